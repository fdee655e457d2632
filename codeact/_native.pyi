"""The compiled core. `codeact.packing` checks its arguments and documents what it does."""

import numpy as np
import numpy.typing as npt

def pack(
    lengths: npt.NDArray[np.integer], capacity: int, algorithm: str, max_items: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int, int]:
    """Return (indices (items,), offsets (packs + 1,), tokens, lower_bound); see `codeact.packing.pack`.

    Args:
        lengths: (items,) integers of any width, stride and alignment, in native byte order. Read without the GIL.
        capacity: 1 to 2**31 - 1.
        algorithm: "bfd", "ffd" or "next_fit".
        max_items: at least 1, or None.

    Raises:
        TypeError: lengths holds no integers, or is in foreign byte order.
        ValueError: anything else; the message is one line and names the first bad length by position and value.
    """
