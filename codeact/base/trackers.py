"""Figures of scoring, evaluation and the lab for TensorBoard, wandb, mlflow and what else accelerate knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codeact.base.errors import InputError, import_extra, one_of
from codeact.base.settings import Settings


def check_trackers(names: str | None) -> list[Any]:
    """The classes of trackers by their names, with commas between them; None: no tracker.

    Raises:
        InputError: one is unknown, or its library is not installed.
        MissingExtraError: accelerate is absent.
    """
    if names is None:
        return []
    import_extra("accelerate", "train", "--report-to")
    tracking = import_extra("accelerate.tracking", "train", "--report-to")
    for name in names.split(","):
        one_of("--report-to", name, tracking.LOGGER_TYPE_TO_CLASS)
        if name not in map(str, tracking.get_available_trackers()):
            raise InputError(f"--report-to {name}: {name} is not installed; pip install {name}, or leave it out")
    return [tracking.LOGGER_TYPE_TO_CLASS[name] for name in names.split(",")]


def report_figures(
    names: str | None, stage: str, folder: Path, settings: Settings, figures: Mapping[str, float]
) -> None:
    """Hand the settings and figures of a stage to trackers, as one run with one step.

    Args:
        names: as in ``check_trackers``, with its errors.
        stage: its name, which goes before that of every figure.
        folder: of the results; files of a tracker go to ``runs`` in it, or where TENSORBOARD_LOGGING_DIR says.
        settings: what the figures are of.
        figures: by names of letters, digits, ``_``, ``-`` and ``/``, which all trackers take.
    """
    values = {name: value for name, value in settings.model_dump(mode="json").items() if value is not None}
    values = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in values.items()
    }
    project = os.environ.get("WANDB_PROJECT") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "codeact"
    for kind in check_trackers(names):
        if kind.requires_logging_directory:
            tracker = kind(stage, os.environ.get("TENSORBOARD_LOGGING_DIR") or folder / "runs")
        else:
            tracker = kind(project)
        tracker.start()
        tracker.store_init_configuration(values)
        tracker.log({f"{stage}/{name}": value for name, value in figures.items()}, step=0)
        tracker.finish()
