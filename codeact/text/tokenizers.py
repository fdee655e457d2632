"""What a tokenizer does by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def leading_bos(tokenizer: Any) -> list[int]:
    """Return ``[bos]`` if the tokenizer itself puts its BOS before a text, else ``[]``.

    A tokenizer may define a BOS that it never writes (SmolLM2's is ``<|im_start|>``, the opening of a chat turn): the
    model was not trained to see it before plain text, so it is not added here either.
    """
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def beyond(ids: Iterable[int], tokenizer: Any, vocabulary: int | None) -> str | None:
    """What is wrong with the largest of some token ids, or None: a model of so many tokens knows them all.

    A tokenizer has more than the model's embedding where words were added and it was not widened.
    """
    largest = int(max(ids, default=-1))
    if vocabulary is None or largest < vocabulary:
        return None
    return f"token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the {vocabulary} of the model"
