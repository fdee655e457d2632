"""Generate programs for the problems of HumanEval or MBPP; a killed run goes on where it was.

A run is cut into fixed batches before it begins. After a kill, a batch that was not finished is computed again with all
its rows, since numbers, and with them now and then a token, depend on the shape of the batch: so the file of a run that
was killed is that of one that was not.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.base.machine import free_memory
from codeact.base.parsing import read_json
from codeact.evaluation.problems import ProblemSet
from codeact.evaluation.programs import SampleLog, discard_samples
from codeact.evaluation.prompts import Prompt, PromptWriter
from codeact.evaluation.settings import GenerationSettings
from codeact.text.tokenizers import beyond

if TYPE_CHECKING:
    from codeact.evaluation.decoding import Manner

GENERATORS = ("hf", "vllm")
_MEMORY_SHARE = 0.4  # of what is free: growing the cache needs it twice for a moment
_LARGEST_BATCH = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to generate."""

    task_id: str
    sample: int
    entry_point: str
    prompt: Prompt

    def seed(self, seed: int) -> int:
        """A seed of its own, so that a sample does not depend on which others are generated with it."""
        digest = hashlib.sha256(f"{seed}/{self.task_id}/{self.sample}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """``text`` ends before the stop; ``finish`` is "stop", "end" (of turn or text) or "length"."""

    text: str
    finish: str
    tokens: int


class Generator(Protocol):
    """What writes completions: a backend."""

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer of the model; None: a server's, which is asked by texts."""

    @property
    def identity(self) -> dict[str, str]:
        """What decides the numbers: model, dtype and the like."""

    @property
    def apart(self) -> bool:
        """Whether an answer is asked for by itself: then only those of a batch that are missing are."""

    def batch_size(self, longest: int) -> int:
        """How many sequences of ``longest`` tokens fit."""

    def complete(
        self, requests: Sequence[Request], ends: set[int], settings: GenerationSettings
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield a completion of every request, in any order."""


def largest_batch(row_bytes: float, free: float, device: str) -> int:
    """How many answers to decode together.

    Args:
        row_bytes: of a row when the answer has its full length.
        free: bytes that the device has left.
        device: its kind, "cpu" or "cuda".
    """
    return max(1, min(int(_MEMORY_SHARE * free / row_bytes), _LARGEST_BATCH.get(device, 64)))


class HuggingFaceGenerator:
    """Decodes with transformers, by our own loop: the generation settings that a model brings do not count."""

    apart = False

    def __init__(self, model: Any, tokenizer: Any, identity: Mapping[str, str]) -> None:
        self._model = model
        self.tokenizer = tokenizer
        self.identity = dict(identity)
        self._manner: Manner | None = None

    def batch_size(self, longest: int) -> int:
        """By the memory that is free now: keys and values, and what a layer makes of a prompt on the way to them."""
        config = self._model.config.get_text_config()
        hidden = width = config.hidden_size
        if heads := getattr(config, "num_attention_heads", None):  # else a state, which is smaller than keys would be
            dim = getattr(config, "head_dim", None) or width // heads
            width = (getattr(config, "num_key_value_heads", None) or heads) * dim
        inner = getattr(config, "intermediate_size", None)
        numbers = 2 * config.num_hidden_layers * width + 4 * (inner if isinstance(inner, int) else 4 * hidden)
        if "logits_to_keep" not in inspect.signature(self._model.forward).parameters:  # of every token of a prompt
            numbers += config.vocab_size
        device = self._model.device
        return largest_batch(numbers * self._model.dtype.itemsize * longest, free_memory(device), device.type)

    def complete(
        self, requests: Sequence[Request], ends: set[int], settings: GenerationSettings
    ) -> Iterator[tuple[Request, Completion]]:
        """See ``Generator``."""
        from codeact.evaluation.decoding import Sampling, decode_batches, exact_manner

        longest = max(len(request.prompt.ids) for request in requests) + settings.max_new_tokens
        self._manner = self._manner or exact_manner(self._model, longest)  # the first batch has the longest
        vocabulary = len(self._model.get_input_embeddings().weight)
        for request in requests:
            if reason := beyond(request.prompt.ids, self.tokenizer, vocabulary):
                raise InputError(f"{request.task_id}: its prompt cannot be given to the model: {reason}")
        watches = [StopWatch(self.tokenizer, request.prompt, ends) for request in requests]
        finished = decode_batches(
            self._model,
            [request.prompt.ids for request in requests],
            lambda row, ids: watches[row].ends(ids),
            settings.max_new_tokens,
            Sampling(temperature=settings.temperature, top_p=settings.top_p),
            [request.seed(settings.seed) for request in requests],
            pad_id=min(ends | {vocabulary - 1}),  # any that the model knows
            manner=self._manner,
        )
        for row, ids in finished:
            yield requests[row], watches[row].completion(ids)


class StopWatch:
    """Sees where a completion ends, in its text and in its tokens."""

    def __init__(self, tokenizer: Any, prompt: Prompt, ends: set[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._stops = prompt.stops
        # A token holds a byte at least, so a stop lies in the last so many tokens; a few more for cut characters.
        self._window = max((len(stop.encode()) for stop in prompt.stops), default=0) + 4
        # Some tokenizers drop a space before the first token they decode, so the prompt's last tokens are decoded too.
        self._before = list(prompt.ids[-4:])

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the newest token ends the completion."""
        if ids[-1] in self._ends:
            return True
        tail = self._decode(ids[-self._window :])
        # The tail is decoded without what stands before it, so the whole text has the last word.
        return any(stop in tail for stop in self._stops) and first_stop(self._text(ids), self._stops) is not None

    def completion(self, ids: Sequence[int]) -> Completion:
        """What a finished row says."""
        ended = bool(ids) and ids[-1] in self._ends
        text = self._text(ids[:-1] if ended else ids)
        cut = first_stop(text, self._stops)
        finish = "stop" if cut is not None else "end" if ended else "length"
        return Completion(text=text if cut is None else text[:cut], finish=finish, tokens=len(ids))

    def _text(self, ids: Sequence[int]) -> str:
        before, whole = self._decode(self._before), self._decode([*self._before, *ids])
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stops begins; None: nowhere."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def requests_for(problems: ProblemSet, writer: PromptWriter, samples: int) -> list[Request]:
    """Every sample that a run has to make."""
    return [
        Request(task_id=problem.task_id, sample=sample, entry_point=problem.entry_point, prompt=prompt)
        for problem in problems.problems
        for prompt in [writer.write(problem)]
        for sample in range(samples)
    ]


def plan_batches(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """Cut into batches of prompts of nearly the same length, the longest first: what does not fit shows at once."""
    ordered = sorted(requests, key=lambda request: (-len(request.prompt.ids), request.task_id, request.sample))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def generate(
    problems: ProblemSet,
    generator: Generator,
    output: str | Path,
    settings: GenerationSettings,
    *,
    batch_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Generate the samples that are missing in ``output`` (JSON lines, one fsync'd line a sample).

    A line: ``task_id``, ``sample``, ``solution`` (the whole program for a base model, the answer for an instruct
    model), ``entry_point``, ``finish`` and ``tokens``. The settings lie beside it in ``OUTPUT.settings.json``.

    Args:
        problems: what to solve.
        generator: the backend.
        output: the file.
        settings: how.
        batch_size: sequences decoded together; by default what memory allows.
        overwrite: discard what was generated with other settings.
        progress: called with samples and tokens of each step.

    Returns:
        How many samples were made; 0 if all were there.

    Raises:
        InputError: the file holds samples of other settings.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; it must be at least 1")
    writer = PromptWriter(generator.tokenizer, settings.chat, settings.protocol)
    requests = requests_for(problems, writer, settings.samples)
    longest = max(len(request.prompt.ids) for request in requests) + settings.max_new_tokens
    asked = [(r.task_id, r.prompt.ids or r.prompt.text, r.prompt.stops) for r in requests]
    prompts = hashlib.sha256(json.dumps(asked).encode())
    identity: dict[str, Any] = {
        **generator.identity,
        "prompts": prompts.hexdigest(),
        "dataset": problems.dataset,
        "template": settings.chat,
        **settings.model_dump(include={"max_new_tokens", "temperature", "top_p", "samples", "seed"}),
    }
    size = _claim(Path(output), identity, batch_size, lambda: generator.batch_size(longest), overwrite)
    ends, made = writer.end_ids(), 0
    with SampleLog(output) as log:
        known = {(row.get("task_id"), row.get("sample")) for row in log.rows}
        for batch in plan_batches(requests, size):
            missing = [request for request in batch if (request.task_id, request.sample) not in known]
            if not missing:
                continue
            for request, completion in generator.complete(missing if generator.apart else batch, ends, settings):
                if (request.task_id, request.sample) in known:
                    continue
                log.append(
                    {
                        "task_id": request.task_id,
                        "sample": request.sample,
                        "solution": request.prompt.prefix + completion.text,
                        "entry_point": request.entry_point,
                        "finish": completion.finish,
                        "tokens": completion.tokens,
                    }
                )
                made += 1
                if progress is not None:
                    progress(1, completion.tokens)
    return made


def _claim(
    output: Path, identity: Mapping[str, Any], wanted: int | None, by_memory: Callable[[], int], overwrite: bool
) -> int:
    """Check the settings of what is there already, or note ours; returns the batch size of the run."""
    notes = output.with_name(f"{output.name}.settings.json")
    known: dict[str, Any] = {}
    if output.is_file() and output.stat().st_size and not overwrite:
        try:
            known = read_json(notes)
        except (OSError, ValueError):
            raise InputError(
                f"{output} is there, but not the settings it was made with ({notes.name}); choose another --output, "
                "or --overwrite"
            ) from None
        differ = [key for key in {*identity, *known} - {"batch_size"} if identity.get(key) != known.get(key)]
        if differ:
            raise InputError(
                f"{output} was made with other settings ({', '.join(sorted(differ))}); choose another --output, or "
                "--overwrite"
            )
        if wanted in (None, known["batch_size"]):
            return int(known["batch_size"])
        size = int(wanted or 0)  # from here on; what is there stays
    else:
        size = wanted or by_memory()
        discard_samples(output)
    with atomic_path(notes) as temporary:
        temporary.write_text(json.dumps({**identity, "batch_size": size}, indent=1) + "\n", encoding="utf-8")
    return size
