"""Stage padding: what every way of batching the chosen rows would cost."""

from __future__ import annotations

from typing import Any

from codeact.base.settings import flag_name
from codeact.base.stage import Lines, Run, Stage
from codeact.text.template_files import template_text

REPORT, LENGTHS = "pack_stats.json", "pack_lengths.npy"
CAPACITY = 2048
"""Tokens of a training row, where training's flags do not say."""


class Padding(Stage):
    """In a run that trains; it has no section of its own and follows the flags of training."""

    name, section = "padding", "train"
    settings = dict[str, Any]
    needs = ("select",)
    outputs = (REPORT, LENGTHS)
    told = False

    def inputs(self, run: Run) -> dict[str, Any]:
        """Chosen rows, tokenizer, and how conversations are written and cut."""
        return {**run.digest("select"), "model": run.identity(run.model), **self._flags(run)}

    def work(self, run: Run) -> Lines:
        """Count."""
        import numpy as np

        from codeact.base.files import atomic_path
        from codeact.padding.stats import stats_for_data

        flags = self._flags(run)
        capacity = flags.pop("max_length", CAPACITY)
        stats = stats_for_data(run.output / "selected.jsonl", run.model, capacity, **flags)
        stats.write_json(run.output / REPORT)
        with atomic_path(run.output / LENGTHS) as temporary, temporary.open("wb") as file:
            np.save(file, stats.lengths)
        return [("batching", stats.summary())]

    def _flags(self, run: Run) -> dict[str, Any]:
        flags = {flag_name(name): value for name, value in run.section("train").items()}
        if "template" in flags:
            flags["model_type"] = template_text(str(flags["template"]))
        return {name: flags[name] for name in ("max_length", "model_type", "on_overflow") if name in flags}
