"""`dpo-score verify OUT`: prove again that what is stored is whole, counted, finite and consistent.

Checks every commit record (its own checksum), every file it names (size, sha256, rows, schema), that ids are
unique and in order, that scored + rejected covers every row, that no number is NaN or infinite, and that the
derived columns follow bit for bit from the stored log-probs. Loads no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.config import LossSpec
from dpo_score.errors import DamageError, StorageError, UsageError
from dpo_score.scores.derive import DERIVED, derive_table
from dpo_score.scores.losses import ResolvedLoss, parse_loss
from dpo_score.store.identity import digest
from dpo_score.store.manifest import MANIFEST, TWIN, Manifest, peek_manifest
from dpo_score.store.records import CommitRecord, DamagedRecord, read_records
from dpo_score.store.resume import FileState, file_states
from dpo_score.store.storage import Store, open_store


class Comparison(Protocol):
    """Stored values held against those of another program."""

    def to_json(self) -> dict[str, Any]: ...
    def lines(self) -> Iterator[str]: ...
    def raise_difference(self) -> None: ...


@dataclass(slots=True)
class Findings:
    """`damage`: (file, what is wrong with it). `checked`: files read. `against`: what --against found."""

    out: str
    checked: int = 0
    rows: int = 0
    damage: list[tuple[str, str]] = field(default_factory=list)
    against: Comparison | None = None

    def add(self, name: str, what: str) -> None:
        self.damage.append((name, what))

    def to_json(self) -> dict[str, Any]:
        damage = [{"file": name, "what": what} for name, what in self.damage]
        found = {"out": self.out, "files": self.checked, "rows": self.rows, "damage": damage}
        return found if self.against is None else {**found, "against": self.against.to_json()}

    def lines(self) -> Iterator[str]:
        yield from (f"damaged: {name}: {what}" for name, what in self.damage)
        verdict = "nothing damaged" if not self.damage else f"{len(self.damage)} findings"
        yield f"{self.out}: {self.checked:,} files, {self.rows:,} scored rows checked: {verdict}"
        if self.against is not None:
            yield from self.against.lines()

    def raise_damage(self) -> None:
        """DamageError (exit 4) when anything was found, or differs from another program."""
        if self.damage:
            names = ", ".join(dict.fromkeys(name for name, _ in self.damage))
            raise DamageError(f"{self.out}: damaged: {names}. The same run command computes these blocks again")
        if self.against is not None:
            self.against.raise_difference()


def verify(out: str) -> Findings:
    """Everything that is wrong with OUT, by file."""
    store, findings = open_store(out), Findings(out)
    try:
        manifest = peek_manifest(store)
    except DamageError as error:
        findings.add("manifest.json", str(error))
        return findings
    if manifest is None:
        raise UsageError(f"{out} holds no run: it has no manifest.json")
    _both_manifests(store, findings)
    for stage in _stages(manifest):
        _stage(store, manifest, stage, findings)
    _outputs(store, manifest, findings)
    _counted(store, manifest, findings)
    return findings


def _stages(manifest: Manifest) -> list[str]:
    """The run's reference, those that policies brought along, and the policies."""
    policies = manifest.identities.policies
    brought = [f"reference/{name}" for name in sorted(policies) if "reference" in policies[name]]
    return ["reference", *brought, *(f"scores/{name}" for name in sorted(policies))]


def _both_manifests(store: Store, findings: Findings) -> None:
    """The manifest and its twin, of which one replaces the other: damage is mended, but said."""
    for name in (MANIFEST, TWIN):
        findings.checked += 1
        try:
            Manifest.from_json(store.read_json(name), store.url(name))
        except (DamageError, StorageError, UsageError) as error:
            findings.add(name, str(error))


def _stage(store: Store, manifest: Manifest, stage: str, findings: Findings) -> None:
    expected = _identity(manifest, stage)
    for name, record in read_records(store, stage).items():
        findings.checked += 1
        if isinstance(record, DamagedRecord):
            findings.add(name, record.reason)
            continue
        if record.identity != expected:
            findings.add(name, "belongs to another request than the manifest")
        sound = _files(store, record, findings)
        if sound:
            _contents(store, manifest, record, findings)


def _identity(manifest: Manifest, stage: str) -> str:
    own = stage.removeprefix("reference/")
    if stage == "reference":
        return manifest.identities.reference_digest
    if own != stage:
        return replace(manifest.identities, reference=manifest.identities.policies[own]["reference"]).reference_digest
    return manifest.identities.policy_digest(stage.removeprefix("scores/"))


