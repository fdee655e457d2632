"""What training costs, as records: one batch, one step after another, a whole run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """One number a step, in columns, so that a long run stays a small file.

    The counts are those of ``BatchCost``. ``seconds`` is wall time; the peaks, in bytes, are those up to the end of
    the step, and therefore never fall.
    """

    tokens: list[int]
    padding: list[int]
    supervised: list[int]
    samples: list[int]
    squared_lengths: list[int]
    seconds: list[float]
    peak_resident_bytes: list[int]
    peak_cuda_allocated_bytes: list[int] | None
    peak_cuda_reserved_bytes: list[int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport:
    """The cost of a run, or of some steps of it, over all ranks.

    Attributes:
        tokens, padding, supervised, samples, squared_lengths: as in ``BatchCost``, summed over steps and ranks.
        first_step: number of the first step counted; not 1 in a resumed run.
        devices: how many computed.
        seconds: wall time of the steps, evaluation and saving left out.
        peak_resident_bytes: largest resident set of one process, since ``peak_resident_since``.
        peak_cuda_allocated_bytes, peak_cuda_reserved_bytes: of the device that took most; None on the CPU.
        model_flops: what the real tokens need, forward and backward; None where the architecture does not tell.
        hardware_flops: that and what gradient checkpointing computes again. Work on padding is in neither.
        peak_flops_per_second: of all devices together; None if unknown.
        peak_flops_source: "given", "data sheet", "unknown", or "measured: ...".
    """

    tokens: int
    padding: int
    supervised: int
    samples: int
    squared_lengths: int
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
    steps: StepCosts

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
        if flops is None or self.peak_flops_per_second is None:
            return None
        return flops / self.seconds / self.peak_flops_per_second

    def rates(self) -> dict[str, float]:
        """What a log shows of some steps; what is not known is left out."""
        values = {
            "tokens_per_second": self.tokens_per_second,
            "samples_per_second": self.samples_per_second,
            "padding_share": self.padding_share,
            "peak_resident_bytes": self.peak_resident_bytes,
            "peak_cuda_allocated_bytes": self.peak_cuda_allocated_bytes,
            "peak_cuda_reserved_bytes": self.peak_cuda_reserved_bytes,
            "model_utilisation": self.model_utilisation,
            "hardware_utilisation": self.hardware_utilisation,
        }
        return {name: value for name, value in values.items() if value is not None}

    def json(self) -> str:
        """The fields and the rates as JSON, a line each; ``steps`` is the last."""
        fields = dataclasses.asdict(self)
        steps = fields.pop("steps")
        content = {**fields, **self.rates(), "steps": steps}
        return (
            "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()) + "\n}\n"
        )

    def lines(self) -> list[tuple[str, str]]:
        """The lines of a summary: name, value with its unit."""
        last = self.first_step + len(self.steps.seconds) - 1
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
        if self.model_utilisation is not None and self.hardware_utilisation is not None:
            hardware = f" ({self.hardware_utilisation:.1%} with recomputation)"
            lines.append(
                (
                    "model FLOPs utilisation",
                    f"{self.model_utilisation:.1%}{hardware if self.hardware_flops != self.model_flops else ''} of "
                    f"{self.peak_flops_per_second:.3g} FLOP/s ({self.peak_flops_source})",
                )
            )
        return lines


def aligned(lines: Sequence[tuple[str, str]]) -> str:
    """The text of a summary table."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
