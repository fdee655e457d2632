"""Texts -> hashed n-grams of tokens, for a whole block of texts at once.

A token is a word, one character of a script that puts no spaces between words, or one sign; upper and lower case are
the same. Of n-grams only hashes are kept, which depend on nothing but the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]

MOST_TEXTS = 1 << 11
"""Of a block."""

# Thai, Lao, Burmese, Khmer, kana, Chinese and Korean: a run of them is no word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_MOST_CACHED = 1 << 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiplying by it loses nothing
_OWNER_BITS = np.uint64(11)


class _TokenHashes(dict[str, int]):
    """Token -> 64 bits, the lowest of which says whether it is a word; forgets all when it has grown large."""

    def __missing__(self, token: str) -> int:
        if len(self) >= _MOST_CACHED:
            self.clear()
        value = self[token] = xxh3_64_intdigest(token.encode()) & ~1 | (token[0].isalnum() or token[0] == "_")
        return value


_hash_of = _TokenHashes()


@dataclass(frozen=True, slots=True, eq=False)
class HashBlock:
    """Hashes of several texts, one text after the other.

    ``hashes``: (items,); ``owners``: (items,) the text of each, ascending from 0; ``texts``: how many there are.
    """

    hashes: Hashes
    owners: Places
    texts: int

    @classmethod
    def tokens_of(cls, texts: Iterable[str]) -> HashBlock:
        """The tokens of every text, in order."""
        tokens = [_TOKEN.findall(text.casefold()) for text in texts]
        sizes = [len(found) for found in tokens]
        hashes = np.fromiter(map(_hash_of.__getitem__, chain.from_iterable(tokens)), np.uint64, count=sum(sizes))
        return cls(hashes, np.repeat(np.arange(len(sizes)), sizes), len(sizes))

    def bounds(self) -> Places:
        """(texts + 1,) where each text begins."""
        return np.searchsorted(self.owners, np.arange(self.texts + 1))

    def joined(self, owners: Places, texts: int) -> HashBlock:
        """The same items, where text i is a part of text ``owners[i]`` of ``texts``; -1: it is left out."""
        new = owners[self.owners]
        return HashBlock(self.hashes[new >= 0], new[new >= 0], texts)

    def grams(self, n: int) -> HashBlock:
        """The n-grams of every text; of one that has fewer tokens, the one gram of all of them."""
        bounds = self.bounds()
        places = np.arange(len(self.hashes))
        left = bounds[1:][self.owners] - places  # tokens from here to the end of the text
        short = np.flatnonzero((left < n) & (places == bounds[self.owners]))
        full = np.flatnonzero(left >= n)
        grams = np.zeros(len(self.hashes), np.uint64)
        for step in range(n):
            for starts in (full, short[left[short] > step]):
                grams[starts] = chained(grams[starts], self.hashes[starts + step])
        kept = np.sort(np.concatenate([full, short])) if len(short) else full
        return HashBlock(_mixed(grams[kept]), self.owners[kept], self.texts)

    def words(self) -> HashBlock:
        """Those tokens that are words."""
        kept = (self.hashes & np.uint64(1)).astype(np.bool_)
        return HashBlock(self.hashes[kept], self.owners[kept], self.texts)

    def distinct(self) -> HashBlock:
        """Each text's set, ascending; the lowest 11 bits of a hash become 0, so that one sort does for all texts."""
        keys = (self.owners.astype(np.uint64) << (np.uint64(64) - _OWNER_BITS)) | (self.hashes >> _OWNER_BITS)
        keys.sort()
        keys = keys[np.diff(keys, prepend=~keys[:1]) != 0]
        return HashBlock(keys << _OWNER_BITS, (keys >> (np.uint64(64) - _OWNER_BITS)).astype(np.int64), self.texts)


def chained(hashes: Hashes, following: Hashes) -> Hashes:
    """Hashes of sequences, each with one more item at its end."""
    return (hashes * _FACTOR) ^ (hashes >> np.uint64(29)) ^ following


def _mixed(values: Hashes) -> Hashes:
    """Spread every bit over all of them (the finaliser of MurmurHash3): n-grams that begin alike look alike no more."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))
