"""Costs of the steps of a run, on the machine that the settings name or on this one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from codeact.base.devices import GPUS, default_tokens_per_pack, find_gpu, resolve_device, resolve_dtype
from codeact.base.errors import one_of
from codeact.base.machine import GIB
from codeact.evaluation.generate import largest_batch
from codeact.evaluation.results import default_parallel
from codeact.evaluation.stage import problems_of
from codeact.forecast.calibration import LOAD_BYTES_PER_SECOND, Machine, calibrate
from codeact.forecast.data import data_facts
from codeact.forecast.models import embedder_facts, model_facts
from codeact.ops.flops import Memory, ModelFacts, decoding_seconds, inference_memory
from codeact.padding.strategies import StrategyStats, strategy_of, strategy_stats
from codeact.run.settings import ForecastSettings, RunSettings
from codeact.training.room import PlannedTraining, checkpoints

CUDA_CONTEXT = 1.5 * GIB
"""What a process takes on a GPU before its first tensor, with the workspaces of its libraries."""
GPU_UTILISATION = 0.4
"""Assumed share of a GPU's peak FLOP/s."""
BANDWIDTH_UTILISATION = 0.6
"""Assumed share of a GPU's memory bandwidth, while generating."""
GPU_START_SECONDS = 30.0
"""Assumed for a GPU process, before it computes."""
PROGRAM_SECONDS = 1.5
"""Assumed for a program under its tests, in its sandbox."""
CLEAN_SECONDS_PER_BYTE = 2.5e-7
"""Of the rows' text."""
SELECT_SECONDS = 0.1
SELECT_SECONDS_PER_ROW = 5e-5
REPORT_SECONDS = 5.0
TOKENIZER_BYTES = 4e6
PROMPT_TOKENS = 200  # of a task of HumanEval or MBPP, about
TO_DO = ("to do", "goes on")
"""States of steps that cost something."""
TASKS = {"humaneval": 164, "mbpp": 378}


@dataclass(slots=True, kw_only=True)
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


def _assumed_machine(forecast: ForecastSettings, name: str, model: ModelFacts) -> Machine:
    """The GPUs that the settings name."""
    gpu = find_gpu(name)
    if gpu is None:
        one_of("forecast.device", name, [known.name for known in GPUS])
        raise AssertionError
    return Machine(
        gpu=gpu,
        devices=forecast.devices,
        memory=gpu.memory,
        base=CUDA_CONTEXT,
        flops=dict.fromkeys(("score", "embed", "train"), GPU_UTILISATION * gpu.flops),
        start_seconds=GPU_START_SECONDS + model.parameters * 2 / LOAD_BYTES_PER_SECOND,
        lines=[
            f"{forecast.devices} x {name}, by its data sheet {gpu.flops / 1e12:,.0f} TFLOP/s and "
            f"{gpu.memory / 1e9:.0f} GB; not measured"
        ],
    )


