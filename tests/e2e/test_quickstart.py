"""The README's first command on the real model, what it promises of the second run, and its other commands.

On the first pairs of the test set; `DPO_SCORE_QUICKSTART=full` scores them all, as the command itself does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_score.cli.main import main
from tests.e2e.readme import PROJECT, own_commands

pytestmark = pytest.mark.slow

LIMIT = None if os.environ.get("DPO_SCORE_QUICKSTART") == "full" else 20
WHOLE = (["quickstart"], ["run", "pipelines/quickstart.yaml", "--quiet"])
"""Commands of the pages that score all pairs of the quickstart."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that looks like a clone: data and pipelines, nothing run yet, a cache of its own."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("data", "pipelines"):
        (folder / name).symlink_to(PROJECT / name)
    before, cache = Path.cwd(), os.environ.get("DPO_SCORE_CACHE_DIR")
    os.chdir(folder)
    os.environ["DPO_SCORE_CACHE_DIR"] = str(folder / "cache")
    yield folder
    os.chdir(before)
    os.environ.pop("DPO_SCORE_CACHE_DIR")
    if cache is not None:
        os.environ["DPO_SCORE_CACHE_DIR"] = cache


@pytest.fixture(scope="module")
def out(workplace: Path) -> Path:
    main_ok(*WHOLE[1])
    return workplace / "runs/quickstart"


def main_ok(*arguments: str) -> None:
    if LIMIT is not None and list(arguments[:3]) in WHOLE:
        arguments = (*arguments, "--limit", str(LIMIT))
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert not stop.value.code, arguments


def policies(out: Path) -> list[str]:
    steps = (path.name for path in (out / "scores").iterdir())
    return sorted(steps, key=lambda name: int(name.rsplit("-", 1)[1]))


def test_three_checkpoints_are_scored_on_every_test_pair(out: Path) -> None:
    rows = pl.read_parquet(PROJECT / "data/quickstart-test.parquet").head(LIMIT or 10**9).height
    assert len(policies(out)) == 3
    for name in policies(out):
        scores = pl.read_parquet(f"{out}/scores/{name}/*.parquet")
        assert scores.height == rows
        assert scores["loss"].null_count() == 0


def test_the_last_checkpoint_is_better_than_the_first_and_than_length(out: Path) -> None:
    first, *_, last = policies(out)
    a, b = (pl.read_parquet(f"{out}/scores/{name}/*.parquet") for name in (first, last))
    assert a["row_id"].equals(b["row_id"])
    difference = b["margins"] - a["margins"]
    error = difference.std() / difference.len() ** 0.5  # type: ignore[operator]
    assert difference.mean() - 1.98 * error > 0  # type: ignore[operator]
    overall = json.loads((out / "summary.json").read_text())["policies"][last]["overall"]
    accuracy = overall["accuracy"]["value"]
    for rule in ("longer_wins", "shorter_wins"):
        assert accuracy >= overall["ranking"][rule]["value"] + 0.10, rule


def test_a_second_run_does_no_forward_pass_and_reads_no_weights(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo_score.logprobs.scorer import PairScorer
    from dpo_score.models.loader import ModelLoader

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished run needs no model")

    monkeypatch.setattr(ModelLoader, "load", refused)
    monkeypatch.setattr(PairScorer, "score", refused)
    before = {path: path.read_bytes() for path in (out / "scores").rglob("*.parquet")}
    main_ok(*WHOLE[1])
    main_ok(*WHOLE[1], "--out", str(out.parent / "elsewhere"))
    assert {path: path.read_bytes() for path in before} == before
    for path, content in before.items():
        assert (out.parent / "elsewhere/scores" / path.relative_to(out / "scores")).read_bytes() == content
    assert "accuracy" in capsys.readouterr().out


def test_the_card_makes_each_policy_loadable(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in policies(out):
        loaded = datasets.load_dataset(str(out), name, split="train", cache_dir=str(tmp_path))
        assert loaded.num_rows == pl.read_parquet(f"{out}/scores/{name}/*.parquet").height


@pytest.mark.parametrize("command", ["status", "verify", "rescore --loss ipo,sigmoid --beta 0.05,0.1,0.5", "report"])
def test_what_follows_a_run_works_on_it(out: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *options = command.split()
    main_ok(name, str(out), *options)
    assert capsys.readouterr().out


@pytest.mark.parametrize("words", own_commands(), ids=" ".join)
def test_each_command_of_the_readme_works_after_the_quickstart(
    out: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if any(word.startswith("runs/pictures/") for word in words) and not Path("runs/pictures").exists():
        pytest.importorskip("PIL")
        from data.make_pictures import main as make_pictures

        make_pictures(Path("runs/pictures"))
    main_ok(*words)
    assert capsys.readouterr().out
