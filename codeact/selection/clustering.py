"""Vectors -> cluster labels by k-means: cuML or plain PyTorch on a GPU, the compiled core on the CPU."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from codeact.base.errors import InputError, MissingExtraError, NotHereError, one_of

if TYPE_CHECKING:
    import torch

KMEANS_BACKENDS = ("auto", "native", "sklearn", "torch", "cuml")
MIN_FIT_ROWS = 200_000
FIT_ROWS_PER_CLUSTER = 256
_BLOCK_ROWS = 65_536  # rows checked or assigned at a time: 200 MB at 768 dimensions
MAX_ITERATIONS = 300

logger = logging.getLogger("codeact")


def cluster(
    vectors: NDArray[Any] | torch.Tensor,
    k: int = 10,
    seed: int = 42,
    backend: str = "auto",
    *,
    n_init: int = 3,
    fit_rows: int | None = None,
) -> NDArray[np.int32]:
    """Group ``vectors`` by k-means (Lloyd's algorithm, k-means++ starts, Euclidean distance).

    One rule for every size: the centres are fitted on all rows up to ``max(200,000, 256 * k)``, beyond that on a seeded
    sample of so many, and every row gets the label of its nearest centre. So memory is bounded, and the centre of a
    cluster of even 256 sampled rows is already known better than a selection by cluster can notice.

    On one machine and backend the labels are the same for the same vectors, ``k`` and ``seed``, whatever the number of
    cores. All backends begin at the same centres and stop by the same rule; rounding may part them where two centres
    are equally near.

    Args:
        vectors: (N, D) floating point, finite; may be a memory map, or a torch tensor on the CPU or the current GPU.
            For unit vectors Euclidean distance orders as cosine does.
        k: number of clusters, 1 to N. Fewer may come back when k is close to the number of
            distinct vectors.
        backend: ``native``, the compiled core; ``sklearn``; ``torch``, on a GPU where there is one; ``cuml`` (an NVIDIA
            GPU and ``codeact[gpu]``); or ``auto``: on a GPU cuml where it works, else torch; on the CPU native, and
            torch where that has no vector instructions that the core knows.
        n_init: runs from different starts, of which the tightest is kept. Of twelve seeds on 2,017 real questions
            (k = 10) the worst was 1.3 % looser than the best with 1 run, 0.5 % with 3, and still 0.5 % with 10.
        fit_rows: fit the centres on a sample of so many rows; None: by the rule above.

    Returns:
        (N,) int32 in 0 to k - 1.

    Raises:
        InputError: an argument is out of range, or a vector is not finite (the message names the first row), or there
            is no GPU for ``cuml``.
        MissingExtraError: ``cuml`` was asked for by name and is not installed.
    """
    check_kmeans(backend)
    if not hasattr(vectors, "is_cuda"):
        vectors = np.asarray(vectors)
    _check(vectors, k, seed, n_init)
    if fit_rows is not None and fit_rows < k:
        raise InputError(f"fit_rows is {fit_rows}; {k} centres cannot be fitted on fewer rows")
    if backend == "auto":
        backend = "cuml" if _cuml_is_usable() else "torch" if _has_gpu() or not _native_is_usable() else "native"
        _announce(backend)
    fit = {"cuml": _fit_cuml, "torch": _fit_torch, "native": _fit_native, "sklearn": _fit_sklearn}[backend]
    rows = len(vectors)
    fit_rows = fit_rows or max(MIN_FIT_ROWS, FIT_ROWS_PER_CLUSTER * k)
    if rows <= fit_rows:
        labels, _ = fit(vectors, k, seed, n_init)
        return labels
    # sorted: a memory map is then read forwards
    sample = np.sort(np.random.default_rng(seed).choice(rows, size=fit_rows, replace=False))
    _, assign = fit(vectors[sample], k, seed, n_init)
    return np.concatenate([assign(vectors[start : start + _BLOCK_ROWS]) for start in range(0, rows, _BLOCK_ROWS)])


def _check(vectors: Any, k: int, seed: int, n_init: int) -> None:
    if vectors.ndim != 2:
        raise InputError(f"vectors must have two dimensions (rows, features), not shape {tuple(vectors.shape)}")
    rows, features = vectors.shape
    if not rows or not features:
        raise InputError(f"there is nothing to cluster: vectors have shape {(rows, features)}")
    is_float = vectors.dtype.kind == "f" if isinstance(vectors, np.ndarray) else vectors.dtype.is_floating_point
    if not is_float:
        raise InputError(f"vectors must be floating point, not {vectors.dtype}")
    if not isinstance(k, int | np.integer) or not 1 <= k <= rows:
        raise InputError(
            f"k must be a whole number from 1 to the number of vectors ({rows}), not {k}; change --clusters"
        )
    if n_init < 1:
        raise InputError(f"n_init must be at least 1, not {n_init}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to 2^32 - 1, not {seed}")
    for start in range(0, rows, _BLOCK_ROWS):
        block = vectors[start : start + _BLOCK_ROWS]
        if isinstance(block, np.ndarray):
            block = _to_numpy(block)
            if np.isfinite([block.min(), block.max()]).all():  # what is not a number is the least and the largest
                continue
            finite = np.isfinite(block).all(axis=1)
        else:
            finite = block.float().isfinite().all(dim=1)  # where the tensor is: one flag comes back, not the block
        if not bool(finite.all()):
            first = int((finite * 1).argmin())
            raise InputError(f"vector {start + first} is not finite in float32; run codeact embed again")


def _to_numpy(vectors: NDArray[Any] | torch.Tensor) -> NDArray[np.float32]:
    if not isinstance(vectors, np.ndarray):
        vectors = vectors.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):  # to infinity, which _check refuses
        return np.ascontiguousarray(vectors, dtype=np.float32)


_Labels = NDArray[np.int32]
_Fitted = tuple[_Labels, Callable[[Any], _Labels]]  # labels of the fitted rows, and the function that labels others


def _fit_sklearn(vectors: NDArray[Any] | torch.Tensor, k: int, seed: int, n_init: int) -> _Fitted:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    model = KMeans(n_clusters=k, n_init=n_init, max_iter=MAX_ITERATIONS, random_state=seed, algorithm="lloyd")
    # One thread: with more, scikit-learn adds the threads' partial centres in the order in which they finish. With 8,
    # the centres' last bits were seen to differ from run to run, so that a vector half-way between two may change its
    # label. Assigning has no such sum and keeps every core.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than k: said in the docstring
        labels = model.fit(_to_numpy(vectors)).labels_.astype(np.int32)
    return labels, lambda block: model.predict(_to_numpy(block)).astype(np.int32)


def _fit_native(vectors: NDArray[Any] | torch.Tensor, k: int, seed: int, n_init: int) -> _Fitted:
    from codeact.selection.kmeans import fit_native

    labels, assign, _ = fit_native(_to_numpy(vectors), k, seed, n_init, MAX_ITERATIONS)
    return labels, lambda block: assign(_to_numpy(block))


def _fit_torch(vectors: NDArray[Any] | torch.Tensor, k: int, seed: int, n_init: int, lloyd: Any = None) -> _Fitted:
    from codeact.selection.kmeans import fit

    labels, assign = fit(_to_device(vectors), k, seed, n_init, MAX_ITERATIONS, lloyd)

    def to_host(labels: torch.Tensor) -> _Labels:
        return labels.to("cpu").numpy().astype(np.int32)

    return to_host(labels), lambda block: to_host(assign(_to_device(block)))


def _fit_cuml(vectors: NDArray[Any] | torch.Tensor, k: int, seed: int, n_init: int) -> _Fitted:
    """cuML's iterations between the starts and the assignment of ``codeact.selection.kmeans``."""
    import torch

    kmeans, cupy = _import_cuml()

    def lloyd(rows: torch.Tensor, starts: torch.Tensor, stop: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        # DLPack hands the memory over. cuML wants a tolerance above 0, and its own starts are drawn otherwise.
        model = kmeans(
            n_clusters=k,
            init=cupy.from_dlpack(starts),
            n_init=1,
            max_iter=MAX_ITERATIONS,
            tol=max(stop, 1e-12),
            random_state=seed,
            output_type="cupy",
        )
        model.fit(cupy.from_dlpack(rows))
        labels, centres = (cupy.asnumpy(array) for array in (model.labels_, model.cluster_centers_))
        place = rows.device
        return torch.as_tensor(labels, device=place), torch.as_tensor(centres, device=place), float(model.inertia_)

    return _fit_torch(vectors, k, seed, n_init, lloyd)


def _to_device(vectors: NDArray[Any] | torch.Tensor) -> torch.Tensor:
    """float32, contiguous, on the GPU if there is one; the same memory when ``vectors`` is that already."""
    import torch

    device = "cuda" if _has_gpu() else "cpu"
    if not isinstance(vectors, torch.Tensor):
        return torch.tensor(_to_numpy(vectors), device=device)  # not from_numpy, which warns of read-only memory maps
    if vectors.device.type != device:
        vectors = vectors.to(device)
    return vectors.detach().to(torch.float32).contiguous()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_kmeans(backend: str) -> None:
    """Refuse a backend that is unknown or not here; errors as in ``cluster``."""
    if one_of("backend", backend, KMEANS_BACKENDS) == "cuml":
        _import_cuml()
    if backend == "native" and not _native_is_usable():
        raise NotHereError("backend 'native' needs an x86-64 CPU with AVX2; use backend 'torch'")


def _native_is_usable() -> bool:
    from codeact._native import instruction_sets

    return bool(instruction_sets())


def _import_cuml() -> tuple[Any, Any]:
    """The KMeans class and the CuPy module."""
    if not _has_gpu():
        raise NotHereError("backend 'cuml' needs an NVIDIA GPU and PyTorch sees none; use backend 'native'")
    try:
        import cupy
        from cuml.cluster import KMeans
    except Exception:  # an installation that does not fit the driver raises far more than ImportError
        raise MissingExtraError("cuml and cupy", "gpu", "clustering on the GPU") from None
    return KMeans, cupy


def _cuml_is_usable() -> bool:
    try:
        _import_cuml()
    except (InputError, MissingExtraError):
        return False
    return True


@functools.cache
def _announce(backend: str) -> None:
    """Say which backend ``auto`` took, once a process."""
    places = {
        "cuml": "the GPU (cuml)",
        "torch": "the GPU (PyTorch; cuml is not here and not needed)" if _has_gpu() else "the CPU (PyTorch)",
        "native": "the CPU",
    }
    logger.info("k-means runs on %s", places[backend])
