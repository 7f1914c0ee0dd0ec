"""The cache: what was added is found, by any number of processes, and never what was not asked for."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.errors import StorageError
from dpo_score.storage.cache import namespace as space_module
from dpo_score.storage.cache.cache import CacheSpace, LogpCache, SequenceLogps, open_cache
from dpo_score.storage.local import LocalStore
from tests.storage import shim
from tests.storage.cache.test_blocks import entry, same

FIELDS = {"weights": "w" * 64, "dtype": "bfloat16", "path": "fast", "kernel": "sdpa", "device_kind": "cuda"}


def key(n: int) -> bytes:
    return random.Random(n).randbytes(16)


def values(n: int, stats: tuple[str, ...] = ()) -> SequenceLogps:
    rng = np.random.default_rng(n)
    logps = -rng.random(n % 5 + 1, np.float32)
    return SequenceLogps(logps, {name: rng.random(len(logps), np.float32) for name in stats})


def block(start: int, stop: int, stats: tuple[str, ...] = ()) -> dict[bytes, SequenceLogps]:
    return {key(n): values(n, stats) for n in range(start, stop)}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, said: list[str]) -> LogpCache:
    return open_cache(tmp_path / "cache", said.append)


@pytest.fixture
def space(cache: LogpCache) -> CacheSpace:
    return cache.namespace(FIELDS)


def lookup(space: CacheSpace, keys: list[bytes], wanted: tuple[str, ...] = ()) -> dict[bytes, SequenceLogps]:
    return space.view(space.snapshot()).lookup(keys, wanted)


def agree(found: dict[bytes, SequenceLogps], known: dict[bytes, SequenceLogps]) -> bool:
    return found.keys() == known.keys() and all(same(found[k], known[k]) for k in known)


# adding and finding


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.dictionaries(st.integers(0, 12), entry(), min_size=1, max_size=6), max_size=5),
    asked=st.lists(st.integers(0, 15), max_size=20),
    compact_after=st.integers(0, 5),
)
def test_a_lookup_equals_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory,
    blocks: list[dict[int, SequenceLogps]],
    asked: list[int],
    compact_after: int,
) -> None:
    space = open_cache(tmp_path_factory.mktemp("cache")).namespace(FIELDS)
    by_file: dict[str, dict[bytes, SequenceLogps]] = {}
    for number, content in enumerate(blocks):
        if number == compact_after:
            space.compact()
        entries = {key(n): e for n, e in content.items()}
        name = space.add("b", entries)
        assert name is not None
        by_file[name] = entries
    known: dict[bytes, SequenceLogps] = {}
    for name in sorted(by_file, reverse=True):  # the first by name answers
        known |= by_file[name]
    keys = [key(n) for n in asked]
    assert agree(lookup(space, keys), {k: known[k] for k in keys if k in known})


def test_an_empty_cache_answers_nothing_and_creates_nothing(cache: LogpCache, space: CacheSpace) -> None:
    assert lookup(space, [key(1)]) == {}
    assert space.add("b", {}) is None
    assert cache.ls() == []
    assert cache.store.list() == ()


def test_answers_come_in_the_order_asked(space: CacheSpace) -> None:
    space.add("b", block(0, 50))
    keys = [key(n) for n in random.Random(0).sample(range(50), 50)]
    assert list(lookup(space, keys)) == keys


@pytest.mark.parametrize("name", FIELDS)
def test_another_namespace_never_answers(cache: LogpCache, space: CacheSpace, name: str) -> None:
    space.add("b", block(0, 3))
    assert lookup(cache.namespace({**FIELDS, name: "other"}), [key(0)]) == {}
    assert len(lookup(cache.namespace(dict(reversed(FIELDS.items()))), [key(0)])) == 1


def test_an_entry_without_a_wanted_statistic_is_a_miss_unless_another_file_has_it(space: CacheSpace) -> None:
    space.add("a", block(0, 10))
    keys = [key(n) for n in range(10)]
    assert lookup(space, keys, ("entropy",)) == {}
    richer = block(0, 5, ("entropy", "top1"))
    space.add("z", richer)
    assert agree(lookup(space, keys, ("entropy",)), richer)
    assert agree(lookup(space, keys), block(0, 10))


def test_values_that_are_not_finite_are_not_kept(space: CacheSpace) -> None:
    bad = SequenceLogps(np.array([-1, np.nan], np.float32))
    assert space.add("b", {key(0): bad}) is None
    space.add("b", {key(0): bad, key(1): values(1)})
    assert list(lookup(space, [key(0), key(1)])) == [key(1)]


def test_equal_blocks_are_one_file_whatever_they_are_called(space: CacheSpace) -> None:
    first = space.add("reference/../00001", block(0, 9))
    before = space.store.stat(f"{space.folder}/{first}")
    assert space.add("policy", block(0, 9)) == first
    assert space.snapshot() == (first,)
    assert space.store.stat(f"{space.folder}/{first}") == before
    assert first is not None
    assert first.startswith("reference-00001-")


class Listings:
    """Counts how often a store is asked what there is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, LocalStore.list

        def counted(store: LocalStore, prefix: str = "") -> tuple[str, ...]:
            self.count += 1
            return real(store, prefix)

        monkeypatch.setattr(LocalStore, "list", counted)

    def of(self, work: Callable[[], Any]) -> int:
        before = self.count
        work()
        return self.count - before


