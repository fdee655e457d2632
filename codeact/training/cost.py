"""What training costs: a Trainer callback that counts real tokens, padding, time, memory and FLOPs, step by step.

A Trainer tells its callbacks nothing about batches, so the trainer itself calls ``monitor.count(inputs)`` at the top
of ``training_step``, where a batch is computed. (In the collator would be too early: workers prefetch, and batches
would be counted in steps before their own.) ``codeact.training.trainer.PackTrainer`` does:

    monitor = CostMonitor(model, output_dir)
    train(model, samples, arguments, monitor=monitor)    # writes output_dir/cost.json; monitor.report has it too

Another trainer calls ``monitor.attach(trainer)`` once and ``count`` in its own ``training_step``.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from codeact.base.devices import resolve_peak
from codeact.base.files import atomic_path
from codeact.base.machine import peak_memory, reset_peaks
from codeact.ops.flops import ModelShape, ParameterCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCost:
    """What one batch, or several added up, asks for.

    Attributes:
        tokens: real ones.
        padding: tokens computed and thrown away.
        supervised: tokens that the loss predicts.
        samples: that hold a real token.
        squared_lengths: sum over samples of length², what exact attention costs (``ModelShape.attention_flops``).
    """

    tokens: int = 0
    padding: int = 0
    supervised: int = 0
    samples: int = 0
    squared_lengths: int = 0

    def __add__(self, other: BatchCost) -> BatchCost:
        return BatchCost(**{name: getattr(self, name) + getattr(other, name) for name in COUNTS})


COUNTS = tuple(field.name for field in dataclasses.fields(BatchCost))
"""The names of what is counted."""


def batch_cost(batch: Mapping[str, Any]) -> BatchCost:
    """Count a collated batch, of any pad mode and on any device.

    Args:
        batch: ``input_ids``, (1, T) of a pack or (B, T); one of ``cu_seq_lens_q``, (N + 1,) int32 sample boundaries of
            a pack (what lies after the last is padding), and ``attention_mask``, (B, T), 1 where a token is real; and
            ``labels``, -100 where there is none: of the shape of ``input_ids`` and not yet shifted, so that the first
            of a row never counts, unless ``shift_labels`` is there and is counted instead.

    A batch without one label is all padding: so are the dummy packs that give every rank the same number of packs.

    Raises:
        ValueError: a key is missing.
    """
    labels = batch.get("shift_labels")
    if labels is None:
        labels = _first(batch, "labels")[..., 1:]
    if batch.get("cu_seq_lens_q") is not None:
        lengths = batch["cu_seq_lens_q"].diff()
    else:
        lengths = _first(batch, "attention_mask", "cu_seq_lens_q").sum(dim=-1)
    lengths = lengths.to(torch.int64)  # the squares of a long pack overflow 32 bits
    counts = torch.stack([lengths.sum(), (labels != -100).sum(), (lengths > 0).sum(), lengths.square().sum()])
    tokens, supervised, samples, squared_lengths = counts.tolist()  # one transfer, where the batch is on a GPU
    computed = batch["input_ids"].numel()
    if not supervised:
        return BatchCost(padding=computed)
    return BatchCost(
        tokens=tokens,
        padding=computed - tokens,
        supervised=supervised,
        samples=samples,
        squared_lengths=squared_lengths,
    )


def _first(batch: Mapping[str, Any], name: str, *others: str) -> Any:
    if batch.get(name) is None:
        wanted = " or ".join((name, *others))
        raise ValueError(f"a batch needs {wanted} to be counted; this one has: {', '.join(batch) or 'nothing'}")
    return batch[name]


_RATES = (
    "tokens_per_second", "samples_per_second", "padding_share", "peak_resident_bytes", "peak_cuda_allocated_bytes",
    "peak_cuda_reserved_bytes", "model_utilisation", "hardware_utilisation",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport(BatchCost):
    """The cost of a run, or of some steps of it, over all ranks: the counts of ``BatchCost`` summed up, and more.

    Attributes:
        first_step: number of the first step counted; not 1 in a resumed run.
        devices: how many computed.
        seconds: wall time of the steps, evaluation and saving left out.
        peak_resident_bytes: largest resident set of one process, since ``peak_resident_since``.
        peak_cuda_allocated_bytes, peak_cuda_reserved_bytes: of the device that took most; None on the CPU.
        model_flops: what the real tokens need, forward and backward; None where the architecture does not tell.
        hardware_flops: that and what gradient checkpointing computes again. Work on padding is in neither.
        peak_flops_per_second: of all devices together; None if unknown.
        peak_flops_source: "given", "data sheet", "unknown", or "measured: ...".
        steps: counts, seconds and peaks, each a list with a number a step; peaks, in bytes, are those up to the end of
            the step, and therefore never fall.
    """

    first_step: int
    devices: int
    seconds: float
    peak_resident_bytes: int
    peak_resident_since: str
    peak_cuda_allocated_bytes: int | None
    peak_cuda_reserved_bytes: int | None
    model_flops: int | None
    hardware_flops: int | None
    peak_flops_per_second: float | None
    peak_flops_source: str
    steps: dict[str, Any]

    @property
    def padding_share(self) -> float:
        """Padding / all tokens computed."""
        return self.padding / max(1, self.tokens + self.padding)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens."""
        return self.tokens / self.seconds

    @property
    def samples_per_second(self) -> float:
        """Samples."""
        return self.samples / self.seconds

    @property
    def model_utilisation(self) -> float | None:
        """``model_flops`` per second as a share of the devices' peak (MFU)."""
        return self._utilisation(self.model_flops)

    @property
    def hardware_utilisation(self) -> float | None:
        """``hardware_flops`` per second as a share of the devices' peak."""
        return self._utilisation(self.hardware_flops)

    def _utilisation(self, flops: int | None) -> float | None:
        peak = self.peak_flops_per_second
        return None if flops is None or peak is None else flops / self.seconds / peak

    def rates(self) -> dict[str, float]:
        """What a log shows of some steps; what is not known is left out."""
        return {name: value for name in _RATES if (value := getattr(self, name)) is not None}

    def json(self) -> str:
        """The fields and the rates as JSON, a line each; ``steps`` is the last."""
        fields = dataclasses.asdict(self)
        steps = fields.pop("steps")
        lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in {**fields, **self.rates()}.items())
        return "{\n" + ",\n".join([*lines, f' "steps": {json.dumps(steps)}']) + "\n}\n"

    def lines(self) -> list[tuple[str, str]]:
        """The lines of a summary: name, value with its unit."""
        last = self.first_step + len(self.steps["seconds"]) - 1
        lines = [
            ("steps", f"{self.first_step:,} to {last:,} in {self.seconds:.1f} s, {self.devices} x device"),
            ("samples", f"{self.samples:,}, {self.samples_per_second:,.2f} a second"),
            ("real tokens", f"{self.tokens:,}, {self.tokens_per_second:,.0f} a second"),
            ("supervised tokens", f"{self.supervised:,}"),
            ("padding", f"{self.padding:,} tokens, {self.padding_share:.1%} of all computed"),
            ("peak resident set", f"{_mib(self.peak_resident_bytes)} since the {self.peak_resident_since}"),
        ]
        if self.peak_cuda_allocated_bytes is not None and self.peak_cuda_reserved_bytes is not None:
            allocated, reserved = _mib(self.peak_cuda_allocated_bytes), _mib(self.peak_cuda_reserved_bytes)
            lines.append(("peak CUDA memory", f"{allocated} allocated, {reserved} reserved"))
        if self.model_flops is not None:
            lines.append(("model FLOPs", f"{self.model_flops:.3g}, {self.model_flops / self.seconds:.3g} a second"))
        if self.hardware_flops != self.model_flops:
            lines.append(("with recomputation", f"{self.hardware_flops:.3g}"))
        if self.model_utilisation is not None:
            again = self.hardware_flops != self.model_flops
            more = f" ({self.hardware_utilisation:.1%} with recomputation)" if again else ""
            peak = f"{self.peak_flops_per_second:.3g} FLOP/s ({self.peak_flops_source})"
            lines.append(("model FLOPs utilisation", f"{self.model_utilisation:.1%}{more} of {peak}"))
        return lines


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