class RunPlan:
    """Costs of steps; the methods are named as the stages and return fields of a ``StepForecast``."""

    def __init__(self, settings: RunSettings, flags: Any, states: dict[str, str], to_do: set[str]) -> None:
        """Look at data, models and machine; ``states``: of the steps by name, ``to_do``: sections."""
        self.settings = settings
        self.training = None if flags is None else PlannedTraining(flags, settings.processes)
        self.model = model_facts(settings.score.model, settings.forecast.parameters)
        checker = settings.score.check_with
        self.checker = None if checker is None else model_facts(checker, None)
        self.embedder, length, tokenizer = embedder_facts(settings.embed.model)
        done = states.get("select") in ("done already", "left as it is")
        self.chosen = settings.output / "selected.jsonl" if done else None
        self.data = data_facts(settings, flags, tokenizer, length, self.chosen)
        if device := settings.forecast.device:
            self.machine, where = _assumed_machine(settings.forecast, device, self.model), "time: "
        else:
            records, where = self.data.records, "time: this machine; "
            self.machine = calibrate(settings, self.model, self.embedder, self.training, records, to_do)
        self.sources = [
            f"data: {self.data.source}",
            f"model: {self.model.source}, {self.model.parameters / 1e9:.3g}e9 parameters",
            *(
                [f"check of the scores: {self.checker.source}, {settings.score.check_rows:,} rows"]
                if self.checker
                else []
            ),
            f"embedder: {self.embedder.source}",
            *(f"{'      ' if n else where}{line}" for n, line in enumerate(self.machine.lines)),
        ]
        stages = (
            self.score,
            self.embed,
            self.clean,
            self.select,
            self.train,
            self.generate,
            self.evaluate,
            self.report,
        )
        self._costs = {stage.__name__: stage for stage in stages}
        self.on_cpu = self.machine.gpu is None and resolve_device().type == "cpu"

    def fill_in(self, steps: list[StepForecast]) -> None:
        """Add the costs of these steps, which are in order; of a stage that is not known here, none."""
        kept = 0.0
        for step in steps:
            cost = self._costs.get(step.name.partition(".")[0]) if step.state in TO_DO else None
            for name, value in cost().items() if cost else ():
                setattr(step, name, value)
            if self.on_cpu and self.settings.processes == 1 and step.memory is not None:
                # What a process took of the machine's memory it seldom gives back.
                if (missing := kept - step.memory.total) > 0:
                    step.memory.parts["left by steps before"] = missing
                kept = step.memory.total

    def score(self) -> dict[str, Any]:
        """A loss for every token of an answer, with its question and alone."""
        data, settings, machine = self.data, self.settings.score, self.machine
        tokens = data.conditional.total + data.unconditional.total
        squares = data.conditional.squares + data.unconditional.squares
        flops = self.model.forward_flops(tokens, squares, data.scored.total)
        pack = settings.tokens_per_pack or default_tokens_per_pack(self._kind, self.model.parameters)
        longest = max([pack, *data.conditional.values.tolist()])
        if self.checker is not None:
            part = min(1.0, settings.check_rows / max(1, data.rows))
            flops += self.checker.forward_flops(tokens * part, squares * part, data.scored.total * part)
            tokens *= 1 + part
        largest = max(filter(None, (self.model, self.checker)), key=lambda model: model.parameters)
        return {
            "rows": data.rows,
            "tokens": tokens,
            "error": math.hypot(data.conditional.error, data.unconditional.error),
            "seconds": machine.start_seconds + flops / (machine.flops["score"] * self._parallel),
            "memory": self._shared(inference_memory(largest, self._bytes(settings.dtype), longest, machine.base)),
            "disk": 20e3 + 100.0 * data.rows,
        }

    def embed(self) -> dict[str, Any]:
        """A vector for every question."""
        questions, settings, machine, model = self.data.questions, self.settings.embed, self.machine, self.embedder
        flops = model.forward_flops(questions.total, 2 * questions.squares, 0)  # every token sees all others
        batch = settings.batch_size * int(questions.values.max(initial=1))
        # From the seconds until the causal model computes.
        start = machine.start_seconds * model.parameters / self.model.parameters + 1.0
        return {
            "rows": round(questions.rows),
            "tokens": questions.total,
            "error": questions.error,
            "seconds": (GPU_START_SECONDS if machine.gpu else start) + flops / machine.flops["embed"] / self._parallel,
            "memory": self._shared(inference_memory(model, self._bytes(settings.dtype), batch, machine.base)),
            "disk": questions.rows * (8.0 * model.shape.hidden + 40),  # shards, and the file they become
        }

    def clean(self) -> dict[str, Any]:
        """Every row by itself, and those that look alike."""
        rows, machine = self.data.rows, self.machine
        return {
            "rows": rows,
            "seconds": rows * self.data.row_bytes * CLEAN_SECONDS_PER_BYTE,
            "memory": Memory({"the process": machine.base, "marks": 200.0 * rows}),
            "disk": 40.0 * rows,
        }

    def select(self) -> dict[str, Any]:
        """Clusters, and the rows that are chosen."""
        rows = self.data.rows
        lengths, vectors = self.data.conditional, 4.0 * rows * self.embedder.shape.hidden
        chosen = self.settings.select.rows_of(rows, lengths.total / max(1.0, lengths.rows))
        return {
            "rows": rows,
            "seconds": SELECT_SECONDS + rows * SELECT_SECONDS_PER_ROW,
            "memory": Memory({"the process": self.machine.base, "vectors": 2 * vectors}),
            "disk": chosen * (self.data.row_bytes + 150) + 60 * rows,
        }

    def train(self) -> dict[str, Any]:
        """Epochs over the chosen rows, and passes over those held out."""
        training, model, data, machine = self.training, self.model, self.data.conversations, self.machine
        assert training is not None
        epoch, flags = self._epoch(training), training.flags
        if epoch is None:
            return {"rows": 0}
        scale = data.rows * (1 - flags.eval_ratio) / epoch.samples
        computed = (epoch.tokens + epoch.padding) * scale
        head = epoch.supervised * scale if training.packs and flags.supervised_only else computed
        passes = epoch.forwards * scale / training.packs_a_pass
        times = float(flags.num_train_epochs)
        steps = max(1.0, passes / (flags.gradient_accumulation_steps * training.processes)) * times
        if flags.max_steps > 0:
            times, steps = times * flags.max_steps / steps, float(flags.max_steps)
        flops = training.flops(model, computed, head, epoch.squared_lengths * scale) * times
        held_out = data.total * flags.eval_ratio * training.evaluations
        flops += model.forward_flops(held_out, 0, held_out)
        trained = training.trained(model)
        kept, bytes_of_one = checkpoints(flags, trained, round(steps))
        saved = trained * (2.0 if training.sharding.startswith("zero") and not flags.lora else 4.0)
        return {
            "rows": round(data.rows),
            "tokens": computed * times + held_out,
            "error": data.error * times,
            "seconds": machine.start_seconds + flops / (machine.flops["train"] * self._parallel),
            "memory": self._shared(training.memory(model, epoch.largest_forward * training.packs_a_pass, machine.base)),
            "disk": saved + TOKENIZER_BYTES + kept * bytes_of_one,
        }

    def _epoch(self, training: PlannedTraining) -> StrategyStats | None:
        """The strategy's figures on the sampled conversations, which stand for all."""
        data, flags = self.data, training.flags
        lengths, supervised = data.conversations.values, data.supervised.values
        if not len(lengths):
            return None
        # As many as there are, up to so many that a pack is filled as it will be.
        count = max(1, min(round(data.conversations.rows * (1 - flags.eval_ratio)), len(lengths)))
        batch = flags.per_device_train_batch_size
        return strategy_stats(
            strategy_of(flags.pad_mode, flags.pack_scope),
            lengths[:count],
            supervised[:count],
            flags.max_length,
            batch,
            None,
            0,
        )

    def generate(self) -> dict[str, Any]:
        """Programs for every task."""
        settings, machine, model = self.settings.generate, self.machine, self.model
        assert settings is not None
        count, new, weight = self._programs(), settings.max_new_tokens, self._bytes(settings.dtype)
        if settings.server is not None:
            return {"rows": count, "tokens": float(count * new), "seconds": 0.0, "disk": 4.0 * count * new}
        length, rate = PROMPT_TOKENS + new, machine.flops["score"]
        room = max(0.0, machine.memory - machine.base - model.parameters * weight)
        batch = settings.batch_size or largest_batch(model.shape.cache_bytes(length, weight), room, self._kind)
        batches, batch = math.ceil(count / batch), min(batch, count)
        if machine.decoding is not None:
            step, measured = machine.decoding
            decoding = new * step * max(1.0, batch / measured)
        else:
            bandwidth = BANDWIDTH_UTILISATION * (machine.gpu.bandwidth if machine.gpu else rate / 10)
            decoding = decoding_seconds(model, weight, new, batch, PROMPT_TOKENS + new / 2, rate, bandwidth)
        reading = model.forward_flops(count * PROMPT_TOKENS, count * PROMPT_TOKENS**2, count)
        return {
            "rows": count,
            "tokens": float(count * new),
            "seconds": machine.start_seconds + batches * decoding + reading / rate,
            "memory": inference_memory(model, weight, batch * PROMPT_TOKENS, machine.base, batch * length),
            "disk": 4.0 * count * new,
        }

    def evaluate(self) -> dict[str, Any]:
        """Every program under its tests."""
        settings, count = self.settings.evaluate, self._programs()
        assert settings is not None
        seconds = count * PROGRAM_SECONDS / (settings.parallel or default_parallel())
        return {"rows": count, "seconds": seconds, "disk": 1500.0 * count}

    def report(self) -> dict[str, Any]:
        """A page."""
        return {"seconds": REPORT_SECONDS, "disk": 1e6}

    def _programs(self) -> int:
        settings = self.settings.generate
        assert settings is not None
        if settings.tasks is not None:
            return len(settings.tasks) * settings.samples
        count = TASKS.get(settings.dataset) or len(problems_of(settings).problems)
        return count * settings.samples

    @property
    def _kind(self) -> str:
        return "cpu" if self.on_cpu else "cuda"

    @property
    def _parallel(self) -> int:
        """Devices that score and train at the same time; the processes of one machine without GPUs share it."""
        return min(self.settings.processes, self.machine.devices)

    def _shared(self, memory: Memory) -> Memory:
        """On a CPU all processes take of the same memory."""
        times = 1 if self.machine.gpu else self.settings.processes
        return Memory({name: size * times for name, size in memory.parts.items()})

    def _bytes(self, dtype: str) -> float:
        """Of a weight."""
        if self.machine.gpu is not None:
            return 4.0 if dtype == "float32" else 2.0
        return float(resolve_dtype(dtype, resolve_device()).itemsize)

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
        if "generate" in stages and self.settings.generate is not None:
            lines.append(f"generation: {self.settings.generate.max_new_tokens:,} tokens an answer, which is the most")
            if self.settings.generate.server is not None:
                lines.append("generation by a server: its time is not counted")
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
            if step.memory is not None and step.memory.total > self.machine.memory:
                need, have, largest = step.memory.total / GIB, self.machine.memory / GIB, step.memory.largest()
                remedy = self._remedy(step.name, largest)
                yield f"{step.name} needs about {need:,.0f} GiB of {have:,.0f}, most for {largest}; {remedy}"

    def _remedy(self, name: str, largest: str) -> str:
        training = self.training
        if name != "train" or training is None:
            settings = {"score": "score.tokens_per_pack or processes", "embed": "embed.batch_size"}
            return f"lower {settings.get(name, 'generate.batch_size')}, or take a smaller model"
        if largest == "activations":
            if not training.checkpointing:
                return "set activation_checkpointing: true, or lower per_device_train_batch_size"
            return "lower per_device_train_batch_size and raise gradient_accumulation_steps"
        if largest == "logits":
            return "set fused_loss: true"
        if not training.flags.lora and not training.whole:
            return "set deepspeed: zero3 (in several processes), or lora: true"
        return "set lora: true, quantize: nf4, or use more devices"
