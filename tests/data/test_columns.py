"""Every column is read, said to be unread, or refused; every row gives a pair or a reject; in any order of files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_score.config.schema import DataSpec
from dpo_score.data.dataset import Dataset, open_datasets, read_pairs
from dpo_score.data.types import Pair, Rejected
from dpo_score.errors import DataError
from tests.data.formats.golden_rows import bot, user

PAIR = {"prompt": "Say hi", "chosen": "Ahoy there", "rejected": "No"}
CHAT = {"chosen": [user("2+2?"), bot("It is four")], "rejected": [user("2+2?"), bot("It is five")]}
PIRATE = "Talk like a pirate."
SYSTEM = {"role": "system", "content": PIRATE}


def lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def opened(path: Path, **spec: Any) -> Dataset:
    return open_datasets([DataSpec(name="set", path=str(path), **spec)])[0]


def read(dataset: Dataset) -> list[Pair | Rejected]:
    return list(read_pairs([dataset], 0, dataset.rows))


def systems(dataset: Dataset) -> list[bool]:
    return [
        isinstance(item, Pair) and item.prompt[0] == {"role": "system", "content": PIRATE} for item in read(dataset)
    ]


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("absent", ["null type", "no column"])
def test_an_optional_column_is_read_whatever_file_has_it(first: str, absent: str, tmp_path: Path) -> None:
    bare = pa.Table.from_pylist([PAIR] * 2)
    if absent == "null type":
        bare = bare.append_column("system", pa.nulls(2))
    pq.write_table(bare, tmp_path / f"{first}.parquet")
    other = "b" if first == "a" else "a"
    pq.write_table(pa.Table.from_pylist([{**PAIR, "system": PIRATE}] * 2), tmp_path / f"{other}.parquet")
    assert sorted(systems(opened(tmp_path))) == [False, False, True, True]


def test_a_column_that_comes_after_a_thousand_rows_is_read(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", [PAIR] * 1200 + [{**PAIR, "system": PIRATE, "tools": [{"name": "f"}]}])
    dataset = opened(tmp_path / "rows.jsonl")
    assert systems(dataset) == [False] * 1200 + [True]
    last = read(dataset)[-1]
    assert isinstance(last, Pair)
    assert last.tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("background_documents", ["The sky is green."]),
        ("prior_turns", "We spoke of the sea."),
        ("background", "The sky is green."),
        ("few_shot_examples", "Q: 1 + 1? A: 2"),
        ("user_persona", "A pirate of seventy."),
        ("context", "Na"),
        ("developer", "s"),
        ("anything", [user("earlier"), bot("before")]),
        ("page_screenshot", "file.png"),
        ("audio", {"bytes": b"\x89PNG", "path": None}),
    ],
)
def test_what_looks_like_context_is_refused_and_can_be_left_out(name: str, value: Any, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{**PAIR, name: value}] * 2), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=f"--ignore-columns {name}") as error:
        opened(tmp_path / "rows.parquet")
    assert "\n" not in str(error.value)
    dataset = opened(tmp_path / "rows.parquet", ignore_columns=(name,))
    assert f"ignored as asked: {name}" in dataset.summary()
    assert dataset.columns.to_json() == {"read": ["prompt", "chosen", "rejected"], "unread": [], "ignored": [name]}


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_a", "m"), ("question_id", "7"), ("n_turns", 3), ("judge_messages", "x"), ("note", "y")],
)
def test_other_columns_are_said_to_be_unread(name: str, value: Any, tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", [{**PAIR, name: value}])
    assert f"columns not read: {name}" in opened(tmp_path / "rows.jsonl").summary()


def test_a_column_that_repeats_the_conversation_is_no_context_but_for_a_row_that_differs(tmp_path: Path) -> None:
    rows = [{**CHAT, "dialogue_turns": CHAT["chosen"]}] * 300
    rows[201] = {**CHAT, "dialogue_turns": [user("Something else was said before")]}
    lines(tmp_path / "rows.jsonl", rows)
    dataset = opened(tmp_path / "rows.jsonl")
    assert "dialogue_turns (it repeats what is read)" in dataset.summary()
    rejected = [item for item in read(dataset) if isinstance(item, Rejected)]
    assert [(item.source.row, item.code, item.column) for item in rejected] == [
        (201, "unread_context", "dialogue_turns")
    ]


@pytest.mark.parametrize(
    "write", [json.dumps, repr, lambda turns: json.dumps(json.dumps(turns)), lambda turns: f" \n{turns}"]
)
def test_messages_in_text_are_decided_over_the_set_and_checked_in_each_row(write: Any, tmp_path: Path) -> None:
    encoded = {side: write(turns) for side, turns in CHAT.items()}
    plain = {"chosen": "2+2? It is four", "rejected": "2+2? It is five"}
    lines(tmp_path / "mostly.jsonl", [encoded] * 20 + [plain])
    found = read(opened(tmp_path / "mostly.jsonl"))
    assert [getattr(item, "code", "pair") for item in found] == ["pair"] * 20 + ["invalid_json"]
    lines(tmp_path / "seldom.jsonl", [plain] * 90 + [encoded])
    found = read(opened(tmp_path / "seldom.jsonl"))
    assert [getattr(item, "code", "pair") for item in found] == ["pair"] * 90 + ["encoded_text"]


def test_messages_in_text_that_is_stored_as_bytes(tmp_path: Path) -> None:
    """Spark writes a column of JSON text as binary; another file of the set holds the same as text."""
    encoded = {side: json.dumps(turns) for side, turns in CHAT.items()}
    pq.write_table(
        pa.table({side: pa.array([text.encode()] * 2) for side, text in encoded.items()}), tmp_path / "a.parquet"
    )
    pq.write_table(pa.Table.from_pylist([encoded]), tmp_path / "b.parquet")
    found = read(opened(tmp_path))
    assert [pair.chosen for pair in found if isinstance(pair, Pair)] == [tuple(CHAT["chosen"])] * 3


def test_values_that_no_arrow_column_holds_are_carried_as_text(tmp_path: Path) -> None:
    kept = [1, "two", None, 10**25, [3], 4.5]
    lines(tmp_path / "rows.jsonl", [{**PAIR, "kept": value, "big": 10**25} for value in kept])
    specs = [DataSpec(name="set", path=str(tmp_path / "rows.jsonl"))]
    (dataset,) = open_datasets(specs, keep_columns=("kept", "big"))
    assert dataset.value_kind("kept") == dataset.value_kind("big") == "other"
    assert [item.extra["kept"] for item in read(dataset) if isinstance(item, Pair)] == kept


COLUMNS: dict[str, Any] = {
    "system": PIRATE,
    "id": "7",
    "source": "web",
    "score": 1.5,
    "extra_documents": ["The sky is green."],
    "tools": [{"name": "f"}],
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(
        st.lists(st.sets(st.sampled_from([*COLUMNS, "broken"])), min_size=1, max_size=3), min_size=1, max_size=3
    ),
    ignore=st.booleans(),
)
def test_rows_and_columns_add_up_in_every_order_of_the_files(
    files: list[list[set[str]]], ignore: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """{rows} = scored + rejected and {columns} = read + said to be unread, or the set is refused; in any order."""
    files = [[set(), *files[0]], *files[1:]]
    present = {name for rows in files for row in rows for name in row} - {"broken"}
    outcomes = []
    for number, order in enumerate(itertools.permutations(files)):
        folder = tmp_path_factory.mktemp(f"order{number}-")
        for index, rows in enumerate(order):
            made = []
            for row in rows:
                more = {name: COLUMNS[name] for name in row if name in COLUMNS}
                made.append({**PAIR, **more, "prompt": None if "broken" in row else PAIR["prompt"]})
            lines(folder / f"{index}.jsonl", made)
        asked = ("extra_documents",) if ignore and "extra_documents" in present else ()
        try:
            dataset = opened(folder, ignore_columns=asked)
        except DataError as error:
            assert "extra_documents" in present
            assert not asked
            outcomes.append(str(error).count("--ignore-columns extra_documents"))
            continue
        found = read(dataset)
        account = dataset.columns.to_json()
        assert len(found) == sum(map(len, files))
        assert sorted(name for names in account.values() for name in names) == sorted({*PAIR, *present})
        pairs = [item for item in found if isinstance(item, Pair)]
        broken = sum("broken" in row for rows in files for row in rows)
        assert [item.code for item in found if isinstance(item, Rejected)] == ["null_field"] * broken
        with_tools = sum("tools" in row and "broken" not in row for rows in files for row in rows)
        assert sum(pair.tools is not None for pair in pairs) == with_tools
        outcomes.append((sorted(pair.pair_id for pair in pairs), sorted(account["read"])))
    assert all(outcome == outcomes[0] for outcome in outcomes)
