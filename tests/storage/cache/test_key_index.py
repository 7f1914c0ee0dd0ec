"""The key index against a dictionary; merged, damaged, and one of an earlier release."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpo_score.errors import DamageError, StorageError
from dpo_score.storage.cache import key_index
from dpo_score.storage.cache.key_index import KeyIndex
from tests.storage import shim

Keys = NDArray[np.uint8]
NARROW = st.binary(min_size=16, max_size=16) | st.integers(0, 3).map(lambda n: bytes([n] * 8) + bytes([n // 2] * 8))
FILES = st.lists(st.lists(NARROW, max_size=6), min_size=1, max_size=4)


def array(keys: list[bytes]) -> Keys:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 16)


def as_dict(files: list[list[bytes]]) -> dict[bytes, set[tuple[str, int]]]:
    """The same, slowly: every place of every key."""
    places: dict[bytes, set[tuple[str, int]]] = {}
    for number, keys in enumerate(files):
        for row, key in enumerate(keys):
            places.setdefault(key, set()).add((f"f{number}", row))
    return places


def found(index: KeyIndex, keys: list[bytes]) -> dict[bytes, set[tuple[str, int]]]:
    places: dict[bytes, set[tuple[str, int]]] = {}
    for key, file, row in index.find(keys):
        places.setdefault(key, set()).add((file, row))
    return places


def on_disk(folder: Path, files: dict[str, Keys]) -> KeyIndex:
    path = folder / f"{len(list(folder.iterdir()))}.part"
    key_index.write(path, files)
    path = path.rename(folder / key_index.file_name(path))
    assert key_index.is_whole(path)
    return key_index.opened(path)


def merged(folder: Path, indexes: list[KeyIndex], keep: set[str]) -> KeyIndex:
    path = folder / "merged.sqlite"
    key_index.merge(path, indexes, keep)
    return key_index.opened(path)


@settings(max_examples=100, deadline=None)
@given(FILES, st.lists(NARROW, max_size=5))
def test_an_index_finds_what_a_dictionary_finds(files: list[list[bytes]], others: list[bytes]) -> None:
    expected = as_dict(files)
    asked = [*dict.fromkeys([*expected, *others])]
    index = key_index.in_memory({f"f{n}": array(keys) for n, keys in enumerate(files)})
    assert found(index, asked) == expected
    assert index.size == sum(map(len, files))


@settings(max_examples=40, deadline=None)
@given(FILES, st.sets(st.integers(0, 3)))
def test_merging_keeps_exactly_the_files_asked_for(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], dropped: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("index")
    parts = [on_disk(folder, {f"f{n}": array(keys)}) for n, keys in enumerate(files)]
    keep = {f"f{n}" for n in range(len(files)) if n not in dropped}
    index = merged(folder, [*parts, parts[0]], keep)
    expected = {key: {p for p in places if p[0] in keep} for key, places in as_dict(files).items()}
    assert found(index, list(expected)) == {key: places for key, places in expected.items() if places}
    assert set(index.files) == keep


def random_keys(count: int, seed: int) -> Keys:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


@pytest.mark.parametrize("size", [1, 511, 5_000])
def test_more_keys_than_go_into_one_statement(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_index, "ROWS_AT_ONCE", 700)
    monkeypatch.setattr(key_index, "QUERIES_AT_ONCE", 37)
    keys = random_keys(size, 0)
    index = merged(tmp_path, [on_disk(tmp_path, {"a": keys[::2]}), on_disk(tmp_path, {"b": keys[1::2]})], {"a", "b"})
    asked = [key.tobytes() for key in keys]
    hits = {key: (file, row) for key, file, row in index.find(asked)}
    assert hits == {key: ("ab"[n % 2], n // 2) for n, key in enumerate(asked)}
    assert list(index.find([key.tobytes() for key in random_keys(100, 1)])) == []


def test_more_indexes_than_one_statement_merges(tmp_path: Path) -> None:
    keys = random_keys(40, 0)
    parts = [on_disk(tmp_path, {f"f{n}": keys[2 * n : 2 * n + 2]}) for n in range(20)]
    index = merged(tmp_path, parts, {f"f{n}" for n in range(1, 20)})
    assert found(index, [key.tobytes() for key in keys]) == {
        keys[row].tobytes(): {(f"f{row // 2}", row % 2)} for row in range(2, 40)
    }


def test_equal_keys_give_equal_bytes(tmp_path: Path) -> None:
    names = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        index = on_disk(tmp_path / folder, {"x": random_keys(40, 0)})
        assert index.path is not None
        names.append(index.path.name)
    assert names[0] == names[1]


def test_any_flipped_bit_and_any_truncation_is_found(tmp_path: Path) -> None:
    index = on_disk(tmp_path, {"a": random_keys(40, 0)})
    assert index.path is not None
    path, data = index.path, index.path.read_bytes()
    for bit in range(0, len(data) * 8, 1009):
        shim.flip(path, bit)
        assert not key_index.is_whole(path)
        shim.flip(path, bit)
    for length in range(0, len(data), 997):
        path.write_bytes(data[:length])
        assert not key_index.is_whole(path)


@pytest.mark.parametrize("data", [b"", b"not a database at all, but long enough to be read as one" * 20])
def test_what_is_no_database_is_damage(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(data)
    with pytest.raises(DamageError, match="not an index of keys"):
        key_index.opened(path)


def test_an_index_that_another_process_has_merged_away_is_gone_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not there"):
        key_index.opened(tmp_path / "gone.sqlite")
