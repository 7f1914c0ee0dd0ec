"""`dpo-score verify OUT`: prove again that what is stored is whole, counted, finite and agrees with itself.

Checks every commit record (its own checksum), every file it names (size, sha256, rows), what each block holds
(blocks.py), that nothing is missing of a finished run and nothing is there that no record names, and that summary.json,
README.md, pipeline.yaml and the grids of `rescore` follow from the parts and the manifest (recompute.py). Loads no
model, changes nothing, and runs no code that OUT names: a loss of the user's own only from a file of `loss_files`.
Whatever a file holds, it is one finding with its name, and the other files are still checked. Not covered: report.html
and audit.parquet, which are made from the rest, and what nothing else in OUT repeats (pipelines/GUARANTEES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import pyarrow as pa

from dpo_score.errors import DamageError, StorageError, UsageError
from dpo_score.metrics.summary import summarise
from dpo_score.results.card import CONTRACT, README, SUMMARY
from dpo_score.results.groups import lacking, slice_columns
from dpo_score.results.run_folder import Reading, missing_of_policy, open_out, sliced, unseen
from dpo_score.results.source_text import PIPELINE, stored_config
from dpo_score.results.verify.blocks import Allowed, Block, Damage, allowed_losses, check
from dpo_score.results.verify.recompute import (
    Benchmark,
    Totals,
    card_damage,
    contract_damage,
    export_damage,
    grid_damage,
    grids,
    noise_again,
    numerics_damage,
    pipeline_damage,
    summary_damage,
    with_kept_slices,
)
from dpo_score.storage.base import Store
from dpo_score.storage.commits import (
    COMMITS,
    CommitRecord,
    DamagedRecord,
    read_record,
    read_records,
    record_name,
    record_stage,
)
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.manifest import MANIFEST, MANIFEST_COPY, Manifest
from dpo_score.storage.resume import FileState, file_state, file_states, row_ranges

DATA = "data/"
REJECTS = ["row_id", "dataset", "code"]
SHOWN_BLOCKS = 8
BROKEN = (
    DamageError,
    StorageError,
    UsageError,
    pa.ArrowException,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What reading a file that is not what it should be may raise: each becomes a finding about that file."""


class Comparison(Protocol):
    """Stored values compared with those of another program."""

    def to_json(self) -> dict[str, Any]: ...
    def lines(self) -> Iterator[str]: ...
    def raise_difference(self) -> None: ...


@dataclass(slots=True)
class Findings:
    """`damage`: (file, what is wrong with it). `unproved`: what was left out, and why: no failure. `checked`: files
    read. `against`: what --against found."""

    out: str
    checked: int = 0
    rows: int = 0
    damage: list[tuple[str, str]] = field(default_factory=list)
    unproved: dict[str, str] = field(default_factory=dict)
    against: Comparison | None = None

    def add(self, name: str, what: str) -> None:
        self.damage.append((name, what))

    def to_json(self) -> dict[str, Any]:
        damage = [{"file": name, "what": what} for name, what in self.damage]
        found = {"out": self.out, "files": self.checked, "rows": self.rows, "damage": damage}
        if self.unproved:
            found["unproved"] = [{"file": name, "what": what} for name, what in self.unproved.items()]
        return found if self.against is None else {**found, "against": self.against.to_json()}

    def lines(self) -> Iterator[str]:
        yield from (f"damaged: {name}: {what}" for name, what in self.damage)
        yield from (f"{name}: {what}" for name, what in self.unproved.items())
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


@dataclass(slots=True)
class StageFound:
    """What a look at a stage left.

    records: names of all its records; damaged: of those that do not hold; named: the files that the others name;
    scored: pairs; stop: the furthest row; exported: records of an exported data set; sound: whether nothing was wrong;
    rejects: what REJECTS says of rejected rows, by file; first: the record of block 0; summary: of the scores, made
    again; skipped_slices: why some of its slices were not.
    """

    records: frozenset[str]
    damaged: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    scored: int = 0
    stop: int = 0
    exported: list[CommitRecord] = field(default_factory=list)
    sound: bool = True
    rejects: list[tuple[str, pa.Table]] = field(default_factory=list)
    margins: list[Any] = field(default_factory=list)
    first: CommitRecord | None = None
    summary: Mapping[str, Any] | None = None
    skipped_slices: Mapping[str, str] = field(default_factory=dict)

    def add(self, record: CommitRecord) -> None:
        self.named.update(file.name for file in record.files)
        self.scored += record.counts.get("scored", 0)
        self.stop = max(self.stop, record.stop)
        self.exported += [record] if record.stage.startswith(DATA) else ()
        self.first = record if record.block == 0 else self.first


