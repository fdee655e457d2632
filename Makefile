# make demo | test | check | bench : each makes the virtual environment first, if need be.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# uv installs in a tenth of the time; UV= for pip.
UV ?= $(shell command -v uv 2>/dev/null)
INSTALL = $(if $(UV),$(UV) pip install -q --python $(BIN)/python,$(BIN)/python -m pip install -q)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix check docs includes constraints wheel-check bench models sandbox browser format clean

help:
	@echo "make demo    score, embed, cluster, select, train, evaluate on small models and real code (3 to 6 minutes on 2 cores)"
	@echo "make test    all tests"
	@echo "make test-matrix   the tests with the lowest and the newest libraries, each in an environment of its own (10 GB)"
	@echo "make check   lint, types, format, pages, sanitizers over the C++"
	@echo "make docs    the pages and the public names by their docstrings, as a site: build/docs/index.html"
	@echo "make bench   every benchmark; figures and tables in benchmarks/results"

$(BIN)/codeact: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
	@command -v $(PYTHON) >/dev/null || { echo "codeact: $(PYTHON) not found; install Python 3.11 or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "codeact: Python 3.11 or newer is needed; say make PYTHON=..."; exit 1; }
	@for c in "$${CXX:-c++}" g++ clang++; do command -v $$c >/dev/null && exit 0; done; echo "codeact: no C++ compiler found; install one (Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install)"; exit 1
	@test -x $(BIN)/python || $(if $(UV),$(UV) venv -q --python $(PYTHON),$(PYTHON) -m venv) $(VENV)
	@echo "installing codeact and its pinned dependencies into $(VENV) ..."
	@$(if $(UV),,$(INSTALL) -c constraints.txt -U pip)
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(INSTALL) -c constraints.txt -e ".[demo,dev]"
	@touch $@

models: $(BIN)/codeact
	@$(BIN)/python -m codeact.run.demo_models >/dev/null

# What isolates generated programs comes with the extra sandbox; the system's may isolate where that may not. Where
# nothing does, their tests are skipped and the demo leaves them out.
sandbox: $(BIN)/codeact
	@$(BIN)/python -c 'from codeact.evaluation.sandbox.sandbox import Limits, Sandbox; Sandbox(Limits())' 2>/dev/null || \
	  { ! command -v bwrap >/dev/null && test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  { apt-get install -qq -y bubblewrap || { apt-get update -qq && apt-get install -qq -y bubblewrap; }; } >/dev/null 2>&1; } || \
	  echo "codeact: generated programs will not be run: no bubblewrap isolates here (docs/install.md, Containers)"

# What looks at the report; where it cannot be had, those tests are skipped.
browser:
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  { apt-get install -qq -y chromium chromium-driver || { apt-get update -qq && apt-get install -qq -y chromium chromium-driver; }; } >/dev/null 2>&1; } || \
	  echo "codeact: no Chromium: the tests that open the report are skipped (Debian: apt-get install chromium chromium-driver)"

demo: models sandbox
	$(BIN)/codeact demo $(DEMO_ARGS)

test: models sandbox browser
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# MATRIX_ARGS="base-lowest" takes minutes, all of it hours.
test-matrix: $(BIN)/codeact sandbox
	$(BIN)/python tests/package/matrix.py $(MATRIX_ARGS)

# Compiled once for each instruction set, and the linker keeps one copy of an inline function of the standard library.
includes:
	@! grep -rnE '^[[:space:]]*#[[:space:]]*(include|import)' csrc --include='*.inc.hpp' | \
	  grep -vE '(<(immintrin\.h|cstdint|cstddef)>|"[a-z0-9_/]+\.inc\.hpp")[[:space:]]*(//.*)?$$' || \
	  { echo "codeact: a *.inc.hpp includes the standard library"; exit 1; }

# A link that leads nowhere, a docstring of an argument that is not there: each fails.
docs: $(BIN)/codeact
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(BIN)/codeact includes docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/package/resolution.py
	$(BIN)/python -m benchmarks.pages --check
	@PYTHONPATH=kernels $(BIN)/python -m codeact_kernels.compile_report >/dev/null || { echo "codeact: a kernel spills or lacks what it should use: python -m codeact_kernels.compile_report"; exit 1; }
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*/*.cpp csrc/*/*.hpp tests/csrc/*.cpp
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCODEACT_SANITIZE=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) >/dev/null
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# The sdist, a wheel made from it, and that wheel in an environment of its own: all that it says, without a compiler.
wheel-check:
	rm -rf build/wheel-check
	$(PYTHON) -m venv build/wheel-check
	build/wheel-check/bin/python -m pip install -q build
	build/wheel-check/bin/python -m build -o build/wheel-check/dist . >build/wheel-check/build.log || { tail -30 build/wheel-check/build.log; exit 1; }
	build/wheel-check/bin/python -m pip install -q -c constraints.txt "$$(echo build/wheel-check/dist/*.whl)[all]"
	cd build/wheel-check && PATH=/nowhere bin/codeact doctor && PATH=/nowhere bin/python ../../tests/package/wheel_smoke.py

bench: models sandbox
	@$(INSTALL) -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks

format: $(BIN)/codeact
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*/*.cpp csrc/*/*.hpp tests/csrc/*.cpp

clean:
	rm -rf $(VENV) build dist demo-run *.egg-info codeact/*.so

# One resolution for every platform and Python; pins stay as they are where they can, UPGRADE=--upgrade takes the newest.
constraints: $(BIN)/codeact
	$(BIN)/python tests/package/resolution.py --write $(UPGRADE)
