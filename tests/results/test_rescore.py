"""`rescore`: grids over stored log-probs, and any scored policy in the reference's place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from dpo_score.cli import console as show
from dpo_score.cli.main import main
from dpo_score.errors import ConfigError, UsageError
from dpo_score.results.rescore import rescore
from tests.engine.whole_runs.small_run import small_run
from tests.run_fixtures import Runner, preference_rows, write_rows

JOIN = ["row_id", "policy_chosen_logps", "policy_rejected_logps"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A copy of the small run: 39 pairs scored by step-10, step-20 and step-30."""
    return Path(shutil.copytree(small_run().out, tmp_path / "out"))


def scores(out: Path, policy: str) -> pl.DataFrame:
    return pl.read_parquet(f"{out}/scores/{policy}/*.parquet")


def reject(out: Path, policy: str, *rows: int) -> None:
    """As if the policy had rejected these rows of its part."""
    [part] = (out / "scores" / policy).glob("*.parquet")
    pl.read_parquet(part).with_row_index().filter(~pl.col("index").is_in(rows)).drop("index").write_parquet(part)


def test_a_scored_policy_takes_the_references_place(out: Path) -> None:
    found = rescore(str(out), "sigmoid", "0.2", None, [], "step-10")
    assert [row["policy"] for row in found["rows"]] == ["step-20", "step-30"]
    assert found["left_out"] == {}
    again = pl.read_parquet(f"{found['folder']}/step-20/*.parquet")
    both = scores(out, "step-20").select(JOIN).join(scores(out, "step-10").select(JOIN), on="row_id", suffix="_ref")
    chosen = both["policy_chosen_logps"] - both["policy_chosen_logps_ref"]
    rejected = both["policy_rejected_logps"] - both["policy_rejected_logps_ref"]
    assert again["row_id"].to_list() == both["row_id"].to_list()
    assert again["margins"].to_list() == pytest.approx((0.2 * (chosen - rejected)).to_list(), rel=1e-12)


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "sigmoid,ipo"], ids=["one", "over the whole set", "two"])
def test_rows_that_it_rejected_are_left_out_counted_and_said(
    out: Path, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rescore(str(out), loss, None, None, [], "step-10")
    whole = pl.read_parquet(f"{before['folder']}/step-20/*.parquet")
    lost = scores(out, "step-10")["row_id"][[3, 8]].to_list()
    reject(out, "step-10", 3, 8)
    found = rescore(str(out), loss, None, None, [], "step-10")
    assert found["left_out"] == {"step-20": 2, "step-30": 2}
    assert {row["n"] for row in found["rows"]} == {37}
    left = pl.read_parquet(f"{found['folder']}/step-20/*.parquet")
    assert left["margins"].to_list() == whole.filter(~pl.col("row_id").is_in(lost))["margins"].to_list()
    assert json.loads(Path(found["folder"], "summary.json").read_text())["left_out"] == found["left_out"]
    show.rescored(found)
    assert "step-20: 2 pairs left out, which step-10 did not score" in capsys.readouterr().out


def test_rows_that_only_it_scored_play_no_part(out: Path) -> None:
    reject(out, "step-20", 0)
    found = rescore(str(out), "sigmoid", None, None, [], "step-10")
    assert [(row["policy"], row["n"]) for row in found["rows"]] == [("step-20", 38), ("step-30", 39)]
    assert found["left_out"] == {}


def test_a_reference_policy_that_rejected_everything_leaves_nothing(out: Path) -> None:
    reject(out, "step-10", *range(39))
    found = rescore(str(out), "sigmoid", None, None, [], "step-10")
    assert found["left_out"] == {"step-20": 39, "step-30": 39}
    assert [(row["n"], row["loss"]) for row in found["rows"]] == [(0, None), (0, None)]


def test_an_unknown_reference_policy_names_the_nearest(out: Path) -> None:
    with pytest.raises(ConfigError, match=r"'step-11' is no scored policy of .*; did you mean 'step-10'\?"):
        rescore(str(out), "sigmoid", None, None, [], "step-11")


def test_a_reference_policy_that_is_not_finished_says_so(runner: Runner, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "two_blocks.parquet", preference_rows(70))
    runner(data, tmp_path / "out", policy=[f"{name}={runner.models[name]}" for name in ("better", "worse")])
    (tmp_path / "out/scores/worse/part-00001-of-00002.parquet").unlink()
    with pytest.raises(UsageError, match=r"'worse' has no .*part-00001.* yet: let `dpo-score run` finish it"):
        rescore(str(tmp_path / "out"), "sigmoid", None, None, [], "worse")


def test_the_only_policy_has_nothing_to_stand_under(out: Path) -> None:
    for name in ("step-20", "step-30"):
        shutil.rmtree(out / "scores" / name)
        shutil.rmtree(out / "commits" / "scores" / name)
    with pytest.raises(ConfigError, match="'step-10' is the only scored policy"):
        rescore(str(out), "sigmoid", None, None, [], "step-10")
    shutil.rmtree(out / "commits" / "scores" / "step-10")
    with pytest.raises(UsageError, match="holds no scored policy yet"):
        rescore(str(out), "sigmoid", None, None, [], "step-10")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--loss", ","], "--loss takes losses, a comma list such as sigmoid,ipo; got ','"),
        (["--loss", ""], "--loss takes losses"),
        (["--loss-param", "lambda=[1"], "--loss-param lambda takes a number, true, false or a name; got '[1'"),
        (["--loss-param", "lambda=[1]"], "--loss-param lambda takes a number"),
        (["--loss-param", "lambda="], "--loss-param lambda takes a number"),
        (["--loss-param", "lambda"], "--loss-param takes KEY=VALUE; got 'lambda'"),
        (["--beta", ","], "--beta takes numbers"),
        (["--beta", "nan"], "beta=nan: must be a finite number"),
        (["--label-smoothing", "nan"], "label_smoothing=nan"),
    ],
)
def test_a_mistake_is_one_paragraph(
    out: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["rescore", str(out), *arguments])
    error = capsys.readouterr().err
    assert (stop.value.code, said in error, "Traceback" in error) == (2, True, False), error
    assert not list(out.glob("rescored/*"))
