"""Costs of the steps of a run, on the machine that the settings name or on this one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from codeact.base.devices import GPUS, Gpu, default_tokens_per_pack, find_gpu, resolve_device
from codeact.base.errors import one_of
from codeact.base.machine import GIB, total_memory
from codeact.base.stage import Stage
from codeact.evaluation.generate import largest_batch
from codeact.evaluation.results import default_parallel
from codeact.forecast.cost import CUDA_CONTEXT, Memory, ModelFacts, decoding_seconds, inference_memory
from codeact.forecast.data import DataFacts, data_facts
from codeact.forecast.models import embedder_facts, model_facts
from codeact.forecast.training import TrainingShape, training_memory, training_shape
from codeact.padding.strategies import StrategyStats, strategy_stats
from codeact.run.settings import RunSettings

GPU_UTILISATION = 0.4
"""Assumed share of a GPU's peak FLOP/s."""
BANDWIDTH_UTILISATION = 0.6
"""Assumed share of a GPU's memory bandwidth, while generating."""
GPU_START_SECONDS = 30.0
"""Assumed for a GPU process, before it computes."""
LOAD_BYTES_PER_SECOND = 1e9
PROGRAM_SECONDS = 1.5
"""Assumed for a program under its tests, in its sandbox."""
SELECT_SECONDS = 0.1
SELECT_SECONDS_PER_ROW = 5e-5
REPORT_SECONDS = 5.0
TOKENIZER_BYTES = 4e6
PROMPT_TOKENS = 200  # of a task of HumanEval or MBPP, about
TO_DO = ("to do", "goes on")
"""States of steps that cost something."""
TASKS = {"humaneval": 164, "mbpp": 378}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepForecast:
    """One step. ``state``: to do, done already, goes on, left as it is; costs are None where there is nothing to do.

    ``tokens`` are those that go through a model, ``error`` the standard error of their number. ``memory`` is the peak
    of a device (or of the machine, on a CPU), ``disk`` what is written, both in bytes.
    """

    name: str
    state: str
    rows: int | None = None
    tokens: float | None = None
    error: float = 0.0
    seconds: float | None = None
    memory: Memory | None = None
    disk: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What computes. ``flops``: FLOP/s that a device reaches, by stage; ``base``: bytes of a process without a model.

    ``decoding``: seconds of a decoding step and the answers it was measured with; None: from ``gpu``'s bandwidth.
    """

    gpu: Gpu | None
    devices: int
    memory: float
    base: float
    flops: dict[str, float]
    start_seconds: float
    decoding: tuple[float, int] | None
    lines: list[str]


def machine_of(
    settings: RunSettings,
    model: ModelFacts,
    embedder: ModelFacts,
    training: TrainingShape | None,
    flags: Any,
    data: DataFacts,
    to_do: set[str],
) -> Machine:
    """The GPU that the settings name, or this machine, calibrated."""
    wanted = settings.forecast
    if wanted.device is not None:
        gpu = find_gpu(wanted.device)
        if gpu is None:
            one_of("forecast.device", wanted.device, [known.name for known in GPUS])
            raise AssertionError
        rate = GPU_UTILISATION * gpu.flops
        return Machine(
            gpu=gpu,
            devices=wanted.devices,
            memory=gpu.memory,
            base=CUDA_CONTEXT,
            flops=dict.fromkeys(("score", "embed", "train"), rate),
            start_seconds=GPU_START_SECONDS + model.parameters * 2 / LOAD_BYTES_PER_SECOND,
            decoding=None,
            lines=[
                f"time: {wanted.devices} x {wanted.device}, by its data sheet {gpu.flops / 1e12:,.0f} TFLOP/s and "
                f"{gpu.memory / 1e9:.0f} GB; not measured"
            ],
        )
    from codeact.forecast.calibration import calibrate

    found = calibrate(settings, model, embedder, training, flags, data.records, to_do)
    return Machine(
        gpu=None,
        devices=1,
        memory=float(total_memory(resolve_device())),
        base=found.base,
        flops=found.flops,
        start_seconds=found.load_seconds or model.parameters * 2 / LOAD_BYTES_PER_SECOND,
        decoding=None if found.decoding is None else (found.decoding, found.decoded_rows),
        lines=[f"time: this machine; {line}" if n == 0 else f"      {line}" for n, line in enumerate(found.lines)],
    )


class RunPlan:
    """Costs of steps; the methods are named as the stages."""

    def __init__(self, settings: RunSettings, flags: Any, states: dict[str, str], to_do: set[str]) -> None:
        """Look at data, models and machine; ``states``: of the steps by name, ``to_do``: stages."""
        self.settings, self.flags = settings, flags
        self.training = None if flags is None else training_shape(flags, settings)
        self.model = model_facts(settings.score.model, settings.forecast.parameters)
        self.embedder, length, tokenizer = embedder_facts(settings.embed.model)
        done = states.get("select") in ("done already", "left as it is")
        self.chosen = settings.output / "selected.jsonl" if done else None
        self.data = data_facts(settings, flags, tokenizer, length, self.chosen)
        self.machine = machine_of(settings, self.model, self.embedder, self.training, flags, self.data, to_do)
        self.sources = [
            f"data: {self.data.source}",
            f"model: {self.model.source}, {self.model.parameters / 1e9:.3g}e9 parameters",
            f"embedder: {self.embedder.source}",
            *self.machine.lines,
        ]

    def steps(self, planned: list[tuple[Stage, str]]) -> list[StepForecast]:
        """Costs of these stages in their states, in order; of a stage that is not known here, none."""
        costs = {
            "score": self.score,
            "embed": self.embed,
            "select": self.select,
            "train": self.train,
            "generate.before": self.generate,
            "generate.after": self.generate,
            "evaluate.before": self.evaluate,
            "evaluate.after": self.evaluate,
            "report": self.report,
        }
        found = []
        kept = 0.0
        for stage, state in planned:
            step = StepForecast(name=stage.name, state=state)
            if state in TO_DO and stage.name in costs:
                step = costs[stage.name](stage.name, state)
            if self._on_cpu and self.settings.processes == 1 and step.memory is not None:
                # What a process took of the machine's memory it seldom gives back.
                missing = max(0.0, kept - step.memory.total)
                parts = {**step.memory.parts, **({"left by steps before": missing} if missing else {})}
                step = dataclasses.replace(step, memory=Memory(parts=parts))
                kept = max(kept, step.memory.total if step.memory else 0.0)
            found.append(step)
        return found

    @property
    def _parallel(self) -> int:
        """Devices that score and train at the same time; the processes of one machine without GPUs share it."""
        return min(self.settings.processes, self.machine.devices)

    def _shared(self, memory: Memory) -> Memory:
        """On a CPU all processes take of the same memory."""
        if self.machine.gpu is not None or self.settings.processes == 1:
            return memory
        return Memory(parts={name: size * self.settings.processes for name, size in memory.parts.items()})

    def score(self, name: str, state: str) -> StepForecast:
        data, settings = self.data, self.settings
        tokens = data.conditional.total + data.unconditional.total
        squares = data.conditional.squares + data.unconditional.squares
        flops = self.model.forward_flops(tokens, squares, data.scored.total)
        kind = "cpu" if self._on_cpu else "cuda"
        pack = settings.score.tokens_per_pack or default_tokens_per_pack(kind, self.model.parameters)
        longest = max([pack, *data.conditional.values.tolist()])
        return StepForecast(
            name=name,
            state=state,
            rows=data.rows,
            tokens=tokens,
            error=math.hypot(data.conditional.error, data.unconditional.error),
            seconds=self.machine.start_seconds + flops / (self.machine.flops["score"] * self._parallel),
            memory=self._shared(
                inference_memory(self.model, self._bytes(settings.score.dtype), longest, self.machine.base)
            ),
            disk=20e3 + 100.0 * data.rows,
        )

    def embed(self, name: str, state: str) -> StepForecast:
        questions = self.data.questions
        squares = 2 * questions.squares  # every token sees all others
        flops = self.embedder.forward_flops(questions.total, squares, 0)
        batch = self.settings.embed.batch_size * int(questions.values.max(initial=1))
        return StepForecast(
            name=name,
            state=state,
            rows=round(questions.rows),
            tokens=questions.total,
            error=questions.error,
            seconds=self._start(self.embedder) + flops / self.machine.flops["embed"],
            memory=inference_memory(self.embedder, self._bytes(self.settings.embed.dtype), batch, self.machine.base),
            disk=questions.rows * (4.0 * self.embedder.shape.hidden + 20),
        )

    def select(self, name: str, state: str) -> StepForecast:
        rows, ratio = self.data.rows, self.settings.select.ratio
        vectors = 4.0 * rows * self.embedder.shape.hidden
        return StepForecast(
            name=name,
            state=state,
            rows=rows,
            seconds=SELECT_SECONDS + rows * SELECT_SECONDS_PER_ROW,
            memory=Memory(parts={"the process": self.machine.base, "vectors": 2 * vectors}),
            disk=rows * (ratio * (self.data.row_bytes + 150) + 40),
        )

    def train(self, name: str, state: str) -> StepForecast:
        shape, model, settings = self.training, self.model, self.settings
        assert shape is not None
        data = self.data.conversations
        epoch = self._epoch()
        if epoch is None:
            return StepForecast(name=name, state=state, rows=0)
        scale = data.rows * (1 - shape.eval_ratio) / epoch.samples
        computed = (epoch.tokens + epoch.padding) * scale
        packs = shape.pad_mode == "dynamic_pack"
        head = epoch.supervised * scale if packs and shape.supervised_only else computed
        forwards = epoch.forwards * scale
        if packs and shape.pack_scope == "epoch":
            forwards /= shape.micro_batch
        steps = max(1.0, forwards / (shape.accumulation * settings.processes)) * shape.epochs
        times = shape.epochs
        if shape.max_steps > 0:
            times *= shape.max_steps / steps
            steps = shape.max_steps
        flops = shape.flops(model, computed, head, epoch.squared_lengths * scale) * times
        held_out = data.total * shape.eval_ratio * shape.evaluations
        evaluated = model.forward_flops(held_out, 0, held_out)
        largest = epoch.largest_forward * (shape.micro_batch if packs and shape.pack_scope == "epoch" else 1)
        memory = training_memory(model, shape, settings.processes, largest, self.machine.base)
        trained = shape.trained(model)
        saved = 4.0 * trained if shape.lora_rank is not None else (2.0 if "zero" in shape.sharding else 4.0) * trained
        checkpoints = 0.0
        if shape.checkpoint_every:
            checkpoints = min(steps // shape.checkpoint_every, shape.checkpoints_kept or math.inf)
        return StepForecast(
            name=name,
            state=state,
            rows=round(data.rows),
            tokens=computed * times + held_out,
            error=data.error * times,
            seconds=self.machine.start_seconds + (flops + evaluated) / (self.machine.flops["train"] * self._parallel),
            memory=self._shared(memory),
            disk=saved + TOKENIZER_BYTES + checkpoints * (saved + 12.0 * trained),
        )

    def _epoch(self) -> StrategyStats | None:
        """The strategy's figures on the sampled conversations, which stand for all."""
        shape, data = self.training, self.data
        assert shape is not None
        if not len(data.conversations.values):
            return None
        lengths, supervised = data.conversations.values, data.supervised.values
        # As many as there are, up to so many that a pack is filled as it will be.
        wanted = max(1, min(round(data.conversations.rows * (1 - shape.eval_ratio)), len(lengths)))
        return strategy_stats(
            shape.strategy, lengths[:wanted], supervised[:wanted], shape.capacity, shape.micro_batch, None, 0
        )

    def generate(self, name: str, state: str) -> StepForecast:
        wanted = self.settings.generate
        assert wanted is not None
        count = self._programs()
        weight = self._bytes(wanted.dtype)
        length = PROMPT_TOKENS + wanted.max_new_tokens
        a_row = 2 * self.model.shape.layers * self.model.shape.key_width * length * weight
        room = max(0.0, self.machine.memory - self.machine.base - self.model.parameters * weight)
        batch = wanted.batch_size or largest_batch(a_row, room, "cpu" if self._on_cpu else "cuda")
        batches, batch = math.ceil(count / batch), min(batch, count)
        if self.machine.decoding is not None:
            seconds, measured = self.machine.decoding
            decoding = batches * wanted.max_new_tokens * seconds * max(1.0, batch / measured)
        else:
            bandwidth = self.machine.gpu.bandwidth if self.machine.gpu else self.machine.flops["score"] / 10
            decoding = batches * decoding_seconds(
                self.model,
                weight,
                wanted.max_new_tokens,
                batch,
                PROMPT_TOKENS + wanted.max_new_tokens / 2,
                self.machine.flops["score"],
                BANDWIDTH_UTILISATION * bandwidth,
            )
        reading = self.model.forward_flops(count * PROMPT_TOKENS, count * PROMPT_TOKENS**2, count)
        memory = inference_memory(self.model, weight, batch * PROMPT_TOKENS, self.machine.base, batch * length)
        return StepForecast(
            name=name,
            state=state,
            rows=count,
            tokens=float(count * wanted.max_new_tokens),
            seconds=self.machine.start_seconds + decoding + reading / self.machine.flops["score"],
            memory=memory,
            disk=4.0 * count * wanted.max_new_tokens,
        )

    def evaluate(self, name: str, state: str) -> StepForecast:
        judged = self.settings.evaluate
        assert judged is not None
        parallel = judged.parallel or default_parallel()
        count = self._programs()
        return StepForecast(
            name=name, state=state, rows=count, seconds=count * PROGRAM_SECONDS / parallel, disk=1500.0 * count
        )

    def report(self, name: str, state: str) -> StepForecast:
        return StepForecast(name=name, state=state, seconds=REPORT_SECONDS, disk=1e6)

    def _programs(self) -> int:
        wanted = self.settings.generate
        assert wanted is not None
        if wanted.tasks is not None:
            return len(wanted.tasks) * wanted.samples
        return TASKS[wanted.dataset] * wanted.samples

    @property
    def _on_cpu(self) -> bool:
        if self.machine.gpu is not None:
            return False
        import torch

        return not torch.cuda.is_available()

    def _bytes(self, dtype: str) -> float:
        if dtype != "auto":
            return 4.0 if dtype == "float32" else 2.0
        if not self._on_cpu:
            return 2.0
        from codeact.base.devices import cpu_has_bf16

        return 2.0 if cpu_has_bf16() else 4.0

    def _start(self, model: ModelFacts) -> float:
        """Seconds until this model computes, from those of the causal one."""
        if self.machine.gpu is not None:
            return GPU_START_SECONDS
        return self.machine.start_seconds * model.parameters / self.model.parameters + 1.0

    # ------------------------------------------------------------------------------------------- what stands below it

    def assumptions(self, stages: set[str]) -> list[str]:
        """What no source says of these stages."""
        lines = []
        if self.machine.gpu is not None:
            lines.append(
                f"{GPU_UTILISATION:.0%} of peak FLOP/s, {BANDWIDTH_UTILISATION:.0%} of memory bandwidth, "
                f"{GPU_START_SECONDS:.0f} s to start, {LOAD_BYTES_PER_SECOND / 1e9:.0f} GB/s to load"
            )
        if "train" in stages and self.chosen is None:
            lines.append("chosen rows are as long as all rows; cdas tends to take longer ones (1.4 times in the demo)")
        if "generate" in stages:
            assert self.settings.generate is not None
            lines.append(f"generation: {self.settings.generate.max_new_tokens:,} tokens an answer, which is the most")
        if "evaluate" in stages:
            lines.append(f"evaluation: {PROGRAM_SECONDS:g} s a program; one that hangs takes longer")
        if stages - {"evaluate", "report"}:
            lines.append("memory is arithmetic on widths; fragmentation and what libraries hoard come on top")
        return lines

    def warnings(self, steps: list[StepForecast]) -> Iterator[str]:
        """What will not work, or wastes."""
        processes, devices = self.settings.processes, self.machine.devices
        if self.machine.gpu is not None and processes < devices:
            idle = devices - processes
            yield f"processes is {processes}, so {idle} of {devices} devices stand idle; set processes: {devices}"
        if self.machine.gpu is not None and processes > devices:
            yield f"processes is {processes} on {devices} devices; set processes: {devices}"
        for step in steps:
            if step.memory is None or step.memory.total <= self.machine.memory:
                continue
            need, have = step.memory.total / GIB, self.machine.memory / GIB
            yield (
                f"{step.name} needs about {need:,.0f} GiB of {have:,.0f}, most for {step.memory.largest()}; "
                f"{_remedy(step, self.training)}"
            )


def _remedy(step: StepForecast, training: TrainingShape | None) -> str:
    assert step.memory is not None
    largest = step.memory.largest()
    if step.name != "train" or training is None:
        settings = {"score": "score.tokens_per_pack or processes", "embed": "embed.batch_size"}
        return f"lower {settings.get(step.name, 'generate.batch_size')}, or take a smaller model"
    if largest == "activations":
        if not training.checkpointing:
            return "set activation_checkpointing: true, or lower per_device_train_batch_size"
        return "lower per_device_train_batch_size and raise gradient_accumulation_steps"
    if largest == "logits":
        return "set fused_loss: true"
    if training.lora_rank is None and training.sharding not in ("zero3", "fsdp"):
        return "set deepspeed: zero3 (in several processes), or lora: true"
    return "set lora: true, quantize: nf4, or use more devices"
