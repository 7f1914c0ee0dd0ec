"""`--score all-assistant`: a sum for each of the assistant's turns, which together are the row's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_score import score
from tests.run_fixtures import Runner, write_rows

COLUMNS = [f"{role}_{side}_turn_logps" for role in ("ref", "policy") for side in ("chosen", "rejected")]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FIRST = [user("q")]
SECOND = [*FIRST, bot("one"), user("and then?")]
THIRD = [*SECOND, bot("two, then"), user("go on")]
LONG = {"prompt": THIRD, "chosen": [bot("three")], "rejected": [bot("no more of it")]}
PARTED = {"prompt": FIRST, "chosen": [bot("one"), user("and then?"), bot("two")], "rejected": [bot("done")]}


def scored(runner: Runner, folder: Path, rows: list[dict[str, Any]], **options: Any) -> pl.DataFrame:
    folder.mkdir(exist_ok=True)
    runner(write_rows(folder / "d.parquet", rows), folder / "out", path="plain", **options)
    return pl.read_parquet(folder / "out/scores/better/*.parquet")


def test_turns_add_up_to_the_row(runner: Runner, tmp_path: Path) -> None:
    found = scored(runner, tmp_path, [LONG, PARTED], score="all-assistant", per_token=True)
    for name in COLUMNS:
        sums = found[name.replace("_turn_logps", "_logps")].to_list()
        assert [sum(turns) for turns in found[name]] == pytest.approx(sums, abs=1e-9)
    assert [len(turns) for turns in found["ref_chosen_turn_logps"]] == [3, 2]
    assert [len(turns) for turns in found["policy_rejected_turn_logps"]] == [3, 1]


def test_a_turn_is_what_it_scores_as_an_answer_of_its_own(runner: Runner, tmp_path: Path) -> None:
    whole = scored(runner, tmp_path / "whole", [LONG], score="all-assistant")
    apart = [
        {"prompt": before, "chosen": [bot(text)], "rejected": [bot("x")]}
        for before, text in ((FIRST, "one"), (SECOND, "two, then"), (THIRD, "three"))
    ]
    alone = scored(runner, tmp_path / "alone", apart)
    for role in ("ref", "policy"):
        turns = whole[f"{role}_chosen_turn_logps"].to_list()[0]
        assert turns == pytest.approx(alone[f"{role}_chosen_logps"].to_list(), abs=1e-4)


def test_a_policy_that_is_the_reference_has_its_turns(runner: Runner, tmp_path: Path) -> None:
    found = scored(runner, tmp_path, [LONG], score="all-assistant", policy=[f"better={runner.models['reference']}"])
    assert found["policy_chosen_turn_logps"].to_list() == found["ref_chosen_turn_logps"].to_list()


def test_rows_without_a_score_have_none_and_other_runs_no_such_column(runner: Runner, tmp_path: Path) -> None:
    models = {"reference": runner.models["reference"], "policy": runner.models["better"]}
    options: dict[str, Any] = {"path": "plain", "cache_dir": runner.cache}
    found = score([LONG, {**LONG, "chosen": None}], score="all-assistant", **models, **options)
    assert found["status"].to_list() == ["scored", "null_field"]
    assert [turns is None for turns in found["policy_chosen_turn_logps"].to_list()] == [False, True]
    assert not set(COLUMNS) & set(score([LONG], **models, **options).columns)
