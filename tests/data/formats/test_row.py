"""Row checks end in codes, and what goes along with a pair arrives whatever container it came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_score.config.schema import DataSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.types import REJECT_CODES, Pair, Rejected
from tests.data.formats.golden_rows import MSG, bot, chat, user
from tests.data.formats.test_registry import read

TEXT = pa.string()
PARTS = pa.list_(pa.struct([("role", TEXT), ("content", pa.list_(pa.struct([("type", TEXT), ("text", TEXT)])))]))


def only(items: list[Pair | Rejected]) -> Any:
    [item] = items
    return item


def from_json(folder: Path, *rows: Any, **options: Any) -> list[Pair | Rejected]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    datasets = open_datasets([DataSpec(name="set", path=str(path), **options)])
    return list(read_pairs(datasets, 0, datasets[0].rows))


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
GOOD_CHAT = {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]}
GOOD_IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
GOOD_LABELS = {
    "chosen_input_ids": [1, 2],
    "chosen_labels": [-100, 2],
    "rejected_input_ids": [1, 3],
    "rejected_labels": [-100, 3],
}
GOOD_BETTER = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0}


@pytest.mark.parametrize(
    ("good", "bad", "code"),
    [
        (GOOD, {"chosen": None}, "null_field"),
        (GOOD, {"prompt": 7}, "wrong_type"),
        (GOOD, {"chosen": "a\ud800"}, "invalid_utf8"),
        (GOOD, {"chosen": "x" * 10_000_001}, "too_large"),
        (GOOD_CHAT, {"prompt": []}, "null_field"),
        (GOOD_CHAT, {"prompt": [None]}, "null_field"),
        (GOOD_CHAT, {"prompt": [{"role": None, "content": "q"}]}, "null_field"),
        (GOOD_CHAT, {"chosen": [{"role": "assistant", "content": None}]}, "null_field"),
        (GOOD_CHAT, {"prompt": "text"}, "wrong_type"),
        (GOOD_CHAT, {"prompt": [user("q")] * 10_001}, "too_large"),
        (GOOD_CHAT, {"chosen": [bot("a"), user("more")]}, "not_assistant_last"),
        (GOOD_CHAT, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "non_text_content"),
        (GOOD_CHAT, {"prompt": [{"role": "user", "content": {"a": 1}}]}, "wrong_type"),
        (GOOD_IDS, {"chosen_ids": [-1]}, "invalid_ids"),
        (GOOD_IDS, {"chosen_ids": [2**31]}, "invalid_ids"),
        (GOOD_IDS, {"chosen_ids": ["2"]}, "invalid_ids"),
        (GOOD_IDS, {"chosen_ids": []}, "no_completion_tokens"),
        (GOOD_LABELS, {"chosen_labels": [-100]}, "invalid_ids"),
        (GOOD_LABELS, {"chosen_labels": [-100, 9]}, "invalid_ids"),
        (GOOD_LABELS, {"chosen_labels": [-100, -100]}, "no_completion_tokens"),
        (GOOD_BETTER, {"better_response_id": 2}, "invalid_label"),
        (GOOD_BETTER, {"better_response_id": None}, "null_field"),
        (GOOD_BETTER, {"better_response_id": "first"}, "invalid_label"),
    ],
)
def test_a_bad_row_becomes_a_reject_with_its_code(
    good: dict[str, Any], bad: dict[str, Any], code: str, tmp_path: Path
) -> None:
    first, second = from_json(tmp_path, good, {**good, **bad})
    assert isinstance(first, Pair)
    assert isinstance(second, Rejected)
    assert second.code == code
    assert code in REJECT_CODES
    assert second.source.row == 1
    assert second.reason
    assert len(second.value_seen or "") <= 200


@pytest.mark.parametrize(
    "line", ["{not json", "[1, 2]", '"text"', "{" * 2000, '{"chosen": "a", "rejected": "b", "prompt": ']
)
def test_a_line_that_is_no_object_is_rejected_in_its_place(line: str, tmp_path: Path) -> None:
    found = from_json(tmp_path, GOOD, line, GOOD)
    assert [isinstance(item, Pair) for item in found] == [True, False, True]
    assert found[1].code == "invalid_json"  # type: ignore[union-attr]
    assert [item.source.row for item in found] == [0, 1, 2]


def test_bytes_that_are_not_utf8_reject_only_their_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe bad", b"good"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    found = read(tmp_path, pa.table({"prompt": ["q"] * 3, "chosen": column, "rejected": ["b"] * 3}))
    assert [getattr(item, "code", "pair") for item in found] == ["pair", "invalid_utf8", "pair"]


def test_what_was_seen_shows_no_control_or_bidi_character(tmp_path: Path) -> None:
    [_, bad] = from_json(tmp_path, GOOD_BETTER, {**GOOD_BETTER, "better_response_id": "\x1b[31m\u202e!"})
    assert isinstance(bad, Rejected)
    assert bad.value_seen == "\\x1b[31m\\u202e!"


def test_parts_that_are_all_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    rows = [{"prompt": [{"role": "user", "content": parts}], "chosen": [bot("a")], "rejected": [bot("b")]}]
    table = pa.Table.from_pylist(rows, schema=pa.schema([("prompt", PARTS), ("chosen", MSG), ("rejected", MSG)]))
    assert only(read(tmp_path, table)).prompt == ({"role": "user", "content": "one two"},)


CALL = {"type": "function", "function": {"name": "find", "arguments": {"query": "x"}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
TOOL_PROMPT = [user("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "r"}]
TOOL_PAIR = {"prompt": TOOL_PROMPT, "chosen": [bot("a")], "rejected": [bot("b")], "tools": [TOOL]}


def as_structs() -> pa.Table:
    """Arrow gives every message and every call the same keys: what a row lacks is null there."""
    other = {"type": "function", "function": {"name": "find", "arguments": {"other": "y"}}}
    return pa.Table.from_pylist([TOOL_PAIR, {**TOOL_PAIR, "prompt": [{**TOOL_PROMPT[1], "tool_calls": [other]}]}])


def as_json_extension() -> pa.Table:
    storage = {k: pa.array([json.dumps(v)] * 2, pa.json_()) for k, v in TOOL_PAIR.items()}
    return pa.table(storage)


def as_json_strings() -> pa.Table:
    return pa.table({k: [json.dumps(v)] * 2 for k, v in TOOL_PAIR.items()})


def as_lists_of_json() -> pa.Table:
    type_ = pa.list_(pa.json_())
    lists = {k: pa.array([[json.dumps(item) for item in v]] * 2, pa.list_(pa.string())) for k, v in TOOL_PAIR.items()}
    return pa.table({k: v.cast(type_) for k, v in lists.items()})


def as_strings_inside() -> pa.Table:
    """OpenAI's own form: arguments are a string."""
    call = {"type": "function", "function": {"name": "find", "arguments": json.dumps({"query": "x"})}}
    prompt = [TOOL_PROMPT[0], {**TOOL_PROMPT[1], "tool_calls": [call]}, TOOL_PROMPT[2]]
    return pa.Table.from_pylist([{**TOOL_PAIR, "prompt": prompt, "tools": json.dumps([TOOL])}])


