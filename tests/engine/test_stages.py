"""What a block's record and columns say of how its values came about, and reference values that stand in the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from dpo_score.errors import DataError
from dpo_score.logprobs.packed import PackedPath
from dpo_score.logprobs.packing import pack_size
from tests.run_fixtures import Runner, preference_rows, write_rows
from tests.tiny import byte_tokenizer, tiny_model

ROWS = 70


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", preference_rows(ROWS))


def notes(out: Path, stage: str) -> list[dict[str, Any]]:
    """Of each block's commit record."""
    return [json.loads(path.read_text())["notes"] for path in sorted((out / "commits" / stage).glob("*.json"))]


def scores(out: Path) -> pl.DataFrame:
    return pl.read_parquet(f"{out}/scores/better/*.parquet").sort("source_row")


def test_packs_that_were_split_are_counted_in_the_record_of_their_block(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner(data, tmp_path / "whole", path="fast")
    compute = PackedPath.compute

    def with_little_memory(self: PackedPath, sequences: Any) -> Any:
        if pack_size(sequences) > 2000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(self, sequences)

    monkeypatch.setattr(PackedPath, "compute", with_little_memory)
    runner(data, tmp_path / "split", path="fast", cache_dir=str(tmp_path / "other"))
    assert [note.get("packs_split", 0) > 0 for note in notes(tmp_path / "split", "reference")] == [True, False]
    assert [note.get("packs_split", 0) > 0 for note in notes(tmp_path / "split", "scores/better")] == [True, False]
    assert not any("packs_split" in note for note in notes(tmp_path / "whole", "reference"))
    manifest = json.loads((tmp_path / "split/manifest.json").read_text())
    assert any("did not fit on cpu and was split" in warning for warning in manifest["warnings"])
    difference = scores(tmp_path / "split")["margins_nats"] - scores(tmp_path / "whole")["margins_nats"]
    assert difference.abs().max() < 1e-4  # type: ignore[operator]


def test_rows_redone_in_float32_say_so_and_are_kept_apart_from_those_in_float16(
    runner: Runner, tmp_path: Path, forwards: list[int]
) -> None:
    """The reference leaves fp16's range on "~", which only the first rows hold; packs are smaller than two rows."""
    model = tiny_model(seed=0)
    with torch.no_grad():
        model.model.embed_tokens.weight[byte_tokenizer().convert_tokens_to_ids("~")] = 65_000.0
        model.model.layers[0].mlp.down_proj.weight.mul_(300)
    model.save_pretrained(tmp_path / "hot")
    byte_tokenizer().save_pretrained(tmp_path / "hot")
    rows = [{**row, "prompt": f"{row['prompt']} {'~' if i < 3 else '-'}"} for i, row in enumerate(preference_rows(8))]
    data = write_rows(tmp_path / "rows.parquet", rows)
    options = {"reference": str(tmp_path / "hot"), "batch_tokens": "64"}
    runner(data, tmp_path / "half", dtype="float16", **options)
    runner(data, tmp_path / "exact", dtype="float32", **options)
    half, exact = (scores(tmp_path / name) for name in ("half", "exact"))
    assert half["compute_dtype"].to_list() == ["float32"] * 3 + [None] * 5
    assert exact["compute_dtype"].to_list() == [None] * 8
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        difference = (half[column] - exact[column]).abs() / exact[column].abs()
        assert difference[:3].max() < 1e-3, "of the same weights rounded to float16"  # type: ignore[operator]
    forwards.clear()
    runner(data, tmp_path / "again", dtype="float16", **options)
    assert forwards == [], "what was redone is kept apart from float16 values, and found there"
    again = scores(tmp_path / "again")
    assert again["compute_dtype"].to_list() == half["compute_dtype"].to_list()
    assert again["ref_chosen_logps"].to_list() == half["ref_chosen_logps"].to_list()


# --- reference values in the data -----------------------------------------------------------------------------------


def test_reference_values_may_be_written_as_text(runner: Runner, tmp_path: Path) -> None:
    rows = [{**row, "rc": f"-{10 + i}.5", "rr": "-20"} for i, row in enumerate(preference_rows(6))]
    rows[2]["rc"], rows[4]["rr"] = "n/a", None
    data = write_rows(tmp_path / "text.parquet", rows)
    runner(data, tmp_path / "out", reference="columns:rc,rr")
    assert scores(tmp_path / "out")["ref_chosen_logps"].to_list() == [-10.5, -11.5, -13.5, -15.5]
    rejected = pl.read_parquet(f"{tmp_path}/out/rejects/reference/*.parquet")
    assert rejected.select("source_row", "code").rows() == [(2, "no_reference_value"), (4, "no_reference_value")]


@pytest.mark.parametrize("value", ["good", True])
def test_a_column_without_a_number_is_not_one_of_reference_values(runner: Runner, tmp_path: Path, value: Any) -> None:
    rows = [{**row, "rc": value, "rr": -1.0} for row in preference_rows(6)]
    told = rf"row 0:0 of words\.parquet: column 'rc' holds '{value}', which is no number.*columns:CHOSEN,REJECTED"
    with pytest.raises(DataError, match=told):
        runner(write_rows(tmp_path / "words.parquet", rows), tmp_path / "out", reference="columns:rc,rr")