@pytest.mark.parametrize("there", [0, 40])
def test_adding_a_block_lists_nothing_however_many_there_are(
    cache: LogpCache, space: CacheSpace, monkeypatch: pytest.MonkeyPatch, there: int
) -> None:
    for n in range(there):
        space.add(f"b{n}", block(10 * n, 10 * n + 10))
    listings = Listings(monkeypatch)
    fresh = cache.namespace(FIELDS)
    assert listings.of(lambda: fresh.add("ref", block(1000, 1010))) == 1
    for n in range(20):
        new = block(2000 + n, 2001 + n)
        assert [listings.of(lambda new=new: fresh.add("ref", new)) for _ in range(2)] == [0, 0]  # type: ignore[misc]
    begun = cache.namespace(FIELDS)
    begun.view(begun.snapshot())
    assert listings.of(lambda: begun.add("policy", block(1000, 1010))) == 0, "the view of a run has listed already"
    assert len(space.snapshot()) == there + 21


def test_a_block_is_found_under_any_name_that_was_there_before(cache: LogpCache, space: CacheSpace) -> None:
    """As caches of earlier releases hold them, and other runs: `ref`, `policy`."""
    names = {space.add(f"role-{n}/x", block(10 * n, 10 * n + 10)) for n in range(5)}
    fresh = cache.namespace(FIELDS)
    assert {fresh.add("other", block(10 * n, 10 * n + 10)) for n in range(5)} == names
    assert set(space.snapshot()) == names


def test_a_block_that_has_gone_since_is_stored_again(cache: LogpCache, space: CacheSpace) -> None:
    name = space.add("ref", block(0, 9))
    cache.gc(namespaces=[""])
    assert space.add("ref", block(0, 9)) == name
    assert agree(lookup(space, [key(n) for n in range(9)]), block(0, 9))


def test_runs_that_add_in_turn_see_no_more_than_their_snapshots(cache: LogpCache) -> None:
    """Each has listed before the other adds: one file for a block of one name, and both are read whatever happens."""
    first, second = cache.namespace(FIELDS), cache.namespace(FIELDS)
    views = [space.view(space.snapshot()) for space in (first, second)]
    assert first.add("ref", block(0, 9)) == second.add("ref", block(0, 9))
    assert first.add("ref", block(20, 29)) != second.add("policy", block(20, 29))
    assert len(first.snapshot()) == 3
    keys = [key(n) for n in range(29)]
    assert [view.lookup(keys) for view in views] == [{}, {}]
    assert agree(lookup(second, keys), block(0, 9) | block(20, 29))
    assert cache.verify() == ()


# snapshots


