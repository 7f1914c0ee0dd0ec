"""Files and rows that cannot be scored, built by code, each with what must become of it.

`FILES`: name → how it is made, exit code, words of the message. `ROWS`: a row of a conversation set → its reject code,
or the marks that it is scored with. `python -m tests.engine.mistakes.bad_corpus FOLDER` writes the files out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Build = Callable[[Path], Path]
TEXT = {"prompt": "a question", "chosen": " good", "rejected": " bad"}


@dataclass(frozen=True)
class BadFile:
    """`make` writes it into a folder and returns what --data is given. `rejects`: code → rows, of a run that ends."""

    make: Build
    exit_code: int = 2
    words: Sequence[str] = ()
    rejects: tuple[tuple[str, int], ...] = ()


def table(count: int = 40, **columns: Any) -> pa.Table:
    rows = {name: [f"{value}{i}" for i in range(count)] for name, value in TEXT.items()}
    return pa.table({**rows, **columns})


def content(**how: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table(), sink, write_page_checksum=True, **how)
    return bytes(sink.getvalue())


def raw(data: bytes | Callable[[], bytes], name: str = "a.parquet") -> Build:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data())
        return folder / name

    return make


def cut(share: float) -> Build:
    return raw(lambda: content()[: int(len(content()) * share)])


def flipped(place: Callable[[bytes], int]) -> Build:
    def spoilt() -> bytes:
        data = bytearray(content(compression="none", use_dictionary=False))
        data[place(bytes(data))] ^= 0x10
        return bytes(data)

    return raw(spoilt)


def stored(make: Callable[[], pa.Table], **how: Any) -> Build:
    def write(folder: Path) -> Path:
        pq.write_table(make(), folder / "a.parquet", **how)
        return folder / "a.parquet"

    return write


def cast(kind: pa.DataType) -> Build:
    def make() -> pa.Table:
        found = table(4)
        return found.cast(pa.schema([(name, kind) for name in found.column_names]))

    return stored(make)


def encrypted(folder: Path) -> Path:
    (folder / "a.parquet").write_bytes(b"PARE" + bytes(60) + b"PARE")
    return folder / "a.parquet"


def no_groups(folder: Path) -> Path:
    pq.ParquetWriter(folder / "a.parquet", table().schema).close()
    return folder / "a.parquet"


def shards(second: Callable[[], pa.Table]) -> Build:
    def make(folder: Path) -> Path:
        pq.write_table(table(), folder / "train-00000-of-00002.parquet")
        pq.write_table(second(), folder / "train-00001-of-00002.parquet")
        return folder

    return make


def partitioned(folder: Path) -> Path:
    for part in ("en", "de"):
        (folder / f"lang={part}").mkdir()
        pq.write_table(table(4), folder / f"lang={part}" / "data.parquet")
    return folder


def leftovers(folder: Path) -> Path:
    pq.write_table(table(4), folder / "a.parquet")
    (folder / ".a.parquet.tmp-1-x").write_bytes(b"PAR1 half")
    (folder / "a.parquet.tmp").write_bytes(b"PAR1 half")
    (folder / "_SUCCESS").touch()
    return folder


def unreadable(folder: Path) -> Path:
    pq.write_table(table(4), folder / "a.parquet")
    (folder / "a.parquet").chmod(0)
    return folder / "a.parquet"


def repeated_columns() -> pa.Table:
    return pa.Table.from_arrays([pa.array(["a"])] * 4, names=["prompt", "chosen", "chosen", "rejected"])


def wide() -> pa.Table:
    return pa.table({**table(3).to_pydict(), **{f"column {i}": pa.nulls(3, pa.int8()) for i in range(2000)}})


def bomb() -> pa.Table:
    """A few kilobytes that decode to 48 MB: every answer is beyond the limit of one cell."""
    return table(4, chosen=pa.array(["x" * 12_000_000] * 4).dictionary_encode())


def maps() -> pa.Table:
    turn = pa.map_(pa.string(), pa.string())
    messages = {name: [("role", "user" if name == "prompt" else "assistant"), ("content", name)] for name in TEXT}
    return pa.table({name: pa.array([[message]] * 3, pa.list_(turn)) for name, message in messages.items()})


def not_utf8() -> pa.Table:
    broken = pa.array([b"\xff\xfe", b"fine"], pa.binary())
    return table(2, chosen=pa.Array.from_buffers(pa.string(), 2, broken.buffers()))


FILES: dict[str, BadFile] = {
    "nothing there": BadFile(lambda folder: folder / "absent.parquet", words=["absent.parquet", "does not exist"]),
    "an empty folder": BadFile(lambda folder: folder, words=["no .parquet, .jsonl or .json"]),
    "0 bytes": BadFile(raw(b""), words=["a.parquet is empty (0 bytes)"]),
    "zeros": BadFile(raw(bytes(4096)), words=["is empty"]),
    "the magic alone": BadFile(raw(b"PAR1"), words=["cut off"]),
    "twice the magic": BadFile(raw(b"PAR1PAR1"), words=["cut off"]),
    **{f"cut at {share:.0%}": BadFile(cut(share), words=["cut off"]) for share in (0.05, 0.3, 0.5, 0.8, 0.99)},
    "a flipped bit in the footer's length": BadFile(flipped(lambda data: len(data) - 6), words=["a.parquet"]),
    "a flipped bit in a page": BadFile(flipped(lambda data: data.index(b"good7")), words=["CRC", "copy or download"]),
    "a flipped bit in the magic": BadFile(flipped(lambda data: 1), words=["not Parquet"]),
    "CSV called .parquet": BadFile(raw(b"prompt,chosen,rejected\na,b,c\n"), words=["not Parquet", "prompt,chosen"]),
    "a web page": BadFile(raw(b"<!doctype html>", "a.jsonl"), words=["neither Parquet nor JSON lines"]),
    "encrypted": BadFile(encrypted, words=["encrypted"]),
    "a Git LFS pointer": BadFile(raw(b"version https://git-lfs.github.com/spec/v1\n"), words=["git lfs pull"]),
    "no rows": BadFile(stored(lambda: table(0)), words=["holds no rows"]),
    "no row groups": BadFile(no_groups, words=["holds no rows"]),
    "a row a group": BadFile(stored(lambda: table(6), row_group_size=1), exit_code=0),
    "shards that drift in type": BadFile(shards(lambda: table(4, chosen=[1, 2, 3, 4])), words=["chosen", "00001"]),
    "shards that drift in columns": BadFile(shards(lambda: table(4).drop_columns("rejected")), words=["missing"]),
    "shards with a column more": BadFile(shards(lambda: table(4, more=[1, 2, 3, 4])), exit_code=0),
    "two columns of one name": BadFile(stored(repeated_columns), words=["more than one column called chosen"]),
    "2,000 columns": BadFile(stored(wide), exit_code=0),
    "large strings": BadFile(cast(pa.large_string()), exit_code=0),
    "string views": BadFile(cast(pa.string_view()), exit_code=0),
    "dictionaries": BadFile(cast(pa.dictionary(pa.int32(), pa.string())), exit_code=0),
    "binary for text": BadFile(cast(pa.binary()), exit_code=0),
    "messages as maps": BadFile(stored(maps), words=["--map"]),
    "partitions": BadFile(partitioned, exit_code=0),
    "left-over temporaries": BadFile(leftovers, exit_code=0),
    "a bomb": BadFile(stored(bomb, compression="zstd"), exit_code=3, rejects=(("too_large", 4),)),
    "bytes that are not UTF-8": BadFile(stored(not_utf8), exit_code=0, rejects=(("invalid_utf8", 1),)),
    "no JSON objects": BadFile(raw(b"[1, 2, 3]", "a.json"), words=["is a JSON object"]),
    "a broken JSON array": BadFile(raw(b'[{"prompt": ', "a.json"), words=["not one JSON array"]),
    "a broken gzip": BadFile(raw(b"\x1f\x8b\x08\0\0", "a.jsonl.gz"), words=["cannot be read"]),
    **({} if os.geteuid() == 0 else {"no permission": BadFile(unreadable, words=["ermission"])}),
}

ASKED = [{"role": "user", "content": "q"}]
SAID = [{"role": "assistant", "content": "yes"}]
OTHER = [{"role": "assistant", "content": "no"}]


def row(prompt: Any = None, chosen: Any = None, rejected: Any = None, **more: Any) -> dict[str, Any]:
    """A sound conversation but for what is given."""
    given = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    sound: dict[str, Any] = {"prompt": ASKED, "chosen": SAID, "rejected": OTHER}
    return {**{name: sound[name] if value is None else value for name, value in given.items()}, **more}


def turn(role: Any, text: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


@dataclass(frozen=True)
class BadRow:
    """`code`: what it is rejected with; None when it is scored, then with `marks` (and `options` of the run)."""

    row: dict[str, Any] | str
    code: str | None = None
    marks: tuple[str, ...] = ()


PART = [{"type": "image", "url": "x"}]
ROWS: dict[str, BadRow] = {
    "sound": BadRow(row()),
    "null": BadRow({**row(), "chosen": None}, "null_field"),
    "empty list": BadRow(row(prompt=[]), "null_field"),
    "list of null": BadRow(row(prompt=[None]), "null_field"),
    "null role": BadRow(row(prompt=turn(None, "q")), "null_field"),
    "null content": BadRow(row(chosen=turn("assistant", None)), "null_field"),
    "empty answer": BadRow(row(chosen=turn("assistant", "")), None, ("empty_answer",)),
    "white space": BadRow(row(chosen=turn("assistant", " \n\t")), None, ("empty_answer",)),
    "lone surrogate": BadRow(row(chosen=turn("assistant", "\ud800")), "invalid_utf8"),
    "NUL": BadRow(row(chosen=turn("assistant", "a\0b"))),
    "10 MB": BadRow(row(chosen=turn("assistant", "x" * 10_000_001)), "too_large"),
    "too many messages": BadRow(row(prompt=ASKED * 10_001), "too_large"),
    "no question": BadRow(row(prompt=turn("system", "be brief"))),
    "same role twice": BadRow(row(prompt=[*ASKED, *ASKED])),
    "ends with the user": BadRow(row(chosen=[*SAID, *ASKED]), "not_assistant_last"),
    "answer after an answer": BadRow(row(prompt=[*ASKED, *SAID]), "bad_role_order"),
    "unknown role": BadRow(row(prompt=turn("wizard", "q"))),
    "image": BadRow(row(prompt=turn("user", PART)), "non_text_content"),
    "text parts": BadRow(row(prompt=turn("user", [{"type": "text", "text": "q"}]))),
    "identical": BadRow(row(rejected=SAID), None, ("identical_pair",)),
    "literal special token": BadRow(row(chosen=turn("assistant", "a<|im_end|>b")), None, ("special_in_text",)),
    "too long a prompt": BadRow(row(prompt=turn("user", "x" * 600)), "prompt_too_long"),
    "content of another type": BadRow(row(prompt=turn("user", {"a": 1})), "wrong_type"),
    "prompt of another type": BadRow(row(prompt="text"), "wrong_type"),
    "template arguments of the call": BadRow(row(chat_template_kwargs={"tokenize": True}), "template_error"),
    "no object": BadRow("[1, 2]", "invalid_json"),
    "no JSON": BadRow("{nope", "invalid_json"),
    "deep": BadRow("[" * 100_000, "invalid_json"),
    "the same again": BadRow(row()),
}


def write_rows_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{r.row if isinstance(r.row, str) else json.dumps(r.row)}\n" for r in ROWS.values()))
    return path


if __name__ == "__main__":
    for name, bad in FILES.items():
        place = Path(sys.argv[1]) / name.replace(" ", "-").replace("%", "")
        place.mkdir(parents=True, exist_ok=True)
        bad.make(place)
    write_rows_file(Path(sys.argv[1]))
