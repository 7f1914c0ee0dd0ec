"""How alike two texts are, by the character sequences they share. Pure.

Jaccard similarity of 5-character shingles (Broder 1997), over letters and digits in lower case, so that spacing and
punctuation do not count. Finds copies and light edits, not paraphrases. Shingles are 64-bit hashes of five characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5
NEAR = 0.8
"""Similarity from which two texts count as near-duplicates."""
BANDS, ROWS = 16, 4
"""Texts that agree in all ROWS MinHashes of a band are compared: of those at NEAR, 0.02 % are missed."""
MAX_CHARACTERS = 20_000
Shingles = NDArray[np.uint64]
_DRAW = np.random.default_rng(0)
_PLACES = _DRAW.integers(1, 2**63, SHINGLE, dtype=np.uint64) | np.uint64(1)
_FACTORS = _DRAW.integers(1, 2**63, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)


def shingles(text: str) -> Shingles:
    """Hashes of the sequences of five letters or digits in the first MAX_CHARACTERS, ascending, each once.

    A shorter text is one shingle.
    """
    letters = re.sub(r"[\W_]+", "", text[:MAX_CHARACTERS].lower())
    codes = np.frombuffer(letters.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < SHINGLE:
        codes = np.pad(codes, (0, SHINGLE - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, SHINGLE)
    return np.unique(_mixed((windows * _PLACES).sum(axis=1, dtype=np.uint64)))


def _mixed(values: Shingles) -> Shingles:
    """Spread close values over all 64 bits."""
    values = values ^ (values >> np.uint64(31))
    values = values * np.uint64(0x9E3779B97F4A7C15)
    return values ^ (values >> np.uint64(29))


def jaccard(a: Shingles, b: Shingles) -> float:
    """|a ∩ b| / |a ∪ b|."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def similarity(a: str, b: str) -> float:
    """0 (nothing shared) to 1 (the same letters)."""
    return jaccard(shingles(a), shingles(b))


def near_duplicates(texts: Sequence[str]) -> list[int | None]:
    """For each text the first earlier one that it nearly equals, else None. MinHash bands propose, Jaccard decides."""
    sets = [shingles(text) for text in texts]
    places: dict[tuple[int, bytes], list[int]] = {}
    found: list[int | None] = []
    for index, own in enumerate(sets):
        bands = list(_bands(own))
        candidates = sorted({other for band in bands for other in places.get(band, ())})
        found.append(next((other for other in candidates if jaccard(sets[other], own) >= NEAR), None))
        if found[-1] is None:  # a copy is found through the text that it copies
            for band in bands:
                places.setdefault(band, []).append(index)
    return found


def _bands(own: Shingles) -> Iterator[tuple[int, bytes]]:
    """The least of each of BANDS · ROWS hash functions over the shingles, in groups of ROWS."""
    hashed = own[:, None] * _FACTORS[None, :]
    least = (hashed ^ (hashed >> np.uint64(32))).min(axis=0)
    for band in range(BANDS):
        yield band, least[band * ROWS : (band + 1) * ROWS].tobytes()
