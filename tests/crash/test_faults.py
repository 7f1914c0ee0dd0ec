"""A device that fails at a storage call of a real run: one clear sentence, no torn file, resumable."""

from __future__ import annotations

import pytest

from tests.crash.conftest import Golden, resumed
from tests.crash.world import World

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "EACCES"])
def test_a_fault_at_a_call(world: World, golden: Golden, kind: str) -> None:
    for number in golden.points(consecutive=1, spread=1):
        world.clean()
        ended = world.run(kind=kind, call=number)
        assert "Traceback" not in ended.errors, (number, ended.errors)
        assert ended.status in (0, 1), (number, ended.errors)
        if ended.status == 1:
            assert f"({kind})" in ended.errors, (number, ended.errors)
            assert str(world.folder) in ended.errors
        resumed(world, golden)
