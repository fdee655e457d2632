"""Text with spans -> token ids, and which of them belong to a span.

The text is tokenized in pieces. They meet where generation tokenizes apart, too:

- where an answer begins: the prompt is tokenized alone, and the answer is what comes after. Tokenized together, the end
  of a prompt and the indentation of the code that follows would share a token, or two line breaks come apart. After a
  control token nothing can mix, so there is no cut;
- around a control token in the text of a turn (``<s>`` in HTML, ``<|im_end|>`` in code about chats): it is tokenized as
  the plain text that it is. Read as control tokens, such texts would end or fake a turn.

Within a piece every token carries the characters that it stands for, so where an answer ends needs no guess. Should a
token reach over a bound nevertheless, the text is cut there as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codeact.text.tokenizers import leading_bos

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpannedText:
    """Text, its answers, spans that hold a control token's text but are none, and the answers not to be labelled.

    ``changed``: of the latter, how many the template changed.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    plain: frozenset[tuple[int, int]]
    context: frozenset[tuple[int, int]] = frozenset()
    changed: int = 0


class ControlTexts:
    """Carries the texts of control tokens that a row holds through a template, so that they can be read as plain text.

    Args:
        specials: what the tokenizer reads as control tokens, the longest first.
    """

    def __init__(self, specials: Sequence[str]) -> None:
        self._specials = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def hide(self, texts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Put a character that stands nowhere else for every such text; returns the texts, and {character: text}."""
        whole = "".join(texts)
        free = (mark for mark in map(chr, itertools.count(0xF0000)) if mark not in whole)
        marks = {token: next(free) for token in sorted(set(self._specials.findall(whole)))}
        hidden = [self._specials.sub(lambda match: marks[match[0]], text) for text in texts] if marks else list(texts)
        return hidden, {mark: token for token, mark in marks.items()}

    @staticmethod
    def show(text: str, tokens: dict[str, str], answers: Sequence[tuple[int, int]] = ()) -> SpannedText:
        """Put them back into what the template wrote, and note where they stand; answers move along."""
        if not tokens:
            return SpannedText(text=text, answers=tuple(answers), plain=frozenset())
        marks = re.compile("[" + "".join(tokens) + "]")
        places = [match.start() for match in marks.finditer(text)]
        grown = np.cumsum([0, *(len(tokens[text[place]]) - 1 for place in places)])

        def moved(position: int) -> int:
            return position + int(grown[np.searchsorted(places, position)])

        return SpannedText(
            text=marks.sub(lambda match: tokens[match[0]], text),
            answers=tuple((moved(start), moved(end)) for start, end in answers),
            plain=frozenset((moved(place), moved(place + 1)) for place in places),
        )


class SpanEncoder:
    """Text with spans -> (ids int32 (L,), labelled bool (L,))."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos = leading_bos(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special_ids = np.array(sorted(added), dtype=np.int32)
        self.control_tokens = tuple(str(token) for token in added.values())
        self.greedy_walls = tuple(str(token) for token in added.values() if token.rstrip)
        self.offsets = bool(tokenizer.is_fast) and self._offsets_tile()
        # SentencePiece tokenizers put a space before a text; in the middle of a conversation there is none.
        self.heads = {head: self._ids(head) for head in ("\n", "a")}
        self.adds_space = self._ids("\na") != self.heads["\n"] + self._ids("a")

    def encode(self, items: Sequence[SpannedText], inner: bool = False) -> list[tuple[Ints, NDArray[np.bool_]]]:
        """Return ids int32 (L,) of every text, and which of them are labelled, bool (L,).

        ``inner``: the texts go on behind others, so that nothing is put before them.
        """
        results: list[tuple[Ints, NDArray[np.bool_]] | None] = [None] * len(items)
        cuts = [self._cuts(item) for item in items]
        pending = list(range(len(items)))
        while pending:
            tokens = self._tokens([items[index] for index in pending], [cuts[index] for index in pending], inner)
            again = []
            for index, (ids, starts, ends) in zip(pending, tokens, strict=True):
                labelled, crossed = self._label(items[index], ids, starts, ends)
                if crossed - cuts[index]:  # a token cannot reach over a cut, so this ends
                    cuts[index] |= crossed
                    again.append(index)
                    continue
                bos = self.bos if not inner and ids[:1].tolist() != self.bos else []
                results[index] = (
                    np.concatenate([np.array(bos, dtype=np.int32), ids]),
                    np.concatenate([np.zeros(len(bos), dtype=np.bool_), labelled]),
                )
            pending = again
        return [result for result in results if result is not None]

    def _cuts(self, item: SpannedText) -> set[int]:
        cuts = {bound for span in item.plain for bound in span}
        for start, end in item.answers:
            before = item.text[:start]
            walled = before.endswith(self.control_tokens) or (
                # such a token takes the white space after it along, but may not take that of the answer
                bool(self.greedy_walls)
                and before.rstrip().endswith(self.greedy_walls)
                and not item.text[start : start + 1].isspace()
            )
            # Pieces that lie wholly inside or outside of an answer need no offsets.
            cuts |= set() if walled and self.offsets else {start}
            cuts |= set() if self.offsets else {end}
        return cuts

    def _label(self, item: SpannedText, ids: Ints, starts: Ints, ends: Ints) -> tuple[NDArray[np.bool_], set[int]]:
        """The tokens of the answers, and the bounds that a token reaches over."""
        labelled = np.zeros(len(ids), dtype=np.bool_)
        crossed = set()
        for start, end in item.answers:
            if np.any((starts < start) & (ends > start)):
                crossed.add(start)
            over = (starts < end) & (ends > end)
            # An end of turn may take the white space after it along (rstrip); it is still that token.
            if np.any(over) and not np.isin(ids[over], self.special_ids).all():
                crossed.add(end)
            if (start, end) not in item.context:
                labelled |= (starts >= start) & (starts < end)
        return labelled, crossed

    def _tokens(
        self, items: Sequence[SpannedText], cuts: Sequence[set[int]], inner: bool
    ) -> list[tuple[Ints, Ints, Ints]]:
        """Ids, and the characters [start, end) of each: every item is tokenized in the pieces between its cuts."""
        pieces = []
        for number, (item, own) in enumerate(zip(items, cuts, strict=True)):
            for start, end in pairwise(sorted({0, len(item.text)} | own)):
                pieces.append((number, start, end, (start, end) in item.plain))
        ids: list[list[Ints]] = [[] for _ in items]
        offsets: list[list[Ints]] = [[] for _ in items]
        encoded: dict[int, tuple[Ints, Ints]] = {}
        for plain in (False, True):
            chosen = [place for place, piece in enumerate(pieces) if piece[3] == plain]
            texts = [items[pieces[place][0]].text[pieces[place][1] : pieces[place][2]] for place in chosen]
            within = [inner or pieces[place][1] > 0 for place in chosen]
            encoded.update(zip(chosen, self._pieces(texts, within, plain), strict=True))
        for place, (number, start, _, _) in enumerate(pieces):
            piece_ids, piece_offsets = encoded[place]
            ids[number].append(piece_ids)
            offsets[number].append(piece_offsets + np.int32(start))
        empty = np.zeros((0, 2), dtype=np.int32)
        joined = [np.concatenate([empty, *parts]) for parts in offsets]
        return [
            (np.concatenate([empty[:, 0], *own]), both[:, 0], both[:, 1]) for own, both in zip(ids, joined, strict=True)
        ]

    def _pieces(self, texts: Sequence[str], inner: Sequence[bool], plain: bool) -> list[tuple[Ints, Ints]]:
        """Ids (n,) and offsets (n, 2) of every text; without offsets each token stands for the whole text."""
        if not texts:
            return []
        # A letter never joins white space, nor a line break anything else: what stands before them is cut off again.
        heads = [
            ("a" if text[:1].isspace() else "\n") if within and self.adds_space else ""
            for text, within in zip(texts, inner, strict=True)
        ]
        encoded = self.tokenizer(
            [head + text for head, text in zip(heads, texts, strict=True)],
            add_special_tokens=False,
            split_special_tokens=plain,
            return_offsets_mapping=self.offsets,
            return_attention_mask=False,
            verbose=False,
        )
        results = []
        for place, (head, text) in enumerate(zip(heads, texts, strict=True)):
            ids = np.array(encoded["input_ids"][place], dtype=np.int32)
            if self.offsets:
                offsets = np.array(encoded["offset_mapping"][place], dtype=np.int32).reshape(-1, 2)
            else:
                offsets = np.tile(np.array([0, len(text)], dtype=np.int32), (len(ids), 1))
            if head:
                front = self.heads[head]
                if ids[: len(front)].tolist() == front:
                    ids, offsets = ids[len(front) :], offsets[len(front) :] - np.int32(1 if self.offsets else 0)
                else:  # labels stay exact, the piece only begins with the tokenizer's own space
                    (ids, offsets), *_ = self._pieces([text], [False], plain)
            results.append((ids, offsets))
        return results

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _offsets_tile(self) -> bool:
        """Whether offsets cover every character; some tokenizers leave out the space before a word."""
        probe = "a b\n  c"
        offsets = self.tokenizer(probe, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        bounds = [0, *(bound for offset in offsets for bound in offset), len(probe)]
        return all(a == b for a, b in zip(bounds[::2], bounds[1::2], strict=True))