@dataclass(frozen=True, slots=True)
class Proof:
    """What one look at OUT works with. `summary`: summary.json, empty where there is none; `stages`: as looked at;
    `files`: data set and file by their number, as the rows say; `reading`: takes the rows that were looked at."""

    store: Store
    manifest: Manifest
    findings: Findings
    allowed: Allowed
    summary: Mapping[str, Any]
    reading: Callable[[int], None]
    totals: Totals = field(default_factory=Totals)
    stages: dict[str, StageFound] = field(default_factory=dict)
    files: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that summary.json counts."""
        found = self.summary.get("data")
        rows = found.get("rows") if isinstance(found, dict) else None
        return rows if isinstance(rows, int) and 0 <= rows <= self.manifest.rows else 0

    def policies(self) -> Mapping[str, Any]:
        found = self.summary.get("policies")
        return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def verify(out: str, loss_files: Sequence[str] = (), reading: Reading = unseen) -> Findings:
    """Everything that is wrong with OUT, by file. Of `loss_files` one is run where its sha256 is the stored one."""
    findings = Findings(out)
    try:
        store, manifest = open_out(out, mend=False)
    except DamageError as error:
        findings.add(MANIFEST, str(error))
        return findings
    for name in (MANIFEST, MANIFEST_COPY):  # of which one replaces the other: damage is mended, but said
        findings.checked += 1
        try:
            Manifest.from_json(store.read_json(name), store.url(name))
        except BROKEN as error:
            findings.add(name, str(error))
    summary = _summary(store, findings)
    exported = list(dict.fromkeys(DATA + name.split("/")[2] for name in store.list(f"{COMMITS}/data")))
    stages = [*_stages(manifest), *exported]
    with reading("verify", len(stages) * manifest.rows) as read:
        proof = Proof(store, manifest, findings, allowed_losses(loss_files, manifest), summary, read)
        for stage in stages:
            proof.stages[stage] = _stage(proof, stage)
    _outputs(proof)
    _check_whole(proof)
    if manifest.state == "complete" and not findings.damage:
        _check_against_parts(proof)
    for folder, names in grids(store).items():
        findings.checked += len(names)
        sound = all(found.sound for found in proof.stages.values())
        for name, what in _until_broken(grid_damage(store, manifest, folder, names, findings.unproved, sound), folder):
            findings.add(name, what)
    return findings


def _until_broken(damage: Damage, name: str) -> Damage:
    """What is found; where the looking itself fails over what a file holds, that too."""
    try:
        yield from damage
    except BROKEN as error:
        yield name, f"cannot be checked ({type(error).__name__}: {error})"


def _summary(store: Store, findings: Findings) -> Mapping[str, Any]:
    """Empty where there is none: `precompute` writes none, nor does a run under way."""
    if not store.exists(SUMMARY):
        return {}
    try:
        found = store.read_json(SUMMARY)
        if not isinstance(found, dict):
            raise DamageError(f"{SUMMARY} holds no fields")
    except BROKEN as error:
        findings.add(SUMMARY, str(error))
        return {}
    return found


def _stages(manifest: Manifest) -> list[str]:
    """The run's reference, those that policies have of their own, and the policies."""
    policies = manifest.identities.policies
    brought = [f"reference/{name}" for name in sorted(policies) if "reference" in policies[name]]
    return ["reference", *brought, *(f"scores/{name}" for name in sorted(policies))]


# --- blocks -----------------------------------------------------------------------------------------------------------


def _stage(proof: Proof, stage: str) -> StageFound:
    """Every block of a stage; of a policy that summary.json sums up, the summary of its parts too, in the same pass."""
    found = StageFound(frozenset(read_records(proof.store, stage)))
    before = len(proof.findings.damage)
    tables = _blocks(proof, stage, found)
    stored = proof.policies().get(stage.removeprefix("scores/")) if stage.startswith("scores/") else None
    if stored is not None:
        try:
            _sum_up(proof, stage, stored, tables, found)
        except BROKEN as error:
            proof.findings.add(stage, f"its parts cannot be summed up ({type(error).__name__}: {error})")
    for _ in tables:
        pass
    found.sound = len(proof.findings.damage) == before
    return found


