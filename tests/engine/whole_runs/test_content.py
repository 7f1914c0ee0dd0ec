"""The cache by content, over whole runs: what was seen is never computed again, what was not is never answered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from dpo_score.results import cache_admin as cachework
from tests.run_fixtures import Runner, preference_rows, write_rows
from tests.tiny import byte_tokenizer, tiny_model

ROWS = 40


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return preference_rows(ROWS)


@pytest.fixture
def seen(runner: Runner, rows: list[dict[str, Any]], tmp_path: Path, forwards: list[int]) -> list[int]:
    """The cache holds `rows` for reference and policy; the counter of sequences computed stands at 0."""
    runner(write_rows(tmp_path / "first.parquet", rows), tmp_path / "first", path="plain")
    assert sum(forwards) == 4 * ROWS
    forwards.clear()
    return forwards


@pytest.mark.parametrize("how", ["shuffled", "subset", "twice", "flipped", "other columns", "JSON", "smaller packs"])
def test_what_was_seen_is_not_computed_again(
    runner: Runner, rows: list[dict[str, Any]], seen: list[int], tmp_path: Path, how: str
) -> None:
    options: dict[str, Any] = {"path": "plain"}
    if how == "shuffled":
        rows = [rows[i] for i in np.random.default_rng(1).permutation(ROWS)]
    elif how == "subset":
        rows = rows[7:19]
    elif how == "twice":
        rows = [*rows, *rows]
    elif how == "flipped":
        rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    elif how == "other columns":
        rows = [{"question": row["prompt"], "win": row["chosen"], "lose": row["rejected"]} for row in rows]
        options["map"] = "prompt=question,chosen=win,rejected=lose"
    elif how == "smaller packs":
        options["batch_tokens"] = "512"
    path = write_rows(tmp_path / "again.parquet", rows)
    if how == "JSON":
        path = tmp_path / "again.jsonl"
        pl.DataFrame(rows).write_ndjson(path)
    runner(path, tmp_path / "again", **options)
    assert seen == []


def test_of_appended_rows_only_the_new_ones_are_computed(
    runner: Runner, rows: list[dict[str, Any]], seen: list[int], tmp_path: Path
) -> None:
    more = preference_rows(5, seed=3)
    runner(write_rows(tmp_path / "more.parquet", [*rows, *more]), tmp_path / "more", path="plain")
    assert sum(seen) == 4 * len(more)


def test_a_scored_policy_serves_as_reference_and_the_reference_as_policy(
    runner: Runner, rows: list[dict[str, Any]], seen: list[int], tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "first.parquet", rows)
    models = runner.models
    policy = [f"old={models['reference']}"]
    runner(data, tmp_path / "swapped", path="plain", reference=str(models["better"]), policy=policy)
    assert seen == []


def test_another_pairing_computes_only_answers_not_yet_paired(
    runner: Runner, tmp_path: Path, forwards: list[int]
) -> None:
    answers = [[" first", " second", " third", " fourth"] for _ in range(6)]
    listed = [
        {"prompt": f"question {i}", "responses": texts, "scores": [4.0, 3.0, 2.0, 1.0]}
        for i, texts in enumerate(answers)
    ]
    data = write_rows(tmp_path / "listed.parquet", listed)
    runner(data, tmp_path / "best", path="plain")
    assert sum(forwards) == 2 * 2 * 6
    forwards.clear()
    runner(data, tmp_path / "all", pairing="all", path="plain")
    assert sum(forwards) == 2 * 2 * 6, "the two answers in the middle"


OTHERS = {
    "weights": {"policy": "worse"},
    "dtype": {"dtype": "bfloat16"},
    "path": {"path": "fast"},
    "template": {"render": "chat"},
    "length": {"max_length": 8, "truncation": "keep_end"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_weights_numerics_or_ids_are_never_answered(
    runner: Runner, rows: list[dict[str, Any]], seen: list[int], tmp_path: Path, what: str
) -> None:
    """As in lm-evaluation-harness #4063, where a cache answered for another chat template."""
    options: dict[str, Any] = {"path": "plain", **OTHERS[what]}
    expected = 4 * ROWS
    if what == "weights":
        options["policy"] = [f"worse={runner.models['worse']}"]
        expected = 2 * ROWS
    data = write_rows(tmp_path / "first.parquet", rows)
    runner(data, tmp_path / "other", **options)
    assert sum(seen) >= expected * (0.3 if what == "length" else 1.0)
    runner.cache = tmp_path / "empty"
    runner(data, tmp_path / "alone", **options)
    found, alone = (sorted((tmp_path / out).glob("scores/*/*.parquet")) for out in ("other", "alone"))
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in alone]


PROGRAM = "import sys; from dpo_score.cli.main import main; main(sys.argv[1:])"


@pytest.mark.slow
def test_two_runs_at_once_share_a_cache(runner: Runner, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "first.parquet", rows)
    models = [f"--reference={runner.models['reference']}", f"--policy=better={runner.models['better']}"]
    given = ["run", f"--data={data}", f"--cache-dir={runner.cache}", "--path=plain", "--threads=1", *models]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *given, f"--out={tmp_path / name}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in ("a", "b")
    ]
    assert [child.wait(300) for child in children] == [0, 0]
    first, second = (sorted((tmp_path / name).glob("scores/*/*.parquet")) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert cachework.verify(str(runner.cache)) == f"{4 * ROWS} entries, nothing damaged"


@pytest.mark.parametrize("role", ["reference", "policy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_rejected_where_it_stands_and_never_averaged(
    runner: Runner, tmp_path: Path, role: str, value: float
) -> None:
    """The embedding of `~` is broken: rows in which it comes before a scored token cannot be scored, others can."""
    model = tiny_model(seed=4)
    with torch.no_grad():
        model.get_input_embeddings().weight[byte_tokenizer()("~").input_ids[0]] = value
    model.save_pretrained(tmp_path / "broken")
    byte_tokenizer().save_pretrained(tmp_path / "broken")
    rows = preference_rows(6)
    rows[0]["prompt"] = "~" + rows[0]["prompt"]
    rows[1]["chosen"] = " ~" + rows[1]["chosen"]
    rows[2]["rejected"] = " good ~ bad"
    data = write_rows(tmp_path / "rows.parquet", rows)
    policy = [f"p={tmp_path / 'broken' if role == 'policy' else runner.models['better']}"]
    reference = str(tmp_path / "broken" if role == "reference" else runner.models["reference"])
    found = runner(data, tmp_path / "out", path="plain", reference=reference, policy=policy)
    lost = pl.read_parquet(f"{tmp_path}/out/rejects/{'p' if role == 'policy' else 'reference'}/*.parquet")
    assert lost.select("source_row", "code").rows() == [(i, "nonfinite_logp") for i in range(3)]
    scored = pl.read_parquet(f"{tmp_path}/out/scores/p/*.parquet")
    assert scored["source_row"].to_list() == [3, 4, 5]
    numbers = scored.select(pl.selectors.float())
    assert all(series.drop_nulls().is_finite().all() for series in numbers)
    overall = found.summary["policies"]["p"]["overall"]
    assert (overall["n"], overall["scored"]) == (6, 3)
    assert np.isfinite(overall["loss"]["mean"])
