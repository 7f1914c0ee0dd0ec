"""Pairs as a report shows them: texts cut and made safe, tokens with a colour, facts to filter and sort by. Pure.

Promises: no control or bidi character passes raw; no text is longer than SHOWN characters; identical calls give
identical passages. HTML escaping is left to the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_score.escape import safe
from dpo_score.losses.ops import Floats
from dpo_score.report.content import Facts, signed
from dpo_score.results.token_view import level, scale_of

SHOWN = 1600
SHOWN_TOKENS = 500
SIDES = ("chosen", "rejected")


def cut(text: str, limit: int = SHOWN) -> tuple[str, int]:
    """The first `limit` characters, made safe, and how many more there are."""
    shown = safe(text[:limit], keep_newlines=True)
    return shown, max(len(text) - limit, 0)


def listed(facts: Facts) -> list[dict[str, Any]]:
    """The filterable list: the worst pairs, then those whose label is in doubt."""
    worst = set(facts.selection.worst)
    audit, shown_suspects = facts.audit, set(facts.selection.suspects)
    against, suspects = set(audit.against_rows.tolist()), set(audit.rows.tolist())
    return [
        _passage(facts, row)
        | {
            "tags": [*(["worst"] if row in worst else []), *(["label in doubt"] if row in shown_suspects else [])],
            "confidence": float(audit.confidence[row]) if row in against else None,
            "copies": int(audit.copies[row]) if row in suspects else 1,
        }
        for row in facts.selection.listed
    ]


def changed(facts: Facts) -> list[dict[str, Any]]:
    """Pairs that changed most, each with both checkpoints' tokens side by side where they are known."""
    before, after = facts.selection.before, facts.selection.after
    if before is None or after is None:
        return []
    return [_passage(facts, row) | _sides(facts, row, before, after) for row in facts.selection.changed]


def _passage(facts: Facts, row: int) -> dict[str, Any]:
    first, values = facts.aligned.first, facts.aligned.first.rows.values
    text = facts.texts.get(row)
    label, names = first.rows.labels["subset"], first.rows.names["subset"]
    return {
        "row_id": safe(first.row_ids[row]),
        "subset": safe(names[label[row]], 80),
        "marks": [safe(mark) for mark in first.marks[row] or ()],
        "tokens": [_whole(values[f"{side}_tokens"][row]) for side in SIDES],
        "margins": [(p.name, float(p.margins[row]), signed(float(p.margins[row]))) for p in facts.aligned.policies],
        "judged": float(facts.aligned[facts.selection.worst_of].margins[row]),
        "pictures": facts.pictures.get(row, ()),
        "text": None if text is None else {side: cut(text[side]) for side in ("prompt", *SIDES)},
    }


def _whole(value: float) -> int | None:
    return int(value) if value == value else None


def _sides(facts: Facts, row: int, before: str, after: str) -> dict[str, Any]:
    """The change, and for both checkpoints each side as coloured tokens on one scale."""
    margins = [float(facts.aligned[name].margins[row]) for name in (before, after)]
    runs = {name: facts.tokens.get((row, name)) for name in (before, after)}
    found: dict[str, Any] = {
        "change": f"{abs(margins[1] - margins[0]):.2f}",
        "gained": margins[1] > margins[0],
        "views": [],
    }
    if any(run is None for run in runs.values()):
        return found
    scale = scale_of(*(_values(run[side]) for run in runs.values() if run is not None for side in SIDES))
    found["views"] = [
        {"policy": name, "margin": signed(margin), "sides": _coloured(run or {}, scale)}
        for (name, run), margin in zip(runs.items(), margins, strict=True)
    ]
    return found


def _values(run: Sequence[tuple[str, float]]) -> Floats:
    return np.array([value for _, value in run], np.float64)


def _coloured(run: Mapping[str, Sequence[tuple[str, float]]], scale: float) -> list[dict[str, Any]]:
    return [
        {
            "side": side,
            "reward": signed(sum(value for _, value in run[side])),
            "runs": merged([_token(text, value, scale) for text, value in run[side][:SHOWN_TOKENS]]),
            "more": max(len(run[side]) - SHOWN_TOKENS, 0),
        }
        for side in SIDES
    ]


def _token(text: str, value: float, scale: float) -> tuple[str, int, float]:
    return safe(text, 120, keep_newlines=True), level(value, scale), value


def merged(tokens: Sequence[tuple[str, int, float]]) -> list[tuple[str, str, str]]:
    """(class, title, text): neighbours without a colour become one run, so that the page stays small."""
    runs: list[tuple[str, str, str]] = []
    for text, strength, value in tokens:
        if strength == 0:
            if runs and not runs[-1][0]:
                runs[-1] = ("", "", runs[-1][2] + text)
            else:
                runs.append(("", "", text))
            continue
        kind = f"{'up' if strength > 0 else 'down'}{abs(strength)}"
        runs.append((kind, f"{value:+.3f}".replace("-", "−"), text))
    return runs
