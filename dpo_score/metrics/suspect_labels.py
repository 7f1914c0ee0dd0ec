"""Labels worth a second look: pairs that every policy ranks against the label, and pairs with nothing to rank. Pure.

A pair ranked against its label by every checkpoint is either hard or mislabelled (confident learning, arXiv
1911.00068, reads the same sign from a classifier); only a person can tell which. `confidence` is the least of the
policies' probabilities σ(−margin) that the label is the wrong way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats, sigmoid
from dpo_score.metrics.arrays import Texts
from dpo_score.metrics.compare import AlignedPolicies
from dpo_score.metrics.summary import order

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


AGAINST = "ranked_against"
IDENTICAL = "identical_answers"


@dataclass(frozen=True, slots=True)
class Suspect:
    """One pair. `row`: its place among the aligned rows; `copies`: how many rows hold this very pair."""

    row: int
    row_id: str
    pair_id: str
    finding: str
    confidence: float | None
    margins: Mapping[str, float]
    reference_agrees: bool | None
    copies: int
    marks: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Audit:
    """Which of the aligned rows are suspects: arrays, since they may be many.

    against: rows ranked against their label, most confident first. identical: rows with two equal answers. confidence:
    by row. margins: policy → margin by row, of those that have a vote. copies: by row, how many rows hold its pair.
    """

    aligned: AlignedPolicies
    against_rows: NDArray[np.int64]
    identical_rows: NDArray[np.int64]
    confidence: Floats
    margins: Mapping[str, Floats]
    copies: NDArray[np.int32]

    @property
    def pairs(self) -> int:
        """Those looked at."""
        return len(self.aligned)

    @property
    def policies(self) -> int:
        """Those with a vote."""
        return len(self.margins)

    @property
    def against(self) -> int:
        return len(self.against_rows)

    @property
    def rows(self) -> NDArray[np.int64]:
        """All suspects, in their order."""
        return np.concatenate([self.against_rows, self.identical_rows])

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """All of them; `suspect` gives one at a time."""
        return tuple(self.suspect(place) for place in range(len(self.rows)))

    def suspect(self, place: int) -> Suspect:
        """The suspect at a place of `rows`."""
        against = place < self.against
        row = int(self.against_rows[place] if against else self.identical_rows[place - self.against])
        first = self.aligned.first
        values = first.rows.values
        agrees = float(order(values["ref_chosen_logps"][row : row + 1], values["ref_rejected_logps"][row : row + 1])[0])
        return Suspect(
            row=row,
            row_id=first.row_ids[row],
            pair_id=first.pair_ids[row],
            finding=AGAINST if against else IDENTICAL,
            confidence=float(self.confidence[row]) if against else None,
            margins={name: float(values[row]) for name, values in self.margins.items()},
            reference_agrees=None if np.isnan(agrees) else agrees == 1.0,
            copies=int(self.copies[row]),
            marks=tuple(first.marks[row] or ()),
        )


def label_audit(aligned: AlignedPolicies) -> Audit:
    """Every pair that all policies rank against the label (labelled ties left out), and every identical pair.

    A policy with margin 0 everywhere (the reference itself) ranks nothing and has no vote. The reference agrees with
    a label where it alone gives the chosen answer the higher log-probability.
    """
    margins = {policy.name: policy.margins for policy in aligned.policies if np.any(policy.margins != 0.0)}
    identical = np.array(["identical_pair" in (marks or ()) for marks in aligned.first.marks], bool)
    against, confidence = np.zeros(len(aligned), bool), np.full(len(aligned), np.nan)
    if margins:
        wrong = np.logical_and.reduce([values < 0.0 for values in margins.values()])
        against = wrong & ~aligned.first.rows.flags["tied"] & ~identical
        confidence = np.min([sigmoid(-values) for values in margins.values()], axis=0)
    found = np.flatnonzero(against)
    found = found[np.argsort(-confidence[found], kind="stable")]
    return Audit(aligned, found, np.flatnonzero(identical), confidence, margins, _copies(aligned.first.pair_ids))


def _copies(pair_ids: Sequence[str]) -> NDArray[np.int32]:
    """For each row how many rows hold its pair."""
    column = pair_ids.column if isinstance(pair_ids, Texts) else pa.chunked_array([pa.array(pair_ids, pa.string())])
    codes = column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return np.bincount(codes, minlength=1).astype(np.int32)[codes] if len(codes) else np.zeros(0, np.int32)
