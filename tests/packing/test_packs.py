"""codeact.packing.packs against its readable twin, and the promises of its docstring."""

from __future__ import annotations

import doctest
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import codeact.packing.packs
from codeact.base.errors import InputError
from codeact.packing.packs import ALGORITHMS, MAX_CAPACITY, Packs, pack
from codeact.packing.reference import lower_bound_reference, pack_reference

DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@st.composite
def problems(draw: st.DrawFn, *, most_items: int = 60, most_capacity: int = 40) -> tuple[list[int], int, int | None]:
    """(lengths, capacity, max_items). Small capacities make equal lengths and equal spaces common: the ties."""
    capacity = draw(st.integers(1, most_capacity))
    longest = draw(st.integers(1, capacity))  # sometimes all items are small, so that packs hold many
    lengths = draw(st.lists(st.integers(1, longest), max_size=most_items))
    return lengths, capacity, draw(st.none() | st.integers(1, 8))


huge_problems = st.tuples(
    st.lists(st.integers(1, MAX_CAPACITY) | st.integers(1, 2**20), max_size=60),
    st.just(MAX_CAPACITY),
    st.none() | st.integers(1, 8),
)


def as_lists(packs: Packs) -> list[list[int]]:
    return [items.tolist() for items in packs]


def assert_valid(packs: Packs, lengths: np.ndarray, max_items: int | None = None) -> None:
    assert packs.indices.dtype == packs.offsets.dtype == np.int64
    assert packs.offsets[0] == 0
    assert packs.offsets[-1] == len(lengths)
    sizes = np.diff(packs.offsets)
    assert (sizes > 0).all()
    assert max_items is None or (sizes <= max_items).all()
    assert np.array_equal(np.sort(packs.indices), np.arange(len(lengths))), "every item once"
    if len(packs):
        totals = np.add.reduceat(np.asarray(lengths, np.int64)[packs.indices], packs.offsets[:-1])
        assert totals.max() <= packs.capacity
    assert packs.tokens == int(np.sum(lengths, dtype=np.int64))
    assert packs.lower_bound <= len(packs)
    assert packs.padding == len(packs) * packs.capacity - packs.tokens >= 0
    assert 0 < packs.fill <= 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=400, deadline=None)
@given(problem=problems() | huge_problems)
@example(problem=([], 1, None))
@example(problem=([1], 1, 1))
@example(problem=([MAX_CAPACITY] * 3, MAX_CAPACITY, None))
@example(problem=([5, 5, 3, 3, 2, 2, 2], 10, None))  # equally full packs: who waited longest?
@example(problem=([7] * 4 + [3] * 2 + [1] * 9, 10, 3))  # packs full in items that still have space
def test_same_packs_as_reference(algorithm: str, problem: tuple[list[int], int, int | None]) -> None:
    lengths, capacity, max_items = problem
    packs = pack(lengths, capacity, algorithm, max_items)
    assert_valid(packs, np.array(lengths, np.int64), max_items)
    assert as_lists(packs) == pack_reference(lengths, capacity, algorithm, max_items)
    assert packs.lower_bound == lower_bound_reference(lengths, capacity, max_items)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=200, deadline=None)
