"""What a report page is made of, which colour each policy has, and how its numbers are written. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_score.metrics import sentences
from dpo_score.metrics.compare import AlignedPolicies
from dpo_score.metrics.suspect_labels import Audit
from dpo_score.report import charts
from dpo_score.report.example_rows import ExampleRows

Cell = Mapping[str, Any]
KEY_POLICIES = 3
NEUTRAL = 5
NARROW = "\u00a0"
"""A space that no line breaks at."""


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What a page is made of. `texts` by row; `tokens` by (row, policy) → side → [(text, β·log-ratio)]."""

    title: str
    aligned: AlignedPolicies
    found: Cell
    audit: Audit
    selection: ExampleRows
    data: Sequence[Cell]
    texts: Mapping[int, Mapping[str, str]]
    tokens: Mapping[tuple[int, str], Mapping[str, Sequence[tuple[str, float]]]]
    noise: Mapping[str, Cell]
    marks: Cell
    warnings: Sequence[str]
    notes: Sequence[str]
    provenance: Sequence[tuple[str, str]]
    pictures: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)
    """Row → (data: URL of a small copy, what it is) of each picture of the prompt."""


@dataclass(frozen=True, slots=True)
class Palette:
    """policy → colour: each its own up to six; of more, only the key ones."""

    colours: Mapping[str, int]
    key: tuple[str, ...]


def palette(aligned: AlignedPolicies, found: Cell) -> Palette:
    names = aligned.names
    wanted = (
        list(names)
        if len(names) <= KEY_POLICIES
        else [found["baseline"] or names[0], found["best"] or names[-1], names[-1]]
    )
    key = tuple(name for name in names if name in wanted)[:KEY_POLICIES]
    if len(names) <= charts.COLOURS:
        return Palette({name: index for index, name in enumerate(names)}, key)
    return Palette({name: key.index(name) if name in key else NEUTRAL for name in names}, key)


def signed(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:+.{digits}f}".replace("-", "−")


def bounds(ci95: Sequence[float] | None, scale: float = 1.0, digits: int = 2) -> str:
    if ci95 is None:
        return ""
    return f"{scale * ci95[0]:.{digits}f} … {scale * ci95[1]:.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    return sentences.percent(value).replace(" ", NARROW)
