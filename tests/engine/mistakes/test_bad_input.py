"""A user's mistake, through the real command line: one paragraph, the right exit code, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_score.cli.main import main
from tests.run_fixtures import Runner, preference_rows, write_rows
from tests.tiny import byte_tokenizer, tiny_model

Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """`said(data, *options)` → exit code and what was printed on standard error."""

    def run(
        data: Path | str, *options: str, reference: Path | None = None, policy: Path | None = None
    ) -> tuple[int, str]:
        arguments = ["run", "--data", str(data), "--out", str(tmp_path / "out"), "--cache-dir", str(runner.cache)]
        models = ["--reference", str(reference or runner.models["reference"])]
        models += ["--policy", f"better={policy or runner.models['better']}"]
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *models, "--threads", "1", *options])
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return int(stop.value.code or 0), error

    return run


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "good.parquet", preference_rows(8))


def test_a_file_that_is_not_there(said: Said, tmp_path: Path) -> None:
    code, error = said(tmp_path / "absent.parquet")
    assert (code, "absent.parquet" in error) == (2, True)


def test_a_file_that_is_not_parquet(said: Said, tmp_path: Path) -> None:
    (tmp_path / "fake.parquet").write_text("prompt,chosen,rejected\na,b,c\n")
    code, error = said(tmp_path / "fake.parquet")
    assert (code, "fake.parquet" in error, "arquet" in error) == (2, True, True)


def test_an_empty_data_set(said: Said, tmp_path: Path) -> None:
    empty = pa.table({name: pa.array([], pa.string()) for name in ("prompt", "chosen", "rejected")})
    pq.write_table(empty, tmp_path / "empty.parquet")
    code, error = said(tmp_path / "empty.parquet")
    assert (code, "no rows" in error) == (2, True)


def test_a_missing_column_names_the_schema_and_the_flag(said: Said, tmp_path: Path) -> None:
    rows = [{"question_text": "a", "chosen": "b", "worst": "c"}]
    code, error = said(write_rows(tmp_path / "odd.parquet", rows))
    assert (code, "question_text" in error, "--map" in error) == (2, True, True)


def test_a_column_of_the_wrong_type(said: Said, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": 3, "rejected": 4}]
    code, error = said(write_rows(tmp_path / "numbers.parquet", rows))
    assert (code, "chosen" in error) == (2, True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--loss", "sigmod"), "did you mean 'sigmoid'"),
        (("--loss-param", "ld_alpa=0.5"), "did you mean 'ld_alpha'"),
        (("--beta", "-1"), "beta"),
        (("--dtype", "float8"), "compute.dtype"),
        (("--device", "cuda"), "no CUDA device"),
        (("--max-length", "1"), "text.max_length"),
        (("--render", "cht"), "text.render"),
        (("--keep-columns", "subst"), "did you mean 'subset'"),
        (("--stats", "entrpy"), "did you mean 'entropy'"),
        (("--threads", "-1"), "compute.threads"),
        (("--threads", "9" * 30), "compute.threads"),
        (("--workers", "9" * 30), "compute.workers"),
        (("--text-processes", "9" * 30), "compute.text_processes"),
        (("--tensor-parallel", "9" * 30), "compute.tensor_parallel"),
        (("--batch-tokens", "0"), "compute.batch_tokens"),
        (("--batch-tokens", "9" * 30), "compute.batch_tokens"),
        (("--limit", "9" * 30), "limit"),
        (("--sample", "5", "--seed", "-5"), "seed"),
        (("--max-length", "9" * 30), "text.max_length"),
        (("--reference", "columns:subset"), "name two columns"),
        (("--map", "prompt"), "'prompt' is no assignment"),
        (("--render", "chat", "--chat-template-kwargs", '{"tools": []}'), "sets 'tools'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_option_that_cannot_be(said: Said, good: Path, options: tuple[str, ...], expected: str) -> None:
    code, error = said(good, *options)
    assert (code, expected in error) == (2, True), error


def test_reference_columns_of_words(said: Said, good: Path) -> None:
    code, error = said(good, "--reference", "columns:subset,subset")
    assert (code, "column 'subset'" in error, "no number" in error) == (2, True, True), error


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", "x"), ("num_attention_heads", 0), ("hidden_size", None), ("rope_parameters", 3)]
)
@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_configuration_that_cannot_be(
    said: Said, runner: Runner, good: Path, tmp_path: Path, key: str, value: Any, tokenizer: bool
) -> None:
    folder = Path(shutil.copytree(runner.models["reference"], tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    other = () if tokenizer else ("--tokenizer", str(runner.models["better"]))
    code, error = said(good, *other, reference=folder)
    assert (code, f"{folder}" in error) == (2, True), error


def test_an_unknown_flag(said: Said, good: Path) -> None:
    assert said(good, "--betta", "0.1")[0] == 2


def test_a_conversation_without_a_chat_template(said: Said, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tiny_model(seed=7).save_pretrained(plain)
    byte_tokenizer(chat_template=None).save_pretrained(plain)
    turn = [{"role": "user", "content": "hi"}]
    answer = [{"role": "assistant", "content": "yes"}]
    rows = [{"prompt": turn, "chosen": answer, "rejected": [{"role": "assistant", "content": "no"}]}]
    data = write_rows(tmp_path / "chat.parquet", rows)
    code, error = said(data, reference=plain, policy=plain)
    assert (code, "--chat-template" in error) == (2, True)


def test_rows_that_cannot_be_scored_get_codes(said: Said, tmp_path: Path) -> None:
    rows = preference_rows(6)
    rows[1]["prompt"] = "x " * 200
    rows[2]["chosen"] = None
    code, _ = said(write_rows(tmp_path / "rows.parquet", rows), "--max-length", "64")
    rejected = pl.read_parquet(tmp_path / "out/rejects/data/*.parquet")
    assert code == 0
    assert rejected.select("source_row", "code").rows() == [(1, "prompt_too_long"), (2, "null_field")]


def test_identical_and_empty_answers_are_scored_and_marked(said: Said, tmp_path: Path) -> None:
    rows = preference_rows(4)
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["chosen"] = ""
    assert said(write_rows(tmp_path / "rows.parquet", rows))[0] == 0
    scores = pl.read_parquet(tmp_path / "out/scores/better/*.parquet")
    marks = dict(zip(scores["source_row"], scores["marks"].to_list(), strict=True))
    assert "identical_pair" in marks[1]
    assert "empty_answer" in marks[2]
    assert scores.filter(source_row=1)["margins"].to_list() == [0.0]


def test_more_bad_rows_than_allowed_end_in_exit_3_with_the_outputs_kept(said: Said, tmp_path: Path) -> None:
    rows = preference_rows(10)
    rows[3]["chosen"] = rows[4]["chosen"] = None
    data = write_rows(tmp_path / "rows.parquet", rows)
    code, error = said(data, "--max-bad-rows", "0.1")
    assert (code, "2 of 10 rows" in error) == (3, True)
    assert json.loads((tmp_path / "out/summary.json").read_text())["policies"]["better"]["overall"]["scored"] == 8
    assert said(data, "--max-bad-rows", "2")[0] == 0


def test_a_value_seen_is_escaped_and_cut(said: Said, tmp_path: Path) -> None:
    turns = [{"role": "\x1b[31mroot\u202e", "content": "x" * 500}]
    answer = [{"role": "assistant", "content": "yes"}]
    rows: list[dict[str, Any]] = [{"prompt": turns, "chosen": answer, "rejected": answer} for _ in range(2)]
    said(write_rows(tmp_path / "odd.parquet", rows))
    rejected = list((tmp_path / "out/rejects/data").glob("*.parquet"))
    for row in pl.read_parquet(rejected).iter_rows(named=True) if rejected else ():
        shown = f"{row['value_seen']}{row['reason']}"
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert len(row["value_seen"] or "") <= 200


def test_logps_that_are_not_finite_become_rejected_rows(said: Said, good: Path, tmp_path: Path) -> None:
    import torch

    broken = tmp_path / "broken"
    model = tiny_model(seed=8)
    with torch.no_grad():
        model.get_output_embeddings().weight[ord("q")] = float("nan")
    model.save_pretrained(broken)
    byte_tokenizer().save_pretrained(broken)
    code, _ = said(good, reference=broken)
    rejected = pl.read_parquet(tmp_path / "out/rejects/reference/*.parquet")
    assert code in (0, 3)
    assert set(rejected["code"]) == {"nonfinite_logp"}
    assert rejected.height == 8
