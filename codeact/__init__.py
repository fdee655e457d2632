"""codeact: fine-tune a code model on the part of the data that teaches most.

The public names load on first use, so ``import codeact`` costs next to nothing and pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codeact.clustering import cluster as cluster
    from codeact.cross_entropy import linear_cross_entropy as linear_cross_entropy
    from codeact.embedding import embed as embed
    from codeact.errors import InputError as InputError
    from codeact.ifd import score_ifd as score_ifd
    from codeact.nll import token_nll as token_nll
    from codeact.packing import Packs as Packs
    from codeact.packing import pack as pack
    from codeact.records import Columns as Columns
    from codeact.records import Record as Record
    from codeact.records import open_records as open_records
    from codeact.selection import select as select

__version__ = "0.1.0"

_HOMES = {
    "Columns": "records",
    "InputError": "errors",
    "Packs": "packing",
    "Record": "records",
    "cluster": "clustering",
    "embed": "embedding",
    "linear_cross_entropy": "cross_entropy",
    "open_records": "records",
    "pack": "packing",
    "score_ifd": "ifd",
    "select": "selection",
    "token_nll": "nll",
}

__all__ = [  # noqa: RUF022 - in the order of the flow
    "open_records",
    "Columns",
    "Record",
    "pack",
    "Packs",
    "token_nll",
    "linear_cross_entropy",
    "score_ifd",
    "embed",
    "cluster",
    "select",
    "InputError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'codeact' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"codeact.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
