"""``codeact`` and ``python -m codeact``."""

from __future__ import annotations

import sys

from codeact.base.machine import limit_threads


def main() -> None:
    """Run the command line; the doctor without it, as it must run where a library that the others need is broken."""
    limit_threads()  # here, as OpenMP reads its number when NumPy or PyTorch load, and the command line loads NumPy
    if sys.argv[1:] in (["doctor"], ["doctor", "--json"]):
        from codeact.doctor.examine import run

        raise SystemExit(run(as_json="--json" in sys.argv))
    from codeact.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
