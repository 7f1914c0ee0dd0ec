"""The cases of ../shared/cases/reading, one test a file or folder, each read as every command reads it.

The page beside them says which public report each one was made after, what is right, and what was got once. `CASES` has
what must be scored, row by row (a code: the row is rejected), `REFUSED` what `inspect` must answer instead.
Files of our own with the same properties are in formats/test_reading.py, test_columns.py, test_row_reader.py and
test_files.py; these are here so that none of the reported ones is forgotten. Skipped where the folder is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dpo_score.cli.main import main
from dpo_score.config.load import load_config
from dpo_score.data.dataset import open_data, read_pairs
from dpo_score.data.types import EncodedPair, Pair
from dpo_score.results.source_text import make_reader
from tests.data.formats.test_reading import Told, told
from tests.tiny import byte_tokenizer

FOLDER = Path(__file__).parents[2].parent / "shared" / "cases" / "reading"
SHOWS_TOOLS = FOLDER / "tok-tools"
"""A tokenizer whose template prints the tools before the conversation."""

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the shared cases are not here")


@dataclass(frozen=True)
class Case:
    """expected: what each row gives. said: parts of the line that every command prints. marks: of every scored row."""

    format: str
    expected: Sequence[Told]
    said: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    marks: tuple[str, ...] = ()


def answers(prompt: str, chosen: str, rejected: str) -> Told:
    """A conversation of which the assistant gives the answers."""
    return (prompt, f"assistant {chosen}", f"assistant {rejected}")


PIRATE = "system Talk like a pirate."
HI = answers(f"{PIRATE}|user Say hi", "Ahoy", "Hi")
SUM = answers("user Sum 2 and 3", "5", "6")
GREETED = answers("system Be kind|user Hello", "Hi there", "Go away")
KIND = answers("system Be kind|user Hello", "Hi", "No")
FOUR, ABC = answers("user 2+2?", "4", "5"), ("a", "b", "c")
GOOD, BAD = answers("user q", "good", "bad"), answers("user q", "bad", "good")
SECOND = ("q", "b", "a")
READ_AT_ROW_1001 = [answers(f"user q{n}", "yes", "no") for n in range(1000)]

CASES: dict[str, Case] = {
    # optional columns that the first file, or the first thousand rows, do not have
    "a1": Case("pair-text", [SUM, SUM, HI, HI], ["columns prompt, chosen, rejected, system", "2 files"]),
    "a1r": Case("pair-text", [HI, HI, SUM, SUM], ["columns prompt, chosen, rejected, system"]),
    "a3.jsonl": Case("pair-text", [*READ_AT_ROW_1001, *[HI] * 3], ["1,003 rows"]),
    "a4": Case("messages-explicit", [answers("user Sum", "5", "6")] * 2 + [answers("user time?", "12", "?")] * 2,
               ["carried along: tools"], {"tokenizer": str(SHOWS_TOOLS)}),
    # splits, configurations, shards and what lies beside the data
    "a5": Case("pair-text", [ABC] * 3, ["3 rows in train.jsonl"], {"split": "train"}),
    "a6": Case("pair-text", [ABC] * 3, ["3 rows in data-00000-of-00001.arrow"]),
    "a6b": Case("pair-text", [ABC] * 3, ["3 rows in test/data-00000-of-00001.arrow"], {"split": "test"}),
    "a7": Case("pair-text", [ABC] * 3, ["files not read: dataset_infos.json (it describes the data set)"]),
    "d7:extra": Case("pair-text", [("e", "a", "b")] * 2, ["in extra/train-00000-of-00001.parquet"]),
    "d8/train-00000-of-00003.parquet": Case("pair-text", [("q", "a", "b")] * 2),
    "d9": Case("pair-text", [("q", "a", "b")] * 2, ["files not read: b.jsonl (JSON, where Parquet files are read)"]),
    # bytes: a byte order mark, one object over several lines, text stored as binary
    "a8.json": Case("pair-text", [("é", "b", "c")]),
    "a8.jsonl": Case("pair-text", [("é", "b", "c")] * 2),
    "a9.json": Case("pair-text", [("q0", "b", "c")]),
    "b28.parquet": Case("pair-text", [("q", "a", "b")] * 2),
    # forms of other programs
    "b1.jsonl": Case("pair-text/alpaca",
                     [answers("system You translate.|user Translate to French\ncat", "chat", "chien")] * 3),
    "b1b.jsonl": Case("pair-text/alpaca", [("Say hi", "hi", "no")] * 3),
    "b2.jsonl": Case("pair-text/output-list", [("Say hi", "hi", "no")] * 3, ["the first of the two outputs is better"]),
    "b3.jsonl": Case("ms-swift/rejected-response", [GREETED] * 3),
    "b3b.jsonl": Case("ms-swift/rejected-messages", [answers("user Hello", "Hi there", "Go away")] * 3),
    "b5.jsonl": Case("messages-explicit/other-name", [FOUR] * 3),
    "b6.jsonl": Case("messages-full", [FOUR] * 3),
    "b10.parquet": Case("pair-text", [("How?", "good", "bad")] * 3, ["columns not read: qid, date, metadata"]),
    "d17b.parquet": Case("messages-full", [answers("system Be kind|user t?", "None", "no")] * 2,
                         marks=("content_altered",)),
    # a prompt under another name, earlier turns beside it
    "b11.parquet": Case("messages-explicit/other-name",
                        [answers("user 2+2?|assistant think|user go on", "4", "5")] * 3, ["columns not read: task"]),
    "c1.jsonl": Case("messages-explicit/other-name", [KIND] * 3),
    "c1f.jsonl": Case("messages-explicit", [answers("user Hello", "Hi", "No")] * 3),
    "c1c.jsonl": Case("pair-text", [("Hello", "Hi", "No")] * 3, options={"map": "prompt=context"}),
    "e5.parquet": Case("pair-text", [answers("user 2+2?|assistant 4|user And times two?", "8", "5")] * 3,
                       ["history = context"]),
    # the prompt repeated in the answers
    "c2.jsonl": Case("messages-explicit", [KIND] * 3),
    "c3.jsonl": Case("pair-text/repeated", [("Q: hello A:", " Hi", " No")] * 3, ["is cut off"]),
    # system texts and tools in every family
    "d1.parquet": Case("messages-full", [answers(f"{PIRATE}|user hi", "Ahoy", "Hi")] * 2),
    "d2.parquet": Case("messages-explicit", [answers(f"{PIRATE}|user hi", "Ahoy", "Hi")] * 2),
    "d3.parquet": Case("ranked/lists", [answers(f"{PIRATE}|user hi", "Ahoy", "Hi")] * 2),
    "f1.jsonl": Case("messages-explicit", ["not_assistant_last", answers("system Be kind|user hi", "hello", "no")]),
    "c4_toolsignored.jsonl": Case("messages-explicit", [answers("user t?", "", "no")] * 2,
                                  marks=("content_altered", "tools_unseen")),
    "c15.jsonl": Case("messages-explicit", [answers("user time?|assistant None|tool 12", "noon", "night")] * 2,
                      marks=("content_altered", "tools_unseen")),
    "d4.parquet": Case("pair-text", [("time?", "12", "?")] * 2, ["carried along: tools"], marks=("tools_unseen",)),
    # labels
    "b7.jsonl": Case("ab-label/text", [("2+2?", "4", "5"), ("2+2?", "5", "4"), ("2+2?", "4", "5")]),
    "b8.parquet": Case("ab-label/text", [("2+2?", "4", "5"), ("2+2?", "5", "4"), "tie"]),
    "b13.parquet": Case("ranked/two-rows", [answers("user A", "A-4", "A-0"),
                                            *(answers(f"user {p}", f"{p}-3", f"{p}-1") for p in "BCDEF")],
                        marks=("prompt_in_answer",)),
    "b15.parquet": Case("ab-label/chosen-model", [GOOD] * 3),
    "b16.parquet": Case("ab-label/winner", [GOOD, BAD, "tie"]),
    "b22.parquet": Case("better-id", [("q", "a", "b"), SECOND, ("q", "a", "b")], options={
        "map": "prompt=prompt,response_0=response_a,response_1=response_b,better_response_id=label"}),
    "c11.jsonl": Case("ab-label/text", [("q", "a", "b"), SECOND, ("q", "a", "b"), *["tie"] * 4, *["invalid_label"] * 4,
                                        *["tie"] * 3]),
    "d13b.parquet": Case("ab-label/shp", [("q", "a", "b"), SECOND]),
    "e10.parquet": Case("ranked/completions", [("Name a colour.", "GOOD: blue", "BAD: 17")] * 2,
                        ["the higher fine-grained_score"]),
    # what a template sees, and what is only noted
    "c4humangpt.jsonl": Case("messages-full", [answers("user q", "x", "y")] * 3),
    "f4.jsonl": Case("messages-full", [answers("user q", "a", "b")] * 2),
    "g1.parquet": Case("ab-label/winner", [answers("user q", "a", "b"), answers("user q", "b", "a"), "tie"]),
    "g2.parquet": Case("ab-label/winner", [answers("user q", "a", "b"), answers("user q", "b", "a"), "tie"]),
    "f2.jsonl": Case("messages-explicit", [answers("user ", "a", "b"), answers("user q|assistant |user r", "a", "b")],
                     marks=("empty_prompt",)),
    # messages as text, decided over the set
    "c16.jsonl": Case("messages-explicit", [*[answers("user q", "a", "b")] * 3, "invalid_json"]),
}  # fmt: skip

REFUSED: dict[str, Sequence[str]] = {
    "a5": ["holds the splits test, train", "--split NAME"],
    "a6b": ["holds the splits test, train", "--split NAME"],
    "b22.parquet": ["--map prompt=prompt,response_0=response_a,response_1=response_b,better_response_id=label"],
    "c10c.jsonl": ["none of the first 2 rows is a JSON object", "Extra data: line 1 column 43"],
    "c1c.jsonl": ["'context' looks like the prompt", "--map prompt=context"],
    "d7": ["several configurations: main, extra", "d7:main"],
    "d8": ["lacks train-00001-of-00003.parquet"],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with a template that shows content, and neither tools nor calls."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", CASES)
def test_a_reported_set_is_read_as_it_was_meant(name: str, tokenizer: str) -> None:
    case = CASES[name]
    config = load_config(None, {"data": [f"set={FOLDER / name}"], "tokenizer": tokenizer, **case.options}, {})
    [dataset] = open_data(config)
    items = list(read_pairs([dataset], 0, dataset.rows))
    assert (dataset.format.full_name, [told(item) for item in items]) == (case.format, list(case.expected))
    assert [part for part in case.said if part not in dataset.summary()] == []
    reader = make_reader(config, [dataset])
    pairs = [item for item in items if isinstance(item, Pair)][-5:]
    encoded = [reader.encode(pair) for pair in pairs]
    assert [item.marks for item in encoded if isinstance(item, EncodedPair)] == [case.marks] * len(pairs)


def test_tools_of_a_later_file_are_shown_to_the_model() -> None:
    """The rows of the first file have none: the same file alone gave them, both together did not."""
    config = load_config(None, {"data": [str(FOLDER / "a4")], "tokenizer": str(SHOWS_TOOLS)}, {})
    datasets = open_data(config)
    reader = make_reader(config, datasets)
    shown = []
    for pair in read_pairs(datasets, 0, 4):
        assert isinstance(pair, Pair)
        found = reader.encode(pair)
        assert isinstance(found, EncodedPair)
        shown.append(reader.tokenizer.decode(found.tokens.prompt))
    assert ["Tools:" in text for text in shown] == [False, False, True, True]
    assert shown[2].startswith('<|im_start|>system\nTools: [{"type": "function"')


@pytest.mark.parametrize("name", REFUSED)
def test_a_set_that_leaves_a_choice_is_refused_with_the_way_out(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(FOLDER / name), "--row", "0", "--tokenizer", str(SHOWS_TOOLS)])
    said = " ".join(capsys.readouterr().err.split())
    assert (stop.value.code, said.count("error: ")) == (2, 1)
    assert [part for part in (str(FOLDER / name), *REFUSED[name]) if part not in said] == []


def test_every_case_has_its_test() -> None:
    known = {name.split("/")[0].split(":")[0] for name in (*CASES, *REFUSED)}
    assert {path.name for path in FOLDER.iterdir()} == known | {"tok-tools"}
