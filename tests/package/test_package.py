"""What importing and typing ``codeact`` costs and gives."""

from __future__ import annotations

import email
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import codeact

HEAVY = ("torch", "transformers", "datasets", "sentence_transformers", "sklearn", "pyarrow", "numpy", "pydantic")
ROOT = Path(__file__).parents[2]


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
    for path in (ROOT / "codeact").rglob("*.py"):
        text = path.read_text()
        for forbidden in ("pickle.load", "torch.load", "trust_remote_code=True", "allow_pickle=True"):
            assert forbidden not in text, f"{path.name}: {forbidden}"


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, what it says) of docs/Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "docs" / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.replace("\\\n", "").splitlines() if line]


def test_the_dockerfile_installs_what_there_is():
    told = dockerfile()
    assert told[0][0] == "FROM"
    assert {name for name, _ in told} <= {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    base, _, version = told[0][1].removesuffix("-slim").partition(":")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (base, f"Programming Language :: Python :: {version}" in settings["classifiers"]) == ("python", True)
    ((constraints, extras),) = [
        found for _, text in told for found in re.findall(r"pip install .*-c (\S+) \"\.\[([\w,]+)\]\"", text)
    ]
    assert set(extras.split(",")) <= set(settings["optional-dependencies"])
    assert constraints in {word for name, text in told if name == "COPY" for word in text.split()}
    assert [json.loads(text) for name, text in told if name in ("ENTRYPOINT", "CMD")] == [["codeact"], ["doctor"]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this source tree, built from a copy so that nothing is left behind here: of what an image gets."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name, text in dockerfile():
        if name == "COPY":
            *sources, target = text.split()
            for source in sources:
                if (ROOT / source).is_dir():  # whose content is copied, and not the folder
                    shutil.copytree(ROOT / source, folder / target, ignore=unwanted)
                else:
                    shutil.copy(ROOT / source, folder / target)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_not_packed.py").touch()
    # The module is what the tests run with; compiling it again takes half a minute, and `make wheel-check` does.
    built = Path(importlib.import_module("codeact._native").__file__)
    program = (
        "import pathlib, shutil, setuptools.command.build_ext as b\n"
        "def copy(self, ext):\n"
        "    target = pathlib.Path(self.get_ext_fullpath(ext.name)); target.parent.mkdir(parents=True, exist_ok=True)\n"
        f"    shutil.copy({str(built)!r}, target)\n"
        "b.build_ext.__init_subclass__ = classmethod(lambda cls: setattr(cls, 'build_extension', copy))\n"
        "from setuptools import build_meta\n"
        "build_meta.build_sdist('dist')\n"
        "print(build_meta.build_wheel('dist'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return folder / "dist" / result.stdout.splitlines()[-1]


def sources(folder: str) -> set[str]:
    """What belongs into the package: everything there that is not built."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT / folder).as_posix() for path in paths if path.suffix not in (".so", ".pyd")}


def test_wheel_holds_all_of_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {f"codeact/{name}" for name in sources("codeact")}
    packages |= {f"codeact_kernels/{name}" for name in sources("kernels/codeact_kernels")}
    native = {name for name in names if name.startswith("codeact/_native.") and name.endswith((".so", ".pyd"))}
    assert len(native) == 1
    assert {name for name in names if ".dist-info/" not in name} == packages | native


def test_sdist_holds_what_builds_the_wheel_and_nothing_else(wheel):
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    expected = {f"{folder}/{name}" for folder in ("codeact", "csrc", "kernels") for name in sources(folder)}
    expected |= set("CMakeLists.txt MANIFEST.in pyproject.toml setup.py constraints.txt constraints-vllm.txt".split())
    assert expected <= names
    more = {name for name in names - expected if not name.startswith("codeact.egg-info/")}
    assert more == {"CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "setup.cfg"}


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
    metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
    assert metadata["Version"] == codeact.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {"score", "select", "train", "eval", "report", "all", "demo", "sandbox", "deepspeed"}
    extras |= {"gpu", "vllm", "evalplus", "lm-eval", "bench", "docs", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    assert b"codeact = codeact.__main__:main" in archive.read(f"{folder}/entry_points.txt")
    tag = email.message_from_bytes(archive.read(f"{folder}/WHEEL"))["Tag"]
    version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert tag.startswith(f"{version}-{version}-")  # not abi3: pybind11 uses more than the limited API


def test_native_module_names_no_folder_of_the_machine_that_built_it():
    content = Path(importlib.import_module("codeact._native").__file__).read_bytes()
    for folder in (ROOT, Path.home() / ".", Path(sys.prefix)):
        assert str(folder).encode() + b"/" not in content
    for run_path in (b"$ORIGIN", b"@loader_path", b"csrc/"):
        assert run_path not in content


@pytest.mark.parametrize("instruction_set", ["", "avx2"])
def test_unpacked_wheel_packs_and_scores_without_a_compiler(wheel, tmp_path, instruction_set):
    from codeact import _native

    if instruction_set and instruction_set not in _native.instruction_sets():
        pytest.skip(f"this CPU has no {instruction_set}")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": "/nowhere"}
    if instruction_set:
        environment["CODEACT_NATIVE_ISA"] = instruction_set

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    assert run("-m", "codeact", "--version") == f"codeact {codeact.__version__}\n"
    said = run(str(ROOT / "tests" / "package" / "wheel_smoke.py"))
    assert f"from {tmp_path / 'codeact'}" in said
    assert said.endswith("compilers on PATH: none\n")
