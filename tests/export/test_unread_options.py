"""`precompute` refuses, by name, the options of `run` that it does not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_score.cli.main import main
from tests.run_fixtures import preference_rows, write_rows


@pytest.mark.parametrize(
    ("option", "value"),
    [("--beta", "0.2"), ("--rewardbench", "exact"), ("--slice", "subset"), ("--policy", "p=nothing")],
)
def test_an_option_that_is_not_read_is_refused(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(2))
    words = ["--data", str(data), "--reference", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["precompute", *words, option, value])
    assert option in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
