"""Whole runs on tiny models: what is written, what a second run does, what policies get."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import BadRowsError, ConfigError, IdentityError, PolicyFailedError
from tests.run_fixtures import preference_rows, write_rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", preference_rows(150))


def scores(out: Path, policy: str = "better") -> pl.DataFrame:
    return pl.read_parquet(f"{out}/scores/{policy}/*.parquet")


def files(out: Path, *folders: str) -> dict[str, bytes]:
    found = [path for folder in folders for path in sorted((out / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


RESULTS = ("scores", "reference", "rejects")


def test_every_row_is_scored_or_rejected_in_order(runner: Any, tmp_path: Path) -> None:
    rows = preference_rows(150)
    rows[3]["chosen"] = None
    rows[70]["prompt"] = None
    data = write_rows(tmp_path / "holes.parquet", rows)
    runner(data, tmp_path / "out")
    scored = scores(tmp_path / "out")
    rejected = pl.read_parquet(f"{tmp_path}/out/rejects/data/*.parquet")
    assert sorted([*scored["source_row"], *rejected["source_row"]]) == list(range(150))
    assert scored["source_row"].to_list() == sorted(scored["source_row"])
    assert rejected.select("source_row", "code").rows() == [(3, "null_field"), (70, "null_field")]


def test_rewards_margin_and_loss_follow_from_the_stored_logps(runner: Any, data: Path, tmp_path: Path) -> None:
    runner(data, tmp_path / "out", beta=0.25)
    for row in scores(tmp_path / "out").iter_rows(named=True):
        chosen = 0.25 * (row["policy_chosen_logps"] - row["ref_chosen_logps"])
        rejected = 0.25 * (row["policy_rejected_logps"] - row["ref_rejected_logps"])
        assert row["chosen_rewards"] == pytest.approx(chosen, abs=1e-12)
        assert row["margins"] == pytest.approx(chosen - rejected, abs=1e-12)
        assert row["loss"] == pytest.approx(math.log1p(math.exp(-(chosen - rejected))), rel=1e-9)


def test_a_policy_with_the_reference_weights_has_margin_zero_without_a_forward_pass(
    runner: Any, data: Path, tmp_path: Path, forwards: list[int]
) -> None:
    runner(data, tmp_path / "out", policy=[f"same={runner.models['reference']}"])
    reference_calls = len(forwards)
    found = scores(tmp_path / "out", "same")
    assert found["margins"].to_list() == [0.0] * 150
    assert found["loss"].to_list() == [0.6931471805599453] * 150
    assert found["accuracy"].null_count() == 150
    assert reference_calls == len(list((tmp_path / "out/reference").glob("*.parquet")))


def test_a_second_run_does_no_forward_pass_and_reads_no_weights(
    runner: Any, data: Path, tmp_path: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner(data, tmp_path / "first")
    before = files(tmp_path / "first", *RESULTS)
    forwards.clear()
    refuse_loading(monkeypatch)
    runner(data, tmp_path / "first")
    runner(data, tmp_path / "second")
    assert forwards == []
    assert files(tmp_path / "first", *RESULTS) == before
    assert files(tmp_path / "second", *RESULTS) == before


def refuse_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_score.models.loader import ModelLoader

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ModelLoader, "load", refused)


def test_only_new_sequences_are_computed(runner: Any, tmp_path: Path, forwards: list[int]) -> None:
    rows = preference_rows(100)
    runner(write_rows(tmp_path / "a.parquet", rows), tmp_path / "a")
    forwards.clear()
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(100)]
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in shuffled]
    more = preference_rows(7, seed=9)
    runner(write_rows(tmp_path / "b.parquet", [*shuffled, *flipped, *more]), tmp_path / "b")
    assert sum(forwards) == 2 * 14  # two new sequences a pair, for reference and policy


def test_a_limit_then_the_whole_set_in_one_folder(runner: Any, data: Path, tmp_path: Path) -> None:
    limited = runner(data, tmp_path / "out", limit=70)
    assert limited.summary["policies"]["better"]["overall"]["n"] == 70
    runner(data, tmp_path / "out")
    runner(data, tmp_path / "whole", cache_dir=str(tmp_path / "another"))  # rows 64-69 were computed twice above
    assert files(tmp_path / "out", *RESULTS) == files(tmp_path / "whole", *RESULTS)
    assert (tmp_path / "out/summary.json").read_bytes() == (tmp_path / "whole/summary.json").read_bytes()


def test_a_limit_is_one_for_each_of_several_sets(runner: Any, tmp_path: Path) -> None:
    counts = {"a": 9, "b": 3}
    sets = {name: write_rows(tmp_path / f"{name}.parquet", preference_rows(n)) for name, n in counts.items()}
    config = runner.config(sets["a"], tmp_path / "out", limit=5)
    several = config.model_copy(
        update={"data": tuple(config.data[0].model_copy(update={"name": n, "path": str(p)}) for n, p in sets.items())}
    )
    cells = run(several, Progress(quiet=True)).summary["policies"]["better"]["datasets"]
    assert {name: cell["n"] for name, cell in cells.items()} == {"a": 5, "b": 3}


def test_a_set_that_loses_all_its_rows_fails_the_run(runner: Any, tmp_path: Path) -> None:
    sets = {
        "good": write_rows(tmp_path / "good.parquet", preference_rows(4)),
        "lost": write_rows(tmp_path / "lost.parquet", [{**row, "chosen": "x" * 900} for row in preference_rows(3)]),
    }
    config = runner.config(sets["good"], tmp_path / "out", max_length=400, truncation="reject")
    data = (config.data[0].model_copy(update={"name": name, "path": str(path)}) for name, path in sets.items())
    found = run(config.model_copy(update={"data": tuple(data)}), Progress(quiet=True))
    assert found.summary["policies"]["better"]["datasets"]["good"]["scored"] == 4
    with pytest.raises(BadRowsError, match="nothing of data set 'lost' was scored: all 3 rows"):
        found.raise_failures()


def test_another_loss_into_the_same_folder_is_refused_with_the_rescore_command(
    runner: Any, data: Path, tmp_path: Path
) -> None:
    runner(data, tmp_path / "out")
    with pytest.raises(IdentityError, match=r"loss.beta: 0\.1 → 0\.5[\s\S]*dpo-score rescore"):
        runner(data, tmp_path / "out", beta=0.5)


def test_another_policy_joins_without_touching_the_first(runner: Any, data: Path, tmp_path: Path) -> None:
    runner(data, tmp_path / "out")
    before = files(tmp_path / "out", "scores/better", "reference", "commits/scores/better")
    found = runner(data, tmp_path / "out", policy=[f"worse={runner.models['worse']}"])
    assert files(tmp_path / "out", "scores/better", "reference", "commits/scores/better") == before
    assert sorted(found.summary["policies"]) == ["better", "worse"]


def test_a_policy_that_cannot_be_loaded_does_not_stop_the_others(runner: Any, data: Path, tmp_path: Path) -> None:
    policies = [f"gone={tmp_path}/nowhere", f"better={runner.models['better']}"]
    found = runner(data, tmp_path / "out", policy=policies)
    assert list(found.summary["policies"]) == ["better"]
    with pytest.raises(PolicyFailedError, match="nowhere") as error:
        found.raise_failures()
    assert error.value.exit_code == 6


def test_a_reference_free_loss_needs_no_reference(runner: Any, data: Path, tmp_path: Path) -> None:
    config = runner.config(data, tmp_path / "out", loss="simpo").model_copy(update={"reference": None})
    from dpo_score.engine.progress import Progress
    from dpo_score.engine.run import run

    run(config, Progress(quiet=True))
    found = scores(tmp_path / "out")
    assert found["ref_chosen_logps"].null_count() == 150
    assert found["loss"].null_count() == 0
    with pytest.raises(ConfigError, match="Add --reference MODEL"):
        run(
            config.model_copy(update={"loss": config.loss.model_copy(update={"name": "sigmoid"})}), Progress(quiet=True)
        )


def test_reference_values_may_stand_in_the_data(runner: Any, tmp_path: Path) -> None:
    rows = [{**row, "rc": -10.0 - i, "rr": -20.0} for i, row in enumerate(preference_rows(70))]
    rows[4]["rc"] = None
    data = write_rows(tmp_path / "with_refs.parquet", rows)
    runner(data, tmp_path / "out", reference="columns:rc,rr")
    found = scores(tmp_path / "out")
    assert found["ref_chosen_logps"].to_list() == [-10.0 - i for i in range(70) if i != 4]
    rejected = pl.read_parquet(f"{tmp_path}/out/rejects/reference/*.parquet")
    assert rejected["code"].to_list() == ["no_reference_value"]


def test_the_resolved_pipeline_is_itself_a_pipeline(runner: Any, data: Path, tmp_path: Path) -> None:
    from dpo_score.config.load import load_config

    runner(data, tmp_path / "out", beta=0.2)
    again = load_config(str(tmp_path / "out/pipeline.yaml"), {}, environment={})
    assert again == runner.config(data, tmp_path / "out", beta=0.2)


def test_no_time_and_no_host_in_what_is_reproducible(runner: Any, data: Path, tmp_path: Path) -> None:
    runner(data, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["state"] == "complete"
    for name, content in files(tmp_path / "out", *RESULTS).items() | {
        ("summary.json", (tmp_path / "out/summary.json").read_bytes())
    }:
        assert manifest["started"].encode() not in content, name
        assert manifest["host"].encode() not in content or len(manifest["host"]) < 4, name
