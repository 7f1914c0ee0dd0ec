"""The exported JSON says what RewardBench's scripts say, with this run's numbers; other runs are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.load import load_config
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import ConfigError, UsageError
from dpo_score.export import precompute as data_set
from dpo_score.export import rewardbench
from tests.results.test_rewardbench import bench_rows, lists
from tests.run_fixtures import write_rows
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A reference, a policy, and a cache that all tests of this file share."""
    root = tmp_path_factory.mktemp("models")
    made = {name: save_tiny(root / name, seed=seed) for seed, name in enumerate(("reference", "better"))}
    return {**made, "cache": root / "cache"}


def score(folder: Path, rows: list[dict[str, Any]], models: Mapping[str, Path], **options: Any) -> str:
    given = {
        "data": [str(write_rows(folder / "b.parquet", rows))],
        "reference": str(models["reference"]),
        "policy": [f"better={models['better']}"],
        "cache_dir": str(models["cache"]),
        "out": str(folder / "out"),
        "threads": 1,
        **options,
    }
    given = {name: value for name, value in given.items() if value is not None}
    run(load_config(None, given, environment={}), Progress(quiet=True))
    return str(folder / "out")


def read(folder: str, kind: str) -> Any:
    return json.loads((Path(folder) / "rewardbench" / kind / "better.json").read_text())


def test_accuracies_and_scores_have_the_benchmarks_form(tmp_path: Path, models: Mapping[str, Path]) -> None:
    rows = bench_rows()
    out = score(tmp_path, rows, models, rewardbench="exact")
    assert len(rewardbench.export(out)) == 2
    results, scores = read(out, "eval-set"), read(out, "eval-set-scores")
    assert (results["model"], results["ref_model"]) == ("better", "reference")
    assert (results["model_type"], results["chat_template"]) == ("DPO", "tokenizer")
    assert scores["id"] == [str(row["id"]) for row in rows]
    assert scores["subset"] == [row["subset"] for row in rows]
    wins = [int(c > r) for c, r in zip(scores["scores_chosen"], scores["scores_rejected"], strict=True)]
    assert scores["results"] == wins
    for subset in {row["subset"] for row in rows}:
        own = [w for w, row in zip(wins, rows, strict=True) if row["subset"] == subset]
        assert results[subset] == sum(own) / len(own)


def test_reference_free_is_named_so(tmp_path: Path, models: Mapping[str, Path]) -> None:
    out = score(tmp_path, bench_rows(5), models, rewardbench="corrected", reference=None, loss="simpo")
    rewardbench.export(out)
    found = read(out, "eval-set")
    assert (found["model_type"], found["ref_model"]) == ("DPO Ref. Free", None)
    assert found["scored_by"] == "dpo-score, rewardbench: corrected, score: avg"


def test_best_of_n_lists_every_answer(tmp_path: Path, models: Mapping[str, Path]) -> None:
    rows = lists()
    out = score(tmp_path, rows, models, rewardbench="corrected")
    rewardbench.export(out)
    scores = read(out, "eval-set-scores")
    assert scores["id"] == [row["id"] for row in rows]
    assert [len(answers) for answers in scores["scores"]] == [len(r["chosen"]) + len(r["rejected"]) for r in rows]
    assert scores["num_correct"] == [row["num_correct"] for row in rows]
    assert [result is None for result in scores["results"]] == [row["subset"] == "Ties" for row in rows]
    assert set(read(out, "eval-set")) > {"Math", "Focus", "Ties"}


def test_two_runs_are_set_against_each_other(
    tmp_path: Path, models: Mapping[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo_score.cli.main import main

    (tmp_path / "two").mkdir()
    exact = score(tmp_path, bench_rows(), models, rewardbench="exact")
    corrected = score(
        tmp_path / "two", bench_rows(), models, rewardbench="corrected", cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(SystemExit) as ended:
        main(["export", corrected, "--to", "rewardbench", "--versus", exact])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "better: corrected against exact" in shown
    ours, theirs = (json.loads((Path(f) / "summary.json").read_text()) for f in (corrected, exact))
    sections = [s["policies"]["better"]["rewardbench"]["sections"]["Reasoning"] for s in (ours, theirs)]
    assert f"{100 * (sections[0] - sections[1]):+.2f}" in shown


def test_a_run_that_is_no_rewardbench_run_is_refused(tmp_path: Path, models: Mapping[str, Path]) -> None:
    out = score(tmp_path, bench_rows(5), models)
    with pytest.raises(ConfigError, match=r"--to rewardbench: .*own rules.*Run it again with --rewardbench exact"):
        rewardbench.export(out)
    with pytest.raises(UsageError, match="holds no run"):
        rewardbench.export(str(tmp_path))


# --- export --to trl, ids ---------------------------------------------------------------------------------------------


def test_a_run_becomes_a_data_set_with_the_values_it_used(tmp_path: Path, models: Mapping[str, Path]) -> None:
    import polars as pl

    out = score(tmp_path, bench_rows(), models)
    outcome = data_set.export_run(out, "trl", str(tmp_path / "data"), None, Progress(quiet=True))
    assert outcome.summary["scored"] == 15
    used = pl.read_parquet(f"{out}/reference/*.parquet").sort("source_row")
    written = pl.read_parquet(tmp_path / "data" / "data" / "*.parquet").sort("id")
    assert written["ref_chosen_logps"].to_list() == used["ref_chosen_logps"].to_list()


@pytest.mark.parametrize(
    ("options", "to", "rule"),
    [
        ({"truncation": "keep_end", "max_length": 64}, "trl", "TRL keeps the first max_length tokens of a row"),
        ({"rewardbench": "exact"}, "trl", "adds and drops tokens that no trainer would"),
        ({}, "axolotl", "--to axolotl"),
    ],
)
def test_a_consumer_that_would_score_other_tokens_is_refused(
    options: dict[str, Any], to: str, rule: str, tmp_path: Path, models: Mapping[str, Path]
) -> None:
    out = score(tmp_path, bench_rows(4), models, **options)
    with pytest.raises(ConfigError, match=rule):
        data_set.export_run(out, to, str(tmp_path / "data"), None, Progress(quiet=True))
    with pytest.raises(ConfigError, match="say where with --out DIR"):
        data_set.export_run(out, "ids", None, None, Progress(quiet=True))
