"""What importing and typing ``codeact`` costs and gives."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import codeact

HEAVY = ("torch", "transformers", "datasets", "sentence_transformers", "sklearn", "pyarrow", "numpy", "pydantic")
ROOT = Path(__file__).parent.parent


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_import_loads_nothing_heavy():
    assert loaded_after("import codeact") == set()


def test_packing_loads_numpy_only():
    assert loaded_after("import codeact; assert len(codeact.pack([3, 2, 1], 4)) == 2") == {"numpy"}


def test_help_loads_no_torch():
    code = "sys.argv = ['codeact', '--help']\nfrom codeact.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert "torch" not in loaded_after(code)


@pytest.mark.parametrize("name", codeact.__all__)
def test_public_names_exist(name):
    assert getattr(codeact, name) is not None
    assert name in dir(codeact)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'pakc'"):
        codeact.pakc  # noqa: B018


def test_no_top_level_kernels_package():
    """It would shadow Hugging Face's ``kernels``, which transformers imports."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_nothing_unpickles_or_trusts_remote_code():
    for path in (ROOT / "codeact").glob("*.py"):
        text = path.read_text()
        for forbidden in ("pickle.load", "torch.load", "trust_remote_code=True", "allow_pickle=True"):
            assert forbidden not in text, f"{path.name}: {forbidden}"
