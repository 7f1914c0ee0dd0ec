"""Every file and row of the corpus through the real command line: the exit code and the words, or the reject code."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_score.cli.main import main
from tests.engine.mistakes.bad_corpus import FILES, ROWS, write_rows_file

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(
    tmp_path: Path, models: Mapping[str, Path], shared_cache: Path, capsys: pytest.CaptureFixture[str]
) -> Command:
    def run(data: Path, *more: str) -> tuple[int, str]:
        both = [f"--reference={models['reference']}", f"--policy=same={models['reference']}"]
        where = [f"--data=set={data}", f"--out={tmp_path / 'out'}", f"--cache-dir={shared_cache}"]
        code = 0
        try:
            main(["run", *where, *both, "--path=plain", "--threads=1", *more])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return run


def rejected(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("rejects/*/*.parquet")) for row in pl.read_parquet(path).to_dicts()]


@pytest.mark.parametrize("name", FILES)
def test_a_file(command: Command, tmp_path: Path, name: str) -> None:
    bad = FILES[name]
    (tmp_path / "data").mkdir()
    code, said = command(bad.make(tmp_path / "data"))
    assert "Traceback" not in said
    assert code == bad.exit_code, said
    assert [word for word in bad.words if word not in said] == [], said
    if code == 3:
        assert "\nerror: nothing of data set" in said
    elif code:
        assert said.startswith("error: ")
        assert "\n" not in said.strip()
        return
    assert Counter(row["code"] for row in rejected(tmp_path / "out")) == dict(bad.rejects)
    counts = json.loads((tmp_path / "out/summary.json").read_text())["policies"]["same"]["overall"]
    assert counts["n"] == counts["scored"] + sum(count for _, count in bad.rejects)


def test_every_row_ends_where_it_should(command: Command, tmp_path: Path) -> None:
    code, said = command(write_rows_file(tmp_path), "--max-length=500", "--render=chat")
    assert code == 0, said
    codes = {row["source_row"]: row["code"] for row in rejected(tmp_path / "out")}
    scored = {
        row["source_row"]: row["marks"] for row in pl.read_parquet(f"{tmp_path}/out/scores/same/*.parquet").to_dicts()
    }
    found = {name: codes.get(i) or tuple(scored[i]) for i, name in enumerate(ROWS)}
    expected = {name: bad.code or bad.marks for name, bad in ROWS.items()}
    assert {n: f for n, f in found.items() if f != expected[n]} == {}
    assert set(codes) | set(scored) == set(range(len(ROWS)))
    assert set(codes) & set(scored) == set()


def test_more_than_a_share_of_bad_rows_is_exit_3_with_everything_kept(command: Command, tmp_path: Path) -> None:
    code, said = command(write_rows_file(tmp_path), "--max-length=500", "--render=chat", "--max-bad-rows=0.1")
    assert (code, "--max-bad-rows 0.1" in said) == (3, True), said
    assert (tmp_path / "out/summary.json").is_file()
