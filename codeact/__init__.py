"""codeact: fine-tune a code model on the part of the data that teaches most.

The public names load on first use, so ``import codeact`` costs next to nothing and pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codeact.base.errors import InputError as InputError
    from codeact.data.forms import Columns as Columns
    from codeact.data.records import Record as Record
    from codeact.data.records import open_records as open_records
    from codeact.embedding.vectors import embed as embed
    from codeact.evaluation.rewards import pass_share as pass_share
    from codeact.evaluation.rewards import run_program as run_program
    from codeact.evaluation.rewards import run_programs as run_programs
    from codeact.models.fused_loss import fuse_loss as fuse_loss
    from codeact.models.isolation import isolate as isolate
    from codeact.ops.cross_entropy import linear_cross_entropy as linear_cross_entropy
    from codeact.ops.nll import token_nll as token_nll
    from codeact.packing.packs import Packs as Packs
    from codeact.packing.packs import pack as pack
    from codeact.scoring.ifd import score_ifd as score_ifd
    from codeact.scoring.loglikelihood import loglikelihood as loglikelihood
    from codeact.scoring.loglikelihood import perplexity as perplexity
    from codeact.selection.choose import select as select
    from codeact.selection.clustering import cluster as cluster
    from codeact.training.dataset import PackCollator as PackCollator
    from codeact.training.dataset import PackDataset as PackDataset

__version__ = "0.1.0"

_HOMES = {
    "Columns": "data.forms",
    "InputError": "base.errors",
    "PackCollator": "training.dataset",
    "PackDataset": "training.dataset",
    "Packs": "packing.packs",
    "Record": "data.records",
    "cluster": "selection.clustering",
    "embed": "embedding.vectors",
    "fuse_loss": "models.fused_loss",
    "isolate": "models.isolation",
    "linear_cross_entropy": "ops.cross_entropy",
    "loglikelihood": "scoring.loglikelihood",
    "open_records": "data.records",
    "pack": "packing.packs",
    "pass_share": "evaluation.rewards",
    "perplexity": "scoring.loglikelihood",
    "run_program": "evaluation.rewards",
    "run_programs": "evaluation.rewards",
    "score_ifd": "scoring.ifd",
    "select": "selection.choose",
    "token_nll": "ops.nll",
}

# What a package needs beyond numpy.
_EXTRAS = {"data": "score", "ops": "score", "scoring": "score", "embedding": "select", "selection": "select"}

__all__ = [  # noqa: RUF022 - in the order of the flow
    "open_records",
    "Columns",
    "Record",
    "pack",
    "Packs",
    "token_nll",
    "linear_cross_entropy",
    "score_ifd",
    "loglikelihood",
    "perplexity",
    "embed",
    "cluster",
    "select",
    "PackDataset",
    "PackCollator",
    "isolate",
    "fuse_loss",
    "run_program",
    "run_programs",
    "pass_share",
    "InputError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'codeact' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"codeact.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        from codeact.base.errors import MissingExtraError

        package = _HOMES[name].partition(".")[0]
        if package not in _EXTRAS or str(error.name).startswith("codeact"):
            raise
        raise MissingExtraError(str(error.name), _EXTRAS[package], f"codeact.{name}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
