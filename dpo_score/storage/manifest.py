"""The manifest: what an output folder was asked for, and the numbers resolved once for all its runs.

    manifest.json            state, identities, numerics, block size, cache snapshots, times, host, versions
    commits/manifest.json    its copy, from which a damaged one is restored

It is created once, and compared from then on: another identity is refused, field by field; another environment is a
recorded warning (`strict_env`: refused); an unknown schema version is never misread. It holds no secrets because it
holds only what it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib import metadata
from typing import Any, Literal

from dpo_score.errors import DamageError, IdentityError, StorageError, UsageError
from dpo_score.storage.base import FileRecord, Store
from dpo_score.storage.commits import COMMITS, sealed, typed, unsealed
from dpo_score.storage.fingerprint import FieldChange, Identities, diff, listed
from dpo_score.storage.resume import BlockRange, block_count

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_COPY = f"{COMMITS}/manifest.json"
OWN_FOLDERS = ("reference", "scores", "rejects", "rescored")
OWN_FILES = ("summary.json", "report.html", "audit.parquet", "README.md", "pipeline.yaml")


@cache
def installed_version(name: str) -> str | None:
    """The version of an installed package, as `Manifest.versions` records it; None where it is not installed.

    Remembered: every committed block names some, and reading a package's metadata takes milliseconds.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Manifest:
    """`numerics` and `cache_snapshots` by model key; `block_rows` and `total_rows` in rows of the data;
    times ISO 8601; `versions` libraries, device and kernel; `outputs` the files written at the end."""

    identities: Identities
    numerics: Mapping[str, Mapping[str, Any]]
    block_rows: int
    total_rows: int
    cache_snapshots: Mapping[str, Sequence[str]] = field(default_factory=dict)
    state: Literal["running", "complete"] = "running"
    started: str = ""
    finished: str | None = None
    host: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    outputs: tuple[FileRecord, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def rows(self) -> int:
        """Rows that a run without --limit scores: all of them, or as many as --sample takes."""
        return min(int(self.identities.text.get("sample") or self.total_rows), self.total_rows)

    @property
    def blocks(self) -> int:
        """Blocks of all those rows: the `of` in the names of parts and records."""
        return block_count(self.rows, self.block_rows)

    def block_ranges(self, rows: int) -> Iterator[BlockRange]:
        """The blocks that hold the first `rows` of them, in order, with the rows of each."""
        for block in range(-(-rows // self.block_rows)):
            start = block * self.block_rows
            yield BlockRange(block, self.blocks, start, min(start + self.block_rows, rows))

    def to_json(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own |= {"identities": self.identities.to_json(), "outputs": [asdict(file) for file in self.outputs]}
        return sealed(own | {"warnings": list(self.warnings)})

    @classmethod
    def from_json(cls, stored: Any, name: str) -> Manifest:
        """UsageError for another schema version, DamageError naming `name` when it does not hold."""
        version = stored.get("schema_version") if isinstance(stored, dict) else None
        if isinstance(version, int) and version != SCHEMA_VERSION:
            raise UsageError(
                f"{name}: written with schema version {version}, this dpo-score knows {SCHEMA_VERSION}. Use the "
                "release that wrote it, or choose another output folder (the log-probability cache is still used)"
            )
        known = dict(unsealed(stored, name))
        try:
            for field_name, kind in _KINDS.items():
                typed(known, field_name, kind)
            if known["block_rows"] < 1:
                raise ValueError("block_rows is 0")
            if known["state"] not in ("running", "complete"):
                raise ValueError(f"its state is {known['state']!r:.40}")
            identities = Identities.from_json(known.pop("identities"))
            outputs = tuple(FileRecord.from_json(file) for file in known.pop("outputs"))
            return cls(identities=identities, outputs=outputs, warnings=tuple(known.pop("warnings")), **known)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamageError(f"{name}: not a manifest of this version ({error})") from error


_KINDS: Mapping[str, type] = {
    **dict.fromkeys(("block_rows", "total_rows", "schema_version"), int),
    **dict.fromkeys(("identities", "numerics", "cache_snapshots", "versions", "notes"), dict),
    **dict.fromkeys(("state", "started", "host"), str),
    **dict.fromkeys(("outputs", "warnings"), list),
}


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """What a run asks for; fields as in `Manifest`. `out` is how the user names the folder, for messages."""

    identities: Identities
    numerics: Mapping[str, Mapping[str, Any]]
    block_rows: int
    total_rows: int
    started: str
    host: str
    versions: Mapping[str, str]
    cache_snapshots: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    strict_env: bool = False
    out: str = ""


def open_manifest(store: Store, request: ManifestRequest) -> Manifest:
    """Create the manifest, or continue the one that is there.

    A continued one keeps its numerics, block size and cache snapshots (new models are added), takes the request's
    `total_rows` and new policies, and is `running` again. Raises IdentityError with every differing field.
    """
    found = read_manifest(store)
    if found is None:
        created = Manifest(
            identities=request.identities,
            numerics=request.numerics,
            block_rows=request.block_rows,
            total_rows=request.total_rows,
            cache_snapshots=request.cache_snapshots,
            started=request.started,
            host=request.host,
            versions=request.versions,
            notes=request.notes,
        )
        if store.write_json(MANIFEST, created.to_json(), if_absent=True):
            store.write_json(MANIFEST_COPY, created.to_json())
            return created
        found = read_manifest(store)
        if found is None:
            raise DamageError(f"{store.url(MANIFEST)} vanished while it was read")
    continued = _continued(found, request)
    settled = continued == found and store.exists(MANIFEST_COPY)
    return found if settled else save_manifest(store, continued)


def read_manifest(store: Store) -> Manifest | None:
    """The manifest, None when there is none. A damaged one is restored from its copy, and says so in `warnings`.

    UsageError for another schema version, DamageError when the copy is damaged too.
    """
    if not store.exists(MANIFEST):
        return None
    try:
        return _read(store, MANIFEST)
    except (DamageError, UsageError) as error:  # a version may be a flipped bit too: the copy tells
        copy = _read_copy(store, error)
        kept = store.quarantine(MANIFEST)
        return save_manifest(store, replace(copy, warnings=(*copy.warnings, f"{error}; restored, kept {kept}")))


def peek_manifest(store: Store) -> Manifest | None:
    """As `read_manifest`, but a damaged or missing one stays as it is: its copy under commits/ answers in its place."""
    if not store.exists(MANIFEST):
        return _read(store, MANIFEST_COPY) if store.exists(MANIFEST_COPY) else None
    try:
        return _read(store, MANIFEST)
    except (DamageError, UsageError) as error:
        return _read_copy(store, error)


def _read(store: Store, name: str) -> Manifest:
    return Manifest.from_json(store.read_json(name), store.url(name))


def save_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Write the copy, then the manifest; each atomically."""
    store.write_json(MANIFEST_COPY, manifest.to_json())
    store.write_json(MANIFEST, manifest.to_json())
    return manifest


def forget_policy(store: Store, name: str) -> None:
    """Drop the identity of a policy of which no block is committed, so that other weights may take its name."""
    found = read_manifest(store)
    if found is not None and name in found.identities.policies:
        kept = {other: fields for other, fields in found.identities.policies.items() if other != name}
        save_manifest(store, replace(found, identities=replace(found.identities, policies=kept)))


def reopen_manifest(store: Store) -> None:
    """State `running` again, before anything that a complete manifest promises is computed or written anew."""
    found = read_manifest(store)
    if found is not None and found.state == "complete":
        save_manifest(store, replace(found, state="running", finished=None, outputs=()))


def finish_manifest(store: Store, manifest: Manifest, finished: str, outputs: Sequence[FileRecord]) -> Manifest:
    """State `complete`: the last write of a run."""
    return save_manifest(store, replace(manifest, state="complete", finished=finished, outputs=tuple(outputs)))


def restart(store: Store) -> None:
    """--restart: delete what this project wrote here, records first and the manifest last, and nothing else."""
    records = [name for name in store.list(COMMITS) if name != MANIFEST_COPY]
    data = [name for folder in OWN_FOLDERS for name in store.list(folder)]
    for name in (*records, *data, *OWN_FILES, MANIFEST, MANIFEST_COPY):
        store.remove(name)


def _continued(found: Manifest, request: ManifestRequest) -> Manifest:
    """`found` with what the request adds: rows, policies, another environment. IdentityError where they differ."""
    changes = found.identities.changes(request.identities)
    if changes:
        raise IdentityError(_refusal(found.identities, request, changes))
    elsewhere = diff(found.versions, request.versions)
    if elsewhere and request.strict_env:
        raise IdentityError(
            f"{request.out or MANIFEST} was begun in another environment and --strict-env is set:\n"
            f"{listed(elsewhere)}\nRun it where it was begun, drop --strict-env, or choose another output folder"
        )
    texts = [f"continued in another environment: {change}" for change in elsewhere]
    warnings = tuple(text for text in texts if text not in found.warnings)
    added = found.identities.joined(request.identities)
    if request.total_rows == found.total_rows and not warnings and added == found.identities:
        return found
    notes = {**request.notes, **found.notes}  # what is noted stays; notes by the names of models get those added
    for name in request.notes.keys() & found.notes.keys():
        if isinstance(found.notes[name], Mapping):
            notes[name] = {**request.notes[name], **found.notes[name]}
    return replace(
        found,
        state="running",
        identities=added,
        numerics={**request.numerics, **found.numerics},
        cache_snapshots={**request.cache_snapshots, **found.cache_snapshots},
        total_rows=request.total_rows,
        notes=notes,
        warnings=(*found.warnings, *warnings),
    )


def _refusal(found: Identities, request: ManifestRequest, changes: Sequence[FieldChange]) -> str:
    out = request.out or "OUT"
    head = f"{out} belongs to another request; what differs (old → new):\n{listed(changes)}\n"
    if found.without_losses().changes(request.identities.without_losses()):
        return head + "Choose another --out, or --restart to delete the results there and begin anew"
    shared = sorted({*found.policies} & {*request.identities.policies})
    differing = [name for name in shared if diff(found.policies[name], request.identities.policies[name])]
    commands = []
    for name in differing:
        loss = request.identities.policies[name].get("loss")
        fields = loss if isinstance(loss, Mapping) else {}
        beta = f" --beta {fields['beta']}" if fields.get("beta") else ""
        commands.append(f"dpo-score rescore {out} --loss {fields.get('name', 'NAME')}{beta}")
    return head + (
        f"Only the loss differs ({', '.join(differing)}), and stored log-probabilities serve every loss without a "
        f"model: {'; '.join(dict.fromkeys(commands))}. Or choose another --out"
    )


def _read_copy(store: Store, error: DamageError | UsageError) -> Manifest:
    """The copy, or what is wrong with both."""
    try:
        return _read(store, MANIFEST_COPY)
    except (DamageError, UsageError, StorageError):
        if isinstance(error, UsageError):
            raise error from None
        raise DamageError(
            f"{error}. Nor can its copy {store.url(MANIFEST_COPY)} be read: --restart, or choose another output folder"
        ) from error
