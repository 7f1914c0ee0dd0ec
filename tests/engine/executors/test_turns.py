"""Shares of one OUT change its manifest one at a time: what one wrote is never lost to another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpo_score.engine.executors import choose as engines
from dpo_score.engine.executors import job_array as shares
from dpo_score.engine.model_logprobs import CachedLogprobs, FastPathRefusedError
from dpo_score.engine.progress import Progress
from dpo_score.errors import HalfWrittenError
from dpo_score.logprobs import numerics
from dpo_score.storage.local import LocalStore
from dpo_score.storage.manifest import MANIFEST, Manifest, read_manifest
from dpo_score.storage.open import open_store
from tests.run_fixtures import Runner, preference_rows, write_rows

QUIET = Progress(quiet=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", preference_rows(6))


@pytest.fixture(autouse=True)
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each write of a manifest: whether its writer had the turn, or OUT for itself."""
    found: list[bool] = []
    holders: list[str] = []

    def watched(name: str) -> Any:
        real = getattr(LocalStore, name)

        @contextmanager
        def held(self: LocalStore) -> Iterator[None]:
            with real(self):
                holders.append(name)
                try:
                    yield
                finally:
                    holders.remove(name)

        return held

    def write_json(self: LocalStore, name: str, *args: Any, **named: Any) -> bool:
        if name == MANIFEST:
            found.append(bool(holders))
        return real(self, name, *args, **named)

    real = LocalStore.write_json
    monkeypatch.setattr(LocalStore, "turn", watched("turn"))
    monkeypatch.setattr(LocalStore, "lock", watched("lock"))
    monkeypatch.setattr(LocalStore, "write_json", write_json)
    return found


def manifest_at(out: Path) -> Manifest:
    found = read_manifest(open_store(out))
    assert found is not None
    return found


def test_a_policy_that_needs_the_plain_path(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: list[bool]
) -> None:
    def refuse_policies(self: CachedLogprobs, _: Any) -> None:
        if self._numerics.path == "fast" and self._source.folder == runner.models["better"]:
            raise FastPathRefusedError("made up for this test", numerics.on_plain_path(self._begun))

    monkeypatch.setattr(CachedLogprobs, "_verify", refuse_policies)
    engines.run(runner.config(data, tmp_path / "out", blocks="0/1"), QUIET)
    assert manifest_at(tmp_path / "out").identities.policies["better"]["numerics"]["path"] == "plain"
    assert set(writes) == {True}


def test_a_checkpoint_that_is_written_anew_while_it_is_read(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: list[bool]
) -> None:
    load = CachedLogprobs._load

    def half(self: CachedLogprobs) -> Any:
        if self._source.folder == runner.models["worse"]:
            raise HalfWrittenError("made up for this test")
        return load(self)

    monkeypatch.setattr(CachedLogprobs, "_load", half)
    policies = [f"{name}={runner.models[name]}" for name in ("better", "worse")]
    engines.run(runner.config(data, tmp_path / "out", blocks="0/1", policy=policies), QUIET)
    assert set(manifest_at(tmp_path / "out").identities.policies) == {"better"}
    assert set(writes) == {True}


def test_a_finished_folder_of_which_a_block_is_gone(
    runner: Runner, data: Path, tmp_path: Path, writes: list[bool]
) -> None:
    out, share = tmp_path / "out", runner.config(data, tmp_path / "out", blocks="0/1")
    engines.run(share, QUIET)
    shares.finish(str(out), QUIET)
    next((out / "scores/better").glob("*.parquet")).unlink()
    writes.clear()
    engines.run(share, QUIET)
    assert manifest_at(out).state == "running"
    assert set(writes) == {True}
