"""What is not there, and what should not be: blocks that are gone with their records, parts that no record names.

Asked of a finished run alone: while one is under way blocks are missing, and a part comes before its record. Grids of
`rescore` are held against the summary that is written last into each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_score.errors import DamageError, UsageError
from dpo_score.results.rescore import GRIDS, SUMMARY
from dpo_score.results.run_folder import missing_of_policy
from dpo_score.results.source_text import stored_config
from dpo_score.results.verify.findings import Findings
from dpo_score.storage.base import FileRecord, Store
from dpo_score.storage.commits import CHECKSUM, CommitRecord, read_records, record_name, unsealed
from dpo_score.storage.manifest import Manifest
from dpo_score.storage.resume import FileState, file_state, row_ranges

DATA = "data/"
SHOWN_BLOCKS = 8


@dataclass(slots=True)
class StageFound:
    """What a look at the records of a stage left: their names, the damaged ones, the files that the others name, pairs
    scored, the furthest row, and the files of an exported data set."""

    records: frozenset[str]
    damaged: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    scored: int = 0
    stop: int = 0
    exported: list[FileRecord] = field(default_factory=list)

    def add(self, record: CommitRecord) -> None:
        self.named.update(file.name for file in record.files)
        self.scored += record.counts.get("scored", 0)
        self.stop = max(self.stop, record.stop)
        self.exported += record.files if record.stage.startswith(DATA) else ()


def check_whole(store: Store, manifest: Manifest, stages: Mapping[str, StageFound], findings: Findings) -> None:
    """Adds, of a finished run, the blocks that are missing and the parts that no record names."""
    if manifest.state != "complete":
        return
    summary = _summary(store)
    rows = max(summary.rows, *(found.stop for name, found in stages.items() if name.startswith(DATA)), 0)
    needed = -(-rows // manifest.block_rows)
    for stage, scored in _expected(manifest, summary).items():
        _check_blocks(stage, stages[stage], range(needed), manifest.blocks, scored, findings)
    _check_policies(store, manifest, summary, findings)
    for name in _unnamed(store, stages):
        findings.add(name, "no commit record names it")


@dataclass(frozen=True, slots=True)
class _Summary:
    """What summary.json says: rows, pairs that the reference scored, those of each policy, and why others are left
    out (waiting for their checkpoint to be written, or failed)."""

    rows: int = 0
    reference: int = 0
    policies: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def _summary(store: Store) -> _Summary:
    """Nothing where there is none (`precompute` writes none), or an altered one: found by its checksum."""
    try:
        found = store.read_json("summary.json") if store.exists("summary.json") else None
        return _Summary() if found is None else _counted(found)
    except (DamageError, LookupError, TypeError, ValueError, AttributeError):
        return _Summary()


def _counted(found: Any) -> _Summary:
    policies = {name: int(policy["overall"]["scored"]) for name, policy in found["policies"].items()}
    left_out = {name: str(text) for kind in ("skipped", "failed") for name, text in found.get(kind, {}).items()}
    return _Summary(int(found["data"]["rows"]), int(found["data"]["scored_by_reference"]), policies, left_out)


def _check_policies(store: Store, manifest: Manifest, summary: _Summary, findings: Findings) -> None:
    """Every policy that was asked for is in summary.json, or the reason why it is not.

    One that is not there although some of its rows are committed is damage: a reader takes the part for the whole. One
    of which nothing is stored is only named.
    """
    if not summary.rows:
        return
    for name in sorted({*_asked(store), *summary.left_out} - summary.policies.keys()):
        reason = summary.left_out.get(name, "summary.json does not say why")
        if not read_records(store, f"scores/{name}"):
            findings.unproved[f"scores/{name}"] = f"nothing is scored: {reason}"
            continue
        missing = missing_of_policy(store, manifest, name, summary.rows)
        what = f"{row_ranges(missing)} of {summary.rows:,} are missing, counted from 0" if missing else "not summed up"
        findings.add(f"scores/{name}", f"{what}; summary.json has no such policy: {reason}")


def _asked(store: Store) -> list[str]:
    """The policies of pipeline.yaml. An altered one is found by its checksum."""
    try:
        return [policy.name for policy in stored_config(store).policies]
    except UsageError:
        return []


def _expected(manifest: Manifest, summary: _Summary) -> dict[str, int]:
    """The stages that a finished run has every block of, with the pairs that they hold at least."""
    own = manifest.identities.policies
    scored = {f"scores/{name}": count for name, count in summary.policies.items() if name in own}
    brought = {f"reference/{name}": 0 for name in summary.policies if "reference" in own.get(name, {})}
    return {"reference": summary.reference, **brought, **scored}


def _check_blocks(stage: str, found: StageFound, needed: range, blocks: int, scored: int, findings: Findings) -> None:
    missing = [block for block in needed if record_name(stage, block, blocks) not in found.records]
    if missing:
        shown = ", ".join(map(str, missing[:SHOWN_BLOCKS])) + (", …" if len(missing) > SHOWN_BLOCKS else "")
        findings.add(stage, f"{len(missing):,} of {len(needed):,} blocks are missing, counted from 0: {shown}")
    elif found.scored < scored and not found.damaged:
        findings.add(stage, f"holds {found.scored:,} rows, summary.json counts {scored:,}")


def _unnamed(store: Store, stages: Mapping[str, StageFound]) -> Iterator[str]:
    """Parts that a reader of the folder would take for results."""
    folders = ["reference", "scores", "rejects", *(["data"] if any(name.startswith(DATA) for name in stages) else [])]
    named = {name for found in stages.values() for name in found.named}
    named |= {file for stage, found in stages.items() for name in found.damaged for file in _files_of(stage, name)}
    for name in (name for folder in folders for name in store.list(folder)):
        if name.endswith(".parquet") and name not in named:
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


# --- grids of rescore ------------------------------------------------------------------------------------------------


def check_grids(store: Store, findings: Findings) -> None:
    """Adds what is not as `rescore` wrote it; says which grids carry nothing to be held against."""
    folders: dict[str, list[str]] = {}
    for name in store.list(GRIDS):
        folders.setdefault("/".join(name.split("/")[:2]), []).append(name)
    for folder, names in folders.items():
        findings.checked += len(names)
        _check_grid(store, folder, names, findings)


def _check_grid(store: Store, folder: str, names: list[str], findings: Findings) -> None:
    summary = f"{folder}/{SUMMARY}"
    if summary not in names:
        findings.unproved[folder] = f"no {SUMMARY}: `rescore` was interrupted; the same command writes it anew"
        return
    try:
        fields = store.read_json(summary)
        if isinstance(fields, dict) and not fields.keys() & {CHECKSUM, "files"}:
            findings.unproved[folder] = "was written before grids carried checksums; the same `rescore` adds them"
            return
        files = [FileRecord.from_json(file) for file in unsealed(fields, store.url(summary))["files"]]
    except (DamageError, LookupError, TypeError, ValueError) as error:
        findings.add(summary, str(error))
        return
    for file in files:
        if file_state(store, file) is not FileState.SOUND:
            findings.add(file.name, "missing or altered since `rescore` wrote it")
    for name in sorted({*names} - {summary, *(file.name for file in files)}):
        findings.add(name, f"{summary} does not name it")
