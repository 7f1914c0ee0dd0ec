"""What a configuration refuses before anything is opened, and the short spellings that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.load import load_config
from dpo_score.config.schema import STATS
from dpo_score.errors import ConfigError


def loaded(**options: Any) -> Any:
    return load_config(None, {"data": ["a"], **options}, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stats": "foo"}, "unknown statistic 'foo': known: entropy, top1, wpo"),
        ({"stats": "wpo,entrpy"}, "unknown statistic 'entrpy': did you mean 'entropy'"),
        ({"threads": -1}, "compute.threads.*greater than or equal to 1"),
        ({"threads": 0}, "compute.threads.*greater than or equal to 1"),
        ({"batch_tokens": "0"}, r"compute\.batch_tokens: .*from 1 to 2 billion, or auto \(got 0\)$"),
        ({"batch_tokens": "-5"}, r"compute\.batch_tokens: .*from 1 to 2 billion, or auto \(got '-5'\)$"),
        ({"batch_tokens": "many"}, r"compute\.batch_tokens: .*from 1 to 2 billion, or auto \(got 'many'\)$"),
        ({"reference": "columns:a"}, r"reference\.model: name two columns.*columns:ref_chosen,ref_rejected"),
        ({"reference": "columns: ,b"}, "name two columns"),
        ({"map": "prompt"}, r"map: 'prompt' is no assignment: write NAME=COLUMN"),
    ],
    ids=str,
)
def test_a_mistake_is_told_by_its_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(**options)


def test_what_is_near_a_mistake_is_taken() -> None:
    assert loaded(stats="wpo, top1").compute.stats == ("wpo", "top1")
    assert loaded(batch_tokens="512").compute.batch_tokens == 512
    assert loaded(batch_tokens="auto").compute.batch_tokens == "auto"
    assert loaded(threads=1).compute.threads == 1
    assert loaded(map="prompt=a, chosen=b,").data[0].map == {"prompt": "a", "chosen": "b"}
    assert loaded(reference="columns:a, b").reference.columns == ("a", "b")


@pytest.mark.parametrize("written", ["2024-07-26", "'2024-07-26'", "2024-07-26 00:00:00"])
def test_a_date_in_yaml_needs_no_quotes(written: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"data: a.parquet\ntext: {{date: {written}}}\n")
    assert load_config(str(tmp_path / "job.yaml"), {}, {}).text.date == "2024-07-26"


def test_the_statistics_to_ask_for_are_those_that_are_written() -> None:
    from dpo_score.results import schemas as tables

    assert tuple(tables.STATS) == STATS
