"""The key index against a dictionary; merged, mapped, damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpo_score.errors import DamageError
from dpo_score.storage.cache import key_index as keyindex
from dpo_score.storage.cache.key_index import KeyIndex
from tests.storage import shim

Keys = NDArray[np.uint8]
NARROW = st.binary(min_size=16, max_size=16) | st.integers(0, 3).map(lambda n: bytes([n] * 8) + bytes([n // 2] * 8))
FILES = st.lists(st.lists(NARROW, max_size=6), min_size=1, max_size=4)


def array(keys: list[bytes]) -> Keys:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 16)


def as_dict(files: list[list[bytes]]) -> dict[bytes, set[tuple[str, int]]]:
    """The slow twin: every place of every key."""
    places: dict[bytes, set[tuple[str, int]]] = {}
    for number, keys in enumerate(files):
        for row, key in enumerate(keys):
            places.setdefault(key, set()).add((f"f{number}", row))
    return places


def found(index: KeyIndex, keys: list[bytes]) -> dict[bytes, set[tuple[str, int]]]:
    places: dict[bytes, set[tuple[str, int]]] = {}
    for query, file, row in index.find(array(keys)):
        places.setdefault(keys[query], set()).add((index.files[file], row))
    return places


def on_disk(path: Path, indexes: list[KeyIndex], keep: set[str]) -> KeyIndex:
    parts, names, total = keyindex.merged(indexes, keep)
    path.write_bytes(b"".join(keyindex.encoded(parts, names, total)))
    assert keyindex.is_whole(path)
    return keyindex.opened(path)


@settings(max_examples=200, deadline=None)
@given(FILES, st.lists(NARROW, max_size=5))
def test_an_index_finds_what_a_dictionary_finds(files: list[list[bytes]], others: list[bytes]) -> None:
    names = [f"f{n}" for n in range(len(files))]
    expected = as_dict(files)
    asked = [*dict.fromkeys([*expected, *others])]
    assert found(keyindex.in_memory(names, [array(keys) for keys in files]), asked) == expected


@settings(max_examples=60, deadline=None)
@given(FILES, st.sets(st.integers(0, 3)))
def test_merging_keeps_exactly_the_files_asked_for(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], dropped: set[int]
) -> None:
    parts = [keyindex.in_memory([f"f{n}"], [array(keys)]) for n, keys in enumerate(files)]
    keep = {f"f{n}" for n in range(len(files)) if n not in dropped}
    index = on_disk(tmp_path_factory.mktemp("index") / "a.idx", [*parts, parts[0]], keep)
    expected = {key: {p for p in places if p[0] in keep} for key, places in as_dict(files).items()}
    assert found(index, list(expected)) == {key: places for key, places in expected.items() if places}


def random_keys(count: int, seed: int) -> Keys:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


@pytest.mark.parametrize("size", [1, 511, 512, 513, 5_000])
def test_buckets_of_every_size(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyindex, "MERGE_SLOTS", 700)
    monkeypatch.setattr(keyindex, "QUERIES_AT_ONCE", 37)
    keys = random_keys(size, 0)
    halves = [keyindex.in_memory(["a"], [keys[::2]]), keyindex.in_memory(["b"], [keys[1::2]])]
    index = on_disk(tmp_path / "x", halves, {"a", "b"})
    assert len(index.slots) == size
    assert (np.diff(index.slots["high"].astype(object)) >= 0).all()
    hits = sorted((query, index.files[file], row) for query, file, row in index.find(keys))
    assert hits == [(n, "ab"[n % 2], n // 2) for n in range(size)]
    assert list(index.find(random_keys(100, 1))) == []


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    on_disk(tmp_path / "x", [keyindex.in_memory(["a"], [random_keys(40, 0)])], {"a"})
    for bit in range((tmp_path / "x").stat().st_size * 8):
        shim.flip(tmp_path / "x", bit)
        if keyindex.is_whole(tmp_path / "x"):
            with pytest.raises(DamageError):
                keyindex.opened(tmp_path / "x")
        shim.flip(tmp_path / "x", bit)


def test_any_truncation_is_found(tmp_path: Path) -> None:
    on_disk(tmp_path / "x", [keyindex.in_memory(["a"], [random_keys(20, 0)])], {"a"})
    data = (tmp_path / "x").read_bytes()
    for length in range(len(data)):
        (tmp_path / "x").write_bytes(data[:length])
        with pytest.raises(DamageError, match="index of keys"):
            keyindex.opened(tmp_path / "x")
