"""How programs are written and judged, for the commands and a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, model_validator

from codeact.base.settings import Protocol, Settings, setting
from codeact.text.template_files import Template

if TYPE_CHECKING:
    from codeact.evaluation.sandbox.sandbox import Limits


class GenerationSettings(Settings):
    """Which tasks, how they are asked, and how answers are drawn."""

    dataset: Literal["humaneval", "mbpp", "own"] = setting("humaneval", "humaneval, mbpp, or own: those in data.")
    data: Path | None = setting(None, "File of the problems; see docs/evaluate.md.")
    tasks: tuple[str, ...] | None = setting(None, "Ids of the tasks; default: all.", command=False)
    before: bool = setting(True, "Try the model as it was before training, too.", command=False)
    instruct: bool = setting(True, "Ask as in a chat; else the model goes on.")
    template: Template = setting("chat", "Of the chat: chat, the chat format of the training, or a Jinja file.")
    protocol: Protocol = setting("exact", "exact, or paper: the prompts of the paper's scripts, to the byte.")
    temperature: float = setting(0.0, "0: greedy.", ge=0)
    top_p: float = setting(1.0, "Draw from so much of the probability.", gt=0, le=1)
    samples: int = setting(1, "Samples of a task.", "--n", "--samples", ge=1)
    seed: int = setting(0, "Of what is drawn.", ge=0)
    max_new_tokens: int = setting(1024, "Tokens of an answer.", ge=1)
    batch_size: int | None = setting(None, "Answers at a time; default: what memory allows.", place=True, ge=1)
    backend: Literal["hf", "vllm"] = setting("hf", "hf or vllm.")
    server: str | None = setting(None, "Instead: address of an OpenAI-compatible server, http://localhost:8000/v1.")
    parallel: int = setting(8, "Requests to the server at a time.", place=True, ge=1, le=1024)
    served: str | None = setting(None, "Name at the server of the model after training.", command=False)
    dtype: str = setting("auto", "auto (bfloat16 where the hardware has it), float32, bfloat16 or float16.")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.", place=True)

    @model_validator(mode="after")
    def _drawn_where_several(self) -> GenerationSettings:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} greedy samples would all be the same; set a temperature above 0 as well")
        return self

    @model_validator(mode="after")
    def _left_to_the_server(self) -> GenerationSettings:
        for name in ("template", "protocol", "batch_size", "backend", "dtype", "device"):
            if self.server is not None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"--{name.replace('_', '-')} is decided by the server; leave it out")
        return self

    @property
    def chat(self) -> str | None:
        """Template of the chat; None: the model goes on where the prompt ends."""
        return self.template if self.instruct else None


class VerifySettings(Settings):
    """How the answers of rows are run."""

    tests: str = setting("tests", "Column of the tests: asserts, or pairs of input and output.", "--tests-column")
    parallel: int | None = setting(None, "Programs at a time; default: half the cores.", place=True, ge=1)
    min_seconds: float = setting(1.0, "A test may take so long.", gt=0)
    memory_mb: int = setting(4096, "Memory of a program, MiB.", ge=64)

    def limits(self) -> Limits:
        """What a program may use."""
        from codeact.evaluation.sandbox.sandbox import Limits

        return Limits(min_seconds=self.min_seconds, memory_mb=self.memory_mb)


class EvaluateSettings(Settings):
    """How programs are judged."""

    parallel: int | None = setting(None, "Programs at a time; default: half the cores.", place=True, ge=1)
    base_only: bool = setting(False, "Leave out the plus tests.")
    k: Annotated[str, BeforeValidator(str)] = setting("1,10,100", "The k of pass@k that there are samples for.")
    min_seconds: float = setting(1.0, "A test may take so long, ...", gt=0)
    time_factor: float = setting(4.0, "... or so many times what the reference takes, if that is longer.", gt=0)
    memory_mb: int = setting(4096, "Memory of a program, MiB.", ge=64)
    report_to: str | None = setting(None, "Trackers of the figures: tensorboard, wandb, mlflow, ...", place=True)

    @model_validator(mode="after")
    def _whole_numbers(self) -> EvaluateSettings:
        if not all(part.isdecimal() and 0 < int(part) < 1 << 31 for part in self.k.split(",")):
            raise ValueError(f"--k {self.k} is no list of whole numbers such as 1,5,10")
        return self

    @property
    def ks(self) -> tuple[int, ...]:
        """Every k, ascending."""
        return tuple(sorted({int(part) for part in self.k.split(",")}))

    def limits(self) -> Limits:
        """What a program may use."""
        from codeact.evaluation.sandbox.sandbox import Limits

        return Limits(min_seconds=self.min_seconds, factor=self.time_factor, memory_mb=self.memory_mb)
