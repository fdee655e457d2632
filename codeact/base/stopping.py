"""^C and SIGTERM end a command in one way: a line that says what to do, and exit code 130 or 143."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Never

from codeact.base.console import say

_stopped_by = signal.SIGINT


def heed_sigterm() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, as ^C does."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> Never:
    global _stopped_by  # noqa: PLW0603 - typer hands on that it was interrupted, not by what
    _stopped_by = signal.SIGTERM
    raise KeyboardInterrupt


def end_as_stopped() -> Never:
    """Say that the command was stopped, and exit."""
    say("\ncodeact: stopped; the same command goes on where it was")
    raise SystemExit(128 + _stopped_by)
