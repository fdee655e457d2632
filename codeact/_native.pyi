"""The compiled core. `codeact.packing.packs` and `codeact.ops.nll` check its arguments and document what it does."""

import numpy as np
import numpy.typing as npt

def pack(
    lengths: npt.NDArray[np.integer], capacity: int, algorithm: str, max_items: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int, int]:
    """Return (indices (items,), offsets (packs + 1,), tokens, lower_bound); see `codeact.packing.packs.pack`.

    Args:
        lengths: (items,) integers of any width, stride and alignment, in native byte order. Read without the GIL.
        capacity: 1 to 2**31 - 1.
        algorithm: "bfd", "ffd" or "next_fit".
        max_items: at least 1, or None.

    Raises:
        TypeError: lengths holds no integers, or is in foreign byte order.
        ValueError: anything else; the message is one line and names the first bad length by position and value.
    """

def instruction_sets() -> list[str]:
    """Return what `linear_nll` can run with on this CPU, best first: "avx512bf16", "avx512", "avx2", or nothing."""

def compiled_instruction_sets() -> list[str]:
    """Return what this build holds, whatever the CPU."""

def linear_nll(
    hidden: npt.NDArray[np.float32 | np.uint16],
    weight: npt.NDArray[np.float32 | np.uint16],
    targets: npt.NDArray[np.int64],
    bias: npt.NDArray[np.float32] | None,
    softcap: float | None,
    ignore_index: int,
    threads: int,
    instruction_set: str,
) -> npt.NDArray[np.float32]:
    """Return the losses (T,); see `codeact.ops.nll.token_nll`.

    Args:
        hidden: (T, D) float32, or uint16 that holds the bits of bfloat16; any row stride. Read without the GIL.
        weight: (V, D), of the same dtype.
        targets: (T,).
        bias: (V,).
        softcap: above 0, or None.
        ignore_index: a target with this value has loss 0.
        threads: at most so many run, the calling one included.
        instruction_set: one of `instruction_sets()`.

    Raises:
        TypeError: hidden or weight holds something else.
        ValueError: shapes do not fit, a target is out of range, or the instruction set is not here.
    """

def loss_and_slope(
    logits: npt.NDArray[np.float32 | np.uint16],
    targets: npt.NDArray[np.int64],
    bias: npt.NDArray[np.float32] | None,
    softcap: float | None,
    ignore_index: int,
    scale: npt.NDArray[np.float32] | None,
    slope: bool,
    threads: int,
    instruction_set: str,
) -> npt.NDArray[np.float32]:
    """Return the losses (R,), and write their slopes over the logits; see `codeact.ops.cross_entropy.loss_and_slope`.

    Args:
        logits: (R, V) float32, or uint16 that holds the bits of bfloat16; any row stride. Used without the GIL.
        targets: (R,).
        bias: (V,).
        softcap: above 0, or None.
        ignore_index: a row with this target has loss 0 and slope 0.
        scale: (R,) that the slopes are multiplied by.
        slope: whether the slopes are written.
        threads: at most so many run, the calling one included.
        instruction_set: one of `instruction_sets()`.

    Raises:
        TypeError: logits are of another dtype.
        ValueError: shapes do not fit, a target is out of range, the logits are read-only, or the instruction set is not
            here.
    """

def kmeans(
    vectors: npt.NDArray[np.float32],
    clusters: int,
    first: npt.NDArray[np.int64],
    draws: npt.NDArray[np.float64],
    tolerance: float,
    iterations: int,
    threads: int,
    instruction_set: str,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32], int]:
    """Return labels (N,), centres (k, D) less the mean, the mean (D,), and the number of passes over all rows.

    Args:
        vectors: (N, D), finite.
        clusters: k, 1 to N.
        first: (runs,), the row at which each begins; the tightest run is returned.
        draws: (runs, k - 1, candidates), 0 to 1, by which the other starts are drawn.
        tolerance: of the variance: a smaller shift of all centres together ends a run.
        iterations: of a run at most.
        threads: at most so many run, the calling one included; it changes no bit.
        instruction_set: one of `instruction_sets()`.

    Raises:
        TypeError: an operand holds something else.
        ValueError: shapes do not fit, or the instruction set is not here.
    """