def _files(store: Store, record: CommitRecord, findings: Findings) -> bool:
    states = file_states(store, record)
    for file, state in zip(record.files, states, strict=True):
        findings.checked += 1
        if state is not FileState.SOUND:
            findings.add(file.name, f"{state.value}: it does not match its commit record")
    return all(state is FileState.SOUND for state in states)


def _contents(store: Store, manifest: Manifest, record: CommitRecord, findings: Findings) -> None:
    tables = {file.name: store.read_table(file.name) for file in record.files}
    main = next((name for name in tables if not name.startswith("rejects/")), None)
    if main is None:
        findings.add(record.name, "names no part")
        return
    table = tables[main]
    findings.rows += table.num_rows
    _counts(record, tables, main, findings)
    _finite(main, table, findings)
    if record.stage.startswith("scores/"):
        _derived(main, table, manifest, record.stage.removeprefix("scores/"), findings)


def _counts(record: CommitRecord, tables: dict[str, pa.Table], main: str, findings: Findings) -> None:
    if record.counts.get("scored") != tables[main].num_rows:
        findings.add(main, f"holds {tables[main].num_rows} rows, its record counts {record.counts.get('scored')}")
    rejected = sum(table.num_rows for name, table in tables.items() if name != main)
    elsewhere = "rejected/data" if record.stage.startswith("reference/") else " "
    codes = [name for name in record.counts if name.startswith("rejected/") and not name.startswith(elsewhere)]
    counted = sum(record.counts[name] for name in codes)
    if rejected != counted:
        findings.add(record.name, f"counts {counted} rejected rows, the files hold {rejected}")
    own = [t for name, t in tables.items() if not name.startswith("rejects/data/")]
    ids = [row_id for table in own for row_id in table["row_id"].to_pylist()]
    if len(set(ids)) != len(ids):
        findings.add(main, "a row_id occurs twice")
    if digest(sorted(ids, key=_place)) != record.row_ids_digest:
        findings.add(main, "its rows are not those that the record covers")


def _place(row_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in row_id.split(":"))


def _finite(name: str, table: pa.Table, findings: Findings) -> None:
    for column in table.column_names:
        values = table[column]
        if pa.types.is_floating(values.type) and not pc.all(pc.is_finite(values.drop_null()), min_count=0).as_py():
            findings.add(name, f"column {column} holds a number that is not finite")


def _derived(name: str, table: pa.Table, manifest: Manifest, policy: str, findings: Findings) -> None:
    fields = manifest.identities.policies[policy]
    loss = _loss(table)
    if loss is None:
        findings.add(name, "says nothing of its loss")
        return
    if json.loads(json.dumps(loss.identity())) != fields.get("loss"):
        findings.add(name, "its loss is not the one the manifest names")
    reference = fields.get("reference") or manifest.identities.reference
    has_reference = reference.get("weights") is not None or reference.get("columns") is not None
    again = derive_table(table, loss, has_reference=has_reference)
    for column in DERIVED:
        if not again[column].equals(table[column]):
            findings.add(name, f"column {column} does not follow from the stored log-probs")


def _loss(table: pa.Table) -> ResolvedLoss | None:
    stored = (table.schema.metadata or {}).get(b"dpo_score.loss_spec")
    return parse_loss(LossSpec.model_validate_json(stored)) if stored else None


def _outputs(store: Store, manifest: Manifest, findings: Findings) -> None:
    """The files written at the end, against the manifest."""
    for file in manifest.outputs:
        findings.checked += 1
        stat = store.stat(file.name)
        if stat is None or stat.size != file.size or store.sha256(file.name) != file.sha256:
            findings.add(file.name, "missing or altered since the run wrote it")


def _counted(store: Store, manifest: Manifest, findings: Findings) -> None:
    """No block is missing whose rows the summary counts."""
    if manifest.state != "complete" or not store.exists("summary.json"):
        return
    try:
        policies = store.read_json("summary.json")["policies"]
        counted = {name: int(policy["overall"]["scored"]) for name, policy in policies.items()}
    except (DamageError, LookupError, TypeError, ValueError):
        return  # altered: found by its checksum
    for name, scored in counted.items():
        records = list(read_records(store, f"scores/{name}").values())
        whole = [record for record in records if isinstance(record, CommitRecord)]
        held = sum(record.counts.get("scored", 0) for record in whole)
        if held < scored and len(whole) == len(records):
            findings.add(f"scores/{name}", f"holds {held:,} rows, summary.json counts {scored:,}: a block is missing")