def test_a_view_sees_its_snapshot_whatever_is_added_and_compacted_later(space: CacheSpace) -> None:
    for n in range(5):
        space.add(f"b{n}", block(10 * n, 10 * n + 10))
    snapshot = space.snapshot()
    early = space.view(snapshot)
    space.compact()
    space.add("late", block(50, 60) | block(0, 1, ("entropy",)))
    space.compact()
    keys = [key(n) for n in range(60)]
    assert agree(early.lookup(keys), block(0, 50))
    assert agree(space.view(snapshot).lookup(keys), block(0, 50))
    assert agree(space.view(snapshot[2:3]).lookup(keys), block(20, 30))
    assert space.view(()).lookup(keys) == {}


def test_files_of_a_snapshot_that_are_gone_are_said_once_and_miss(space: CacheSpace, said: list[str]) -> None:
    space.add("a", block(0, 5))
    space.add("b", block(5, 9))
    snapshot = space.snapshot()
    view = space.view(snapshot)
    space.compact()
    space.store.remove(f"{space.folder}/{snapshot[0]}")
    keys = [key(n) for n in range(9)]
    for found in (view.lookup(keys), view.lookup(keys), space.view(snapshot).lookup(keys)):
        assert agree(found, block(5, 9))
    assert len(said) == 1
    assert "1 of 2 cache files this run began with are gone" in said[0]


def test_many_files_are_indexed_and_indexes_stay_few(space: CacheSpace) -> None:
    for n in range(100):
        space.add(f"b{n:03}", block(10 * n, 10 * n + 10))
        if n % 9 == 0:
            space.compact()
    space.compact()
    assert 1 <= len(space.indexes()) <= 4
    assert agree(lookup(space, [key(n) for n in range(0, 1000, 7)]), {key(n): values(n) for n in range(0, 1000, 7)})


def test_an_index_that_cannot_be_written_is_built_in_memory(
    space: CacheSpace, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space_module, "UNINDEXED_FILES", 1)
    for n in range(3):
        space.add(f"b{n}", block(10 * n, 10 * n + 10))

    def refuse(*_: Any) -> None:
        raise StorageError("read-only")

    monkeypatch.setattr(LocalStore, "write_chunks", refuse)
    assert agree(lookup(space, [key(25)]), {key(25): values(25)})
    assert said == ["the cache index cannot be written, so it is built in memory (read-only)"]


# damage


def test_a_flipped_bit_is_found_or_harmless_and_never_another_number(tmp_path: Path, said: list[str]) -> None:
    known = block(0, 300, ("entropy",))
    space = open_cache(tmp_path, said.append).namespace(FIELDS)
    name = f"{space.folder}/{space.add('b', known)}"
    clean = space.store.read_bytes(name)
    outcomes = []
    for bit in random.Random(0).sample(range(len(clean) * 8), 300):
        space.store.write_bytes(name, clean)
        shim.flip(tmp_path / name, bit)
        said.clear()
        found = lookup(space, list(known))
        assert all(same(found[k], known[k]) for k in found), bit
        assert len(found) in (0, 300) or len(said) == 1
        assert len(said) <= 1
        outcomes.append(len(found) == 300)
    assert sum(outcomes) < 60


def test_damage_is_quarantined_with_one_warning_and_becomes_misses(space: CacheSpace, said: list[str]) -> None:
    name = space.add("a", block(0, 500))
    space.add("b", block(500, 520))
    view = space.view(space.snapshot())
    path = space.store.local_copy(f"{space.folder}/{name}")
    shim.flip(path, path.stat().st_size * 2)
    keys = [key(n) for n in range(520)]
    for _ in range(2):
        assert agree(view.lookup(keys), block(500, 520))
    assert len(said) == 1
    assert name is not None
    assert name in said[0]
    assert len(space.snapshot()) == 1
    assert any(name in kept for kept in space.store.list(".work/quarantine"))
    assert space.add("a", block(0, 500)) == name
    assert agree(lookup(space, keys), block(0, 520))


