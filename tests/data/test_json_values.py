"""JSON values one after the other: those of json.loads, whatever the pieces that are read; memory of one value."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest

from dpo_score.data import json_values as module
from dpo_score.data import row_reader
from dpo_score.data.files import UNREADABLE
from dpo_score.data.json_values import json_values
from dpo_score.data.layout import Located
from dpo_score.data.row_reader import open_rows
from dpo_score.errors import DataError

ARRAYS = ("[]", "[ ]\n", "[1, -2.5e3,\n null]", '[{"a": "é😀]"}, {"b": [[], {}]}]', '\ufeff[{"a": 1}]')
BROKEN = ("[", "[1", "[1,", "[1 2]", "[1]x", "[1,]", "[,1]", '[{"a": 1},\n{"b"]', "[1,2]]", '{"a":', "nope")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is cut at some place, and the rest of it read later."""
    monkeypatch.setattr(module, "PIECE_BYTES", 3)


def values(text: str) -> list[Any]:
    return list(json_values(io.BytesIO(text.encode())))


@pytest.mark.parametrize("text", ARRAYS)
def test_the_items_are_those_of_the_json_module(text: str) -> None:
    assert values(text) == json.loads(text.removeprefix("\ufeff"))


def test_values_that_follow_each_other() -> None:
    assert values('{"a":\n 1}{"b": "}"}\n 12 3') == [{"a": 1}, {"b": "}"}, 12, 3]


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_json_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(ValueError, match=r": line \d+ column \d+$"):
        values(text)


def test_the_place_is_that_of_the_file() -> None:
    with pytest.raises(ValueError, match="line 3 column 7"):
        values('[\n{"a": 1},\n {"b" 2}]')


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UnicodeDecodeError):
        list(json_values(io.BytesIO(b'["\xff"]')))


def test_a_value_without_an_end_is_not_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_VALUE", 100)
    handle = io.BytesIO(b'[{"a": 1}, "' + b"x" * 9_000_000)
    with pytest.raises(ValueError, match="more than 100 characters"):
        list(json_values(handle))
    assert handle.tell() < 3_000_000


def packed(path: Path, pieces: int, begin: bytes, piece: bytes, end: bytes) -> Located:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(begin)
        for _ in range(pieces):
            file.write(piece)
        file.write(end)
    return Located(str(path), path.name, path.stat().st_size)


ROW = b'{"prompt": "q", "chosen": "%s", "rejected": "n"}' % (b"y" * 400_000)


@pytest.mark.parametrize(
    ("name", "begin", "piece", "end"),
    [("a.json.gz", b"[", ROW + b",", ROW + b"]"), ("a.jsonl.gz", b"", ROW + b"\n", ROW)],
)
def test_memory_is_not_that_of_the_unpacked_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: bytes, piece: bytes, end: bytes
) -> None:
    """24 MB in a few kilobytes: neither the text nor the rows that are looked at are all held."""
    monkeypatch.setattr(row_reader, "SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr(module, "PIECE_BYTES", 1 << 20)
    file = packed(tmp_path / name, 60, begin, piece, end)
    tracemalloc.start()
    try:
        assert open_rows(file).rows == 61
        assert tracemalloc.get_traced_memory()[1] < 14_000_000
    finally:
        tracemalloc.stop()


def test_a_packed_file_that_is_damaged_inside_is_one_sentence(tmp_path: Path) -> None:
    file = packed(tmp_path / "a.jsonl.gz", 3, b"", b'{"prompt": "q", "chosen": "y", "rejected": "n"}\n' * 99, b"")
    data = bytearray((tmp_path / "a.jsonl.gz").read_bytes())
    data[40] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(bytes(data))
    assert zlib.error in UNREADABLE
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        open_rows(file)


def test_a_line_of_csv_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "MAX_LINE", 1000)
    file = packed(tmp_path / "a.csv.gz", 300, b"prompt,chosen,rejected\na,b,", b"x" * 1000, b"\n")
    with pytest.raises(DataError, match="line 2 has more than 1,000 characters"):
        open_rows(file)
