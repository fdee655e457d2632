"""k-means: the rule for every size, determinism, hostile vectors, and the contract with cuML kept by a stand-in."""

from __future__ import annotations

import logging
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import codeact._native as _native
from codeact.base.errors import InputError, MissingExtraError
from codeact.selection import clustering
from codeact.selection.clustering import cluster


def blobs(sizes, features=8, seed=0):
    """Well separated groups, shuffled; vectors and the group of each."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = np.eye(len(sizes), features) * 10
    return (centres[groups] + rng.normal(size=(len(groups), features))).astype(np.float32), groups


def same_partition(left, right):
    pairs = set(zip(left.tolist(), right.tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_separate_groups_are_found():
    vectors, groups = blobs([50, 30, 20, 5])
    labels = cluster(vectors, k=4)
    assert (labels.dtype, labels.shape) == (np.int32, (105,))
    assert same_partition(labels, groups)


def test_labels_are_the_same_for_the_same_seed_and_the_input_is_left_alone():
    vectors = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    vectors.setflags(write=False)
    before = vectors.copy()
    labels = cluster(vectors, k=7, seed=3)
    assert np.array_equal(labels, cluster(vectors, k=7, seed=3))
    assert not np.array_equal(labels, cluster(vectors, k=7, seed=4))
    assert np.array_equal(vectors, before)
    assert set(labels.tolist()) == set(range(7))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32 - 1), st.data())
def test_any_size_gets_labels_in_range(rows, features, seed, data):
    k = data.draw(st.integers(1, rows))
    vectors = np.random.default_rng(seed).normal(size=(rows, features))
    labels = cluster(vectors, k=k, seed=seed, n_init=1)
    # Lloyd's algorithm may leave a cluster empty, above all where k is close to the number of vectors
    assert set(labels.tolist()) <= set(range(k))
    assert len(set(labels.tolist())) >= min(k, 2)


def test_fewer_distinct_vectors_than_clusters_share_labels():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    labels = cluster(vectors, k=8)
    assert same_partition(labels, np.repeat(np.arange(3), 10))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, torch.float32, torch.bfloat16])
def test_every_floating_type_and_a_torch_tensor(kind):
    vectors, groups = blobs([20, 20])
    given_vectors = torch.from_numpy(vectors).to(kind) if isinstance(kind, torch.dtype) else vectors.astype(kind)
    assert same_partition(cluster(given_vectors, k=2), groups)


@pytest.mark.parametrize("backend", ["native", "sklearn"])
def test_beyond_the_limit_centres_come_from_a_sample_and_every_row_gets_its_nearest(tmp_path, monkeypatch, backend):
    monkeypatch.setattr(clustering, "MIN_FIT_ROWS", 300)
    monkeypatch.setattr(clustering, "FIT_ROWS_PER_CLUSTER", 10)
    monkeypatch.setattr(clustering, "_BLOCK_ROWS", 64)
    fitted = []
    real_fit = getattr(clustering, f"_fit_{backend}")
    monkeypatch.setattr(clustering, f"_fit_{backend}", lambda v, *rest: fitted.append(len(v)) or real_fit(v, *rest))
    vectors, groups = blobs([400, 300, 200, 105])
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    labels = cluster(mapped, k=4, backend=backend)
    assert fitted == [300]
    assert same_partition(labels, groups)
    assert np.array_equal(labels, cluster(vectors, k=4, backend=backend))
    cluster(vectors, k=50, backend=backend, n_init=1)
    assert fitted[-1] == 500
    assert same_partition(cluster(vectors, k=4, backend=backend, fit_rows=80), groups)
    assert fitted[-1] == 80


@pytest.mark.parametrize(
    ("vectors", "k", "options", "message"),
    [
        (np.zeros((3, 2)), 4, {}, r"k must be a whole number from 1 to the number of vectors \(3\), not 4"),
        (np.zeros((3, 2)), 0, {}, "k must be"),
        (np.zeros((3, 2)), -1, {}, "k must be"),
        (np.zeros((3, 2)), 1.5, {}, "k must be"),
        (np.zeros(3), 1, {}, "two dimensions"),
        (np.zeros((2, 2, 2)), 1, {}, "two dimensions"),
        (np.zeros((0, 2)), 1, {}, "nothing to cluster"),
        (np.zeros((2, 0)), 1, {}, "nothing to cluster"),
        (np.zeros((3, 2), int), 1, {}, "must be floating point, not int64"),
        (np.array([["a", "b"]]), 1, {}, "must be floating point"),
        (torch.zeros(3, 2, dtype=torch.int32), 1, {}, "must be floating point, not torch.int32"),
        (np.zeros((3, 2)), 1, {"seed": -1}, "seed must be from 0"),
        (np.zeros((3, 2)), 1, {"seed": 2**32}, "seed must be from 0"),
        (np.zeros((3, 2)), 1, {"n_init": 0}, "n_init must be at least 1"),
        (np.zeros((3, 2)), 2, {"fit_rows": 1}, "fit_rows is 1; 2 centres cannot be fitted on fewer rows"),
        (np.zeros((3, 2)), 1, {"backend": "cumll"}, "'cumll' is unknown; choose one of: cuml, "),
    ],
)
def test_wrong_arguments_are_refused(vectors, k, options, message):
    with pytest.raises(InputError, match=message) as caught:
        cluster(vectors, k=k, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_the_first_vector_that_is_not_finite_is_named(bad, monkeypatch):
    monkeypatch.setattr(clustering, "_BLOCK_ROWS", 4)
    vectors = np.ones((20, 3))
    vectors[[13, 17], 1] = bad
    with pytest.raises(InputError, match="vector 13 is not finite"):
        cluster(vectors, k=2)


def test_large_finite_values_are_no_false_alarm():
    cluster(np.full((4, 3), 1e15, np.float32), k=1)


def test_auto_says_once_what_it_took(caplog):
    clustering._announce.cache_clear()
    with caplog.at_level(logging.INFO, "codeact"):
        for _ in range(3):
            cluster(np.eye(3), k=1)
    assert len([record for record in caplog.records if "k-means runs on" in record.message]) == 1


def test_the_module_imports_no_heavy_library():
    heavy = "{'torch', 'sklearn', 'sentence_transformers', 'transformers', 'cuml', 'cupy'}"
    code = "import sys, codeact.selection.clustering, codeact.selection.choose, codeact.embedding.vectors\n"
    code += f"print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# ------------------------------------------------------------------------------ cuML, by its documented contract


class DeviceArray:
    """Stands for a CuPy array: no implicit conversion to numpy, and it knows whose memory it is."""

    def __init__(self, values):
        self.values = values

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")  # CuPy's own words


def cupy_stand_in():
    def from_dlpack(array, *, device=None, copy=None):
        assert array.__dlpack_device__()
        assert (array.dtype, array.is_contiguous()) == (torch.float32, True)
        return DeviceArray(np.from_dlpack(array))

    def asnumpy(array):
        assert type(array) is DeviceArray
        return array.values

    return types.SimpleNamespace(from_dlpack=from_dlpack, asnumpy=asnumpy)


class CumlKMeans:
    """cuml.cluster.KMeans as documented for 26.10: keyword-only, device arrays in, ``output_type`` out.

    The arithmetic is scikit-learn's; labels are int64, which cuML returns for large inputs.
    """

    made: list[CumlKMeans]

    def __init__(
        self,
        *,
        n_clusters=8,
        max_iter=300,
        tol=0.0001,
        verbose=False,
        random_state=None,
        init="scalable-k-means++",
        n_init="auto",
        oversampling_factor=2.0,
        max_samples_per_batch=32768,
        device_buffer_samples=0,
        init_size=0,
        output_type=None,
    ):
        from sklearn.cluster import KMeans

        assert type(init) is DeviceArray
        assert init.values.shape[0] == n_clusters
        assert tol > 0
        assert output_type == "cupy"
        self.inputs = []
        self.model = KMeans(n_clusters, init=init.values, n_init=n_init, max_iter=max_iter, random_state=random_state)
        self.made.append(self)

    def take(self, X):  # noqa: N803 - the names are cuML's
        assert type(X) is DeviceArray, f"on the host: {type(X)}"
        self.inputs.append(X.values)
        return X.values

    def fit(self, X, y=None, sample_weight=None, *, convert_dtype=True):  # noqa: N803
        self.model.fit(self.take(X))
        self.labels_ = DeviceArray(self.model.labels_.astype(np.int64))
        self.cluster_centers_, self.inertia_ = DeviceArray(self.model.cluster_centers_), self.model.inertia_
        return self


@pytest.fixture
def gpu_present(monkeypatch):
    """A machine with a GPU, as far as the code can tell; "the GPU" is the host's memory; and what was moved there."""
    moved = []

    def to_device(vectors):
        moved.append(vectors if isinstance(vectors, torch.Tensor) else torch.tensor(clustering._to_numpy(vectors)))
        return moved[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(clustering, "_to_device", to_device)
    return moved


@pytest.fixture
def cuml_present(gpu_present, monkeypatch):
    """And cuML is installed."""
    CumlKMeans.made = []
    monkeypatch.setitem(sys.modules, "cupy", cupy_stand_in())
    monkeypatch.setitem(sys.modules, "cuml", types.ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.cluster", types.SimpleNamespace(KMeans=CumlKMeans))
    return gpu_present


@pytest.mark.parametrize("backend", ["cuml", "auto"])
def test_cuml_gets_device_arrays_and_its_labels_become_int32(cuml_present, backend):
    vectors, groups = blobs([30, 20, 10])
    labels = cluster(vectors, k=3, seed=5, backend=backend, n_init=2)
    assert len(CumlKMeans.made) == 2, "a model a start"
    assert [model.model.n_clusters for model in CumlKMeans.made] == [3, 3]
    assert (type(labels), labels.dtype) == (np.ndarray, np.int32)
    assert same_partition(labels, groups)


@pytest.mark.parametrize("backend", ["cuml", "torch"])
def test_rows_beyond_the_sample_are_assigned_on_the_device_in_blocks(cuml_present, monkeypatch, backend):
    monkeypatch.setattr(clustering, "MIN_FIT_ROWS", 40)
    monkeypatch.setattr(clustering, "FIT_ROWS_PER_CLUSTER", 10)
    monkeypatch.setattr(clustering, "_BLOCK_ROWS", 25)
    vectors, groups = blobs([40, 30, 20])
    assert same_partition(cluster(vectors, k=3, backend=backend), groups)
    assert [len(block) for block in cuml_present] == [40, 25, 25, 25, 15]


def test_a_gpu_without_cuml_is_not_left_idle(gpu_present, caplog):
    clustering._announce.cache_clear()
    vectors, groups = blobs([30, 20, 10])
    with caplog.at_level(logging.INFO, "codeact"):
        assert same_partition(cluster(vectors, k=3), groups)
    assert len(gpu_present) == 1
    assert "k-means runs on the GPU (PyTorch; cuml is not here and not needed)" in caplog.text
    clustering._announce.cache_clear()


def embeddings_like(rows, features=48):
    """Unit vectors round centres, so widely that the clusters run into each other."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(20, features))[rng.integers(20, size=rows)] + 1.5 * rng.normal(size=(rows, features))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def inertia(vectors, labels):
    wide = vectors.astype(np.float64)
    return sum(((wide[labels == c] - wide[labels == c].mean(axis=0)) ** 2).sum() for c in np.unique(labels))


AWKWARD = {
    "embeddings": (embeddings_like(3000), 10),
    "many clusters": (embeddings_like(1000), 300),
    "duplicates": (np.repeat(embeddings_like(60), 5, axis=0), 40),
    "k above the distinct vectors": (np.repeat(embeddings_like(60), 5, axis=0), 100),
    "half of them zero": (np.vstack([np.zeros((150, 16)), embeddings_like(150, 16)]).astype(np.float32), 20),
    "all zero": (np.zeros((50, 4), np.float32), 3),
    "k is n - 1": (embeddings_like(300), 299),
    "far from the origin": (embeddings_like(300) * 0.01 + 1000, 20),
    "huge": (embeddings_like(300) * np.float32(1e15), 20),
    "tight groups far apart": (
        np.repeat(embeddings_like(12) * 1000, 50, axis=0) + 0.01 * np.tile(embeddings_like(50), (12, 1)),
        12,
    ),
    "one row": (np.ones((1, 4), np.float32), 1),
}


@pytest.mark.parametrize("case", AWKWARD)
def test_all_backends_are_equally_tight(cuml_present, case):
    vectors, k = AWKWARD[case]
    tightness = {
        name: inertia(vectors, cluster(vectors, k, 7, name)) for name in ("native", "sklearn", "torch", "cuml")
    }
    rounding = 1e-9 * inertia(vectors, np.zeros(len(vectors), int))
    assert max(tightness.values()) <= 1.001 * min(tightness.values()) + rounding, tightness


@pytest.mark.parametrize("instructions", _native.instruction_sets())
@pytest.mark.parametrize("features", [1, 15, 48, 100])
def test_the_compiled_core_labels_as_its_twin_in_pytorch(instructions, features, monkeypatch):
    monkeypatch.setenv("CODEACT_NATIVE_ISA", instructions)
    for rows, k in ((1, 1), (7, 7), (515, 3), (700, 47), (700, 49), (1100, 130)):
        vectors = np.random.default_rng(rows).normal(size=(rows, features)).astype(np.float32) + 3
        labels = cluster(vectors, k, 5, "native")
        assert inertia(vectors, labels) == pytest.approx(inertia(vectors, cluster(vectors, k, 5, "torch")), rel=1e-6)


@pytest.mark.parametrize("instructions", _native.instruction_sets())
def test_other_rows_get_the_nearest_centre(instructions):
    rng = np.random.default_rng(0)
    for count, k, features in ((0, 2, 3), (1, 1, 1), (513, 17, 31), (100, 60, 8)):
        rows, centres = rng.normal(size=(count, features)), rng.normal(size=(k, features))
        mean = rng.normal(size=features).astype(np.float32)
        labels = _native.nearest_centres(rows.astype(np.float32), centres.astype(np.float32), mean, 2, instructions)
        distances = ((rows[:, None] - mean - centres[None]) ** 2).sum(axis=2)
        assert np.array_equal(labels, distances.argmin(axis=1))


@pytest.mark.parametrize(
    "change",
    [
        {"vectors": np.zeros(4, np.float32)},
        {"vectors": np.zeros((4, 0), np.float32)},
        {"clusters": 5},
        {"clusters": 0},
        {"first": np.array([4])},
        {"first": np.array([-1])},
        {"first": np.array([], np.int64)},
        {"draws": np.zeros((1, 2, 0))},
        {"draws": np.zeros((2, 1, 3))},
        {"instruction_set": "sse"},
    ],
)
def test_the_compiled_core_refuses_what_does_not_fit(change):
    fits = {"vectors": np.ones((4, 2), np.float32), "clusters": 2, "first": np.array([3]), "draws": np.zeros((1, 1, 2))}
    fits |= {"tolerance": 0.0, "iterations": 3, "threads": 1, "instruction_set": _native.instruction_sets()[0]}
    _native.kmeans(**fits)
    with pytest.raises(ValueError, match=r"must|is not"):
        _native.kmeans(**fits | change)


def test_without_vector_instructions_pytorch_takes_over(monkeypatch, caplog):
    monkeypatch.setattr(_native, "instruction_sets", list)
    clustering._announce.cache_clear()
    with caplog.at_level(logging.INFO, "codeact"):
        cluster(np.eye(3), k=1)
    assert "k-means runs on the CPU (PyTorch)" in caplog.text
    clustering._announce.cache_clear()
    with pytest.raises(InputError, match="needs an x86-64 CPU with AVX2; use backend 'torch'"):
        cluster(np.eye(3), k=1, backend="native")


@pytest.mark.parametrize("case", ["embeddings", "many clusters", "half of them zero"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_labels_do_not_depend_on_the_number_of_threads(backend, case, monkeypatch):
    from codeact.selection import kmeans

    monkeypatch.setattr(kmeans, "_BLOCK", 256)
    vectors, k = AWKWARD[case]
    before, labels = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            labels.append(cluster(vectors, k, backend=backend))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(labels[0], others) for others in labels)


def test_moving_to_the_device_copies_nothing_that_is_there_already(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        there = torch.empty(4, 3, device="cuda")  # before a GPU seems to be there, as a CUDA build then starts it
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert clustering._to_device(there).device.type == "cuda"
        assert clustering._to_device(there).untyped_storage()._cdata == there.untyped_storage()._cdata


@pytest.mark.gpu
def test_torch_on_a_device():
    vectors, k = AWKWARD["embeddings"]
    labels = [cluster(vectors, k, backend="torch") for _ in range(2)]
    assert np.array_equal(*labels)
    assert inertia(vectors, labels[0]) <= 1.001 * inertia(vectors, cluster(vectors, k, backend="sklearn"))


@pytest.mark.gpu
def test_cuml_on_a_device():
    if not clustering._cuml_is_usable():
        pytest.skip("cuml is not installed")
    vectors, groups = blobs([300, 200, 100])
    for given_vectors in (vectors, torch.from_numpy(vectors).cuda()):
        labels = cluster(given_vectors, k=3, backend="cuml")
        assert same_partition(labels, groups)
        assert np.array_equal(labels, cluster(given_vectors, k=3, backend="cuml"))


def test_cuml_by_name_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="PyTorch sees none; use backend 'native'"):
        cluster(np.eye(3), k=1, backend="cuml")


@pytest.mark.parametrize(
    "error", [ImportError("no"), RuntimeError("driver too old"), OSError("libcuml.so"), KeyError()]
)
def test_a_cuml_that_does_not_import_counts_as_absent(gpu_present, monkeypatch, error):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cuml", types.ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.cluster", Broken("cuml.cluster"))
    with pytest.raises(MissingExtraError, match=r'clustering on the GPU needs cuml.*"codeact\[gpu\]"'):
        cluster(np.eye(3), k=1, backend="cuml")
    assert set(cluster(np.eye(3), k=3, backend="auto").tolist()) == {0, 1, 2}
