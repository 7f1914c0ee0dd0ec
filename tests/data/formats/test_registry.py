"""Every format reads its data set's own schema, and knows which answer is better."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_score.config.schema import DataSpec
from dpo_score.data.dataset import Dataset, open_datasets, read_pairs
from dpo_score.data.formats import base
from dpo_score.data.formats.registry import FAMILIES, FORMATS, describe_formats, map_keys
from dpo_score.data.row_reader import ParquetRows
from dpo_score.data.types import Pair, Rejected
from tests.data.formats.golden import GOLDEN, Golden

each_golden = pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g.format}-{g.dataset}")


def opened(folder: Path, table: pa.Table, **options: Any) -> Dataset:
    path = folder / "rows.parquet"
    pq.write_table(table, path)
    return open_datasets([DataSpec(name="set", path=str(path), **options)])[0]


def read(folder: Path, table: pa.Table, **options: Any) -> list[Pair | Rejected]:
    dataset = opened(folder, table, **options)
    return list(read_pairs([dataset], 0, dataset.rows))


def said(side: Any) -> str:
    return side if isinstance(side, str) else side[-1]["content"]


def preference(item: Pair | Rejected) -> tuple[str, str] | str:
    """What a reading says, in the words of the golden table."""
    if isinstance(item, Rejected):
        return item.code
    if item.tokens is not None:
        return tuple(" ".join(map(str, ids)) for ids in (item.tokens.chosen, item.tokens.rejected))  # type: ignore[return-value]
    return said(item.chosen), said(item.rejected)


@each_golden
def test_is_recognised_by_its_schema(golden: Golden, tmp_path: Path) -> None:
    assert opened(tmp_path, golden.table(), **golden.options).format.full_name == golden.format


@each_golden
def test_the_better_answer_is_chosen(golden: Golden, tmp_path: Path) -> None:
    assert [preference(item) for item in read(tmp_path, golden.table(), **golden.options)] == golden.expected


@each_golden
def test_a_turned_label_turns_every_pair(golden: Golden, tmp_path: Path) -> None:
    """So a reader with the wrong polarity fails the test above on each of its rows."""
    straight = {p for p in golden.expected if isinstance(p, tuple)}
    turned = [preference(item) for item in read(tmp_path, golden.table(flipped=True), **golden.options)]
    assert {(b, a) for a, b in straight} == {p for p in turned if isinstance(p, tuple)}
    assert not straight & set(turned)


@each_golden
def test_the_other_string_and_list_types_read_the_same(golden: Golden, tmp_path: Path) -> None:
    def wide(type_: pa.DataType) -> pa.DataType:
        if pa.types.is_struct(type_):
            return pa.struct([(f.name, wide(f.type)) for f in type_.fields])
        if pa.types.is_list(type_):
            return pa.large_list(wide(type_.value_type))
        return pa.large_string() if pa.types.is_string(type_) else type_

    schema = pa.schema([(field.name, wide(field.type)) for field in golden.table().schema])
    table = pa.Table.from_pylist(golden.rows, schema=schema)
    assert [preference(item) for item in read(tmp_path, table, **golden.options)] == golden.expected


@each_golden
def test_kept_ties_are_scored_in_the_given_order(golden: Golden, tmp_path: Path) -> None:
    found = read(tmp_path, golden.table(), keep_ties=True, **golden.options)
    assert sum(isinstance(item, Pair) and item.tied for item in found) == golden.expected.count("tie")
    assert "tie" not in {item.code for item in found if isinstance(item, Rejected)}


def test_every_row_of_the_table_has_a_fixture() -> None:
    assert {row.full_name for row in FORMATS} == {golden.format for golden in GOLDEN}


def test_the_example_of_a_format_runs() -> None:
    """A new format is a function like this one, in a family's file, and a fixture in golden.py: nothing else."""
    found = doctest.testmod(base)
    assert found.attempted >= 6
    assert not found.failed


def test_every_function_with_the_decorator_is_in_the_table() -> None:
    made = [value for family in FAMILIES for value in vars(family).values() if isinstance(value, base.Format)]
    assert len(made) == len(FORMATS) == len({format_.full_name for format_ in FORMATS})


def test_the_keys_of_map_are_told_for_every_format() -> None:
    told = map_keys()
    assert all(format_.full_name in told for format_ in FORMATS)
    assert "response_a, response_b, winner" in told


def test_the_table_can_be_shown() -> None:
    shown = describe_formats()
    assert len(shown) == len(FORMATS)
    assert all(row["polarity"] and row["columns"] and row["code"].startswith("F") for row in shown)


def test_two_labels_need_a_choice(tmp_path: Path) -> None:
    golden = next(g for g in GOLDEN if g.dataset == "PKU-Alignment/PKU-SafeRLHF")
    with pytest.raises(Exception, match="--preference better or --preference safer"):
        opened(tmp_path, golden.table())
    assert [preference(i) for i in read(tmp_path, golden.table(), preference="better")] == [
        (b, a)
        for a, b in golden.expected  # type: ignore[misc]
    ]


def test_a_missing_label_is_refused(tmp_path: Path) -> None:
    golden = next(g for g in GOLDEN if g.dataset == "PKU-Alignment/PKU-SafeRLHF-single-dimension")
    with pytest.raises(Exception, match="no label for --preference safer"):
        opened(tmp_path, golden.table(), preference="safer")


RANKED = next(g for g in GOLDEN if g.format == "ranked/lists")


@pytest.mark.parametrize(
    ("pairing", "pairs"),
    [
        ("best-worst", [("Paris.", "London.")]),
        ("all", [("Paris.", "Lyon."), ("Paris.", "London."), ("Lyon.", "London.")]),
        ("adjacent", [("Paris.", "Lyon."), ("Lyon.", "London.")]),
    ],
)
def test_pairings_of_a_ranked_list(pairing: str, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    found = read(tmp_path, RANKED.table().slice(0, 1), pairing=pairing)
    assert [preference(item) for item in found] == pairs
    assert len({item.extra["group_id"] for item in found if isinstance(item, Pair)}) == 1
    assert len({item.source.row_id for item in found}) == len(found)


def test_a_random_pairing_is_one_of_all_and_follows_the_row_not_its_place(tmp_path: Path) -> None:
    table = RANKED.table().slice(0, 2)
    found = [preference(i) for i in read(tmp_path, table, pairing="random")]
    turned = [preference(i) for i in read(tmp_path, table.take([1, 0]), pairing="random")]
    assert found == turned[::-1]
    assert found[0] in [("Paris.", "Lyon."), ("Paris.", "London."), ("Lyon.", "London.")]


def test_only_the_columns_that_are_used_are_read(tmp_path: Path) -> None:
    golden = next(g for g in GOLDEN if g.dataset == "openai/webgpt_comparisons")
    dataset = opened(tmp_path, golden.table())
    assert dataset.reader.needed == ["question", "answer_0", "answer_1", "score_0", "score_1"]
    rows = list(ParquetRows(dataset.files[0].path).stream(0, dataset.reader.needed))
    assert not any("quotes_0" in row for row in rows)  # type: ignore[operator]