def _sum_up(proof: Proof, stage: str, stored: Mapping[str, Any], tables: Iterator[pa.Table], found: StageFound) -> None:
    """Makes the numbers of a policy again. Columns of the data that it is sliced by are read there once more."""
    policy, manifest = stage.removeprefix("scores/"), proof.manifest
    own = f"reference/{policy}" if "reference" in manifest.identities.policies[policy] else "reference"
    first = next(tables, None)
    if first is None:
        return
    slices = list(stored.get("slices", {}))
    try:
        columns = slice_columns(proof.store, manifest, policy, slices, first.column_names, remember=False)
    except (UsageError, DamageError) as error:
        columns = None
        found.skipped_slices = dict.fromkeys(lacking(slices, first.column_names), str(error))
    wanted = ["rejects/data", f"rejects/{own}", f"rejects/{policy}"]

    def rejects() -> Iterator[pa.Table]:
        for each in (found, *proof.stages.values()):
            yield from (table for name, table in each.rejects if name.rpartition("/")[0] in wanted)

    benchmark = Benchmark(manifest, policy, stored)
    counted = sliced(benchmark.passing(chain([first], tables)), columns)
    summary = summarise(
        counted, rejects=rejects(), slices=[name for name in slices if name not in found.skipped_slices]
    )
    found.summary = with_kept_slices({**summary, **benchmark.summary(rejects())}, stored, found.skipped_slices)


