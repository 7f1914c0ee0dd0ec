"""Rows are numbered through all files, read in any blocks, and identified by content."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.config.schema import DataSpec
from dpo_score.data import row_reader as row_files
from dpo_score.data.dataset import PairReader, mean_text_bytes, open_datasets, read_pairs, read_rows_at
from dpo_score.data.row_reader import JsonRows
from dpo_score.data.types import Pair
from dpo_score.errors import DataError
from tests.data.formats.golden import GOLDEN


def rows(count: int, start: int = 0) -> pa.Table:
    numbers = range(start, start + count)
    return pa.table(
        {"prompt": [f"p{n}" for n in numbers], "chosen": [f"a{n}" for n in numbers], "rejected": ["b"] * count}
    )


def spec(path: Path | str, name: str = "set", **options: Any) -> DataSpec:
    return DataSpec(name=name, path=str(path), **options)


@pytest.fixture
def two_sets(tmp_path: Path) -> list[DataSpec]:
    """Seven rows in three files (one empty), then JSON lines with four; odd row groups."""
    folder = tmp_path / "one"
    folder.mkdir()
    pq.write_table(rows(4), folder / "a.parquet", row_group_size=3)
    pq.write_table(rows(0), folder / "b.parquet")
    pq.write_table(rows(3, 4), folder / "c.parquet", row_group_size=1)
    lines = tmp_path / "two.jsonl"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows(4, 7).to_pylist()) + "\n")
    return [spec(folder, "one"), spec(lines, "two")]


def prompts(items: Any) -> list[Any]:
    return [item.prompt for item in items]


def test_rows_count_through_files_and_sets(two_sets: list[DataSpec]) -> None:
    datasets = open_datasets(two_sets)
    found = list(read_pairs(datasets, 0, 11))
    assert prompts(found) == [f"p{n}" for n in range(11)]
    assert [item.source.row_id for item in found] == [
        "0:0", "0:1", "0:2", "0:3", "2:0", "2:1", "2:2", "3:0", "3:1", "3:2", "3:3",
    ]  # fmt: skip
    assert [dataset.rows for dataset in datasets] == [7, 4]
    assert found[4].source.dataset == "one"
    assert found[4].source.file == "c.parquet"


@given(bounds=st.lists(st.integers(0, 12), min_size=2, max_size=6), ordered=st.booleans())
@settings(max_examples=40, deadline=None)
def test_blocks_in_any_order_give_the_rows_of_one_pass(
    tmp_path_factory: pytest.TempPathFactory, bounds: list[int], ordered: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "blocks"
    if not folder.exists():
        folder.mkdir()
        pq.write_table(rows(5), folder / "a.parquet", row_group_size=2)
        pq.write_table(rows(6, 5), folder / "b.parquet", row_group_size=4)
    datasets = open_datasets([spec(folder)])
    whole = prompts(read_pairs(datasets, 0, 11))
    reader = PairReader(datasets)
    edges = sorted(bounds) if ordered else bounds
    for start, stop in itertools.pairwise(edges):
        assert prompts(reader.read(start, stop)) == whole[start:stop]


def test_consecutive_blocks_open_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(rows(100), tmp_path / "a.parquet")
    datasets = open_datasets([spec(tmp_path)])
    opened: list[object] = []
    whole = pq.ParquetFile

    def counted(*args: Any, **kwargs: Any) -> Any:
        opened.append(args)
        return whole(*args, **kwargs)

    monkeypatch.setattr("dpo_score.data.row_reader.pq.ParquetFile", counted)
    reader = PairReader(datasets)
    blocks = [reader.read(start, start + 10) for start in range(0, 100, 10)]
    assert [len(block) for block in blocks] == [10] * 10
    assert len(opened) == 1


def test_single_rows_by_number(two_sets: list[DataSpec]) -> None:
    assert prompts(read_rows_at(open_datasets(two_sets), [0, 3, 4, 10])) == ["p0", "p3", "p4", "p10"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
@given(wanted=st.sets(st.integers(0, 39)))
@settings(max_examples=20, deadline=None)
def test_rows_by_number_are_those_of_one_pass(
    tmp_path_factory: pytest.TempPathFactory, kind: str, wanted: set[int]
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"picked-{kind}"
    if not folder.exists():
        folder.mkdir()
        for name, first, count in (("a", 0, 23), ("b", 23, 17)):
            save(folder / f"{name}.{kind}", rows(count, first))
    datasets = open_datasets([spec(folder)])
    whole = prompts(read_pairs(datasets, 0, 40))
    assert prompts(read_rows_at(datasets, sorted(wanted))) == [whole[row] for row in sorted(wanted)]


def save(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=5)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        path.write_text(json.dumps(table.to_pylist()))


def test_scattered_rows_of_json_lines_take_one_pass_and_parse_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.jsonl", rows(5000))
    datasets = open_datasets([spec(tmp_path)])
    opened: list[str] = []
    parsed: list[object] = []
    open_, parse = row_files.open_binary, JsonRows._decoded
    monkeypatch.setattr(row_files, "open_binary", lambda path: (opened.append(path), open_(path))[1])
    monkeypatch.setattr(JsonRows, "_decoded", lambda self, row: (parsed.append(row), parse(self, row))[1])
    assert prompts(read_rows_at(datasets, range(0, 5000, 500))) == [f"p{i}" for i in range(0, 5000, 500)]
    assert (len(opened), len(parsed)) == (1, 10)


def test_units_of_two_rows_by_number(tmp_path: Path) -> None:
    golden = next(g for g in GOLDEN if g.format == "ranked/two-rows")
    table = pa.concat_tables([golden.table()] * 3)
    pq.write_table(table.slice(0, table.num_rows - 1), tmp_path / "a.parquet")
    datasets = open_datasets([spec(tmp_path)])
    whole = list(read_pairs(datasets, 0, datasets[0].rows))
    assert read_rows_at(datasets, [1, datasets[0].rows - 1]) == [whole[1], whole[-1]]


def test_a_file_that_is_shorter_than_it_was_is_said(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", rows(30))
    datasets = open_datasets([spec(tmp_path)])
    save(tmp_path / "a.jsonl", rows(3))
    with pytest.raises(DataError, match="ended before row 20"):
        read_rows_at(datasets, [1, 20])


def test_two_row_formats_count_pairs_of_rows(tmp_path: Path) -> None:
    golden = next(g for g in GOLDEN if g.format == "ranked/two-rows")
    pq.write_table(golden.table().slice(0, 5), tmp_path / "a.parquet")
    [dataset] = open_datasets([spec(tmp_path)])
    found = list(read_pairs([dataset], 0, dataset.rows))
    assert dataset.rows == 3
    assert [item.source.row for item in found] == [0, 2, 4]
    assert found[2].code == "context_mismatch"  # type: ignore[union-attr]


def test_a_unit_of_two_rows_can_be_read_alone(tmp_path: Path) -> None:
    golden = next(g for g in GOLDEN if g.format == "ranked/two-rows")
    pq.write_table(golden.table(), tmp_path / "a.parquet")
    [item] = PairReader(open_datasets([spec(tmp_path)])).read(1, 2)
    assert isinstance(item, Pair)
    assert item.chosen == ({"role": "assistant", "content": "4"},)


def test_the_fingerprint_follows_content_and_choices_but_not_places(tmp_path: Path) -> None:
    def fingerprint(folder: str, table: pa.Table, seed: int = 0, **options: Any) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / folder / "a.parquet")
        return json.dumps(open_datasets([spec(tmp_path / folder, **options)], seed=seed)[0].fingerprint())

    base = fingerprint("x", rows(3))
    assert fingerprint("elsewhere", rows(3)) == base
    assert fingerprint("x", rows(3), seed=1) == base  # nothing is drawn
    others = [
        fingerprint("x", rows(3, 1)),
        fingerprint("x", rows(3), pairing="random"),
        fingerprint("x", rows(3), pairing="random", seed=1),
        fingerprint("x", rows(3), keep_ties=True),
        fingerprint("x", rows(3), pairing="all"),
        fingerprint("x", rows(3), map={"prompt": "prompt"}),
    ]
    assert len({base, *others}) == 7


def test_digests_can_come_from_elsewhere(tmp_path: Path) -> None:
    pq.write_table(rows(1), tmp_path / "a.parquet")
    [dataset] = open_datasets([spec(tmp_path)], sha256=lambda path: f"digest of {Path(path).name}")
    assert dataset.files[0].sha256 == "digest of a.parquet"


def test_the_size_of_a_row_is_estimated(tmp_path: Path) -> None:
    table = rows(1000).append_column("unread", pa.array([os.urandom(1000).hex() for _ in range(1000)]))
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    assert 5 < mean_text_bytes(open_datasets([spec(tmp_path)])[0]) < 15


@pytest.mark.parametrize("form", ["glob", "file", "memory", "file-url", "gz", "array"])
def test_every_way_to_name_a_set(form: str, tmp_path: Path) -> None:
    path: Path | str = tmp_path / "a.parquet"
    pq.write_table(rows(2), path)
    if form == "glob":
        path = tmp_path / "*.parquet"
    elif form == "file-url":
        path = f"file://{path}"
    elif form == "memory":
        fsspec.filesystem("memory").pipe("/sets/a.parquet", (tmp_path / "a.parquet").read_bytes())
        path = "memory://sets/a.parquet"
    elif form == "gz":
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows(2).to_pylist())).encode()))
    elif form == "array":
        path = tmp_path / "a.json"
        path.write_text(json.dumps(rows(2).to_pylist()))
    [dataset] = open_datasets([spec(path)])
    assert prompts(read_pairs([dataset], 0, 5)) == ["p0", "p1"]
    assert dataset.files[0].name.startswith("a.")
    assert len(dataset.files[0].sha256) == 64


def test_files_of_a_set_must_agree_on_what_is_read(tmp_path: Path) -> None:
    pq.write_table(rows(2), tmp_path / "a.parquet")
    pq.write_table(rows(2).drop(["chosen"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: column 'chosen' is missing, but text in .*a.parquet"):
        open_datasets([spec(tmp_path)])
    numbers = rows(2).set_column(1, "chosen", pa.array([1, 2]))
    pq.write_table(numbers, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="column 'chosen' is int, but text"):
        open_datasets([spec(tmp_path)])


def test_files_of_a_set_may_differ_in_what_is_not_read(tmp_path: Path) -> None:
    pq.write_table(rows(2).append_column("subset", pa.array(["x", "y"])), tmp_path / "a.parquet")
    pq.write_table(rows(2, 2), tmp_path / "b.parquet")
    found = list(read_pairs(open_datasets([spec(tmp_path)]), 0, 4))
    assert [item.extra for item in found] == [{"subset": "x"}, {"subset": "y"}, {}, {}]  # type: ignore[union-attr]


def test_a_column_to_keep_must_be_there(tmp_path: Path) -> None:
    pq.write_table(rows(1), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'promt' to keep; did you mean 'prompt'"):
        open_datasets([spec(tmp_path)], keep_columns=["promt"])


def test_no_rows_at_all_is_an_error(tmp_path: Path) -> None:
    pq.write_table(rows(0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no rows"):
        open_datasets([spec(tmp_path)])


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = rows(1)
    pq.write_table(
        pa.Table.from_arrays([*table.columns, table.column(0)], [*table.column_names, "prompt"]), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="more than one column called prompt"):
        open_datasets([spec(tmp_path)])


def test_rows_of_a_prompt_are_found_in_every_file_of_the_set_and_from_any_row_on(tmp_path: Path) -> None:
    """A unit belongs to the file of its first row; reading in parts gives what reading at once gives."""
    answers = [(f"p{n % 7}", n) for n in range(40)] + [(None, 1), ("alone", 2)]
    for name, part in (("a.jsonl", answers[:15]), ("b.jsonl", answers[15:20]), ("c.jsonl", answers[20:])):
        rows = [{"prompt": prompt, "response": f"r{score}", "helpfulness": score} for prompt, score in part]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    [dataset] = open_datasets([DataSpec(name="set", path=str(tmp_path))])
    assert [file.rows for file in dataset.files] == [7, 0, 2]
    whole = list(read_pairs([dataset], 0, 9))
    assert [item.source.row_id for item in whole] == [*(f"0:{n}" for n in range(7)), "2:20", "2:21"]
    assert [(pair.chosen, pair.rejected) for pair in whole[:2] if isinstance(pair, Pair)] == [
        (({"role": "assistant", "content": f"r{high}"},), ({"role": "assistant", "content": f"r{low}"},))
        for low, high in ((0, 35), (1, 36))
    ]
    assert [getattr(item, "code", "pair") for item in whole[7:]] == ["null_field", "context_mismatch"]
    parts = [item for start in range(0, 9, 2) for item in read_pairs([dataset], start, start + 2)]
    assert parts == whole
    assert read_rows_at([dataset], [1, 6, 8]) == [whole[1], whole[6], whole[8]]
    assert [dataset.files[2].unit_of(dataset.files[2].first_row(unit)) for unit in (0, 1)] == [0, 1]
