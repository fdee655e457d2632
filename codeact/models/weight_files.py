"""What the files of a model say of its weights before any of them is read. Importing it imports no torch."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from codeact.base.console import size
from codeact.base.errors import NotHereError

_ONE_BYTE = ("F8", "I8", "U8", "BOOL")


def local_weights(name: str) -> Path | None:
    """The folder of a model whose weights are on this machine; None if they would have to be fetched."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            return None
    return folder if list(folder.glob("*.safetensors")) else None


def stored_weights(folder: Path) -> dict[str, int]:
    """How many numbers of every type, as safetensors calls it (F32, BF16 ...), the weights of a model's folder are.

    Of a model that lies there twice, whole and in parts, one counts; what cannot be read counts as nothing.
    """
    from safetensors import SafetensorError, safe_open

    whole = folder / "model.safetensors"
    counts: dict[str, int] = {}
    with suppress(OSError, SafetensorError, MemoryError):  # of the last where a limit forbids to map the file
        for path in [whole] if whole.exists() else folder.glob("model*.safetensors"):
            if not path.is_file():  # a pipe would wait for ever
                continue
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + math.prod(part.get_shape())
    return counts


def loaded_bytes(name: str, number_bytes: float) -> float:
    """Bytes that a model's weights take once loaded; 0 where they would have to be fetched.

    Args:
        name: folder or hub name.
        number_bytes: of a number then; what is stored in a byte stays so.
    """
    folder = local_weights(name)
    stored = stored_weights(folder) if folder is not None else {}
    return sum(count * (1 if kind.startswith(_ONE_BYTE) else number_bytes) for kind, count in stored.items())


def check_fits(what: str, needed: float, free: float, place: str, remedy: str = "take a smaller model") -> None:
    """Refuse weights that take more memory than there is, before the system ends this process for it.

    Args:
        what: names them in the message.
        needed: bytes, see ``loaded_bytes``.
        free: bytes that are left.
        place: where.
        remedy: the end of the message.

    Raises:
        NotHereError: they do not fit.
    """
    if needed > free:
        raise NotHereError(f"the weights of {what} take {size(needed)}, and {size(free)} are left on {place}; {remedy}")


def check_copies(name: str, workers: int, itemsize: int) -> None:
    """Refuse more workers than this machine's memory has room for weights of; errors of ``check_fits``."""
    from codeact.base.machine import free_memory

    # On their way to a GPU weights are in the machine's memory as well.
    needed = workers * loaded_bytes(name, itemsize)
    check_fits(f"{workers} processes", needed, free_memory(), "this machine", "lower --workers")
