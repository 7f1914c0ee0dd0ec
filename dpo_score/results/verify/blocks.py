"""What a committed block holds, against its record, the manifest and the stage before it.

Its files are already known to be those that the record names (size, sha256): this finds what was wrong when they were
written, or was altered together with the record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.data.types import row_place
from dpo_score.errors import ConfigError
from dpo_score.losses.columns import DERIVED, derive_table
from dpo_score.losses.parse import ResolvedLoss
from dpo_score.results.verify.findings import Findings
from dpo_score.results.verify.loss import OF_CUSTOM, Allowed, is_unknown, stored_loss
from dpo_score.storage.commits import CommitRecord
from dpo_score.storage.fingerprint import digest, has_reference
from dpo_score.storage.manifest import Manifest

Damage: TypeAlias = Iterator[tuple[str, str]]
"""(file, what is wrong with it)."""


@dataclass(frozen=True, slots=True)
class Block:
    """A committed block: its tables by file, `main` the one with its values; `before`: the record that it goes on
    from, of the run's reference for a policy's own, of its reference for a policy."""

    manifest: Manifest
    record: CommitRecord
    tables: Mapping[str, pa.Table]
    main: str
    before: CommitRecord | None

    @property
    def values(self) -> pa.Table:
        return self.tables[self.main]


def check(block: Block, allowed: Allowed, findings: Findings) -> None:
    """Adds what is wrong with a block; `allowed` losses of the user's own are computed again."""
    for finding in (*_span(block), *_counts(block), *_equation(block), *_ids(block), *_finite(block)):
        findings.add(*finding)
    if block.record.stage.startswith("scores/"):
        _derived(block, allowed, findings)


def _span(block: Block) -> Damage:
    """The rows that it covers are those of its number."""
    record, size = block.record, block.manifest.block_rows
    first, end = record.block * size, min((record.block + 1) * size, block.manifest.rows)
    if record.blocks != block.manifest.blocks or record.start != first or not first < record.stop <= end:
        yield record.name, f"covers rows {record.start} to {record.stop}, not those of its block"


def _counts(block: Block) -> Damage:
    """The counts of the record are those of its files."""
    record, scored = block.record, block.record.counts.get("scored")
    for file in record.files:
        if file.rows != block.tables[file.name].num_rows:
            yield file.name, f"holds {block.tables[file.name].num_rows} rows, its record says {file.rows}"
    if scored != block.values.num_rows:
        yield block.main, f"holds {block.values.num_rows} rows, its record counts {scored}"
    lost = sum(table.num_rows for name, table in block.tables.items() if name != block.main)
    elsewhere = _rejected(record, "rejected/data/") if record.stage.startswith("reference/") else 0
    counted = _rejected(record) - elsewhere
    if lost != counted:
        yield record.name, f"counts {counted} rejected rows, the files hold {lost}"


def _rejected(record: CommitRecord, where: str = "rejected/") -> int:
    return sum(count for name, count in record.counts.items() if name.startswith(where))


def _equation(block: Block) -> Damage:
    """Every row that goes in comes out: of the data in stage one, of stage one in a policy."""
    record, before = block.record, block.before
    if before is not None and (before.start, before.stop) != (record.start, record.stop):
        before = None  # one of the two was computed under another --limit
    if record.stage.startswith("scores/"):
        yield from _of_stage_one(record, before) if before is not None else ()
        return
    covered = record.stop - record.start
    if record.counts.get("rows") != covered:
        yield record.name, f"counts {record.counts.get('rows')} rows, and covers {covered}"
    if record.stage == "reference":
        rows = {row_place(row_id)[:2] for table in block.tables.values() for row_id in _row_ids(table)}
        if len(rows) != covered:
            yield record.name, f"covers {covered} rows, its files hold {len(rows)}"
    elif before is not None:
        yield from _of_the_same_pairs(record, before)


