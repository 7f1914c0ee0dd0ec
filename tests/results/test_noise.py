"""The noise floor of a run: of the same pairs under both models, or a reason; never an end of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs import noise_floor as engine
from dpo_score.logprobs.types import SequenceLogps, Unscored
from dpo_score.results import noise
from tests.run_fixtures import Runner, preference_rows, write_rows

MARGINS = np.array([0.5, -3.0, 10.0])


def found(*deltas: float, keys: Any = None) -> dict[str, Any]:
    named = {} if keys is None else {"keys": list(keys)}
    return {"sequences": len(deltas), "reason": None, "deltas": list(deltas), **named}


def test_margins_carry_the_noise_of_both_models_on_the_same_pairs() -> None:
    policy, reference = found(0.5, 0.25, 1.0, 2.0, keys="abcd"), found(0.25, 0.5, 0.0, 0.0, keys="abcd")
    summary = noise.of_policy(policy, reference, MARGINS)
    assert summary["margin_mean"] == np.mean([0.5, 1.0])
    assert summary["margin_max"] == 1.0
    assert summary["share_below"] == 1 / 3
    assert "deltas" not in summary["policy"]
    assert "keys" not in summary["reference"]


def test_only_pairs_that_both_measured_count() -> None:
    policy, reference = found(0.5, 0.25, 1.0, 2.0, keys="abcd"), found(7.0, 9.0, 0.0, 4.0, keys="xycd")
    assert noise.of_policy(policy, reference, MARGINS)["margin_mean"] == abs((1.0 - 2.0) - (0.0 - 4.0))


def test_as_many_other_pairs_are_not_taken_for_the_same() -> None:
    policy, reference = found(0.5, 0.25, keys="ab"), found(0.25, 0.5, keys="ba")
    summary = noise.of_policy(policy, reference, MARGINS)
    assert (summary["margin_mean"], summary["reason"]) == (None, "reference and policy were sampled on different pairs")


def test_without_a_reference_it_is_the_policy_alone() -> None:
    assert noise.of_policy(found(0.5, 0.25, keys="ab"), None, MARGINS)["margin_mean"] == 0.25


@pytest.mark.parametrize("missing", ["policy", "reference"])
def test_what_could_not_be_measured_says_why(missing: str) -> None:
    nothing = {"sequences": 0, "reason": "no room"}
    both = (nothing, found(0.5, 0.25, keys="ab"))
    summary = noise.of_policy(*(both if missing == "policy" else both[::-1]), MARGINS)
    assert (summary["margin_mean"], summary["reason"]) == (None, "no room")


def test_records_of_an_earlier_release_have_places_for_keys() -> None:
    assert noise.of_policy(found(0.5, 0.25), found(0.25, 0.5), MARGINS)["margin_mean"] == 0.5
    for other in (found(0.5, 0.25, 0.0), found(0.5, 0.25, 0.0, 0.0), found(0.5, 0.25, keys="ab")):
        assert noise.of_policy(found(0.5, 0.25), other, MARGINS)["margin_mean"] is None


def test_half_a_pair_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [TokenSequence(np.array([1], np.int32), np.array([i], np.int32)) for i in range(6)]
    entries: list[Any] = [SequenceLogps(np.full(1, -float(i), np.float32)) for i in range(6)]
    entries[1], entries[2] = Unscored("too_large", "no room"), Unscored("too_large", "no room")
    monkeypatch.setattr(engine, "_plain_fp32", lambda *_: [0.0] * 6)
    measured = noise.measure(None, None, sequences, entries)  # type: ignore[arg-type]
    assert measured["deltas"] == [-4.0, -5.0]
    assert measured["keys"] == [sequences[4].key.hex(), sequences[5].key.hex()]
    assert measured["sequences"] == 4


def test_other_pairs_first_in_the_data_leave_the_margins_unmeasured(runner: Runner, tmp_path: Path) -> None:
    """The reference's values, and their noise, come from the cache, where other pairs were measured."""
    rows = preference_rows(40)
    data, turned = (write_rows(tmp_path / f"{i}.parquet", r) for i, r in enumerate((rows, rows[::-1])))
    runner(data, tmp_path / "first")
    policies = [f"better={runner.models['better']}", f"worse={runner.models['worse']}"]
    summary = runner(turned, tmp_path / "turned", policy=policies).summary["policies"]
    assert summary["better"]["noise"]["margin_mean"] is not None, "both come from the cache, measured on the same"
    assert summary["worse"]["noise"]["margin_mean"] is None
    assert summary["worse"]["noise"]["reason"] == "reference and policy were sampled on different pairs"


def test_no_room_for_the_measurement_does_not_end_the_run(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(engine, "_plain_fp32", full)
    found = runner(write_rows(tmp_path / "few.parquet", preference_rows(6)), tmp_path / "out")
    assert found.summary["policies"]["better"]["overall"]["scored"] == 6
    assert found.summary["policies"]["better"]["noise"]["margin_mean"] is None
    assert "no room" in found.summary["policies"]["better"]["noise"]["reason"]
