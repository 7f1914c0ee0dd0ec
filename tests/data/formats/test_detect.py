"""A schema has one format or is refused, with the option that settles it in the message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_score.data.types import Pair, Rejected
from dpo_score.errors import DataError
from tests.data.formats.golden_rows import MSG, bot, chat, user
from tests.data.formats.test_registry import opened, read

TEXT = pa.string()


def table(rows: list[dict[str, Any]], **types: Any) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=pa.schema(types) if types else None)


def test_an_unknown_schema_shows_itself_and_how_to_map_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"good: text, bad: text.*--map prompt=COLUMN,chosen=COLUMN,rejected=COLUMN"):
        opened(tmp_path, table([{"good": "a", "bad": "b"}]))


def test_a_map_names_the_columns(tmp_path: Path) -> None:
    rows = table([{"q": "Q", "good": "a", "bad": "b"}])
    [pair] = read(tmp_path, rows, map={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert isinstance(pair, Pair)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Q", "a", "b")


def test_a_mapped_name_hides_the_column_of_that_name(tmp_path: Path) -> None:
    rows = table([{"prompt": "old", "question": "new", "chosen": "a", "rejected": "b"}])
    [pair] = read(tmp_path, rows, map={"prompt": "question"})
    assert isinstance(pair, Pair)
    assert pair.prompt == "new"


def test_a_map_to_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'question'"):
        opened(tmp_path, table([{"question": "q", "chosen": "a", "rejected": "b"}]), map={"prompt": "questoin"})


def test_a_mapped_name_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--map chosn=… is not read by pair-text"):
        opened(tmp_path, table([{"prompt": "q", "chosen": "a", "rejected": "b"}]), map={"chosn": "chosen"})


def test_two_prompt_columns_are_not_guessed_between(tmp_path: Path) -> None:
    rows = table([{"instruction": "q", "question": "more", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="--map prompt=question or --map prompt=instruction"):
        opened(tmp_path, rows)


def test_a_system_column_can_be_left_out(tmp_path: Path) -> None:
    rows = table([{"system": "Be brief.", "prompt": "q", "chosen": "a", "rejected": "b"}])
    [with_system], [without] = read(tmp_path, rows), read(tmp_path, rows, map={"system": ""})
    assert isinstance(with_system, Pair)
    assert isinstance(without, Pair)
    assert with_system.prompt[0] == {"role": "system", "content": "Be brief."}
    assert without.prompt == "q"


def test_single_completions_with_a_label_are_not_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DPO needs pairs"):
        opened(tmp_path, table([{"prompt": "q", "completion": "a", "label": True}]))


def test_more_than_one_match_names_the_formats(tmp_path: Path) -> None:
    both = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0}
    rows = table([{**both, "response_2": "c", "preference_strength": 1}])
    with pytest.raises(DataError, match="--format signed-preference/helpsteer2 or --format better-id"):
        opened(tmp_path, rows)
    assert opened(tmp_path, rows, format="better-id").format.name == "better-id"


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'messages-full'"):
        opened(tmp_path, table([{"chosen": "a", "rejected": "b"}]), format="message-full")


def test_a_format_that_does_not_fit_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not openai, which needs input: struct"):
        opened(tmp_path, table([{"chosen": "a", "rejected": "b"}]), format="openai")


@pytest.mark.parametrize(("marked", "expected"), [(95, "hh-transcript"), (94, "pair-text-implicit")])
def test_a_transcript_needs_95_percent_of_rows_with_markers(marked: int, expected: str, tmp_path: Path) -> None:
    with_marker = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    rows = [with_marker] * marked + [{"chosen": "a", "rejected": "b"}] * (100 - marked)
    assert opened(tmp_path, table(rows)).format.name == expected
    if expected == "hh-transcript":
        found = read(tmp_path, table(rows))
        assert {item.code for item in found if isinstance(item, Rejected)} == {"not_hh_transcript"}


def test_a_prompt_string_beside_whole_conversations_is_not_read(tmp_path: Path) -> None:
    """Such columns often lack the system turn or the later turns."""
    prompts = {"something else": ("prompt_unread",), "Capital of\nFrance?": (), "Human: Capital of France?": ()}
    rows = [{"prompt": prompt, "chosen": chat("a"), "rejected": chat("b")} for prompt in prompts]
    pairs = read(tmp_path, table(rows, prompt=TEXT, chosen=MSG, rejected=MSG))
    assert [pair.marks for pair in pairs if isinstance(pair, Pair)] == list(prompts.values())
    assert all(isinstance(pair, Pair) and pair.implicit and pair.chosen == tuple(chat("a")) for pair in pairs)


def test_a_prompt_string_serves_where_the_conversations_hold_only_the_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": [bot("a")], "rejected": [bot("b")]}]
    [pair] = read(tmp_path, table(rows, prompt=TEXT, chosen=MSG, rejected=MSG))
    assert isinstance(pair, Pair)
    assert pair.prompt == (user("q"),)


def test_a_side_that_repeats_the_prompt_is_cut_to_its_answer(tmp_path: Path) -> None:
    rows = [{"prompt": [user("q")], "chosen": chat("a", "q"), "rejected": chat("b", "q")}]
    [pair] = read(tmp_path, table(rows, prompt=MSG, chosen=MSG, rejected=MSG))
    assert isinstance(pair, Pair)
    assert pair.chosen == (bot("a"),)
