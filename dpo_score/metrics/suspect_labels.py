"""Labels worth a second look: pairs that every policy ranks against the label, and pairs with nothing to rank. Pure.

A pair ranked against its label by every checkpoint is either hard or mislabelled (confident learning, arXiv
1911.00068, reads the same sign from a classifier); only a person can tell which. `confidence` is the least of the
policies' probabilities σ(−margin) that the label is the wrong way round.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats, sigmoid
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


@dataclass(frozen=True, slots=True)
class Audit:
    """`suspects`: against the label, most confident first, then identical answers. `pairs`: those looked at."""

    suspects: tuple[Suspect, ...]
    pairs: int
    policies: int

    @property
    def against(self) -> int:
        return sum(suspect.finding == AGAINST for suspect in self.suspects)


def label_audit(aligned: AlignedPolicies) -> Audit:
    """Every pair that all policies rank against the label (labelled ties left out), and every identical pair.

    A policy with margin 0 everywhere (the reference itself) ranks nothing and has no vote.
    """
    margins = {policy.name: policy.margins for policy in aligned.policies if np.any(policy.margins != 0.0)}
    against = _against(aligned, margins)
    confidence = _confidence(margins, len(aligned))
    identical = np.array(["identical_pair" in (marks or ()) for marks in aligned.first.marks], bool)
    first = sorted(np.flatnonzero(against & ~identical).tolist(), key=lambda row: (-confidence[row], row))
    copies = Counter(aligned.first.pair_ids)
    agrees = _reference_ranks(aligned)

    def suspect(row: int, finding: str) -> Suspect:
        return Suspect(
            row=row,
            row_id=aligned.first.row_ids[row],
            pair_id=aligned.first.pair_ids[row],
            finding=finding,
            confidence=float(confidence[row]) if finding == AGAINST else None,
            margins={name: float(values[row]) for name, values in margins.items()},
            reference_agrees=None if np.isnan(agrees[row]) else bool(agrees[row] == 1.0),
            copies=copies[aligned.first.pair_ids[row]],
            marks=tuple(aligned.first.marks[row] or ()),
        )

    found = [suspect(row, AGAINST) for row in first]
    found += [suspect(int(row), IDENTICAL) for row in np.flatnonzero(identical)]
    return Audit(tuple(found), len(aligned), len(margins))


def _against(aligned: AlignedPolicies, margins: Mapping[str, Floats]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    if not margins:
        return np.zeros(len(aligned), np.bool_)
    wrong = np.logical_and.reduce([values < 0.0 for values in margins.values()])
    return np.asarray(wrong & ~aligned.first.rows.flags["tied"], np.bool_)


def _confidence(margins: Mapping[str, Floats], rows: int) -> Floats:
    if not margins:
        return np.full(rows, np.nan)
    least: Floats = np.min([sigmoid(-values) for values in margins.values()], axis=0)
    return least


def _reference_ranks(aligned: AlignedPolicies) -> Floats:
    """1 where the reference alone ranks the pair as labelled, 0 against, NaN where it cannot be told."""
    v = aligned.first.rows.values
    return order(v["ref_chosen_logps"], v["ref_rejected_logps"])
