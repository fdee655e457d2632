"""What training costs: a Trainer callback that counts real tokens, padding, time, memory and FLOPs, step by step.

A Trainer tells its callbacks nothing about batches, so the trainer itself calls ``monitor.count(inputs)`` at the top
of ``training_step``, where a batch is computed. (In the collator would be too early: workers prefetch, and batches
would be counted in steps before their own.) ``codeact.training.trainer.PackTrainer`` does:

    monitor = CostMonitor(model, output_dir)
    train(model, samples, arguments, monitor=monitor)    # prints a summary, writes output_dir/cost.json

Another trainer calls ``monitor.attach(trainer)`` once and ``count`` in its own ``training_step``.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from codeact.base.files import atomic_path
from codeact.base.machine import peak_memory, reset_peaks, resolve_peak
from codeact.ops.flops import ModelShape, ParameterCounts
from codeact.training.cost_records import COUNTS, BatchCost, CostReport, StepCosts, aligned, batch_cost

__all__ = ["BatchCost", "CostMonitor", "CostReport", "batch_cost"]


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
        peak_flops: float | Literal["auto", "measure"] | None = "auto",
        print_summary: bool = True,
    ) -> None:
        """Count the parameters of ``model``, which must not be sharded yet (so: before the Trainer is made).

        Args:
            model: the model as it will be trained: adapters on, the rest frozen.
            output_dir: where ``cost.json`` goes.
            peak_flops: FLOP/s of one device, for the utilisation. "auto": of a well-known GPU that trains in 16 bits,
                else none and no utilisation is reported. "measure": of one large matrix multiplication, in the
                training's dtype, at the begin. None: no utilisation.
            print_summary: whether the first rank prints a table at the end.
        """
        self.report: CostReport | None = None
        self._pending = BatchCost()
        self._path = Path(output_dir) / "cost.json"
        self._print = print_summary
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
        """Leave the time of an evaluation out."""
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the time of a checkpoint out."""
        self._mark = time.perf_counter()

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
        """Print the summary and write ``cost.json``."""
        if not self._counts or self.report is not None:
            return
        self.report = self._report(0)
        if not self.report.tokens + self.report.padding:
            warnings.warn("no batch was counted: training_step must call CostMonitor.count(inputs)", stacklevel=2)
            return
        if state.is_world_process_zero:
            with atomic_path(self._path) as temporary:
                temporary.write_text(self.report.json(), encoding="utf-8")
            if self._print:
                print(aligned(self.report.lines()), flush=True)

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
            steps=StepCosts(
                **columns,
                seconds=seconds.tolist(),
                peak_resident_bytes=resident,
                peak_cuda_allocated_bytes=allocated if on_cuda else None,
                peak_cuda_reserved_bytes=reserved if on_cuda else None,
            ),
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