@pytest.mark.parametrize("form", [as_structs, as_json_extension, as_json_strings, as_lists_of_json, as_strings_inside])
def test_a_tool_call_is_the_same_pair_in_every_container(form: Any, tmp_path: Path) -> None:
    pair = read(tmp_path, form())[0]
    expected = only(from_json(tmp_path, TOOL_PAIR))
    assert isinstance(pair, Pair)
    assert pair.prompt == expected.prompt == tuple(TOOL_PROMPT)
    assert pair.tools == (TOOL,)
    assert pair.pair_id == expected.pair_id


def test_nulls_of_arrow_stay_only_where_asked_for(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(as_structs(), path)
    kept = open_datasets([DataSpec(name="set", path=str(path))], keep_nulls=True)
    pair = next(read_pairs(kept, 0, 1))
    assert isinstance(pair, Pair)
    assert pair.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"query": "x", "other": None}  # type: ignore[index]


def test_a_null_written_in_json_is_meant(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"query": None}}}
    row = {**TOOL_PAIR, "prompt": [user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}, user("go")]}
    pair = only(read(tmp_path, pa.table({k: [json.dumps(v)] for k, v in row.items()})))
    assert pair.prompt[1]["tool_calls"] == [call]


def test_json_lines_keep_their_nulls_and_keys_that_come_late(tmp_path: Path) -> None:
    late = {**user("q"), "note": {"deep": None}}
    found = from_json(tmp_path, *[GOOD_CHAT] * 1001, {**GOOD_CHAT, "prompt": [late]})
    assert found[-1].prompt == (late,)  # type: ignore[union-attr]


