"""What a run is told, as pydantic models, and the YAML file that tells it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from codeact.base.errors import InputError
from codeact.base.protocols import resolve_protocol
from codeact.data.records import Columns, RecordSet, open_records


def _todays_protocol(name: object) -> object:
    return resolve_protocol(name) if name == "seed" else name


Protocol = Annotated[Literal["exact", "paper"], BeforeValidator(_todays_protocol)]


class Settings(BaseModel):
    """Unknown keys are errors, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Settings):
    """Which data, and which columns of it."""

    source: str
    question: str = "instruction"
    answer: str = "output"
    input: str | None = None
    conversation: str | None = None
    id: str | None = None
    split: str = "train"
    config_name: str | None = None

    def open(self) -> RecordSet:
        """Open the data set.

        Raises:
            InputError: it cannot be read, or lacks a column.
        """
        columns = Columns(**self.model_dump(include={field.name for field in dataclasses.fields(Columns)}))
        return open_records(self.source, columns, split=self.split, config_name=self.config_name)


class ScoreSettings(Settings):
    """How rows are scored; see ``codeact.scoring.ifd.IfdScorer``."""

    model: str
    template: str = "qa"
    max_length: int = Field(default=2048, ge=2)
    dtype: str = "auto"
    device: str = "auto"
    tokens_per_pack: int | None = Field(default=None, ge=1)
    shard_size: int = Field(default=10_000, ge=1)
    protocol: Protocol = "exact"


class EmbedSettings(Settings):
    """How questions are embedded; see ``codeact.embedding.vectors.embed``."""

    model: str = "sentence-transformers/all-mpnet-base-v2"
    batch_size: int = Field(default=64, ge=1)
    dtype: str = "auto"
    device: str = "auto"


class SelectSettings(Settings):
    """What is chosen; see ``codeact.selection.choose.plan_selection``."""

    ratio: float = Field(default=0.4, gt=0, le=1)
    clusters: int = Field(default=10, ge=1)
    strategy: Literal["cdas", "top_ifd", "random"] = "cdas"
    protocol: Protocol = "exact"
    seed: int = Field(default=42, ge=0)
    backend: Literal["auto", "sklearn", "cuml"] = "auto"


class GenerateSettings(Settings):
    """Which programs are written; see ``codeact.evaluation.generate``. Needs ``train``, whose model it tries."""

    dataset: Literal["humaneval", "mbpp"] = "humaneval"
    data: Path | None = None  # file of the problems; default: CODEACT_EVAL_DATA, else evalplus
    tasks: tuple[str, ...] | None = None  # default: all
    before: bool = True  # the model as it was, too, to compare with
    instruct: bool = True
    template: str = "chat"
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=1024, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    backend: Literal["hf", "vllm"] = "hf"
    dtype: str = "auto"
    device: str = "auto"


class EvaluateSettings(Settings):
    """How programs are judged; see ``codeact.evaluation.results``. Needs ``generate``."""

    parallel: int | None = Field(default=None, ge=1)
    base_only: bool = False


class ForecastSettings(Settings):
    """What ``--dry-run`` assumes where it cannot look: data or model are elsewhere, or the run is for other devices."""

    rows: int | None = Field(default=None, ge=1)
    question_tokens: float | None = Field(default=None, gt=0)  # of a row, on average
    answer_tokens: float | None = Field(default=None, gt=0)
    parameters: float | None = Field(default=None, gt=0)  # of the model
    devices: int = Field(default=1, ge=1)
    device: str | None = None  # as A100 or H100; default: this machine, calibrated


class RunSettings(Settings):
    """One run: its data, its stages and the folder it writes to."""

    output: Path
    data: DataSettings
    score: ScoreSettings
    embed: EmbedSettings = EmbedSettings()
    select: SelectSettings = SelectSettings()
    train: dict[str, Any] | None = None  # flags of codeact train; data, model and output folder follow from the rest
    generate: GenerateSettings | None = None
    evaluate: EvaluateSettings | None = None
    processes: int = Field(default=1, ge=1)  # that score and train at the same time: one a GPU
    forecast: ForecastSettings = ForecastSettings()

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> RunSettings:
        if self.generate is not None and self.train is None:
            raise ValueError("generate needs a section train, whose model it tries")
        if self.evaluate is not None and self.generate is None:
            raise ValueError("evaluate needs a section generate, whose programs it runs")
        return self


def read_settings(path: str | Path) -> RunSettings:
    """Read a run's YAML file, or one that codeact brings, by its name without ``.yaml``.

    Raises:
        InputError: it cannot be read, or a key is unknown, missing, there twice or of a wrong type; the message names
            the line, and the closest key there is.
    """
    path = _shipped(Path(path))
    try:
        text = path.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings; it needs output, data and score")
    for line, key in _repeated(tree):
        raise InputError(f"{path}, line {line}: the key {key} is there twice; remove one")
    try:
        return RunSettings.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}{'; '.join(_complaint(item, tree) for item in error.errors())}") from None


def shipped_configs() -> list[str]:
    """Names of the runs that codeact brings."""
    folder = files("codeact") / "configs"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if _is_run(entry))


def _is_run(entry: Any) -> bool:
    return entry.name.endswith(".yaml") and "\noutput:" in entry.read_text(encoding="utf-8")


def _shipped(path: Path) -> Path:
    names = shipped_configs()
    if path.exists() or (path.suffix and str(path) not in names):  # a name may hold a dot: 6.7b
        return path
    if str(path) not in names:
        raise InputError(f"no such file: {path}; codeact brings {', '.join(names)}")
    return Path(str(files("codeact") / "configs" / f"{path}.yaml"))


def _complaint(item: Any, tree: Any) -> str:
    keys = [str(part) for part in item["loc"]]
    where = f", line {_line(tree, keys)}: {'.'.join(keys)}" if keys else ""
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg'].removeprefix('Value error, ').lower()}"
    section: type[BaseModel] = RunSettings
    for parent in keys[:-1]:
        section = _model(section.model_fields[parent].annotation)
    closest = difflib.get_close_matches(keys[-1], section.model_fields, n=1, cutoff=0.0)[0]
    return f"{where}: unknown key; did you mean {closest}?"


def _model(annotation: Any) -> type[BaseModel]:
    """The section's model, where its type may also be None."""
    kinds: Sequence[Any] = get_args(annotation) if get_origin(annotation) is not None or get_args(annotation) else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), annotation)


def _line(node: Any, keys: Sequence[str]) -> int:
    """The line of the last of ``keys`` that is there, from 1."""
    line: int = node.start_mark.line + 1
    for key in keys:
        found = [pair for pair in getattr(node, "value", []) if isinstance(pair, tuple) and pair[0].value == key]
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line


def _repeated(node: Any) -> Iterator[tuple[int, str]]:
    """Keys that are in one mapping twice; YAML's reader would keep the last and say nothing."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if str(key.value) in seen:
                yield key.start_mark.line + 1, str(key.value)
            seen.add(str(key.value))
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated(value)
