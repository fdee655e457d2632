"""By which rules a run computes: the definitions, or the paper's scripts."""

from __future__ import annotations

import logging

from codeact.base.errors import InputError, one_of

PROTOCOLS = ("exact", "paper")
"""exact: by the definitions; paper: as the paper's scripts compute, with their flaws."""


def resolve_protocol(name: str) -> str:
    """Return ``name``, or its name of today: until the next release "seed" means "paper".

    Raises:
        InputError: it is none of ``PROTOCOLS``.
    """
    if name == "seed":
        logging.getLogger("codeact").warning("protocol seed is now called paper; the next release forgets the old word")
        return "paper"
    return one_of("protocol", name, PROTOCOLS)


TURNS = ("all", "last")
"""Which answers of a conversation are scored: all that are to be learnt, or the last one given the rest."""


def resolve_turns(turns: str | None, protocol: str) -> str:
    """Return ``turns``; None is all, but under protocol paper, which knows one question and one answer, the last.

    Raises:
        InputError: it is none of ``TURNS``, or does not fit the protocol.
    """
    if turns is None:
        return "last" if protocol == "paper" else "all"
    if one_of("turns", turns, TURNS) == "all" and protocol == "paper":
        raise InputError("protocol paper scores the last answer of a conversation only; leave out --turns all")
    return turns