def _blocks(proof: Proof, stage: str, found: StageFound) -> Iterator[pa.Table]:
    """Checks one block after another; yields the values of those that summary.json counts."""
    store, findings = proof.store, proof.findings
    needed = -(-proof.rows // proof.manifest.block_rows) if proof.summary else proof.manifest.blocks
    for name, record in read_records(store, stage).items():
        findings.checked += 1
        if isinstance(record, DamagedRecord):
            findings.add(name, record.reason)
            found.damaged.append(name)
            continue
        try:
            if record.identity != _identity(proof.manifest, record):
                findings.add(name, "belongs to another request than the manifest")
            found.add(record)
            sound = _files_are_sound(store, record, findings)
            if sound and stage.startswith(DATA):
                for file, what in export_damage(store, proof.manifest, record):
                    findings.add(file, what)
            tables = _tables(proof, record) if sound else {}
        except BROKEN as error:
            findings.add(name, f"cannot be checked ({type(error).__name__}: {error})")
            continue
        main = next((file for file in tables if not file.startswith("rejects/")), None)
        if main is None:
            continue
        values = tables[main]
        findings.rows += values.num_rows
        proof.reading(record.stop - record.start)
        block = Block(proof.manifest, record, tables, main, *_given(proof, record), proof.files)
        try:
            for file, what in check(block, proof.allowed, findings.unproved):
                findings.add(file, what)
            if record.block < needed:
                rejects = {file: table for file, table in tables.items() if file != main}
                found.rejects += [
                    (file, table.select(["row_id", "dataset", "code"])) for file, table in rejects.items()
                ]
                if stage == "reference":
                    proof.totals.add(record, values)
                elif stage.startswith("scores/"):
                    found.margins.append(values["margins_nats"].drop_null().to_numpy())
        except BROKEN as error:
            findings.add(main, f"cannot be checked ({type(error).__name__}: {error})")
            continue
        if record.block < needed:
            yield values


def _identity(manifest: Manifest, record: CommitRecord) -> str:
    identities = manifest.identities
    kind, _, own = record.stage.partition("/")
    if kind == "scores":
        return identities.policy_digest(own)
    if kind == "data":
        return digest({"reference": identities.reference_digest, "export": record.notes.get("export")})
    return replace(identities, reference=identities.reference_of(own)).reference_digest


def _files_are_sound(store: Store, record: CommitRecord, findings: Findings) -> bool:
    states = file_states(store, record)
    for file, state in zip(record.files, states, strict=True):
        findings.checked += 1
        if state is not FileState.SOUND:
            findings.add(file.name, f"{state.value}: it does not match its commit record")
    return all(state is FileState.SOUND for state in states)


def _tables(proof: Proof, record: CommitRecord) -> dict[str, pa.Table]:
    """What the files of a block hold; nothing of an exported data set, which is looked at by itself."""
    if record.stage.startswith(DATA):
        return {}
    tables = {}
    for file in record.files:
        try:
            tables[file.name] = proof.store.read_table(file.name)
        except BROKEN as error:
            proof.findings.add(file.name, str(error))
            return {}
    if all(name.startswith("rejects/") for name in tables):
        proof.findings.add(record.name, "names no part")
        return {}
    return tables


def _given(proof: Proof, record: CommitRecord) -> tuple[CommitRecord | None, pa.Table | None]:
    """The record of the same block that this one goes on from, and for a policy its values; None where they are no more
    or damaged, which is said elsewhere."""
    kind, _, own = record.stage.partition("/")
    brought = kind == "scores" and "reference" in proof.manifest.identities.policies[own]
    stage = f"reference/{own}" if brought else "reference"
    name = record_name(stage, record.block, record.blocks)
    if not own or name not in proof.stages[stage].records:
        return None, None
    found = read_record(proof.store, name)
    if not isinstance(found, CommitRecord):
        return None, None
    if kind != "scores":
        return found, None
    try:
        part = next(file.name for file in found.files if not file.name.startswith("rejects/"))
        return found, proof.store.read_table(part)
    except (*BROKEN, StopIteration):
        return found, None


# --- the whole --------------------------------------------------------------------------------------------------------


def _outputs(proof: Proof) -> None:
    """The files written at the end, against the manifest; those of an exported data set against their records."""
    exported = (record for found in proof.stages.values() for record in found.exported)
    known = {file.name: file for record in exported for file in record.files}
    said = {name for name, _ in proof.findings.damage}
    for file in proof.manifest.outputs:
        if file.name in said:
            continue
        if file.name in known:
            if file != known[file.name]:
                proof.findings.add(file.name, "the manifest and its commit record describe it differently")
            continue
        proof.findings.checked += 1
        try:
            state = file_state(proof.store, file)
        except BROKEN as error:
            proof.findings.add(file.name, str(error))
            continue
        if state is not FileState.SOUND:
            proof.findings.add(file.name, "missing or altered since the run wrote it")
        elif file.rows and not file.name.endswith(".parquet"):
            proof.findings.add(file.name, f"holds no rows, the manifest says {file.rows}")


def _check_whole(proof: Proof) -> None:
    """Adds, of a finished run, what is missing and what nothing names. While one is under way blocks are missing, and
    a part comes before its record."""
    manifest, findings = proof.manifest, proof.findings
    if manifest.state != "complete":
        return
    exported = [found.stop for stage, found in proof.stages.items() if stage.startswith(DATA)]
    needed = -(-max(proof.rows, *exported, 0) // manifest.block_rows)
    for stage, scored in _expected(proof).items():
        found = proof.stages[stage]
        missing = [block for block in range(needed) if record_name(stage, block, manifest.blocks) not in found.records]
        if missing:
            shown = ", ".join(map(str, missing[:SHOWN_BLOCKS])) + (", …" if len(missing) > SHOWN_BLOCKS else "")
            findings.add(stage, f"{len(missing):,} of {needed:,} blocks are missing, counted from 0: {shown}")
        elif found.scored < scored and not found.damaged:
            findings.add(stage, f"holds {found.scored:,} rows, summary.json counts {scored:,}")
    _check_policies(proof)
    for name in _unnamed(proof):
        findings.add(name, "no commit record names it")


def _expected(proof: Proof) -> dict[str, int]:
    """The stages that a finished run has every block of, with the pairs that they hold at least by summary.json."""
    own = proof.manifest.identities.policies
    data = proof.summary.get("data")
    named = [name for name in proof.policies() if name in own]
    return {
        "reference": _number(data, "scored_by_reference"),
        **{f"reference/{name}": 0 for name in named if "reference" in own[name]},
        **{f"scores/{name}": _number(proof.policies()[name].get("overall"), "scored") for name in named},
    }


def _number(fields: Any, name: str) -> int:
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if isinstance(value, int) else 0


def _check_policies(proof: Proof) -> None:
    """Every policy that was asked for is in summary.json, or the reason why it is not; and none but those of the
    manifest.

    One that is not there although some of its rows are committed is damage: a reader takes the part for the whole. One
    of which nothing is stored is only named.
    """
    findings, summed = proof.findings, proof.policies()
    for name in sorted(summed.keys() - proof.manifest.identities.policies.keys()):
        findings.add(SUMMARY, f"sums up the policy {name!r}, which the manifest does not name")
    if not proof.rows:
        return
    left_out: dict[str, str] = {}
    for kind in ("skipped", "failed"):
        reasons = proof.summary.get(kind)
        left_out |= {str(k): str(v) for k, v in reasons.items()} if isinstance(reasons, dict) else {}
    asked = _asked(proof.store)
    for name in sorted(left_out.keys() - asked) if asked else ():
        findings.add(SUMMARY, f"says why the policy {name!r} was not scored, which pipeline.yaml does not ask for")
    for name in sorted({*asked, *left_out} - summed.keys()):
        stage, reason = f"scores/{name}", left_out.get(name)
        if not read_records(proof.store, stage):
            if reason is None and "failed" in proof.summary:
                findings.add(
                    stage, "pipeline.yaml asks for this policy, and summary.json names it neither as scored nor failed"
                )
            else:
                findings.unproved[stage] = f"nothing is scored: {reason or 'summary.json does not say why'}"
            continue
        missing = missing_of_policy(proof.store, proof.manifest, name, proof.rows)
        what = f"{row_ranges(missing)} of {proof.rows:,} are missing, counted from 0" if missing else "not summed up"
        why = reason or "summary.json does not say why"
        findings.add(stage, f"{what}; summary.json has no such policy: {why}")


def _asked(store: Store) -> list[str]:
    """The policies of pipeline.yaml. An altered one is found by its checksum."""
    try:
        return [policy.name for policy in stored_config(store).policies]
    except BROKEN:
        return []


def _unnamed(proof: Proof) -> Iterator[str]:
    """Parts that a reader of the folder would take for results, and records of policies that the manifest has not."""
    store, stages = proof.store, proof.stages
    folders = ["reference", "scores", "rejects", *(["data"] if any(name.startswith(DATA) for name in stages) else [])]
    named = {name for found in stages.values() for name in found.named}
    named |= {file for stage, found in stages.items() for name in found.damaged for file in _files_of(stage, name)}
    for name in (name for folder in folders for name in store.list(folder)):
        if name.endswith((".parquet", ".pq")) and name not in named:
            yield name
    for name in store.list(COMMITS):
        if name != MANIFEST_COPY and record_stage(name) not in stages:
            yield name


def _files_of(stage: str, record: str) -> Iterator[str]:
    """The files that a record which cannot be read may have named."""
    part = record.rsplit("/", 1)[-1].removesuffix(".json")
    if stage.startswith(DATA):
        yield f"{stage}-{part}.parquet"
        return
    rejects = stage.removeprefix("scores/")
    for folder in (stage, f"rejects/{rejects}", *(["rejects/data"] if stage == "reference" else [])):
        yield f"{folder}/part-{part}.parquet"


# --- what follows from the parts --------------------------------------------------------------------------------------


def _check_against_parts(proof: Proof) -> None:
    """summary.json, README.md and pipeline.yaml of a finished run, where nothing is wrong with the parts."""
    summed = {}
    for name in proof.policies():
        stage = proof.stages.get(f"scores/{name}")
        if stage is None or stage.summary is None:
            continue
        own = proof.manifest.identities.policies[name]
        reference = proof.stages[f"reference/{name}" if "reference" in own else "reference"]
        floor = noise_again(stage.first, reference.first, stage.margins)
        summed[name] = {**stage.summary, "loss": own.get("loss"), "noise": floor}
        for column, why in stage.skipped_slices.items():
            proof.findings.unproved[f"{SUMMARY}: {name}, slice {column}"] = f"not made again: {why}"
    exported = [record for found in proof.stages.values() for record in found.exported]
    checks = {
        MANIFEST: numerics_damage(proof.manifest),
        SUMMARY: summary_damage(proof.manifest, proof.summary, proof.totals, summed),
        README: card_damage(proof.store, proof.manifest, proof.summary),
        CONTRACT: contract_damage(proof.store, proof.manifest, proof.totals, exported),
        PIPELINE: pipeline_damage(proof.store, proof.manifest, proof.summary),
    }
    for file, damage in checks.items():
        for name, what in _until_broken(damage, file):
            proof.findings.add(name, what)
