"""The manifest: created once, compared for ever after, restored from its twin."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dpo_score.errors import DamageError, IdentityError, UsageError
from dpo_score.storage.base import FileRecord
from dpo_score.storage.commits import sealed
from dpo_score.storage.fingerprint import Identities
from dpo_score.storage.local import LocalStore
from dpo_score.storage.manifest import (
    MANIFEST,
    MANIFEST_COPY,
    SCHEMA_VERSION,
    ManifestRequest,
    finish_manifest,
    open_manifest,
    read_manifest,
    restart,
    save_manifest,
)
from tests.storage import shim

LOSS = {"name": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "params": {}}
TEXT = {
    "files": [{"name": "a.parquet", "size": 10, "sha256": "aa"}],
    "split": None,
    "format": "messages-full",
    "format_version": 1,
    "polarity": "chosen is better",
    "map": {},
    "pairing": "best-worst",
    "seed": 0,
    "template": "tt",
    "tokenizer": "kk",
    "system": None,
    "max_length": 1024,
    "truncation": "keep_start",
}
REFERENCE = {
    "weights": "ww",
    "adapter": None,
    "quantization": None,
    "dtype": "bfloat16",
    "path": "fast",
    "kernel": "sdpa",
    "compile": False,
    "batch_tokens": 8192,
    "block_rows": 64,
    "threads": 2,
}
POLICY = {"weights": "pp", "adapter": None, "loss": LOSS}
IDENTITIES = Identities(TEXT, REFERENCE, {"step-1": POLICY, "step-2": {**POLICY, "weights": "qq"}})
REQUEST = ManifestRequest(
    identities=IDENTITIES,
    numerics={"reference": {"dtype": "bfloat16"}},
    block_rows=64,
    total_rows=1000,
    started="2026-01-01T00:00:00+00:00",
    host="here",
    versions={"torch": "2.13.0", "device": "H100", "kernel": "sdpa"},
    cache_snapshots={"ww": ["block-1.parquet"]},
    out="runs/x",
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out")


def asking(part: str, change: Mapping[str, Any], policy: str = "step-1") -> ManifestRequest:
    """REQUEST with some fields of one identity changed."""
    known = {"text": TEXT, "reference": REFERENCE, "policies": copy.deepcopy(dict(IDENTITIES.policies))}
    target: Any = known["policies"][policy] if part == "policy" else known[part]
    changed = {**target, **change}
    if part == "policy":
        known["policies"] = {**known["policies"], policy: changed}
    else:
        known[part] = changed
    return replace(REQUEST, identities=Identities(**known))


def test_the_first_run_creates_it_and_the_second_finds_it(store: LocalStore) -> None:
    created = open_manifest(store, REQUEST)
    later = replace(REQUEST, started="2027-01-01T00:00:00+00:00", host="elsewhere", cache_snapshots={"ww": ["new"]})
    assert open_manifest(store, later) == created == read_manifest(store)
    assert created.state == "running"
    assert created.started.startswith("2026")
    assert store.read_bytes(MANIFEST) == store.read_bytes(MANIFEST_COPY)


def test_notes_are_kept_and_those_by_name_get_new_names(store: LocalStore) -> None:
    first = {"names": {"step-1": "models/a"}, "cards": "none"}
    assert open_manifest(store, replace(REQUEST, notes=first)).notes == first
    later = {"names": {"step-1": "moved/a", "step-3": "models/c"}, "cards": "other", "more": 1}
    more = replace(IDENTITIES, policies={"step-3": {**POLICY, "weights": "rr"}})
    found = open_manifest(store, replace(REQUEST, identities=more, notes=later)).notes
    assert found == {"names": {"step-1": "models/a", "step-3": "models/c"}, "cards": "none", "more": 1}


CHANGES = [
    *(("text", name) for name in TEXT),
    *(("reference", name) for name in REFERENCE),
    *(("policy", name) for name in POLICY),
    *(("text", "a new field"), ("reference", "a new field"), ("policy", "a new field")),
]


@pytest.mark.parametrize(("part", "name"), CHANGES)
def test_each_identity_field_changed_alone_is_refused(store: LocalStore, part: str, name: str) -> None:
    open_manifest(store, REQUEST)
    before = store.read_bytes(MANIFEST)
    with pytest.raises(IdentityError) as caught:
        open_manifest(store, asking(part, {name: "something else"}))
    assert re.search(rf"^  .*{re.escape(name)}.*: .* → .*something else", str(caught.value), re.MULTILINE)
    assert "runs/x" in str(caught.value)
    assert store.read_bytes(MANIFEST) == before


NEVER_REFUSED = {
    "numerics": {"reference": {"dtype": "float32"}},
    "block_rows": 128,
    "total_rows": 2000,
    "started": "2027",
    "host": "elsewhere",
    "versions": {"torch": "9"},
    "cache_snapshots": {"ww": []},
    "notes": {"report": "other"},
    "out": "other/name",
}


@pytest.mark.parametrize("name", NEVER_REFUSED)
def test_what_numbers_do_not_depend_on_resumes(store: LocalStore, name: str) -> None:
    first = open_manifest(store, REQUEST)
    found = open_manifest(store, replace(REQUEST, **{name: NEVER_REFUSED[name]}))
    assert (found.block_rows, found.numerics) == (first.block_rows, first.numerics)
    assert found.cache_snapshots == first.cache_snapshots


def test_every_field_of_a_request_is_either_identity_or_never_refused() -> None:
    assert {f.name for f in fields(ManifestRequest)} == {*NEVER_REFUSED, "identities", "strict_env"}


def test_a_policy_may_come_and_go(store: LocalStore) -> None:
    first = open_manifest(store, REQUEST)
    fewer = replace(REQUEST, identities=Identities(TEXT, REFERENCE, {"step-1": POLICY}))
    assert open_manifest(store, fewer) == first
    new = {"weights": "rr", "loss": LOSS}
    more = Identities(TEXT, REFERENCE, {"step-3": new})
    request = replace(REQUEST, identities=more, cache_snapshots={"rr": ["x"]}, numerics={"step-3": {"dtype": "f"}})
    found = open_manifest(store, request)
    assert set(found.identities.policies) == {"step-1", "step-2", "step-3"}
    assert found.cache_snapshots == {"ww": ["block-1.parquet"], "rr": ["x"]}
    assert found.numerics == {**first.numerics, "step-3": {"dtype": "f"}}
    assert found.identities.policy_digest("step-1") == first.identities.policy_digest("step-1")


@pytest.mark.parametrize("policy", ["step-1", "step-2"])
def test_only_another_loss_prints_the_rescore_command(store: LocalStore, policy: str) -> None:
    open_manifest(store, REQUEST)
    loss = {**LOSS, "name": "ipo", "beta": 0.5}
    with pytest.raises(IdentityError, match=r"`?dpo-score rescore runs/x --loss ipo --beta 0.5"):
        open_manifest(store, asking("policy", {"loss": loss}, policy))
    with pytest.raises(IdentityError) as caught:
        open_manifest(store, asking("policy", {"loss": loss, "weights": "zz"}, policy))
    assert "rescore" not in str(caught.value)
    assert "--restart" in str(caught.value)


def test_a_policy_named_like_a_field_is_not_mistaken_for_a_loss(store: LocalStore) -> None:
    odd = Identities(TEXT, REFERENCE, {"a.loss.b": POLICY})
    open_manifest(store, replace(REQUEST, identities=odd))
    changed = Identities(TEXT, REFERENCE, {"a.loss.b": {**POLICY, "weights": "zz"}})
    with pytest.raises(IdentityError) as caught:
        open_manifest(store, replace(REQUEST, identities=changed))
    assert "rescore" not in str(caught.value)


def test_another_environment_is_a_recorded_warning_said_once(store: LocalStore) -> None:
    open_manifest(store, REQUEST)
    moved = replace(REQUEST, versions={**REQUEST.versions, "device": "A10"})
    found = open_manifest(store, moved)
    assert found.warnings == ('continued in another environment: device: "H100" → "A10"',)
    assert open_manifest(store, moved) == found
    assert found.versions == REQUEST.versions


@pytest.mark.parametrize("name", ["torch", "device", "kernel", "a new one"])
def test_strict_env_refuses_it(store: LocalStore, name: str) -> None:
    open_manifest(store, REQUEST)
    strict = replace(REQUEST, versions={**REQUEST.versions, name: "other"}, strict_env=True)
    with pytest.raises(IdentityError, match=rf"--strict-env(.|\n)*{name}.*other"):
        open_manifest(store, strict)
    assert open_manifest(store, replace(REQUEST, strict_env=True)).warnings == ()


def test_finishing_is_the_last_write(store: LocalStore) -> None:
    manifest = open_manifest(store, REQUEST)
    outputs = (FileRecord("summary.json", 3, 0, "ff"),)
    done = finish_manifest(store, manifest, "2026-01-02", outputs)
    assert read_manifest(store) == done
    assert (done.state, done.outputs, done.finished) == ("complete", outputs, "2026-01-02")
    assert open_manifest(store, REQUEST) == done
    assert open_manifest(store, replace(REQUEST, total_rows=2000)).state == "running"


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_schema_version_is_refused_whatever_it_holds(store: LocalStore, version: int) -> None:
    store.write_json(MANIFEST, {"schema_version": version, "shape": "unknown"})
    with pytest.raises(UsageError, match=rf"schema version {version}, this dpo-score knows {SCHEMA_VERSION}"):
        open_manifest(store, REQUEST)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_manifest_that_is_no_object_is_damage(store: LocalStore, content: str) -> None:
    for name in (MANIFEST, MANIFEST_COPY):
        store.write_bytes(name, content.encode())
    with pytest.raises(DamageError, match=MANIFEST):
        read_manifest(store)


def test_a_damaged_manifest_is_restored_from_its_twin(store: LocalStore) -> None:
    manifest = open_manifest(store, REQUEST)
    path = store.path(MANIFEST)
    size = path.stat().st_size
    for bit in random.Random(0).sample(range(size * 8), 150):
        shim.flip(path, bit)
        found = read_manifest(store)
        assert found is not None
        assert replace(found, warnings=()) == manifest
        assert "restored, kept .work/quarantine/manifest.json-" in found.warnings[-1]
        save_manifest(store, manifest)


def test_when_both_are_gone_the_way_out_is_named(store: LocalStore) -> None:
    open_manifest(store, REQUEST)
    store.write_bytes(MANIFEST, b"{}")
    store.write_bytes(MANIFEST_COPY, b"{}")
    with pytest.raises(DamageError, match="--restart"):
        read_manifest(store)
    store.remove(MANIFEST_COPY)
    with pytest.raises(DamageError, match="--restart"):
        read_manifest(store)


def test_a_sealed_manifest_of_other_fields_is_damage(store: LocalStore) -> None:
    for body in ({}, {"identities": 3}, {"identities": {}, "outputs": []}, {"unknown": 1}):
        store.write_json(MANIFEST, sealed({"schema_version": SCHEMA_VERSION, **body}))
        with pytest.raises(DamageError):
            read_manifest(store)


def test_restart_deletes_what_is_ours_and_nothing_else(store: LocalStore) -> None:
    open_manifest(store, REQUEST)
    own = (
        "reference/part.parquet",
        "scores/p/x",
        "rejects/data/y",
        "commits/reference/00000-of-00001.json",
        "README.md",
    )
    for name in (*own, "notes.txt", "mine/thesis.md"):
        store.write_bytes(name, b"x")
    restart(store)
    assert store.list() == ("mine/thesis.md", "notes.txt")


def test_a_crash_while_restarting_never_leaves_records_that_resume(tmp_path: Path) -> None:
    for call in range(1, 30):
        store = LocalStore(tmp_path / str(call))
        open_manifest(store, REQUEST)
        for name in ("reference/part.parquet", "commits/reference/00000-of-00001.json"):
            store.write_bytes(name, b"x")
        with suppress(shim.PowerCutError), shim.cut_at(call):
            restart(store)
        left = store.list()
        if "commits/reference/00000-of-00001.json" in left:
            assert "reference/part.parquet" in left
        if MANIFEST in left:
            with pytest.raises(IdentityError):
                open_manifest(store, asking("text", {"seed": 1}))
        restart(store)
        assert store.list() == ()


def test_two_processes_that_create_it_agree(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process wins between the look and the write."""
    other = LocalStore(store.root)
    real = LocalStore.write_json

    def late(self: LocalStore, name: str, obj: Any, if_absent: bool = False) -> bool:
        monkeypatch.setattr(LocalStore, "write_json", real)
        open_manifest(other, replace(REQUEST, started="earlier"))
        return real(self, name, obj, if_absent)

    monkeypatch.setattr(LocalStore, "write_json", late)
    assert open_manifest(store, REQUEST).started == "earlier"
