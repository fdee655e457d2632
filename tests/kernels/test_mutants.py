"""Broken copies of the kernels: each must fail the check that is there for it, or that check proves nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from codeact_kernels import linear_nll, loss_slope, segments

from tests.kernels import agreement
from tests.kernels.test_segments import check_ignored_and_empty, check_long_sums


def broken(module, tmp_path: Path, old: str, new: str):
    """Import a copy of ``module`` in which ``old`` reads ``new``, beside the real one."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__} has changed: {source.count(old)} x {old!r}"
    path = tmp_path / "broken_kernels.py"
    path.write_text(source.replace(old, new).replace('"codeact::', '"codeact_broken::'))
    spec = importlib.util.spec_from_file_location("broken_kernels", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


MASK = 'logits = tl.where((column < V - first)[None, :], logits, float("-inf"))'
CAP = "logits = softcap * _tanh(logits / softcap)"
HIDDEN_OFFSET = "T - 1).to(tl.int64)"
WEIGHT_OFFSET = "V - 1).to(tl.int64)"


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        pytest.param(
            CAP,
            f"{MASK}\n        {CAP}\n        V = first + BLOCK_V",
            agreement.check_ragged_vocabulary_under_a_small_cap,
            id="softcap after the mask",
        ),
        pytest.param(
            MASK, "logits += 0.0", agreement.check_ragged_vocabulary_under_a_small_cap, id="no vocabulary mask"
        ),
        pytest.param(
            "    if HAS_BIAS:\n        logits +=",
            f"    if HAS_SOFTCAP:\n        {CAP}\n    if HAS_BIAS:\n        logits +=",
            agreement.check_bias_comes_before_softcap,
            id="softcap before the bias",
        ),
        pytest.param(
            "total * tl.exp2(largest - shift) +",
            "total +",
            agreement.check_many_vocabulary_tiles,
            id="sums not rescaled",
        ),
        pytest.param(
            'shift = tl.where(raised == float("-inf"), 0.0, raised)',
            'shift = tl.where(largest == float("-inf"), 0.0, largest)',
            agreement.check_many_vocabulary_tiles,
            id="rescaled by the old maximum",
        ),
        pytest.param(
            'shift = tl.where(largest == float("-inf"), 0.0, largest * _LOG2E)',
            "shift = largest * _LOG2E",
            agreement.check_tokens_forbidden_by_the_bias,
            id="a tile of -inf",
        ),
        pytest.param(
            "tl.max(here.to(tl.int32), axis=0) > 0",
            "tl.min(here.to(tl.int32), axis=0) > 0",
            agreement.check_bias_comes_before_softcap,
            id="targets of tiles full of them only",
        ),
        pytest.param(") / _LOG2E", ")", agreement.check_bias_comes_before_softcap, id="a loss in bits"),
        pytest.param(
            "tile = first + tl.arange(0, BLOCK_TILES)",
            "tile = (first + tl.arange(0, BLOCK_TILES) + 17 * T) % tiles",
            agreement.check_same_bits_in_any_batch,
            id="merge order depends on the batch",
        ),
        pytest.param(
            "h = tl.load(hidden_at, mask=depth[None, :] < D - start, other=0.0)",
            "h = tl.load(hidden_at)",
            agreement.check_inside_poisoned_buffers,
            id="no mask along D",
        ),
        pytest.param(HIDDEN_OFFSET, "T - 1)", agreement.check_strides_past_2_31, id="int32 offsets of hidden"),
        pytest.param(WEIGHT_OFFSET, "V - 1)", agreement.check_strides_past_2_31, id="int32 offsets of weight"),
        pytest.param(
            "step = tl.full((), BLOCK_D, tl.int64)",
            "step = tl.full((), BLOCK_D, tl.int32)",
            agreement.check_strides_past_2_31,
            id="int32 steps along D",
        ),
    ],
)
def test_broken_losses_are_caught(tmp_path, old, new, check):
    copy = broken(linear_nll, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check(copy.linear_nll)


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        pytest.param(
            "kept = at < end\n", "kept = at < end + 1\n", check_ignored_and_empty, id="one token of the next sample"
        ),
        pytest.param(
            "kept = kept & (tl.load(targets + at, mask=kept, other=0) != ignore_index)",
            "pass",
            check_ignored_and_empty,
            id="ignored tokens counted",
        ),
        pytest.param(
            "total += tl.load(values + at, mask=kept, other=0.0).to(tl.float64)",
            "total = (total.to(tl.float32) + tl.load(values + at, mask=kept, other=0.0)).to(tl.float64)",
            check_long_sums,
            id="float32 sums",
        ),
    ],
)
def test_broken_sums_are_caught(tmp_path, old, new, check):
    copy = broken(segments, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check(copy.segment_sums)


@pytest.mark.parametrize("check", [agreement.check_slopes, agreement.check_slopes_past_2_31])
def test_slopes(check):
    check(loss_slope.loss_and_slope)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("slope *= 1.0 - tanh * tanh", "slope *= 1.0", id="no derivative of the softcap"),
        pytest.param("tl.where(kept, slope * factor, 0.0)", "slope * factor", id="ignored rows slope"),
        pytest.param('x = tl.where(inside, x, float("-inf"))', "x += 0.0", id="no vocabulary mask"),
        pytest.param("total * tl.exp2((largest - shift) * _LOG2E)", "total", id="sums not rescaled"),
        pytest.param("picked, at, bias, whole + lanes", "picked, at, bias, lanes", id="the first block twice"),
        pytest.param("_sloped(at, bias, whole + lanes", "_sloped(at, bias, lanes", id="no slopes at the end"),
        pytest.param(
            "range(0, whole, BLOCK):\n            _sl", "range(BLOCK, whole, BLOCK):\n            _sl", id="nor before"
        ),
        pytest.param("tl.load(scale + row)", "tl.load(scale)", id="the first row's scale"),
        pytest.param("tl.store(at + lane, slope, mask=lane < V)", "tl.store(at + lane, slope)", id="past a row's end"),
        pytest.param("(lane == target).to(tl.float32)", "(lane == 0).to(tl.float32)", id="another target's slope"),
    ],
)
def test_broken_slopes_are_caught(tmp_path, old, new):
    copy = broken(loss_slope, tmp_path, old, new)
    with pytest.raises(AssertionError):
        agreement.check_slopes(copy.loss_and_slope)


def test_int32_offsets_of_rows_are_caught(tmp_path):
    copy = broken(loss_slope, tmp_path, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)")
    with pytest.raises(AssertionError):
        agreement.check_slopes_past_2_31(copy.loss_and_slope)
