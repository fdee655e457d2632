"""``codeact`` and ``python -m codeact``."""

from __future__ import annotations

import importlib.util
import sys

from codeact.base.machine import limit_threads, name_user
from codeact.base.stopping import end_as_stopped, heed_sigterm

EXTRAS = {
    **dict.fromkeys(("score", "merge", "status", "pack", "pack-stats", "ppl"), "score"),
    **dict.fromkeys(("embed", "select"), "select"),
    "clean": "clean",
    "train": "train",
    **dict.fromkeys(("generate", "sanitize", "evaluate", "verify"), "eval"),
    "report": "report",
    **dict.fromkeys(("run", "lab"), "all"),
    "demo": "demo",
}
"""A command and the extra that has what it needs."""


def main() -> None:
    """Run the command line; the doctor without it, as it must run where a library that the others need is broken.

    A command whose extra is not installed ends in one line that says what to type, with exit code 2.
    """
    heed_sigterm()
    try:
        _main()
    except KeyboardInterrupt:  # while libraries load; later the command line itself ends as stopped
        end_as_stopped()


def _main() -> None:
    limit_threads()  # here, as OpenMP reads its number when NumPy or PyTorch load, and the command line loads NumPy
    name_user()
    if sys.argv[1:] in (["doctor"], ["doctor", "--json"]):
        from codeact.doctor.examine import run

        raise SystemExit(run(as_json="--json" in sys.argv))
    command = next((word for word in sys.argv[1:] if word in EXTRAS), None)
    try:
        from codeact.cli import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        own = library in ("codeact", "codeact_kernels")
        if command is None or own or importlib.util.find_spec(library):  # nothing that an installation mends
            raise
        print(f'codeact: error: {command} needs {library}: pip install "codeact[{EXTRAS[command]}]"', file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
