"""The ahead-of-time gate: every default configuration compiles for every chip, without a GPU and without a spill."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from codeact_kernels import compile_report, linear_nll, loss_slope, segments, tiles
from codeact_kernels.compile_report import SHARED_LIMIT, TARGETS, Report, problems

# ``make check`` looks at all chips, which takes four times as long; so do the tests with other libraries.
CHIPS = tuple(TARGETS) if os.environ.get("CODEACT_ALL_CHIPS") else ("sm_90",)
NVIDIA = [chip for chip in ("sm_90", "sm_100") if chip in CHIPS]
INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[Report]:
    """In processes that interpret nothing; what Triton has compiled from the same source it has kept."""
    folder = tmp_path_factory.mktemp("compile-report")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "codeact_kernels.compile_report", "--json", str(folder / "report.json")]
    command += [word for chip in CHIPS for word in ("--chip", chip)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("| ok |") == len(result.stdout.splitlines()) - 2
    return [Report(**entry) for entry in json.loads((folder / "report.json").read_text())]


def of(reports, chip, kernel="partial_nll"):
    return [r for r in reports if r.chip == chip and r.kernel.startswith(kernel)]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_is_there(reports, chip):
    found = {r.kernel for r in reports if r.chip == chip}
    expected = {"partial_nll", "merge_nll", "loss_slope", "sum_segments"}
    expected |= {"rms_norm_rows", "rms_norm_slopes", "gate", "gate_slopes", "rotation"}
    assert found == (expected | {"partial_nll_descriptors"} if chip in ("sm_90", "sm_100") else expected)
    dtypes = {r.variant.split()[0] for r in of(reports, chip)}
    assert dtypes == {"bfloat16", "float16", "float32"}


@pytest.mark.parametrize("chip", CHIPS)
def test_nothing_spills_and_shared_memory_suffices(reports, chip):
    for r in reports:
        if r.chip == chip:
            assert r.stack == 0, r
            assert r.shared <= SHARED_LIMIT[chip], r
            assert 0 < r.registers <= 255, r


@pytest.mark.parametrize("chip", CHIPS)
def test_tensor_cores_do_the_work(reports, chip):
    half = [r for r in of(reports, chip) if "float32" not in r.variant]
    assert len(half) == 6 + len(tiles.candidates_for(chip)[1:])
    for r in half:
        assert any(name.startswith(INSTRUCTIONS[chip]) for name in r.matrix), r


@pytest.mark.parametrize("chip", NVIDIA)
def test_descriptors_become_tma_loads(reports, chip):
    found = of(reports, chip, "partial_nll_descriptors")
    # Two dtypes, plain and with bias and softcap; and what may be tried.
    assert len(found) == 4 + len(tiles.candidates_for(chip)[1:])
    assert all(r.copies for r in found)
    assert not any(r.copies for r in of(reports, chip) if r.kernel == "partial_nll")


@pytest.mark.parametrize("chip", NVIDIA)
def test_exact_float32_products_do_not_use_tf32(reports, chip):
    assert all(not r.matrix for r in of(reports, chip) if "float32" in r.variant)


def test_two_programs_of_sm_90s_tile_fit_on_a_multiprocessor(reports):
    """Its shared memory is 228 KiB, of which a program takes 1 KiB beside its own; its registers are 65,536."""
    for r in of(reports, "sm_90", "partial_nll_descriptors"):
        if "to try" not in r.variant:
            assert 2 * (r.shared + 1024) <= 228 << 10
            assert 2 * 256 * r.registers <= 65_536


def test_a_wide_tile_may_be_tried_on_sm_90(reports):
    assert [r.stack for r in of(reports, "sm_90") if "bias, to try: 128 x 256 x 64, 3 stages" in r.variant] == [0]


def test_tiles_are_data_that_can_be_written_anew(tmp_path):
    wide = tiles.candidates_for("sm_90")[2]
    assert wide.block_v == 256
    text = tiles.with_tile(tiles.TABLE.read_text(), "sm_90", wide, "the fastest on a card")
    (tmp_path / "tiles.toml").write_text(text)
    before, after = tiles.read_table(), tiles.read_table(tmp_path / "tiles.toml")
    assert after["sm_90"].pop("half") == [wide]
    assert before["sm_90"].pop("half") == [tiles.tile_for(torch.bfloat16, "sm_90")]
    assert after == before
    assert "source = 'the fastest on a card'" in text


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack": 8}, "8 bytes of registers spilled"),
        ({"shared": 228 << 10}, "of shared memory, sm_90 has"),
        ({"matrix": {"HMMA": 4}}, "no HGMMA instruction"),
        ({"copies": 0}, "no TMA instruction"),
    ],
)
def test_faults_are_named(change, fault):
    good = Report(
        chip="sm_90", kernel="partial_nll_descriptors", variant="bfloat16", registers=100, stack=0, shared=1024,
        matrix={"HGMMA": 4}, copies=2,
    )  # fmt: skip
    assert good.faults() == []
    assert fault in dataclasses.replace(good, **change).faults()[0]


def test_what_is_compiled_is_what_is_launched(monkeypatch):
    """On fake CUDA tensors the public functions ask for the kernels, grids, and options that the report compiles."""
    compiled = {
        kernel.fn.__name__: options for _, found in reversed(problems("sm_90")) for kernel, _, _, options in found
    }
    launched = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((self.kernel, grid, arguments, options))

    def recorded(real):
        def wrapper(*arguments):
            found = real(*arguments)
            if isinstance(found, list):
                return [(Recorder(kernel), *rest) for kernel, *rest in found]
            return (Recorder(found[0]), *found[1:])

        return wrapper

    monkeypatch.setattr(linear_nll, "launches", recorded(linear_nll.launches))
    monkeypatch.setattr(segments, "segment_launch", recorded(segments.segment_launch))
    monkeypatch.setattr(loss_slope, "loss_slope_launch", recorded(loss_slope.loss_slope_launch))
    monkeypatch.setattr(linear_nll, "architecture_of", lambda device: "sm_90")
    tile = tiles.tile_for(torch.bfloat16, "sm_90")
    hidden, weight = torch.zeros(9, 64, dtype=torch.bfloat16), torch.zeros(300, 64, dtype=torch.bfloat16)
    linear_nll.linear_nll(hidden, weight, torch.zeros(9, dtype=torch.int64))
    segments.segment_sums(torch.zeros(9), torch.tensor([0, 9], dtype=torch.int32))
    loss_slope.loss_and_slope(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), None, None, -100, None, True)
    names = ["partial_nll_descriptors", "merge_nll", "sum_segments", "loss_slope"]
    assert [kernel.fn.__name__ for kernel, *_ in launched] == names
    for kernel, _, _, options in launched:
        assert options == compiled[kernel.fn.__name__]
    assert launched[0][1] == (-(-300 // tile.block_v),)


def test_it_refuses_the_interpreter(monkeypatch):
    monkeypatch.setattr(tiles, "interpreting", lambda: True)
    monkeypatch.setattr(sys, "argv", ["compile_report"])
    with pytest.raises(SystemExit, match="unset TRITON_INTERPRET"):
        compile_report.main()
