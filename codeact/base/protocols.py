"""By which rules a run computes: the definitions, or the paper's scripts."""

from __future__ import annotations

import logging

from codeact.base.errors import one_of

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