def test_a_later_shard_may_have_more_keys_in_its_structs(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    named = {**GOOD_CHAT, "prompt": [{**user("q"), "name": "Ann"}]}
    pq.write_table(pa.Table.from_pylist([GOOD_CHAT]), tmp_path / "0.parquet")
    pq.write_table(pa.Table.from_pylist([named]), tmp_path / "1.parquet")
    datasets = open_datasets([DataSpec(name="set", path=str(tmp_path))])
    first, second = read_pairs(datasets, 0, 2)
    assert first.prompt == (user("q"),)  # type: ignore[union-attr]
    assert second.prompt == ({**user("q"), "name": "Ann"},)  # type: ignore[union-attr]


def test_template_arguments_reasoning_and_names_go_along(tmp_path: Path) -> None:
    row = {
        **GOOD_CHAT,
        "prompt": [{**user("q"), "name": "Ann"}],
        "chosen": [{**bot("a"), "reasoning_content": "because"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    pair = only(from_json(tmp_path, row))
    assert pair.prompt[0]["name"] == "Ann"
    assert pair.chosen[0]["reasoning_content"] == "because"
    assert pair.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("column", "value", "code"),
    [
        ("tools", "{not json", "invalid_json"),
        ("tools", "7", "wrong_type"),
        ("tools", '["x"]', "invalid_json"),
        ("tools", "[7]", "wrong_type"),
        ("chat_template_kwargs", "[1]", "wrong_type"),
    ],
)
def test_bad_tools_and_arguments_are_rejects(column: str, value: str, code: str, tmp_path: Path) -> None:
    assert only(from_json(tmp_path, {**GOOD_CHAT, column: value})).code == code


def test_id_subset_and_kept_columns_are_carried(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**GOOD, "prompt_id": "p1", "subset": "facts", "score": 3}))
    datasets = open_datasets([DataSpec(name="set", path=str(path))], keep_columns=["score"])
    assert next(read_pairs(datasets, 0, 1)).extra == {"id": "p1", "subset": "facts", "score": 3}  # type: ignore[union-attr]


def test_pair_id_tells_pairs_apart_and_nothing_else(tmp_path: Path) -> None:
    """The same for an implicit and an explicit prompt; another for swapped sides, other text, other tools."""
    explicit = only(from_json(tmp_path, GOOD_CHAT))
    implicit = only(from_json(tmp_path, {"chosen": chat("a", "q"), "rejected": chat("b", "q")}))
    swapped = only(from_json(tmp_path, {**GOOD_CHAT, "chosen": [bot("b")], "rejected": [bot("a")]}))
    tools = only(from_json(tmp_path, {**GOOD_CHAT, "tools": [TOOL]}))
    assert explicit.pair_id == implicit.pair_id
    assert len({explicit.pair_id, swapped.pair_id, tools.pair_id}) == 3
    assert len(explicit.pair_id) == 32


def test_a_transcript_keeps_its_pair_id_once_its_prompt_is_a_column(tmp_path: Path) -> None:
    """As `precompute` writes it: runs over either can be compared."""
    begun = "\n\nHuman: q\n\nAssistant:"
    whole = only(from_json(tmp_path, {"chosen": f"{begun} yes", "rejected": f"{begun} no"}))
    split = only(from_json(tmp_path, {"prompt": begun, "chosen": " yes", "rejected": " no"}))
    assert whole.implicit
    assert whole.pair_id == split.pair_id


def test_labels_split_where_scoring_begins_and_keep_any_mask(tmp_path: Path) -> None:
    row = {
        "chosen_input_ids": [1, 2, 3, 4, 5, 0],
        "chosen_labels": [-100, 2, -100, 4, 5, -100],
        "chosen_attention_mask": [1, 1, 1, 1, 1, 0],
        "rejected_input_ids": [1, 2, 6],
        "rejected_labels": [-100, 2, 6],
    }
    tokens = only(from_json(tmp_path, row)).tokens
    assert tokens.prompt.tolist() == [1]
    assert tokens.chosen.tolist() == [2, 3, 4, 5]
    assert tokens.chosen_mask.tolist() == [True, False, True, True]
    assert tokens.rejected.tolist() == [2, 6]
    assert tokens.rejected_mask is None


def test_masks_beside_ids_are_read(tmp_path: Path) -> None:
    tokens = only(from_json(tmp_path, {**GOOD_IDS, "prompt_mask": [1], "chosen_mask": [False]})).tokens
    assert tokens.prompt_mask.tolist() == [True]
    assert tokens.chosen_mask.tolist() == [False]
    assert only(from_json(tmp_path, {**GOOD_IDS, "chosen_mask": [1, 1]})).code == "invalid_ids"
