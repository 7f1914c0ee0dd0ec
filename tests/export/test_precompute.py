"""`precompute`: the input's rows, in their order, with the reference's values, and nothing computed twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_score.config.load import load_config
from dpo_score.engine.progress import Progress
from dpo_score.errors import BadRowsError, ConfigError, DataError, IdentityError
from dpo_score.export import layout as splits
from dpo_score.export.contract import tokenizer_digest
from dpo_score.export.dataset import DatasetWriter
from dpo_score.export.precompute import precompute
from dpo_score.integrations import load_ref_logps
from dpo_score.logprobs.scorer import PairScorer
from tests.exported import chat_rows, export, hh_rows, read, text_rows, write_rows
from tests.tiny import byte_tokenizer, save_tiny

LABELS = ["row_id", "pair_id", "pair_digest"]
VALUES = ["ref_chosen_logps", "ref_rejected_logps"]
SIDES = ["prompt", "chosen", "rejected"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "m0", seed=0)


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr(PairScorer, "score", refuse)


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts)
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def load(out: Path, **options: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset(str(out), cache_dir=str(out.parent / "hf"), **options)


# --- what is written -----------------------------------------------------------------------------------------------


def test_every_row_keeps_its_place_and_its_columns(model: Path, tmp_path: Path) -> None:
    rows = text_rows(70)
    rows[3]["chosen"] = None
    found = export(write_rows(tmp_path / "d.parquet", rows), model, tmp_path / "out")
    table = read(tmp_path / "out")
    assert table.column_names == [*SIDES, "subset", "n", *LABELS, *VALUES, "status"]
    assert table.select([*SIDES, "subset", "n"]).to_pylist() == rows
    assert table["row_id"].to_pylist() == [f"0:{i}" for i in range(70)]
    assert table["status"].to_pylist() == ["scored"] * 3 + ["null_field"] + ["scored"] * 66
    assert [i for i, value in enumerate(table["ref_chosen_logps"].to_pylist()) if value is None] == [3]
    assert (found.summary["rows"], found.summary["scored"], found.summary["rejected"]) == (70, 69, {"null_field": 1})


def test_the_values_are_those_that_stage_one_committed(model: Path, tmp_path: Path) -> None:
    export(write_rows(tmp_path / "d.parquet", text_rows(5)), model, tmp_path / "out")
    committed = pq.read_table(next((tmp_path / "out/reference").glob("*.parquet")))
    table = read(tmp_path / "out")
    for name in (*LABELS, *VALUES):
        assert table[name].equals(committed[name])
    assert table.schema.field("ref_chosen_logps").type == pa.float64()


def test_rejected_rows_are_listed_with_their_reasons(model: Path, tmp_path: Path) -> None:
    rows = text_rows(4)
    rows[1]["prompt"] = "x" * 50
    export(write_rows(tmp_path / "d.parquet", rows), model, tmp_path / "out", max_length=40)
    listed = pq.read_table(next((tmp_path / "out/rejects/data").glob("*.parquet"))).to_pylist()
    assert [(row["row_id"], row["code"]) for row in listed] == [("0:1", "prompt_too_long")]
    assert read(tmp_path / "out")["status"].to_pylist()[1] == "prompt_too_long"


def test_load_dataset_finds_both_splits(model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "test")):
        write_rows(tmp_path / f"in/{name}-00000-of-00001.parquet", text_rows(3 + seed, seed))
    found = export(tmp_path / "in", model, tmp_path / "out", split="train,test")
    assert found.summary["splits"] == {"train": 3, "test": 4}
    assert {name: len(split) for name, split in load(tmp_path / "out").items()} == {"train": 3, "test": 4}


def test_sets_are_splits_of_one_data_set_where_their_columns_meet(model: Path, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.parquet", text_rows(3))
    second = write_rows(tmp_path / "b.parquet", [{k: v for k, v in row.items() if k != "n"} for row in text_rows(2)])
    export([f"one={first}", f"two-x={second}"], model, tmp_path / "out")
    found = load(tmp_path / "out")
    assert {name: len(split) for name, split in found.items()} == {"one": 3, "two_x": 2}
    assert found["two_x"]["n"][:] == [None, None]


def test_sets_whose_columns_do_not_meet_are_configurations(model: Path, tmp_path: Path) -> None:
    text, chat = write_rows(tmp_path / "a.parquet", text_rows(3)), write_rows(tmp_path / "b.parquet", chat_rows(2))
    export([f"text={text}", f"chat={chat}"], model, tmp_path / "out")
    assert len(load(tmp_path / "out", name="text", split="text")) == 3
    assert load(tmp_path / "out", name="chat", split="chat")[0]["prompt"][0]["role"] == "user"


def test_a_transcript_gets_its_prompt_and_keeps_what_it_was(model: Path, tmp_path: Path) -> None:
    rows = hh_rows(4)
    export(write_rows(tmp_path / "d.parquet", rows), model, tmp_path / "out")
    table = read(tmp_path / "out").to_pylist()
    for row, given in zip(table, rows, strict=True):
        assert row["prompt"].endswith("\n\nAssistant:")
        assert row["prompt"] + row["chosen"] == row["original_chosen"] == given["chosen"]
        assert row["prompt"] + row["rejected"] == row["original_rejected"] == given["rejected"]


def test_whole_conversations_get_their_prompt(model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"][0]["content"], **{side: row["prompt"] + row[side] for side in SIDES[1:]}}
        for row in chat_rows(3)
    ]
    export(write_rows(tmp_path / "d.parquet", rows), model, tmp_path / "out")
    table = read(tmp_path / "out").to_pylist()
    assert [row["prompt"] for row in table] == [row["prompt"] for row in chat_rows(3)]
    assert [row["chosen"] for row in table] == [row["chosen"] for row in chat_rows(3)]
    assert [row["original_prompt"] for row in table] == [row["prompt"] for row in rows]


def test_conversations_that_need_no_change_pass_through(model: Path, tmp_path: Path) -> None:
    export(write_rows(tmp_path / "d.parquet", chat_rows(3)), model, tmp_path / "out")
    assert read(tmp_path / "out").column_names == [*SIDES, *LABELS, *VALUES, "status"]


def test_a_template_over_strings_is_written_as_the_conversation_it_scored(model: Path, tmp_path: Path) -> None:
    export(write_rows(tmp_path / "d.parquet", text_rows(2)), model, tmp_path / "out", render="chat", system="Be kind.")
    first = read(tmp_path / "out").to_pylist()[0]
    given = text_rows(2)[0]
    assert first["prompt"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": given["prompt"]},
    ]
    assert first["original_chosen"] == given["chosen"]


def test_columns_that_would_clash_are_kept_under_another_name(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "row_id": "mine", "status": "old", "ref_chosen_logps": 1.0} for row in text_rows(2)]
    export(write_rows(tmp_path / "d.parquet", rows), model, tmp_path / "out")
    first = read(tmp_path / "out").to_pylist()[0]
    assert (first["original_row_id"], first["original_status"], first["original_ref_chosen_logps"]) == (
        "mine",
        "old",
        1,
    )
    assert (first["row_id"], first["status"]) == ("0:0", "scored")


def test_a_row_of_several_answers_becomes_several_rows(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "responses": [" x", " y", " z"], "scores": [1.0, 3.0, 2.0], "n": i} for i in range(2)]
    export(write_rows(tmp_path / "d.parquet", rows), model, tmp_path / "out", pairing="all")
    table = read(tmp_path / "out")
    assert table["n"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert table["row_id"].to_pylist()[:3] == ["0:0:0", "0:0:1", "0:0:2"]
    assert set(table["chosen"].to_pylist()) <= {" y", " z"}


@pytest.mark.parametrize("rows", [text_rows, chat_rows])
def test_a_file_of_polars_gives_the_columns_of_one_of_pyarrow(rows: Any, model: Path, tmp_path: Path) -> None:
    made = rows(3)
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "d.parquet")
    polars = pl.DataFrame(made).to_arrow()
    assert any("large" in str(field.type) for field in polars.schema)
    (tmp_path / "p").mkdir()
    pq.write_table(polars, tmp_path / "p/d.parquet")
    tables = []
    for folder in (tmp_path, tmp_path / "p"):
        export(folder / "d.parquet", model, folder / "out")
        tables.append(read(folder / "out"))
    assert tables[0].column_names == tables[1].column_names
    assert tables[0].to_pylist() == tables[1].to_pylist()


def test_types_of_other_columns_are_not_touched(model: Path, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(text_rows(3)).append_column(
        "when", pa.array([1, 2, None], pa.timestamp("ns", tz="UTC"))
    )
    table = table.append_column("kind", pa.array(["x", "y", "x"]).dictionary_encode())
    table = table.append_column("raw", pa.array([b"\xff", None, b""], pa.large_binary()))
    pq.write_table(table, tmp_path / "d.parquet")
    export(tmp_path / "d.parquet", model, tmp_path / "out")
    for name in ("when", "kind", "raw"):
        assert read(tmp_path / "out")[name].to_pylist() == table[name].to_pylist()


def test_json_lines_get_the_types_that_their_rows_share(model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = text_rows(3)
    rows[0] |= {"score": 1, "odd": "x", "more": {"a": [1]}}
    rows[1] |= {"score": 2.5, "odd": 7}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export(tmp_path / "d.jsonl", model, tmp_path / "out")
    found = read(tmp_path / "out").to_pylist()
    assert [row["score"] for row in found] == [1.0, 2.5, None]
    assert [row["odd"] for row in found] == ["x", "7", None]
    assert found[0]["more"] == {"a": [1]}


def test_a_string_that_is_not_utf8_is_null_in_the_output(model: Path, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(text_rows(3))
    broken = pa.array([b"a", b"\xff\xfe", b"b"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(3, "subset", broken), tmp_path / "d.parquet")
    export(tmp_path / "d.parquet", model, tmp_path / "out")
    assert read(tmp_path / "out")["subset"].to_pylist() == ["a", None, "b"]


# --- ids, per-token values, other consumers ------------------------------------------------------------------------


def test_ids_that_were_written_score_to_the_same_bits(model: Path, tmp_path: Path) -> None:
    export(
        write_rows(tmp_path / "d.parquet", text_rows(70)), model, tmp_path / "one/out", emit_ids=True, per_token=True
    )
    first = read(tmp_path / "one/out")
    export(tmp_path / "one/out/data", model, tmp_path / "two/out", to="ids", format="ids", per_token=True)
    second = read(tmp_path / "two/out")
    for name in ("prompt_ids", "pair_digest", *VALUES, "ref_chosen_token_logps", "ref_rejected_token_logps"):
        assert second[name].equals(first[name])
    sums = [sum(map(float, row)) for row in first["ref_chosen_token_logps"].to_pylist()]
    assert sums == pytest.approx(first["ref_chosen_logps"].to_pylist(), abs=1e-4)


def test_ids_for_a_trainer_of_ones_own(model: Path, tmp_path: Path) -> None:
    rows = chat_rows(2)
    export(write_rows(tmp_path / "d.parquet", rows), model, tmp_path / "out", to="ids", score="last")
    table = read(tmp_path / "out")
    assert {"prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask"} <= set(table.column_names)
    assert "original_chosen" in table.column_names
    assert "chosen" not in table.column_names


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"score": "all-assistant"}, "every token of the answer"),
        ({"truncation": "keep_end"}, "the first max_length tokens"),
    ],
)
def test_an_export_for_another_rule_is_refused(options: Any, rule: str, model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", chat_rows(2))
    with pytest.raises(ConfigError, match=rule):
        export(data, model, tmp_path / "out", **options)
    assert not (tmp_path / "out/data").exists()


def test_steps_that_begin_the_turn_are_no_data_for_trl(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "q?", "initial_reason_steps": "Step 1.", "chosen": "yes", "rejected": "no"}]
    data = write_rows(tmp_path / "d.parquet", rows)
    with pytest.raises(ConfigError, match="what follows the steps that it begins with"):
        export(data, model, tmp_path / "out", render="chat")


def test_token_ids_are_no_data_for_trl(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}]
    with pytest.raises(ConfigError, match="this data is token ids"):
        export(write_rows(tmp_path / "d.parquet", rows), model, tmp_path / "out")


def test_columns_under_other_names(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(2))
    export(data, model, tmp_path / "out", rename="ref_chosen_logps=reference_chosen_logps")
    assert "reference_chosen_logps" in read(tmp_path / "out").column_names
    with pytest.raises(ConfigError, match=r"no such column is written; did you mean 'ref_chosen_logps'"):
        export(data, model, tmp_path / "o2", rename="ref_chosen_logp=a")
    with pytest.raises(ConfigError, match="two columns called 'status'"):
        export(data, model, tmp_path / "o3", rename="row_id=status")


def test_ld_weighted_sums(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(5))
    export(data, model, tmp_path / "plain")
    export(data, model, tmp_path / "ld", loss_param=["ld_alpha=0.25"])
    part = pq.read_table(next((tmp_path / "plain/reference").glob("*.parquet"))).to_pylist()
    expected = [r["ref_chosen_logps_shared"] * 0.75 + r["ref_chosen_logps"] * 0.25 for r in part]
    assert read(tmp_path / "ld")["ref_chosen_logps"].to_pylist() == pytest.approx(expected, rel=1e-12)


# --- nothing is lost or done twice ---------------------------------------------------------------------------------


def test_the_same_command_again_does_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(70))
    first = export(data, model, tmp_path / "out")
    before = files_of(tmp_path / "out")
    monkeypatch.setattr(DatasetWriter, "write", None)
    monkeypatch.setattr(PairScorer, "score", None)
    again = export(data, model, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    assert again.summary == first.summary


def test_without_a_folder_the_cache_is_filled(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(5))
    found = export(data, model, None, cache_dir=str(tmp_path / "cache"))
    assert (found.out, found.summary["scored"]) == (None, 5)
    request.getfixturevalue("no_forward")
    export(data, model, tmp_path / "out")
    assert read(tmp_path / "out")["ref_chosen_logps"].null_count == 0


def test_files_of_one_split_and_an_interruption_between_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(200))
    export(data, model, tmp_path / "whole")
    monkeypatch.setattr(splits, "SHARD_BYTES", 6000)
    write, written = DatasetWriter.write, []

    def write_two(writer: DatasetWriter, shard: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.name)
        write(writer, shard)

    monkeypatch.setattr(DatasetWriter, "write", write_two)
    with pytest.raises(KeyboardInterrupt):
        export(data, model, tmp_path / "out")
    before = files_of(tmp_path / "out/data")
    monkeypatch.setattr(DatasetWriter, "write", write)
    export(data, model, tmp_path / "out")
    after = files_of(tmp_path / "out/data")
    assert len(after) > 2
    assert before.items() <= after.items()
    assert read(tmp_path / "out").equals(read(tmp_path / "whole"))


def test_a_damaged_file_is_written_again(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(5))
    export(data, model, tmp_path / "out")
    path = next((tmp_path / "out/data").glob("*.parquet"))
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    export(data, model, tmp_path / "out")
    assert path.read_bytes() == good


def test_a_limit_is_a_beginning(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(100))
    export(data, model, tmp_path / "out", limit=70)
    assert len(read(tmp_path / "out")) == 70
    export(data, model, tmp_path / "out")
    export(data, model, tmp_path / "apart" / "whole")  # a cache of its own: rows 64-69 were computed twice here
    assert read(tmp_path / "out").equals(read(tmp_path / "apart" / "whole"))


def test_a_sample_is_written_in_the_order_of_the_data(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(100))
    export(data, model, tmp_path / "out", sample=10, seed=3)
    found = read(tmp_path / "out")["n"].to_pylist()
    assert len(found) == 10
    assert found == sorted(found)


def test_another_export_into_the_same_folder_is_refused_until_restart(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(5))
    export(data, model, tmp_path / "out")
    (tmp_path / "out/mine.txt").write_text("kept")
    with pytest.raises(IdentityError, match=r"renames.status: \(absent\) → .state.[\s\S]*--restart"):
        export(data, model, tmp_path / "out", rename="status=state")
    export(data, model, tmp_path / "out", rename="status=state", restart=True)
    assert "state" in read(tmp_path / "out").column_names
    assert (tmp_path / "out/mine.txt").read_text() == "kept"


# --- refusals ------------------------------------------------------------------------------------------------------


def test_folders_that_hold_something_else(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "set/data/train-00000-of-00001.parquet", text_rows(2))
    with pytest.raises(ConfigError, match="were not written here"):
        export(data, model, tmp_path / "set")
    (tmp_path / "run/scores").mkdir(parents=True)
    (tmp_path / "run/scores/part.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="scores of a run"):
        export(data, model, tmp_path / "run")
    inside = write_rows(tmp_path / "out/mine.parquet", text_rows(2))
    with pytest.raises(ConfigError, match="lies inside --out"):
        export(inside, model, tmp_path / "out")


def test_no_model_to_compute_with(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(2))
    with pytest.raises(ConfigError, match="no reference"):
        precompute(load_config(None, {"data": [str(data)]}, {}), Progress(quiet=True))
    with pytest.raises(ConfigError, match="stand in the data already"):
        export(data, "columns:a,b", tmp_path / "out")


def test_files_whose_columns_do_not_meet(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in/a.parquet", text_rows(2))
    write_rows(tmp_path / "in/b.parquet", [{**row, "n": {"x": 1}} for row in text_rows(2)])
    with pytest.raises(DataError, match="different types"):
        export(tmp_path / "in", model, tmp_path / "out")


def test_too_many_bad_rows(model: Path, tmp_path: Path) -> None:
    rows = text_rows(4)
    rows[0]["chosen"] = rows[1]["chosen"] = None
    found = export(write_rows(tmp_path / "d.parquet", rows), model, tmp_path / "out", max_bad_rows=0.25)
    with pytest.raises(BadRowsError, match="2 of 4 rows"):
        found.raise_failures()
    assert any("2 null_field" in line for line in found.lines())


def test_the_digest_of_a_tokenizer_is_the_one_that_the_trainer_finds() -> None:
    tokenizer = byte_tokenizer()
    for without in ([], [tokenizer.pad_token], [None, "<|endoftext|>"]):
        assert tokenizer_digest(tokenizer, without) == load_ref_logps.tokenizer_digest(tokenizer, without)
    assert tokenizer_digest(tokenizer) != tokenizer_digest(byte_tokenizer(bos=True))


def test_the_contract_knows_texts_that_are_read_as_conversations(model: Path, tmp_path: Path) -> None:
    """A trainer must render them with the template that they were scored with."""
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no"}] * 3
    told = [{**row, "system": "Be brief."} for row in rows]
    for name, given in (("plain", rows), ("told", told)):
        export(write_rows(tmp_path / f"{name}.parquet", given), model, tmp_path / name)
    found = {name: json.loads((tmp_path / name / "dpo_score.json").read_text())["text"] for name in ("plain", "told")}
    assert [found[name]["chat"] for name in ("plain", "told")] == [False, True]
