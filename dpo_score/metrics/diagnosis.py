"""Why a policy scores as it does: length, calibration and training health of its scored rows, as strict JSON.

Every number has a sentence and a source in `definitions.py`; null comes with a reason. The arithmetic is in
length.py, calibration.py and health.py; here it is only fed and put into words.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from dpo_score.metrics.arrays import Rows
from dpo_score.metrics.calibration import best_beta, calibration
from dpo_score.metrics.health import training_health
from dpo_score.metrics.intervals import Interval
from dpo_score.metrics.length import length_controlled_accuracy, pearson, spearman

NOT_STORED = "a value that it needs is not stored for any pair"
NO_VARIATION = "one of the two does not vary"


def diagnose(rows: Rows) -> dict[str, Any]:
    """{"length": …, "calibration": …, "health": …} of one policy."""
    return {"length": _length(rows), "calibration": _calibration(rows), "health": _health(rows)}


def _length(rows: Rows) -> dict[str, Any]:
    v, margins = rows.values, _margins(rows)
    chosen, rejected = v["chosen_tokens"].astype(np.float64), v["rejected_tokens"].astype(np.float64)
    controlled = length_controlled_accuracy(margins, chosen, rejected, rows.repeated)
    found: dict[str, Any] = {
        "length_controlled_accuracy": {
            "n": controlled.n,
            "value": controlled.accuracy,
            "ci95": None if controlled.low is None else [controlled.low, controlled.high],
            "slope": controlled.slope,
        }
        | ({} if controlled.reason is None else {"reason": controlled.reason}),
    }
    for name, correlate in (("pearson", pearson), ("spearman", spearman)):
        value = correlate(margins, chosen - rejected)
        found[f"{name}_margin_length"] = {"value": value} | ({} if value is not None else {"reason": NO_VARIATION})
    return found


def _calibration(rows: Rows) -> dict[str, Any]:
    found = asdict(calibration(_margins(rows)))
    fit = asdict(best_beta(rows.values["margins_nats"]))
    return _without_empty_reason(found) | {"best_beta": _without_empty_reason(fit)}


def _health(rows: Rows) -> dict[str, Any]:
    v = rows.values
    delta_chosen = v["policy_chosen_logps"] - v["ref_chosen_logps"]
    delta_rejected = v["policy_rejected_logps"] - v["ref_rejected_logps"]
    found = training_health(
        delta_chosen, delta_rejected, v["chosen_tokens"], v["rejected_tokens"], v["dpo_weight"], rows.repeated
    )
    return {name: _interval(value) for name, value in found.items()}


def _interval(interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {"value": None, "ci95": None, "reason": NOT_STORED}
    bounds = None if interval.low is None else [interval.low, interval.high]
    found = {"value": interval.value, "ci95": bounds, "method": interval.method}
    return found if interval.reason is None else found | {"reason": interval.reason}


def _without_empty_reason(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "reason" or value is not None}


def _margins(rows: Rows) -> np.ndarray[Any, np.dtype[np.float64]]:
    """β-scaled margins; a labelled tie has no right answer, so it is left out."""
    margins = rows.values["chosen_rewards"] - rows.values["rejected_rewards"]
    return np.where(rows.flags["tied"], np.nan, margins)
