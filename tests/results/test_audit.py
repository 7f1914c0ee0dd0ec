"""`audit` writes every suspect with its texts for review, or says why texts are missing."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from dpo_score.cli.console import audited
from dpo_score.results.audit import SCHEMA, audit
from tests.engine.whole_runs.small_run import small_run


def test_the_file_holds_every_suspect_with_texts() -> None:
    run = small_run()
    found = audit(str(run.out))
    table = pq.read_table(found["file"])
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert len(rows) == found["ranked_against"] + found["identical_answers"]
    assert [row["row_id"] for row in rows if row["finding"] == "identical_answers"] == ["0:7"]
    assert all(margin < 0 for row in rows[:-1] for _, margin in row["margins"])
    source = pq.read_table(run.data).to_pylist()
    assert all(row["chosen"] == source[row["source_row"]]["chosen"] for row in rows)
    assert rows[-1]["answer_similarity"] == 1.0


def test_without_texts_everything_else_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    found = audit(str(small_run().out), policies="step-10", no_text=True)
    rows = pq.read_table(found["file"]).to_pylist()
    assert {row["chosen"] for row in rows} == {None}
    assert {row["answer_similarity"] for row in rows} == {None}
    audited(found)
    assert "--no-text" in capsys.readouterr().out
