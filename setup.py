"""Builds codeact._native with CMake. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

INSTALL_COMPILER = "install one (Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install)"


def find_tool(name: str) -> str | None:
    """Path of a program; the running Python's own scripts come first, as `pip install cmake ninja` puts them there."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]))


def check_compiler() -> None:
    """Stop with one line where CMake would stop with thirty. CMake finds Microsoft's compiler without PATH."""
    if os.name == "nt":
        return
    if asked := os.environ.get("CXX"):
        if shutil.which(asked.split()[0]) is None:
            raise SystemExit(f"codeact: the C++ compiler CXX={asked} was not found; correct CXX or unset it")
    elif not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SystemExit(f"codeact: no C++ compiler found; {INSTALL_COMPILER}")


class FreshBuild(build_py):
    """Start from an empty folder: setuptools packs all that lies there, so also modules that were since deleted."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configure and build the top-level CMakeLists.txt, and leave the module where setuptools looks for it."""

    def build_extension(self, ext: Extension) -> None:
        check_compiler()
        cmake = find_tool("cmake")
        if cmake is None:
            raise SystemExit("codeact: CMake not found; install it: pip install cmake ninja")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        configure = [
            "--fresh",  # pip builds in a new environment each time, and the paths of the last one are gone
            *("-S", str(Path(__file__).resolve().parent), "-B", str(build)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_RELEASE={target}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if ninja := find_tool("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        try:
            subprocess.run([cmake, *configure], check=True)
            jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            subprocess.run([cmake, "--build", str(build), "--config", "Release", *jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"codeact: the native module did not build (see CMake's output above): {error}") from None


setup(
    ext_modules=[Extension("codeact._native", sources=[])], cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuild}
)