def test_a_damaged_index_is_quarantined_and_built_anew(space: CacheSpace, said: list[str]) -> None:
    space.add("a", block(0, 40))
    space.compact()
    (name,) = space.indexes()
    shim.flip(space.store.local_copy(name), 8 * 24 * 7 + 3)
    fresh = LogpCache(space.store, said.append).namespace(FIELDS)
    assert agree(lookup(fresh, [key(n) for n in range(40)]), block(0, 40))
    assert len(said) == 1
    assert "damaged index" in said[0]
    fresh.compact()
    assert list(fresh.indexes()) == [name]


def test_the_index_of_an_earlier_release_is_replaced_without_a_word(space: CacheSpace, said: list[str]) -> None:
    space.add("a", block(0, 40))
    old = f"{space.folder}/index/{'0' * 32}.idx"
    space.store.write_bytes(old, b"sorted slots of an earlier release")
    assert agree(lookup(space, [key(n) for n in range(40)]), block(0, 40))
    assert open_cache(space.store.url()).verify() == ()
    space.compact()
    assert not space.store.exists(old)
    assert len(space.indexes()) == 1
    assert said == []


# processes


def _add_blocks(root: str, worker: int, start: Any) -> None:
    space = open_cache(root).namespace(FIELDS)
    start.wait(60)
    for n in range(6):  # every second block is every worker's
        first = 100 * n if n % 2 else 1000 * (worker + 1) + 100 * n
        space.add(f"block-{n}", block(first, first + 100))
        if n % 3 == worker % 3:
            space.compact()


def test_eight_processes_add_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(8)
    workers = [context.Process(target=_add_blocks, args=(str(tmp_path), n, start)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    cache = open_cache(tmp_path, _fail)
    space = cache.namespace(FIELDS)
    assert len(space.snapshot()) == 3 + 8 * 3
    assert cache.verify() == ()
    shared = [n for b in (1, 3, 5) for n in range(100 * b, 100 * b + 100)]
    own = [
        n for w in range(8) for b in (0, 2, 4) for n in range(1000 * (w + 1) + 100 * b, 1000 * (w + 1) + 100 * b + 100)
    ]
    assert agree(lookup(space, [key(n) for n in shared + own]), {key(n): values(n) for n in shared + own})
    assert [name for name in space.store.list(".work") if ".tmp-" in name] == []


def _fail(text: str) -> None:
    raise AssertionError(text)


def test_a_crash_at_any_call_of_add_and_compact_loses_only_that_block(tmp_path: Path) -> None:
    def work(space: CacheSpace) -> None:
        space.add("new", block(20, 30))
        space.compact()

    def prepared(root: Path) -> CacheSpace:
        space = open_cache(root, _fail).namespace(FIELDS)
        space.add("old", block(0, 20))
        return space

    calls = len(shim.count(lambda: work(prepared(tmp_path / "count"))))
    for call in range(1, calls + 1):
        space = prepared(tmp_path / str(call))
        with suppress(shim.PowerCutError), shim.cut_at(call):
            work(space)
        again = open_cache(tmp_path / str(call), _fail)
        found = lookup(again.namespace(FIELDS), [key(n) for n in range(30)])
        assert agree(found, block(0, 20)) or agree(found, block(0, 30))
        assert again.verify() == ()
        work(again.namespace(FIELDS))
        assert agree(lookup(again.namespace(FIELDS), [key(n) for n in range(30)]), block(0, 30))


# upkeep


def test_listing(cache: LogpCache, space: CacheSpace) -> None:
    space.add("a", block(0, 7))
    space.add("b", block(7, 9))
    cache.namespace({"weights": "v"}).add("a", block(0, 1))
    rows = {row["fields"]["weights"]: row for row in cache.ls()}
    row = rows["w" * 64]
    assert (row["files"], row["entries"], row["fields"]) == (2, 9, FIELDS)
    assert row["bytes"] == sum((space.store.local_copy(f"{space.folder}/{f}")).stat().st_size for f in space.snapshot())
    assert row["newest"].startswith("20")
    assert len(rows) == 2


def test_verify_names_each_damaged_file_and_changes_nothing(cache: LogpCache, space: CacheSpace) -> None:
    name = space.add("a", block(0, 40))
    space.compact()
    (index,) = space.indexes()
    assert cache.verify() == ()
    described = f"{space.folder}/namespace.json"
    for victim in (f"{space.folder}/{name}", index, described):
        path = space.store.local_copy(victim)
        clean = path.read_bytes()
        flipped = clean[:-9] + bytes([clean[-9] ^ 4]) + clean[-8:]
        changed = clean.replace(b"bfloat16", b"float160") if victim == described else flipped
        path.write_bytes(changed)
        damage = open_cache(cache.store.url()).verify()
        assert len(damage) == 1
        assert victim.rsplit("/", 1)[-1] in damage[0]
        path.write_bytes(clean)


def test_a_renamed_file_is_not_what_its_name_stands_for(cache: LogpCache, space: CacheSpace) -> None:
    name = space.add("a", block(0, 4))
    space.store.write_bytes(f"{space.folder}/b-{'0' * 32}.parquet", space.store.read_bytes(f"{space.folder}/{name}"))
    assert len(cache.verify()) == 1


def aged(cache: LogpCache, space: CacheSpace) -> list[str]:
    """Three files, 30, 20 and 10 seconds old."""
    files = [space.add(f"{n}", block(10 * n, 10 * n + 10)) or "" for n in range(3)]
    for n, file in enumerate(files):
        moment = time.time() - 30 + 10 * n
        os.utime(cache.store.local_copy(f"{space.folder}/{file}"), (moment, moment))
    space.compact()
    return files


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"max_age": 25}, 2),
        ({"max_age": 5}, 0),
        ({"max_age": 100}, 3),
        ({"max_bytes": 0}, 0),
        ({"max_bytes": 1 << 20}, 3),
        ({"max_age": 25, "max_bytes": 0}, 0),
        ({"namespaces": [""]}, 0),
        ({"namespaces": ["no such"]}, 3),
        ({}, 3),
    ],
)
def test_gc_removes_the_oldest_first(cache: LogpCache, space: CacheSpace, limits: dict[str, Any], left: int) -> None:
    files = aged(cache, space)
    removed = cache.gc(**limits)
    assert removed.files == 3 - left
    assert sorted(space.snapshot()) == sorted(files[3 - left :])
    keys = [key(n) for n in range(30)]
    assert agree(lookup(space, keys), block(30 - 10 * left, 30))
    assert {f for index in space.indexes().values() for f in index.files} == set(space.snapshot())
    assert cache.store.list() != () or left == 0


