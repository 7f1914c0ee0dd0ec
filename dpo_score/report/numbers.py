"""Why policies rank as they do, as numbers for text tables: ranking, length, calibration and training health. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_score.metrics.compare import AlignedPolicies, ScoredPolicy
from dpo_score.metrics.diagnostics import diagnose
from dpo_score.metrics.summary import ranking

TITLES = {
    "ranking": "What other rules prefer chosen",
    "length": "Length",
    "calibration": "Calibration of σ(margin)",
    "health": "Training health",
}
"""Kind of number → title of its table."""


@dataclass(frozen=True, slots=True)
class Number:
    """One number of one policy; `value` None where it cannot be had."""

    policy: str
    step: int | None
    kind: str
    metric: str
    value: float | None
    ci95: Sequence[float] | None = None


def numbers(aligned: AlignedPolicies) -> list[Number]:
    """Every number that explains the levels, policy by policy."""
    return [number for policy in aligned.policies for number in _of(policy)]


def _of(policy: ScoredPolicy) -> Iterator[Number]:
    found = diagnose(policy.rows)
    fit = found["calibration"].pop("best_beta")
    kinds = {"ranking": ranking(policy.rows), **found}
    kinds["calibration"] = {name: kinds["calibration"][name] for name in ("ece", "ece_if_calibrated", "brier", "nll")}
    kinds["calibration"]["best_beta"] = fit["beta"]
    for kind, cells in kinds.items():
        for metric, cell in cells.items():
            value, ci95 = _read(cell)
            yield Number(policy.name, policy.step, kind, metric, value, ci95)


def _read(cell: Any) -> tuple[float | None, Sequence[float] | None]:
    """Value and interval of a cell, which may be a bare number."""
    return (cell.get("value"), cell.get("ci95")) if isinstance(cell, dict) else (cell, None)
