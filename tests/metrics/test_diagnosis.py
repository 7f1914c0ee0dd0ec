"""The diagnosis in a summary: fed with the right numbers, strict JSON, every number defined."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_score.config.schema import LossSpec
from dpo_score.losses.columns import derive_table
from dpo_score.losses.parse import parse_loss
from dpo_score.metrics.calibration import best_beta, calibration
from dpo_score.metrics.diagnostics import DEFINITIONS
from dpo_score.metrics.summary import summarise


def table(n: int = 300, reference: bool = True, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {"dataset": ["d"] * n}
    for side, shift in (("chosen", 3.0), ("rejected", -3.0)):
        ref = -rng.gamma(5.0, 8.0, n)
        columns[f"policy_{side}_logps"] = np.minimum(ref + shift + rng.normal(0, 10, n), -0.1)
        columns[f"{side}_tokens"] = rng.integers(1, 60, n)
        columns |= {f"ref_{side}_logps": ref} if reference else {}
    return pa.table(columns)


def diagnosis(scores: pa.Table, **spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = summarise([derive_table(scores, parse_loss(LossSpec(**spec)))])["diagnosis"]
    return found


def test_it_holds_what_the_parts_say() -> None:
    found = diagnosis(table())
    scores = derive_table(table(), parse_loss(LossSpec()))
    assert found["calibration"]["ece"] == calibration(np.asarray(scores["margins"])).ece
    assert found["calibration"]["best_beta"]["beta"] == best_beta(np.asarray(scores["margins_nats"])).beta
    delta = np.asarray(scores["policy_chosen_logps"]) - np.asarray(scores["ref_chosen_logps"])
    assert found["health"]["displaced"]["value"] == pytest.approx(float(np.mean(delta < 0)))
    drift = np.mean(delta / np.asarray(scores["chosen_tokens"]))
    assert found["health"]["drift_chosen"]["value"] == pytest.approx(float(drift))
    assert abs(found["length"]["pearson_margin_length"]["value"]) < 0.2


def test_labelled_ties_are_left_out_of_calibration() -> None:
    tied = table().append_column("tied", pa.array([True] * 100 + [False] * 200))
    assert diagnosis(tied)["calibration"]["n"] == 200


def test_without_a_reference_health_is_null_with_a_reason() -> None:
    found = diagnosis(table(reference=False), name="cpo")
    assert found["health"]["displaced"]["value"] is None
    assert "not stored" in found["health"]["displaced"]["reason"]
    assert found["calibration"]["best_beta"]["beta"] is None


def test_an_empty_policy_is_strict_json() -> None:
    json.dumps(summarise([]), allow_nan=False)
    json.dumps(diagnosis(table(3)), allow_nan=False)


STRUCTURE = """
    n scored rejected clustered ranking mean std ci95 quantiles overflow value method reason beta at_edge bins low high
    confidence slope groups p5 p25 p50 p75 p95 length calibration health
"""


def names(found: Any) -> set[str]:
    if isinstance(found, list | tuple):
        return set().union(*map(names, found))
    if isinstance(found, dict):
        return set(found) | set().union(*map(names, found.values()))
    return set()


def test_every_number_of_a_summary_is_defined_in_a_sentence() -> None:
    summary = summarise([derive_table(table(), parse_loss(LossSpec()))])
    found = names([summary["overall"], summary["diagnosis"]]) | {"macro"}
    assert found - set(STRUCTURE.split()) <= set(DEFINITIONS)
    assert set(DEFINITIONS) <= found
