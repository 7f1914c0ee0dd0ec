"""Facts of a report without a run: made policies, and texts that try to get out."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo_score.metrics.compare import ScoredPolicy, align_policies, compare_policies
from dpo_score.metrics.suspect_labels import label_audit
from dpo_score.report.content import Facts
from dpo_score.report.example_rows import choose_examples
from tests.metrics.scored import policies

PAYLOADS = (
    "<script>alert('script ran')</script>",
    '"><img src=x onerror="alert(1)">',
    "<svg/onload=alert(1)>",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(1)",
    "</script><script>alert(2)</script>",
    "</style><style>*{display:none}</style>",
    "<!--",
    "\u202egnp.exe\u2066",
    "\x1b]8;;https://example.invalid\x07link\x1b[31m",
    "W" * 1_000_000,
    "<iframe src='https://example.invalid/'></iframe><link rel=stylesheet href=//example.invalid/x.css>",
    "\ud800 lone surrogate",
    "' onmouseover='alert(3)",
)
HOSTILE_SUBSETS = ('"><b onclick=alert(4)>', "plain", "</option><script>alert(5)</script>")


def facts(
    scored: list[ScoredPolicy] | None = None, hostile: bool = False, tokens: bool = True, **changes: Any
) -> Facts:
    """Facts with a text for every selected pair, and token values for those that changed."""
    aligned = align_policies(scored or policies(3, 240, {"step-10": 0.1, "step-20": 0.4, "step-30": 0.5}))
    found, audit = compare_policies(aligned, changes.pop("baseline", None)), label_audit(aligned)
    selection = choose_examples(aligned, audit, found["best"])
    text = _hostile if hostile else _plain
    values: dict[str, Any] = {
        "title": "runs/quickstart",
        "aligned": aligned,
        "found": found,
        "audit": audit,
        "selection": selection,
        "data": [{"name": "d", "value": "240 rows"}],
        "texts": {row: text(row) for row in selection.rows},
        "tokens": _tokens(aligned.names, selection.changed, hostile) if tokens else {},
        "noise": {name: {"margin_mean": 1e-5, "margin_max": 2e-5, "share_below": 0.0} for name in aligned.names},
        "marks": {"no_eos": "3 pairs, first row 0:1"},
        "warnings": ["a warning"],
        "notes": [],
        "provenance": [("reference", "a model")],
    }
    return Facts(**(values | changes))


def _plain(row: int) -> dict[str, str]:
    return {"prompt": f"Question {row}?", "chosen": f"A good answer to {row}.", "rejected": f"A worse one to {row}."}


def _hostile(row: int) -> dict[str, str]:
    return {
        side: PAYLOADS[(row + shift) % len(PAYLOADS)] for shift, side in enumerate(("prompt", "chosen", "rejected"))
    }


def _tokens(names: list[str], rows: tuple[int, ...], hostile: bool) -> dict[tuple[int, str], Any]:
    draw = np.random.default_rng(0)

    def run(row: int) -> list[tuple[str, float]]:
        words = [PAYLOADS[row % len(PAYLOADS)]] if hostile else ["The", " answer", " is", " forty", "-two", "."]
        return [(word, float(draw.normal())) for word in words]

    return {(row, name): {"chosen": run(row), "rejected": run(row + 1)} for row in rows for name in names}
