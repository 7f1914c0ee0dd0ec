"""Build the quickstart preference set: data/source/*.jsonl -> quickstart-train.parquet and quickstart-test.parquet.

Promises: the same sources give the same rows in the same order, byte for byte under one pyarrow version; a source
pair that breaks a rule stops the build and is named by file and line; a pair keeps its split when other pairs of
its subset are edited, because its place depends on its id alone.
Does not promise: equal bytes under another pyarrow version (the file names its writer); `--check` then compares rows.

    python data/build.py            write both files
    python data/build.py --check    rebuild in memory and compare with the files that are there
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATA = Path(__file__).resolve().parent
SUBSETS = (
    "facts",
    "arithmetic",
    "format",
    "concision",
    "honesty",
    "rewriting",
    "safety",
    "system",
    "multi-turn",
    "code",
)
PAIRS_PER_SUBSET = 44
TEST_PER_SUBSET = 14
SHUFFLE_SEED = "quickstart-1"
LONGER_SHARE = (0.35, 0.65)

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [("id", pa.string()), ("subset", pa.string()), ("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES)]
)
KEYS = {"prompt", "chosen", "rejected", "subset", "why"}

Messages = list[dict[str, str]]


class SourceError(Exception):
    """A source pair breaks a rule; the message names the file, the line and the rule."""


@dataclass(frozen=True, slots=True)
class PairRow:
    """One row of the set. `id` is the subset and the line's number in its source file, counted from 0."""

    id: str
    subset: str
    prompt: Messages
    chosen: Messages
    rejected: Messages

    def place(self) -> str:
        """Sort key of the shuffle: a digest of the seed and the id."""
        return hashlib.sha256(f"{SHUFFLE_SEED}/{self.id}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Splits:
    train: pa.Table
    test: pa.Table


def answer_length(messages: Messages) -> int:
    """Characters of an answer."""
    return sum(len(message["content"]) for message in messages)


def _reason_against(record: dict[str, Any], subset: str) -> str | None:
    """The first rule that a source record breaks, or None."""
    if set(record) != KEYS:
        return f"keys {sorted(record)} instead of {sorted(KEYS)}"
    if record["subset"] != subset:
        return f"subset {record['subset']!r} in the file of {subset!r}"
    if not record["why"].strip():
        return "no reason why the chosen answer is better"
    return _reason_against_messages(record)


def _reason_against_messages(record: dict[str, Any]) -> str | None:
    for column in ("prompt", "chosen", "rejected"):
        for message in record[column]:
            if set(message) != {"role", "content"} or not message["content"].strip():
                return f"{column}: a message needs a role and a text that is not blank"
    roles = [message["role"] for message in record["prompt"]]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        return f"prompt roles {roles}: user and assistant must alternate and end with user"
    for column in ("chosen", "rejected"):
        if [message["role"] for message in record[column]] != ["assistant"]:
            return f"{column} must be one assistant message"
    if record["chosen"] == record["rejected"]:
        return "chosen and rejected are the same"
    return None


def read_subset(subset: str) -> list[PairRow]:
    """Read and check the pairs of one source file. Raises SourceError."""
    path = DATA / "source" / f"{subset}.jsonl"
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        if reason := _reason_against(record, subset):
            raise SourceError(f"{path.name}, line {number + 1}: {reason}")
        columns = {column: record[column] for column in ("prompt", "chosen", "rejected")}
        rows.append(PairRow(f"{subset}-{number:03d}", subset, **columns))
    if len(rows) != PAIRS_PER_SUBSET:
        raise SourceError(f"{path.name}: {len(rows)} pairs instead of {PAIRS_PER_SUBSET}")
    return rows


def prompt_key(prompt: Messages) -> str:
    """What two prompts share when only case, spaces or punctuation at the ends differ."""
    return "\n".join(
        f"{message['role']}: {' '.join(message['content'].casefold().split()).strip(' .!?')}" for message in prompt
    )


def check_whole(rows: list[PairRow]) -> None:
    """Rules over all pairs: no prompt twice, lengths balanced. Raises SourceError."""
    seen: dict[str, str] = {}
    for row in rows:
        first = seen.setdefault(prompt_key(row.prompt), row.id)
        if first != row.id:
            raise SourceError(f"{row.id}: the prompt is that of {first}")
    share = sum(answer_length(row.chosen) > answer_length(row.rejected) for row in rows) / len(rows)
    if not LONGER_SHARE[0] <= share <= LONGER_SHARE[1]:
        raise SourceError(f"the chosen answer is the longer one in {share:.0%} of the pairs")


def to_table(rows: list[PairRow]) -> pa.Table:
    ordered = sorted(rows, key=PairRow.place)
    return pa.table({name: [getattr(row, name) for row in ordered] for name in SCHEMA.names}, schema=SCHEMA)


def build() -> Splits:
    """Read, check, split per subset and shuffle. Raises SourceError."""
    train: list[PairRow] = []
    test: list[PairRow] = []
    for subset in SUBSETS:
        rows = sorted(read_subset(subset), key=PairRow.place)
        test += rows[:TEST_PER_SUBSET]
        train += rows[TEST_PER_SUBSET:]
    check_whole(train + test)
    return Splits(to_table(train), to_table(test))


def to_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    written: bytes = sink.getvalue().to_pybytes()
    return written


def difference(table: pa.Table, path: Path) -> str | None:
    """How the file at `path` differs from what `table` would be written as, or None."""
    if not path.is_file():
        return f"{path.name} is not there"
    built = to_parquet(table)
    if not pq.read_table(path).equals(table):
        return f"{path.name} holds other rows"
    same_writer = pq.read_metadata(path).created_by == pq.read_metadata(pa.BufferReader(built)).created_by
    if same_writer and path.read_bytes() != built:
        return f"{path.name} holds the same rows in other bytes"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the quickstart preference set from data/source.")
    parser.add_argument("--check", action="store_true", help="compare with the files that are there, write nothing")
    check_only = parser.parse_args().check
    splits = build()
    differences = []
    for name, table in (("train", splits.train), ("test", splits.test)):
        path = DATA / f"quickstart-{name}.parquet"
        if check_only:
            differences += [found] if (found := difference(table, path)) else []
        else:
            path.write_bytes(to_parquet(table))
        print(f"{path.name}: {table.num_rows} pairs")
    for found in differences:
        print(f"differs: {found}", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