def test_gc_by_size_keeps_what_fits(cache: LogpCache, space: CacheSpace) -> None:
    files = aged(cache, space)
    sizes = [cache.store.local_copy(f"{space.folder}/{f}").stat().st_size for f in files]
    assert cache.gc(max_bytes=sizes[1] + sizes[2]).bytes == sizes[0]
    assert set(space.snapshot()) == set(files[1:])


# memory

MEMORY = """
import sys, resource, numpy as np
from tests.benchmarks.bench_cache import fill, rss
from dpo_score.storage.cache.cache import open_cache
space = open_cache(sys.argv[1]).namespace({"weights": "synthetic"})
if sys.argv[2] == "fill":
    fill(space, 1_000_000)
    space.compact()
else:
    base = rss()
    view = space.view(space.snapshot())
    from tests.benchmarks.bench_cache import key_bytes
    wanted = np.random.default_rng(0).choice(1_000_000, 2_000, replace=False)
    found = view.lookup([key.tobytes() for key in key_bytes(wanted)])
    assert len(found) == 2_000
    print(rss() - base)
"""


@pytest.mark.slow
def test_a_million_entries_are_searched_in_little_memory(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]

    def child(what: str) -> str:
        command = [sys.executable, "-c", MEMORY, str(tmp_path), what]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout

    child("fill")
    grown = int(child("read"))
    assert grown < 120 << 20, f"{grown >> 20} MiB"


def test_few_files_are_held_open(space: CacheSpace) -> None:
    for n in range(40):
        space.add(f"b{n:02}", block(10 * n, 10 * n + 10))
    view = space.view(space.snapshot())
    before = shim.open_files()
    view.lookup([key(n) for n in range(400)])
    assert shim.open_files() <= before + 20
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 20
