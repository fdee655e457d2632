"""``codeact`` and ``python -m codeact``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the doctor without it, as it must run where a library that the others need is broken."""
    if sys.argv[1:] in (["doctor"], ["doctor", "--json"]):
        from codeact.doctor.examine import run

        raise SystemExit(run(as_json="--json" in sys.argv))
    from codeact.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