@given(problem=problems(), factor=st.sampled_from([2, 1009, 65537, MAX_CAPACITY // 40]))
def test_scaled_problem_has_same_packs(algorithm: str, problem: tuple[list[int], int, int | None], factor: int) -> None:
    """Lengths and capacity times one factor: the same packs, though the factor moves the work from the counting sort
    and the exact table to the radix sort and the searched table."""
    lengths, capacity, max_items = problem
    small = pack(lengths, capacity, algorithm, max_items)
    large = pack(np.array(lengths, np.int64) * factor, capacity * factor, algorithm, max_items)
    assert np.array_equal(small.indices, large.indices)
    assert np.array_equal(small.offsets, large.offsets)
    assert small.lower_bound == large.lower_bound


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("max_items", [None, 1, 3])
@pytest.mark.parametrize(
    ("items", "capacity", "longest"),
    [
        (1500, 2048, 2048),  # the usual: some hundred runs of a few items
        (1500, 100, 7),  # long runs in large groups of packs
        (1500, MAX_CAPACITY, MAX_CAPACITY),  # all lengths differ, three radix digits
        (1500, 300_000, 9_000),  # two radix digits, many items in a pack
        (1500, 131_072, 10_000),  # counted lengths, but too few of them for an exact table
    ],
)
def test_same_packs_as_reference_at_size(
    algorithm: str, max_items: int | None, items: int, capacity: int, longest: int
) -> None:
    lengths = np.random.default_rng(items + capacity).integers(1, longest, items, endpoint=True)
    packs = pack(lengths, capacity, algorithm, max_items)
    assert_valid(packs, lengths, max_items)
    assert as_lists(packs) == pack_reference(lengths.tolist(), capacity, algorithm, max_items)


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_lower_bound_is_at_least_the_simple_one(problem: tuple[list[int], int, int | None]) -> None:
    lengths, capacity, max_items = problem
    bound = pack(lengths, capacity, max_items=max_items).lower_bound
    assert bound >= -(-sum(lengths) // capacity)
    # Two items over half the capacity never share a pack.
    assert bound >= sum(2 * length > capacity for length in lengths)


def test_lower_bound_proves_a_plan_optimal() -> None:
    packs = pack([6] * 10 + [5] * 3, 10)  # tokens / capacity says 8; 6 and 5 never share, two of 5 do
    assert (len(packs), packs.lower_bound) == (12, 12)


@settings(max_examples=300, deadline=None)
@given(problem=problems(most_items=200))
def test_decreasing_is_within_its_guarantee(problem: tuple[list[int], int, int | None]) -> None:
    """First and best fit decreasing open at most 11/9 of the optimum and 6/9 (Dosa 2007), so not over next fit's
    count by more: next fit is no better than the optimum."""
    lengths, capacity, _ = problem
    next_fit = len(pack(lengths, capacity, "next_fit"))
    for algorithm in ("bfd", "ffd"):
        assert 9 * len(pack(lengths, capacity, algorithm)) <= 11 * next_fit + 6


@pytest.mark.parametrize("capacity", [2048, 8192])
def test_real_sizes(capacity: int) -> None:
    """Lognormal lengths, as code samples have: decreasing algorithms within 0.1 % of the bound, next fit far off."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.79, 0.8, 100_000), 1, capacity).astype(np.int32)
    packs = {algorithm: pack(lengths, capacity, algorithm) for algorithm in ALGORITHMS}
    for plan in packs.values():
        assert_valid(plan, lengths)
    assert len(packs["bfd"]) <= len(packs["ffd"]) <= 1.001 * packs["bfd"].lower_bound
    assert len(packs["next_fit"]) > 1.03 * len(packs["bfd"])


# --- what goes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, ">i4", ">u2", "<i8", "intp", "longlong", "ulonglong"])
def test_every_integer_dtype(dtype: str) -> None:
    lengths = np.random.default_rng(3).integers(1, 100, 200)
    assert as_lists(pack(lengths.astype(dtype), 100)) == as_lists(pack(lengths, 100))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layouts_and_sequences(algorithm: str) -> None:
    lengths = np.random.default_rng(4).integers(1, 50, 64)
    expected = as_lists(pack(lengths, 64, algorithm))
    strided = np.full((64, 3), -1)
    strided[:, 1] = lengths
    read_only = lengths.copy()
    read_only.flags.writeable = False
    record = np.zeros(64, np.dtype([("flag", "i1"), ("length", "i8")]))  # packed, so "length" is unaligned
    record["length"] = lengths
    assert not record["length"].flags.aligned
    for same in (strided[:, 1], lengths[::-1].copy()[::-1], read_only, record["length"], lengths.tolist(),
                 tuple(lengths.tolist())):  # fmt: skip
        assert as_lists(pack(same, 64, algorithm)) == expected
    assert as_lists(pack(np.broadcast_to(np.int64(3), 5), 6, algorithm)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("empty", [[], (), np.empty(0, np.int64), np.empty(0, np.uint8)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty(empty: object, algorithm: str) -> None:
    packs = pack(empty, 10, algorithm)  # type: ignore[arg-type]
    assert len(packs) == packs.tokens == packs.padding == packs.lower_bound == 0
    assert packs.fill == 1.0
    assert packs.offsets.tolist() == [0]
    assert list(packs) == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_input_untouched_and_deterministic(algorithm: str) -> None:
    lengths = np.random.default_rng(5).integers(1, 1000, 20_000)
    before = lengths.copy()
    first, second = pack(lengths, 2048, algorithm), pack(lengths, 2048, algorithm)
    assert np.array_equal(lengths, before)
    assert np.array_equal(first.indices, second.indices)
    assert np.array_equal(first.offsets, second.offsets)


def test_ties_go_by_position() -> None:
    assert as_lists(pack([4, 4, 4, 4, 2, 2], 8)) == [[0, 1], [2, 3], [4, 5]]
    # Three packs with space 4; the one that has waited longest takes the first item of length 3.
    assert as_lists(pack([6, 6, 6, 3, 3], 10)) == [[0, 3], [1, 4], [2]]
    # 7 leaves 3, and 4 + 3 leave 3 as well, but later: the 2 goes to the pack of the 7.
    assert as_lists(pack([2, 3, 4, 7], 10)) == [[3, 1], [2, 0]]


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_packs_is_a_frozen_sequence() -> None:
    packs = pack([5, 3, 2, 8, 1], 8)
    assert packs[-1].tolist() == packs[np.int64(2)].tolist() == [2, 4]
    assert packs[0].base is packs.indices, "a view, not a copy"
    for outside in (3, -4):
        with pytest.raises(IndexError, match=r"of 3 packs"):
            packs[outside]
    with pytest.raises(TypeError):
        packs["0"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        packs.capacity = 9  # type: ignore[misc]
    assert packs.fill == 19 / 24


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_bad_length_is_named(dtype: str) -> None:
    over = np.array([5, 101, 0], dtype)
    with pytest.raises(
        InputError, match=r"^lengths\[1\] is 101, over the capacity 100: cut or drop the item, or raise"
    ):
        pack(over, 100)
    with pytest.raises(InputError, match=r"^lengths\[2\] is 0; a length must be at least 1: drop empty items first$"):
        pack(over, 120)
    if dtype.startswith("i"):
        with pytest.raises(InputError, match=r"^lengths\[3\] is -128; a length must be at least 1"):
            pack(np.array([1, 1, 1, -128], dtype), 100)


@pytest.mark.parametrize("step", [1, 3, -1])
@pytest.mark.parametrize("position", [0, 4095, 4096, 9_999])
def test_first_bad_length_is_named_in_any_block(position: int, step: int) -> None:
    """Lengths are checked 4096 at a time."""
    lengths = np.ones(30_000, np.int64)[::step][:10_000]
    lengths[position:] = 9
    with pytest.raises(InputError, match=rf"^lengths\[{position}\] is 9, over the capacity 8"):
        pack(lengths, 8)


@pytest.mark.parametrize("value", [2**63, 2**63 + 5, 2**64 - 1, 2**32 + 1])
def test_unsigned_does_not_wrap(value: int) -> None:
    with pytest.raises(InputError, match=rf"lengths\[1\] is {value}, over the capacity 10"):
        pack(np.array([1, value], np.uint64), 10)
    with pytest.raises(InputError, match=rf"lengths\[0\] is {value}, over the capacity 10"):
        pack([value], 10)


@pytest.mark.parametrize("value", [-(2**63), -(2**31), -1])
def test_negative_extremes(value: int) -> None:
    with pytest.raises(InputError, match=rf"lengths\[0\] is {value};"):
        pack(np.array([value]), MAX_CAPACITY)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([True, False], TypeError, "bool"),
        ([1.0, 2.0], TypeError, "float64"),
        (np.empty(0, np.float32), TypeError, "float32"),
        ([2**64], TypeError, "object"),
        (np.array([1, None]), TypeError, "object"),
        (["3"], TypeError, "<U1"),
        (np.array([1, 2], "timedelta64[s]"), TypeError, "timedelta64"),
        ([[1, 2]], InputError, r"one dimension, not shape \(1, 2\)"),
        (3, InputError, r"one dimension, not shape \(\)"),
        ([[1], [2, 3]], InputError, "sequences of unequal sizes"),
    ],
)
def test_other_lengths_are_refused(lengths: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack(lengths, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["capacity", "max_items"])
@pytest.mark.parametrize("value", [True, np.True_, 2.0, "8", [8]])
def test_numbers_must_be_integers(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be an integer, not"):
        pack([1], **{"capacity": 8, name: value})  # type: ignore[arg-type]


def test_numbers_out_of_range() -> None:
    for capacity in (0, -1, MAX_CAPACITY + 1, 2**70):
        with pytest.raises(InputError, match=rf"capacity is {capacity}; it must be in 1\.\.2147483647"):
            pack([1], capacity)
    with pytest.raises(InputError, match="max_items is 0; it must be at least 1, or None"):
        pack([1], 8, max_items=0)
    assert len(pack([1] * 5, np.int32(8), max_items=2**70)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("typed", "first"), [("BFD", "bfd"), ("nextfit", "next_fit"), ("ff", "ffd")])
def test_unknown_algorithm_lists_closest_first(typed: str, first: str) -> None:
    with pytest.raises(InputError, match=rf"^algorithm '{typed}' is unknown; choose {first}, ") as caught:
        pack([1], 8, typed)
    assert all(valid in str(caught.value) for valid in ALGORITHMS)


# --- threads, memory, imports -----------------------------------------------------------------------------------------


def test_threads_pack_at_once() -> None:
    """Several threads, own data each, many rounds: the GIL is released, so any shared state would show."""
    problem = [np.random.default_rng(seed).integers(1, 2048, 30_000) for seed in range(4)]
    expected = [pack(lengths, 2048) for lengths in problem]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            packs = pack(problem[number], 2048)
            if not np.array_equal(packs.indices, expected[number].indices):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_kept_between_calls_is_never_shared() -> None:
    """From 131,072 items and 65,536 packs on, the core's arrays are mappings that later calls use again: never while a
    plan is held, and never in two threads at once."""
    lengths = [np.random.default_rng(seed).integers(1, 9, 150_000) for seed in range(4)]
    held = [pack(each, 8) for each in lengths]
    expected = [(plan.indices.copy(), plan.offsets.copy()) for plan in held]

    def same(plan: Packs, number: int) -> bool:
        return all(map(np.array_equal, (plan.indices, plan.offsets), expected[number]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda round_: same(pack(lengths[round_ % 4], 8), round_ % 4), range(40)))
    assert all(same(plan, number) for number, plan in enumerate(held))


def test_gil_is_released() -> None:
    """Without a switch the interpreter gives the GIL to nobody for an hour, so that another thread can move only
    while the core has released it."""
    lengths = np.random.default_rng(0).integers(1, 2**30, 300_000)
    started, stop = threading.Event(), threading.Event()
    steps = 0

    def count() -> None:
        nonlocal steps
        started.set()
        while not stop.is_set():
            steps += 1
            stop.wait(1e-5)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    started.wait()
    try:
        sys.setswitchinterval(3600)
        before = steps
        for _ in range(100):  # once is enough, unless the machine is so busy that the thread gets no processor
            pack(lengths, MAX_CAPACITY)
            if steps > before:
                break
        after = steps
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert after > before


MEMORY_CHECK = """
import resource, sys
import numpy as np
from codeact.packing.packs import pack
lengths = np.random.default_rng(0).integers(1, 2**31 - 1, 1000)
lengths[0] = 2**31 - 1
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 32 * 2**20, resource.RLIM_INFINITY))
for algorithm in ("bfd", "ffd", "next_fit"):
    assert len(pack(lengths, 2**31 - 1, algorithm)) >= 500
try:
    bytearray(64 * 2**20)
except MemoryError:
    print("limited")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_AS")
def test_memory_is_not_in_proportion_to_capacity() -> None:
    """32 MiB beside the interpreter: one bit for each of 2**31 capacities would already be 256 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY_CHECK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "limited"), done.stderr


def test_imports_numpy_only() -> None:
    code = "import sys, codeact.packing.packs; print({'torch', 'pyarrow', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_docstring_examples() -> None:
    results = doctest.testmod(codeact.packing.packs)
    assert results.attempted > 0
    assert results.failed == 0
