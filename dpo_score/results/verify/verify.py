"""`dpo-score verify OUT`: prove again that what is stored is whole, counted, finite and consistent.

Checks every commit record (its own checksum), every file it names (size, sha256, rows, schema), that ids are
unique and in order, that scored + rejected covers every row, that no number is NaN or infinite, and that the
derived columns follow bit for bit from the stored log-probs (verify_blocks.py); of a finished run, that no block and
no record is missing and that grids of `rescore` are as they were written (verify_whole.py). Loads no model, changes
nothing, and runs no code that OUT names: a loss of the user's own only from a file of `loss_files`. Not covered:
report.html and audit.parquet, which are made from the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dpo_score.errors import DamageError, StorageError, UsageError
from dpo_score.results.run_folder import open_out
from dpo_score.results.verify.blocks import Block, check
from dpo_score.results.verify.completeness import DATA, StageFound, check_grids, check_whole
from dpo_score.results.verify.findings import Findings
from dpo_score.results.verify.loss import Allowed, allowed_losses
from dpo_score.storage.base import Store
from dpo_score.storage.commits import COMMITS, CommitRecord, DamagedRecord, read_record, read_records, record_name
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.manifest import MANIFEST, TWIN, Manifest
from dpo_score.storage.resume import FileState, file_states


@dataclass(frozen=True, slots=True)
class Proof:
    """What one look at OUT works with. `stages`: those that were looked at."""

    store: Store
    manifest: Manifest
    findings: Findings
    allowed: Allowed
    stages: dict[str, StageFound] = field(default_factory=dict)


def verify(out: str, loss_files: Sequence[str] = ()) -> Findings:
    """Everything that is wrong with OUT, by file. Of `loss_files` one is run where its sha256 is the stored one."""
    findings = Findings(out)
    try:
        store, manifest = open_out(out, mend=False)
    except DamageError as error:
        findings.add("manifest.json", str(error))
        return findings
    _both_manifests(store, findings)
    proof = Proof(store, manifest, findings, allowed_losses(loss_files, manifest))
    for stage in (*_stages(manifest), *_data_stages(store)):
        proof.stages[stage] = _stage(proof, stage)
    _outputs(proof)
    check_whole(store, manifest, proof.stages, findings)
    check_grids(store, findings)
    return findings


def _stages(manifest: Manifest) -> list[str]:
    """The run's reference, those that policies brought along, and the policies."""
    policies = manifest.identities.policies
    brought = [f"reference/{name}" for name in sorted(policies) if "reference" in policies[name]]
    return ["reference", *brought, *(f"scores/{name}" for name in sorted(policies))]


def _data_stages(store: Store) -> list[str]:
    """The splits of the data set that `precompute` wrote."""
    return list(dict.fromkeys(DATA + name.split("/")[2] for name in store.list(f"{COMMITS}/data")))


def _both_manifests(store: Store, findings: Findings) -> None:
    """The manifest and its twin, of which one replaces the other: damage is mended, but said."""
    for name in (MANIFEST, TWIN):
        findings.checked += 1
        try:
            Manifest.from_json(store.read_json(name), store.url(name))
        except (DamageError, StorageError, UsageError) as error:
            findings.add(name, str(error))


def _stage(proof: Proof, stage: str) -> StageFound:
    records, findings = read_records(proof.store, stage), proof.findings
    found = StageFound(frozenset(records))
    for name, record in records.items():
        findings.checked += 1
        if isinstance(record, DamagedRecord):
            findings.add(name, record.reason)
            found.damaged.append(name)
            continue
        if record.identity != _identity(proof.manifest, record):
            findings.add(name, "belongs to another request than the manifest")
        found.add(record)
        if _files(proof.store, record, findings):
            _contents(proof, record)
    return found


def _identity(manifest: Manifest, record: CommitRecord) -> str:
    identities = manifest.identities
    kind, _, own = record.stage.partition("/")
    if kind == "scores":
        return identities.policy_digest(own)
    if kind == "data":
        return digest({"reference": identities.reference_digest, "export": record.notes.get("export")})
    return replace(identities, reference=identities.reference_of(own)).reference_digest


def _files(store: Store, record: CommitRecord, findings: Findings) -> bool:
    states = file_states(store, record)
    for file, state in zip(record.files, states, strict=True):
        findings.checked += 1
        if state is not FileState.SOUND:
            findings.add(file.name, f"{state.value}: it does not match its commit record")
    return all(state is FileState.SOUND for state in states)


def _contents(proof: Proof, record: CommitRecord) -> None:
    store, manifest, findings = proof.store, proof.manifest, proof.findings
    if record.stage.startswith(DATA):
        return  # its rows are those of the input; what was added to them stands in the parts of stage one
    tables = {file.name: store.read_table(file.name) for file in record.files}
    main = next((name for name in tables if not name.startswith("rejects/")), None)
    if main is None:
        findings.add(record.name, "names no part")
        return
    findings.rows += tables[main].num_rows
    check(Block(manifest, record, tables, main, _before(proof, record)), proof.allowed, findings)


def _before(proof: Proof, record: CommitRecord) -> CommitRecord | None:
    """The record of the same block that this one goes on from. None for the run's reference, or where it is no more."""
    kind, _, own = record.stage.partition("/")
    brought = kind == "scores" and "reference" in proof.manifest.identities.policies[own]
    stage = f"reference/{own}" if brought else "reference"
    name = record_name(stage, record.block, record.blocks)
    if not own or name not in proof.stages[stage].records:
        return None
    found = read_record(proof.store, name)
    return found if isinstance(found, CommitRecord) else None


def _outputs(proof: Proof) -> None:
    """The files written at the end, against the manifest, but for those that were looked at with their records."""
    store, findings = proof.store, proof.findings
    known = {file for found in proof.stages.values() for file in found.exported}
    for file in proof.manifest.outputs:
        if file in known:
            continue
        findings.checked += 1
        stat = store.stat(file.name)
        if stat is None or stat.size != file.size or store.sha256(file.name) != file.sha256:
            findings.add(file.name, "missing or altered since the run wrote it")