def _of_stage_one(record: CommitRecord, before: CommitRecord) -> Damage:
    pairs, given = record.counts.get("scored", 0) + _rejected(record), before.counts.get("scored")
    if pairs != given:
        yield record.name, f"counts {pairs} pairs, scored and rejected; {before.name} counts {given} scored"


def _of_the_same_pairs(record: CommitRecord, before: CommitRecord) -> Damage:
    """A policy's own reference sees what the run's sees; rows that give no pair are listed there alone."""
    lost = [_rejected(each, "rejected/data/") for each in (record, before)]
    if lost[0] != lost[1] or record.row_ids_digest != before.row_ids_digest:
        yield record.name, f"covers other pairs than {before.name}"


def _ids(block: Block) -> Damage:
    record, values = block.record, _row_ids(block.values)
    own = [name for name in block.tables if not name.startswith("rejects/data/")]
    ids = [row_id for name in own for row_id in _row_ids(block.tables[name])]
    if len(set(ids)) != len(ids):
        yield block.main, "a row_id occurs twice"
    if values != sorted(values, key=row_place):
        yield block.main, "its rows are not in order"
    if digest(sorted(ids, key=row_place)) != record.row_ids_digest:
        yield block.main, "its rows are not those that the record covers"


def _row_ids(table: pa.Table) -> list[str]:
    found: list[str] = table["row_id"].to_pylist()
    return found


def _finite(block: Block) -> Damage:
    """Of what was computed; a column of the data that is carried along is as the data has it."""
    carried = _carried(block.manifest)
    for name in block.values.column_names:
        if name not in carried and not _is_finite(block.values[name]):
            yield block.main, f"column {name} holds a number that is not finite"


def _carried(manifest: Manifest) -> set[str]:
    """Columns of --keep-columns, and those that a loss reads."""
    losses = [fields.get("loss", {}) for fields in manifest.identities.policies.values()]
    offsets = {loss.get("modifiers", {}).get("offset_column") for loss in losses}
    return {*(manifest.identities.text.get("keep_columns") or ()), *(name for name in offsets if name)}


def _is_finite(values: pa.ChunkedArray) -> bool:
    """Of numbers, and of whatever lists and structs hold them."""
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_finite(pc.list_flatten(values))
    if pa.types.is_struct(kind):
        return all(_is_finite(pc.struct_field(values, place)) for place in range(kind.num_fields))
    return not pa.types.is_floating(kind) or bool(pc.all(pc.is_finite(values.drop_null()), min_count=0).as_py())


def _derived(block: Block, allowed: Allowed, findings: Findings) -> None:
    """The derived columns, computed again from the log-probs."""
    policy = block.record.stage.removeprefix("scores/")
    fields = block.manifest.identities.policies[policy]
    try:
        loss = stored_loss(block.values.schema.metadata or {}, allowed)
    except (ConfigError, ValueError, LookupError, TypeError) as error:
        findings.add(block.main, f"does not say which loss it was computed with ({type(error).__name__}: {error})")
        return
    if json.loads(json.dumps(loss.identity())) != fields.get("loss"):
        findings.add(block.main, "its loss is not the one the manifest names")
    reference = block.manifest.identities.reference_of(policy)
    again = derive_table(block.values, loss, has_reference=has_reference(reference))
    for column in _provable(block, loss, findings):
        if not again[column].equals(block.values[column]):
            findings.add(block.main, f"column {column} does not follow from the stored log-probs")


def _provable(block: Block, loss: ResolvedLoss, findings: Findings) -> tuple[str, ...]:
    """All, but for what code that the user has not named would give: that is said, once a policy."""
    if loss.custom is None or not is_unknown(loss):
        return DERIVED
    why = f"custom loss {loss.name!r}; --loss-file FILE runs a file of yours of sha256 {loss.custom.sha256}"
    findings.unproved[block.record.stage] = f"{' and '.join(OF_CUSTOM)} not recomputed: {why}"
    return tuple(name for name in DERIVED if name not in OF_CUSTOM)
