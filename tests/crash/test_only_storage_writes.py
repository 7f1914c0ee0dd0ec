"""Nothing but the storage primitives (and lock files) writes under OUT and CACHE.

Opening a file from Python is seen by an audit hook; what native code might write beside it would be a file that
no primitive ever gave its name.
"""

from __future__ import annotations

import pytest

from tests.crash.conftest import Golden
from tests.crash.world import World

pytestmark = pytest.mark.slow
LOCKS = {"lock", "create.lock"}


def test_every_writing_open_goes_through_storage(world: World, golden: Golden) -> None:
    world.clean()
    ended = world.run(watch=True)
    assert ended.status == 0, ended.errors
    assert ended.strays == []


def test_there_are_as_many_files_as_renames(world: World, golden: Golden) -> None:
    world.clean()
    ended = world.run()
    assert ended.status == 0, ended.errors
    found = [p for top in (world.out, world.cache) for p in top.rglob("*") if p.is_file() and p.name not in LOCKS]
    assert ended.calls.count("create") == ended.calls.count("replace")
    assert len(found) <= ended.calls.count("replace")