def nearest_centres(
    vectors: npt.NDArray[np.float32],
    centres: npt.NDArray[np.float32],
    mean: npt.NDArray[np.float32],
    threads: int,
    instruction_set: str,
) -> npt.NDArray[np.int32]:
    """Return the nearest of the ``centres`` and ``mean`` that `kmeans` returned, (rows,); errors as there."""

def rms_norm(
    x: npt.NDArray[np.float32 | np.uint16],
    weight: npt.NDArray[np.float32 | np.uint16],
    epsilon: float,
    output: npt.NDArray[np.float32 | np.uint16],
    threads: int,
    instruction_set: str,
) -> None:
    """Write ``weight * (x / sqrt(mean(x^2) + epsilon))`` to ``output``, (T, D) both; see `codeact.ops.layers`.

    Operands are all float32 or all uint16 that holds the bits of bfloat16; any stride of rows. ``output`` may be ``x``.

    Raises:
        TypeError: an operand holds something else.
        ValueError: shapes do not fit, ``output`` cannot be written to, or the instruction set is not here.
    """

def silu_multiply(
    gate: npt.NDArray[np.float32 | np.uint16],
    up: npt.NDArray[np.float32 | np.uint16],
    output: npt.NDArray[np.float32 | np.uint16],
    threads: int,
    instruction_set: str,
) -> None:
    """Write ``silu(gate) * up`` to ``output``, (T, D) all; the rest as in `rms_norm`."""

def rotate(
    x: npt.NDArray[np.float32 | np.uint16],
    cosine: npt.NDArray[np.float32 | np.uint16],
    sine: npt.NDArray[np.float32 | np.uint16],
    output: npt.NDArray[np.float32 | np.uint16],
    threads: int,
    instruction_set: str,
) -> None:
    """Write ``x * cosine + rotate_half(x) * sine`` to ``output``: (H, T, D) with D even, cosine and sine (T, D).

    Any stride of heads and tokens; the rest as in `rms_norm`.
    """

def varlen_attention(
    query: npt.NDArray[np.float32 | np.uint16],
    key: npt.NDArray[np.float32 | np.uint16],
    value: npt.NDArray[np.float32 | np.uint16],
    cu_seqlens: npt.NDArray[np.int32],
    scale: float,
    threads: int,
    instruction_set: str,
    prefixes: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.float32 | np.uint16]:
    """Return the causal attention of every sample on its own, (T, H, E); see `codeact.ops.attention.varlen_attention`.

    Args:
        query: (H, T, D) float32, or uint16 that holds the bits of bfloat16; any stride of heads and tokens.
        key: (G, T, D), of the same dtype; G divides H.
        value: (G, T, E).
        cu_seqlens: (N + 1,), rising from 0 to T.
        scale: of the scores, above 0.
        threads: at most so many run, the calling one included.
        instruction_set: one of `instruction_sets()`.
        prefixes: (N,), the sample whose tokens come before those of each, or -1; it has none itself.

    Raises:
        TypeError: an operand holds something else.
        ValueError: shapes, bounds or prefixes do not fit, or the instruction set is not here.
    """

def varlen_attention_backward(
    output_gradient: npt.NDArray[np.float32 | np.uint16],
    query: npt.NDArray[np.float32 | np.uint16],
    key: npt.NDArray[np.float32 | np.uint16],
    value: npt.NDArray[np.float32 | np.uint16],
    cu_seqlens: npt.NDArray[np.int32],
    scale: float,
    threads: int,
    instruction_set: str,
) -> tuple[
    npt.NDArray[np.float32 | np.uint16], npt.NDArray[np.float32 | np.uint16], npt.NDArray[np.float32 | np.uint16]
]:
    """Return the gradients of query (T, H, D), key (T, G, D) and value (T, G, E).

    Args:
        output_gradient: (H, T, E), that of the output of `varlen_attention`, of the operands' dtype; any stride of
            heads and tokens.

    The other arguments and all errors are those of `varlen_attention`.
    """
