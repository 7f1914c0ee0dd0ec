"""Which pairs a report shows: those that changed most between two checkpoints, the worst, and suspects. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_score.metrics.compare import AlignedPolicies, refusal
from dpo_score.metrics.suspect_labels import Audit

CHANGED, WORST, SUSPECTS = 6, 30, 50
"""Pairs shown: so many gained most and so many lost most; worst; suspects."""


@dataclass(frozen=True, slots=True)
class ExampleRows:
    """Rows of the aligned policies. `before`, `after`: whose margins `changed` compares, None where they are unlike."""

    before: str | None
    after: str | None
    changed: tuple[int, ...]
    worst: tuple[int, ...]
    worst_of: str
    suspects: tuple[int, ...]

    @property
    def rows(self) -> list[int]:
        """Each row once, in order."""
        return sorted({*self.changed, *self.worst, *self.suspects})

    @property
    def listed(self) -> list[int]:
        """The rows of the filterable list: worst first, then suspects."""
        return list(dict.fromkeys((*self.worst, *self.suspects)))


def choose_examples(aligned: AlignedPolicies, audit: Audit, best: str | None) -> ExampleRows:
    """`best`: the policy whose worst pairs are shown; changes lead from the first checkpoint to it, or to the last."""
    before = aligned.names[0]
    judged = best or aligned.names[-1]
    after = judged if judged != before else aligned.names[-1]
    if before == after or refusal(aligned[before].settings, aligned[after].settings, "margins"):
        changed: tuple[int, ...] = ()
    else:
        changed = _extremes(aligned[after].margins - aligned[before].margins)
    suspects = tuple(audit.against_rows[:SUSPECTS].tolist())
    worst = _lowest(aligned[judged].margins)
    if not changed:
        return ExampleRows(None, None, (), worst, judged, suspects)
    return ExampleRows(before, after, changed, worst, judged, suspects)


def _extremes(changes: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[int, ...]:
    """The rows that gained most, then those that lost most."""
    order = _order(changes)
    lost = [row for row in order[:CHANGED].tolist() if changes[row] < 0]
    gained = [row for row in reversed(order[-CHANGED:].tolist()) if changes[row] > 0]
    return (*gained, *lost)


def _lowest(margins: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[int, ...]:
    return tuple(row for row in _order(margins)[:WORST].tolist() if margins[row] < 0)


def _order(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> NDArray[np.int64]:
    """Rows with a value, lowest first; equals in row order."""
    order = np.argsort(values, kind="stable")
    return order[np.isfinite(values[order])]