class CostMonitor(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Counts batches and writes ``cost.json``; see the module for how to wire it.

    A step's time runs from the end of the step before, so that waiting for data counts, up to its own end; evaluation
    and saving are left out. On CUDA the device is synchronised at the end of every step. Peaks of memory are of the
    training alone, from its begin: CUDA's statistics are reset then, and so is the CPU's peak resident set where Linux
    allows it (``CostReport.peak_resident_since`` says whether). Caches are never emptied.

    Under ``torch.distributed`` counts are summed over the ranks, time and memory are those of the worst rank; every
    rank must have its own monitor, and the first one prints and writes. A resumed run counts its own steps only.

    ``report`` holds the outcome after training, on every rank.
    """

    def __init__(
        self,
        model: Any,
        output_dir: str | Path,
        *,
        peak_flops: float | str | None = "auto",
    ) -> None:
        """Count the parameters of ``model``, which must not be sharded yet (so: before the Trainer is made).

        Args:
            model: the model as it will be trained: adapters on, the rest frozen.
            output_dir: where ``cost.json`` goes.
            peak_flops: FLOP/s of one device, for the utilisation. "auto": of a well-known GPU that trains in 16 bits,
                else none and no utilisation is reported. "measure": of one large matrix multiplication, in the
                training's dtype, at the begin. None: no utilisation.
        """
        self.report: CostReport | None = None
        self._pending = BatchCost()
        self._path = Path(output_dir) / "cost.json"
        self._peak_wanted = peak_flops
        self._shape = ModelShape.from_config(model.config)
        self._parameters = ParameterCounts.of(model)
        self._dtype: torch.dtype = model.dtype

    def attach(self, trainer: Any) -> None:
        """Register with ``trainer`` before its loggers, so that they see the ``cost/...`` keys that this adds."""
        trainer.callback_handler.callbacks.insert(0, self)

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Add one micro-batch to the step being computed; the hook for ``training_step``."""
        self._pending += batch_cost(inputs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start all counts from nothing."""
        self.report = None
        self._device = args.device
        self._pending = BatchCost()
        self._counts: list[list[int]] = []
        self._totals = np.zeros(len(COUNTS), np.int64)
        self._seconds: list[float] = []
        self._memory: list[list[int]] = []
        self._first_step, self._logged = state.global_step + 1, 0
        self._devices = max(1, args.n_gpu) * args.world_size
        self._recomputed = _recomputed_share(args)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else self._dtype
        self._peak, self._peak_source = resolve_peak(self._peak_wanted, args.device, dtype)
        self._resident_since = reset_peaks(args.device)
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the step."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds.append(now - self._mark)
        self._counts.append([getattr(self._pending, name) for name in COUNTS])
        self._totals += self._counts[-1]
        self._memory.append(peak_memory(self._device))
        self._pending, self._mark = BatchCost(), now

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the time of an evaluation out, or of a checkpoint."""
        self._mark = time.perf_counter()

    on_save = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add rates since the last log and totals to a training log; evaluations and the final log have none."""
        if logs is None or "loss" not in logs or self._logged == len(self._counts):
            return
        report = self._report(self._logged)
        totals = self._over_ranks(self._totals.copy(), "SUM")
        self._logged = len(self._counts)
        values = {f"cost/{name}": value for name, value in report.rates().items()}
        values |= {f"cost/total_{name}": int(total) for name, total in zip(COUNTS, totals, strict=True)}
        logs.update(values)
        if state.log_history:  # Trainer has put a copy there already
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write ``cost.json``."""
        if not self._counts or self.report is not None:
            return
        self.report = self._report(0)
        if not self.report.tokens + self.report.padding:
            warnings.warn("no batch was counted: training_step must call CostMonitor.count(inputs)", stacklevel=2)
            return
        if state.is_world_process_zero:
            with atomic_path(self._path) as temporary:
                temporary.write_text(self.report.json(), encoding="utf-8")

    def _report(self, first: int) -> CostReport:
        """Everything from the ``first`` recorded step on, over all ranks (each of which must call this)."""
        counts = self._over_ranks(np.array(self._counts[first:], np.int64), "SUM")
        seconds = self._over_ranks(np.array(self._seconds[first:], np.float64), "MAX")
        memory = self._over_ranks(np.array(self._memory[first:], np.int64), "MAX")
        columns = dict(zip(COUNTS, counts.T.tolist(), strict=True))
        totals = BatchCost(**{name: sum(column) for name, column in columns.items()})
        model_flops = hardware_flops = None
        if self._shape is not None:
            attention = self._shape.attention_flops(totals.squared_lengths)
            model_flops = hardware_flops = self._parameters.flops(totals.tokens, totals.supervised) + attention
            # Of attention's three parts (forward once, backward twice) the first.
            again = self._parameters.recomputed_flops(totals.tokens) + attention // 3
            hardware_flops += int(self._recomputed * again)
        resident, allocated, reserved = memory.T.tolist()
        on_cuda = self._device.type == "cuda"
        return CostReport(
            **dataclasses.asdict(totals),
            first_step=self._first_step + first,
            devices=self._devices,
            seconds=float(seconds.sum()),
            peak_resident_bytes=max(resident),
            peak_resident_since=self._resident_since,
            peak_cuda_allocated_bytes=max(allocated) if on_cuda else None,
            peak_cuda_reserved_bytes=max(reserved) if on_cuda else None,
            model_flops=model_flops,
            hardware_flops=hardware_flops,
            peak_flops_per_second=None if self._peak is None else self._peak * self._devices,
            peak_flops_source=self._peak_source,
            steps={
                **columns,
                "seconds": seconds.tolist(),
                "peak_resident_bytes": resident,
                "peak_cuda_allocated_bytes": allocated if on_cuda else None,
                "peak_cuda_reserved_bytes": reserved if on_cuda else None,
            },
        )

    def _over_ranks(self, values: npt.NDArray[Any], operation: str) -> npt.NDArray[Any]:
        if not (dist.is_available() and dist.is_initialized()):
            return values
        tensor = torch.from_numpy(values).to(self._device)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation))
        return tensor.cpu().numpy()


def _recomputed_share(args: Any) -> float:
    """The share of the layers whose forward pass is computed twice."""
    # transformers is renaming gradient checkpointing to activation checkpointing.
    if not (getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)):
        return 0.0
    options = getattr(args, "activation_checkpointing_kwargs", None) or {}
    return 1 / int(options.get("every_n_layers", 1))
