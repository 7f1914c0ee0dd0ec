"""`dpo-score select` on real runs of tiny models: every row accounted for, folds, JSON, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import dpo_score
from dpo_score.cli.main import main
from dpo_score.errors import ConfigError, UsageError
from dpo_score.results.select import (
    Folds,
    Request,
    _compact,
    _places,
    compare,
    parse_folds,
    parse_keep,
    parse_score_columns,
    select,
)
from tests.run_fixtures import WORDS, Runner, preference_rows, write_rows


@pytest.fixture
def out(tmp_path: Path, runner: Runner) -> str:
    """40 pairs, one of which gives none; two policies; a column with folds."""
    rows = preference_rows(40, seed=3)
    for i, row in enumerate(rows):
        row["fold"] = i % 2
    rows[7]["chosen"] = None
    data = write_rows(tmp_path / "pairs.parquet", rows)
    policies = [f"{name}={runner.models[name]}" for name in ("better", "worse")]
    runner(data, tmp_path / "out", policy=policies, keep_columns="fold")
    return str(tmp_path / "out")


def test_digests_as_numbers_are_the_digests_in_their_order() -> None:
    """What is no digest, as a row id is where none is stored, gets one of its own."""
    digests = ["f" * 32, "00" * 16, "0123456789abcdef" * 2, "f" * 32, "0" * 31 + "1", "8" + "0" * 31]
    frame = _compact(pl.DataFrame({"row_id": [f"0:{i}" for i in range(6)], "prompt_digest": digests}))
    places, keys = _places(frame["prompt_high"].to_numpy(), frame["prompt_low"].to_numpy())
    assert list(keys) == [keys[i] for i in range(5)] == sorted(set(digests))
    assert list(keys[1:3]) == sorted(set(digests))[1:3]
    assert [keys[place] for place in places.tolist()] == digests
    odd = _compact(pl.DataFrame({"row_id": ["0:0", "0:1", "0:0"], "prompt_digest": ["A" * 32, None, "A" * 32]}))
    places, keys = _places(odd["prompt_high"].to_numpy(), odd["prompt_low"].to_numpy())
    assert (places[0], len(keys)) == (places[2], 2)
    bare = _compact(pl.DataFrame({"row_id": ["0:0", "0:1"], "subset": ["a", None]}))
    assert bare.columns == ["row_id", "subset", "prompt_high", "prompt_low"]


def scores(out: str, policy: str) -> pl.DataFrame:
    return pl.read_parquet(f"{out}/scores/{policy}/*.parquet")


def test_every_row_of_the_run_has_one_reason(out: str) -> None:
    found = select(out, Request("margin:high", 10))
    assert found.frame["reason"].value_counts().sort("reason").rows() == [
        ("below_cut", 29),
        ("kept", 10),
        ("not_scored", 1),
    ]
    assert found.frame.filter(pl.col("reason") == "not_scored")["code"].to_list() == ["null_field"]
    assert found.summary["counts"] == {"kept": 10, "below_cut": 29, "not_scored": 1}
    assert found.summary["rows"] == 40
    assert repr(found) == "<Selected 10 of 40 rows by margin:high>"


@pytest.mark.parametrize("lost", ["first", "last"])
def test_scores_that_change_between_the_judging_and_the_writing_are_refused(out: str, lost: str) -> None:
    found = select(out, Request("margin:high", 10))
    (part,) = Path(out).glob("scores/better/*.parquet")
    table = pl.read_parquet(part)
    (table[1:] if lost == "first" else table[:-1]).write_parquet(part)
    for part in Path(out).glob("scores/worse/*.parquet"):
        part.unlink()
        pl.read_parquet(Path(out) / "scores" / "better" / part.name).write_parquet(part)
    with pytest.raises(UsageError, match="the scores changed while pairs were selected"):
        list(found.frames())


def test_scores_are_the_mean_margin_of_the_policies(out: str) -> None:
    found = select(out, Request("margin:high", "25%")).frame.filter(pl.col("select_score").is_not_null())
    both = [scores(out, name).select("row_id", "margins_nats") for name in ("better", "worse")]
    expected = (
        both[0]
        .join(both[1], on="row_id")
        .with_columns(mean=(pl.col("margins_nats") + pl.col("margins_nats_right")) / 2)
    )
    joined = found.join(expected, on="row_id")
    assert joined["select_score"].to_list() == pytest.approx(joined["mean"].to_list())
    assert set(joined.sort("mean", descending=True)["row_id"][:10]) == set(joined.filter("kept")["row_id"])


RULES = ["margin:high", "margin:low", "difficulty", "on-policy", "random", "agree", "suspect=1", "margin:band=-1,1"]


@pytest.mark.parametrize("rule", [*RULES, "margins_nats - chosen_tokens"])
@pytest.mark.parametrize("how", [{}, {"per_token": True}, {"scaled": True}, {"per_token": True, "scaled": True}])
def test_a_rule_reads_all_that_it_computes_with(out: str, rule: str, how: dict[str, bool]) -> None:
    """From a folder only what a rule says that it reads is read; a frame has everything."""
    both = pl.concat(scores(out, name).with_columns(policy=pl.lit(name)) for name in ("better", "worse"))
    keep = None if rule.startswith(("agree", "suspect", "margin:band")) else 10
    request = Request(rule, keep, length_match=bool(how), by_subset=True, **how)
    columns = ["row_id", "select_score", "select_rank", "kept", "reason"]
    found = select(out, request).frame.filter(pl.col("code").is_null()).select(columns)
    assert found.equals(select(both, request).frame.select(columns))
    assert found["select_score"].null_count() == 0


def test_each_pair_is_judged_by_the_policy_of_its_fold(out: str) -> None:
    found = select(out, Request("margin:low", 5, folds=Folds("fold", {"0": "better", "1": "worse"})))
    own = {name: dict(scores(out, name).select("row_id", "margins_nats").iter_rows()) for name in ("better", "worse")}
    for row_id, score in (
        found.frame.filter(pl.col("select_score").is_not_null()).select("row_id", "select_score").rows()
    ):
        judge = ("better", "worse")[int(row_id.split(":")[1]) % 2]
        assert score == pytest.approx(-own[judge][row_id])
    assert found.summary["judged"] == "each pair is judged by the policy that did not train on its fold"


def test_an_expression_reads_one_policy_or_the_mean_over_them(out: str) -> None:
    one = select(out, Request('"better.margins" > 0')).frame
    assert one.filter("kept").height == scores(out, "better").filter(pl.col("margins") > 0).height
    mean = select(out, Request("margins_nats * 1", 3))
    assert (
        mean.frame.filter("kept")["row_id"].to_list()
        == select(out, Request("margin:high", 3)).frame.filter("kept")["row_id"].to_list()
    )


def test_a_policy_whose_name_begins_anothers_has_its_own_columns(out: str) -> None:
    names = {"a": "better", "a.b": "worse"}
    both = pl.concat(scores(out, name).with_columns(policy=pl.lit(alias)) for alias, name in names.items())
    mean, longer, shorter = (
        select(both, Request(rule, 39)).frame["select_score"].to_numpy()
        for rule in ("margins + 0", '"a.b.margins" + 0', '"a.margins" + 0')
    )
    assert longer == pytest.approx(scores(out, "worse")["margins"].to_numpy())
    assert mean == pytest.approx((longer + shorter) / 2)


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        (Request("margin:high"), ConfigError, "say how many to keep"),
        (Request("margin:high", 100), ConfigError, "39 pairs to choose from"),
        (Request("margin:high", "110%"), ConfigError, "at most 100 %"),
        (Request("margin:high", 5, policies=["beter"]), UsageError, "better"),
        (Request("dual", 5, score_columns=("a", "b")), ConfigError, "--keep-columns a"),
        (Request("policy_chosen_log_sum_sq_probs < 0"), ConfigError, "--stats wpo"),
        (Request("margin:high", 5, folds=Folds("fold", {"0": "better"})), UsageError, "fold '1'"),
        (Request("all"), ConfigError, "name one rule"),
    ],
)
def test_mistakes(out: str, request_: Request, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said.replace("(", r"\(")):
        select(out, request_)


def test_near_duplicates_of_prompts(tmp_path: Path, runner: Runner) -> None:
    """A prompt with another last word is another prompt, and asks for the same answers."""
    rows = preference_rows(12, seed=1)
    rows[2]["prompt"] = " ".join(["2", *WORDS, *reversed(WORDS)])
    rows[5]["prompt"] = rows[2]["prompt"] + " today"
    data = write_rows(tmp_path / "pairs.parquet", rows)
    runner(data, tmp_path / "out")
    found = select(str(tmp_path / "out"), Request("random", 11, dedupe=True))
    assert found.summary["counts"] == {"kept": 11, "duplicate_prompt": 1}
    data.unlink()
    with pytest.raises(UsageError, match="--dedupe reads the prompts again"):
        select(str(tmp_path / "out"), Request("random", 11, dedupe=True))


def test_all_rules_side_by_side(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(out, Request("all", "25%"))
    assert [rule["rule"] for rule in found["rules"]] == [
        *("margin:high", "margin:low", "difficulty", "on-policy", "random", "agree", "suspect")
    ]
    assert found["keep"] == 10
    assert found["all"]["kept"] == 39
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["select", out, "--rules", "all", "--keep", "25%", "--json"])
    assert json.loads(capsys.readouterr().out)["rules"] == json.loads(json.dumps(found["rules"]))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["select", out, "--rules", "all", "--keep", "25%"])
    shown = capsys.readouterr().out
    assert "each rule keeps 10 of 39 scored pairs" in shown
    assert "(they may have trained on these pairs;" in " ".join(shown.split())


def test_in_python_on_a_folder_and_on_a_frame(out: str) -> None:
    by_folder = dpo_score.select(out, rule="margin:high", keep=10, policies="better")
    frame = scores(out, "better")
    by_frame = dpo_score.select(frame, rule="margin:high", keep=10)
    assert isinstance(by_folder, pl.DataFrame)
    assert by_folder.filter("kept")["row_id"].to_list() == by_frame.filter("kept")["row_id"].to_list()


@pytest.mark.parametrize(("given", "kept"), [("10%", 14), ("12.5 %", 18), (7, 7), ("1,000", 1000), (None, None)])
def test_how_many(given: Any, kept: int | None) -> None:
    assert parse_keep(given, 140) == kept


@pytest.mark.parametrize("given", ["0", "-3", "ten", "nan", "101%", "2.5"])
def test_how_many_not(given: str) -> None:
    with pytest.raises(ConfigError, match="--keep"):
        parse_keep(given, 140)


def test_options_that_belong_together_or_name_too_few() -> None:
    assert parse_folds("fold", "0=a, 1=b") == Folds("fold", {"0": "a", "1": "b"})
    assert parse_score_columns("good, bad") == ("good", "bad")
    for column, given in (("fold", None), (None, "0=a")):
        with pytest.raises(ConfigError, match="belong together"):
            parse_folds(column, given)
    with pytest.raises(ConfigError, match="write FOLD=POLICY"):
        parse_folds("fold", "0=")
    with pytest.raises(ConfigError, match="name two columns"):
        parse_score_columns("good")
