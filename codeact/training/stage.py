"""``codeact train`` as a command."""

from __future__ import annotations

from collections.abc import Sequence

from codeact.training.flags import parse


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        InputError: see ``codeact.training.flags.parse`` and ``codeact.training.train.train``.
    """
    settings = parse(argv)
    if isinstance(settings, str):
        print(settings)
        return
    import torch

    from codeact.training.train import train

    try:
        train(settings)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
