"""What a committed block holds, against its record, the manifest, the stage before it, and itself.

The files of the block are already known to be those that the record names (size, sha256). What is found here was wrong
when the files were written, or was altered together with the record: row ids and where rows come from, counts, the
reference's values repeated in the scores, sums beside the lists they are sums of, and the columns that follow from the
log-probs.

Nothing that a file names is run. A loss of the user's own is code, and OUT may come from somebody else: it is run only
from a file that the command line names and whose sha256 is the stored one; without it everything is known but its
value.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_score.config.schema import LossSpec
from dpo_score.errors import ConfigError
from dpo_score.losses.columns import DERIVED, derive_table
from dpo_score.losses.custom import CustomLoss, is_custom, load_custom, not_run
from dpo_score.losses.parse import ResolvedLoss, parse_loss, parse_modifiers
from dpo_score.storage.commits import CommitRecord
from dpo_score.storage.faults import translated
from dpo_score.storage.fingerprint import digest, has_reference
from dpo_score.storage.manifest import SCHEMA_VERSION, Manifest

Damage: TypeAlias = Iterator[tuple[str, str]]
"""(file, what is wrong with it)."""
REDONE = "compute_dtype"
"""The column of the reference's part that a policy may change: a pack computed again in float32."""
OF_CUSTOM = ("loss", "loss_code")
"""The derived columns that only the function of a custom loss can give."""
Allowed: TypeAlias = Mapping[tuple[str, str], CustomLoss]
"""(sha256, function) → the function, from a file that the user named."""
TURN_TOLERANCE = 1e-9
"""Turns are added up in another order than tokens: relative to the sum of the sizes."""


@dataclass(frozen=True, slots=True)
class Block:
    """A committed block: its tables by file, `main` the one with its values.

    `before`: the record of the same block that this one goes on from (of the run's reference for a policy's own
    reference, of its reference for a policy); `given`: the values of that one, for a policy. `files`: data set and file
    by the number that row ids have for them, as the blocks before said it; it grows.
    """

    manifest: Manifest
    record: CommitRecord
    tables: Mapping[str, pa.Table]
    main: str
    before: CommitRecord | None
    given: pa.Table | None = None
    files: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def values(self) -> pa.Table:
        return self.tables[self.main]


def check(block: Block, allowed: Allowed, unproved: dict[str, str]) -> Damage:
    """What is wrong with a block. `allowed` losses of the user's own are made again, others named in `unproved`."""
    places = {name: row_places(table) for name, table in block.tables.items()}
    yield from (*_span(block), *_counts(block), *_equation(block, places), *_ids(block, places))
    yield from (*_sources(block, places), *_metadata(block))
    not_finite = list(_finite(block))
    yield from not_finite
    if not not_finite:
        yield from (*_sums(block), *_same_as_given(block))
    if block.record.stage.startswith("scores/"):
        yield from _derived(block, allowed, unproved)


def row_places(table: pa.Table) -> NDArray[np.int64]:
    """(file, row, part) of every row id, -1 for no part: shape (rows, 3). ValueError for a text that is no row id."""
    ids = table["row_id"].combine_chunks().cast(pa.string())
    if ids.null_count:
        raise ValueError("a row has no row_id")
    parts = pc.split_pattern(ids, ":")
    lengths = pc.list_value_length(parts).to_numpy(zero_copy_only=False)
    numbers = pc.list_flatten(parts).cast(pa.int64()).to_numpy(zero_copy_only=False)
    if not np.isin(lengths, (2, 3)).all():
        raise ValueError("a row_id is not file:row or file:row:part")
    places = np.full((len(ids), 3), -1, np.int64)
    row = np.repeat(np.arange(len(ids)), lengths)
    within = np.arange(len(numbers)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places[row, within] = numbers
    return places


def _span(block: Block) -> Damage:
    """The rows that it covers are those of its number."""
    record, size = block.record, block.manifest.block_rows
    first, end = record.block * size, min((record.block + 1) * size, block.manifest.rows)
    if record.blocks != block.manifest.blocks or record.start != first or not first < record.stop <= end:
        yield record.name, f"covers rows {record.start} to {record.stop}, not those of its block"


def _counts(block: Block) -> Damage:
    """The counts of the record are those of its files, code by code."""
    record, scored = block.record, block.record.counts.get("scored")
    for file in record.files:
        if file.rows != block.tables[file.name].num_rows:
            yield file.name, f"holds {block.tables[file.name].num_rows} rows, its record says {file.rows}"
    if scored != block.values.num_rows:
        yield block.main, f"holds {block.values.num_rows} rows, its record counts {scored}"
    held: Counter[str] = Counter()
    for name, table in block.tables.items():
        if name.startswith("rejects/"):
            kind = _rejected_by(name)
            held.update({f"rejected/{kind}/{code}": n for code, n in _value_counts(table["code"]).items()})
    elsewhere = "rejected/data/" if record.stage.startswith("reference/") else None  # listed by the run's reference
    counted = Counter({name: n for name, n in _rejected(record).items() if elsewhere is None or elsewhere not in name})
    if held.total() != counted.total():
        yield record.name, f"counts {counted.total()} rejected rows, the files hold {held.total()}"
    elif held != counted:
        codes = ", ".join(sorted((held - counted) | (counted - held)))
        yield record.name, f"counts other reject codes than the files hold: {codes}"


def _rejected_by(name: str) -> str:
    """Who rejected the rows of a file of rejects: the data, a reference or a policy, as counts name them."""
    kind = name.split("/")[1]
    return kind if kind in ("data", "reference") else "policy"


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(item["values"]): int(item["counts"]) for item in pc.value_counts(column).to_pylist()}


def _rejected(record: CommitRecord, where: str = "rejected/") -> dict[str, int]:
    return {name: count for name, count in record.counts.items() if name.startswith(where)}


def _equation(block: Block, places: Mapping[str, NDArray[np.int64]]) -> Damage:
    """Every row that goes in comes out: of the data in stage one, of stage one in a policy."""
    record, before = block.record, block.before
    if before is not None and (before.start, before.stop) != (record.start, record.stop):
        before = None  # one of the two was computed under another --limit
    if record.stage.startswith("scores/"):
        if before is not None:
            pairs, given = record.counts.get("scored", 0) + sum(_rejected(record).values()), before.counts.get("scored")
            if pairs != given:
                what = f"counts {pairs} pairs, scored and rejected; {before.name} counts {given} scored"
                yield record.name, what
        return
    covered = record.stop - record.start
    if record.counts.get("rows") != covered:
        yield record.name, f"counts {record.counts.get('rows')} rows, and covers {covered}"
    if record.stage == "reference":
        rows = len(np.unique(np.concatenate([found[:, :2] for found in places.values()]), axis=0))
        if rows != covered:
            yield record.name, f"covers {covered} rows, its files hold {rows}"
    elif before is not None:
        lost = [sum(_rejected(each, "rejected/data/").values()) for each in (record, before)]
        if lost[0] != lost[1] or record.row_ids_digest != before.row_ids_digest:
            yield record.name, f"covers other pairs than {before.name}"


def _ids(block: Block, places: Mapping[str, NDArray[np.int64]]) -> Damage:
    own = [name for name in block.tables if not name.startswith("rejects/data/")]
    together = np.concatenate([places[name] for name in own])
    order = np.lexsort(together.T[::-1])
    if (np.diff(together[order], axis=0) == 0).all(axis=1).any():
        yield block.main, "a row_id occurs twice"
    values = places[block.main]
    if not (np.diff(np.lexsort(values.T[::-1])) > 0).all():
        yield block.main, "its rows are not in order"
    ids = pa.chunked_array([chunk for name in own for chunk in block.tables[name]["row_id"].chunks], pa.string())
    if digest(ids.take(pa.array(order)).to_pylist()) != block.record.row_ids_digest:
        yield block.main, "its rows are not those that the record covers"


def _sources(block: Block, places: Mapping[str, NDArray[np.int64]]) -> Damage:
    """Where a row comes from is what its id says: the same file for the same number, one of the data, and its row."""
    data = block.manifest.identities.text.get("data", {})
    for name, table in block.tables.items():
        if not np.array_equal(table["source_row"].fill_null(-1).to_numpy(), places[name][:, 1]):
            yield name, "column source_row is not the row that row_id names"
        sources = pa.table({"number": places[name][:, 0], **{c: table[c] for c in ("dataset", "source_file")}})
        for each in sources.group_by(sources.column_names).aggregate([]).to_pylist():
            number, dataset, file = each.values()
            known = block.files.setdefault(number, (dataset, file))
            if known != (dataset, file):
                yield name, f"file {number} is {file} of {dataset}, and in other rows {known[1]} of {known[0]}"
            elif data and file not in [each["name"] for each in data.get(dataset, {}).get("files", ())]:
                yield name, f"holds rows of {file} of {dataset}, which the manifest does not name"


def _metadata(block: Block) -> Damage:
    """A part says of itself what its record says of it."""
    for name, table in block.tables.items():
        told = table.schema.metadata or {}
        for key, value in ((b"dpo_score.identity", block.record.identity), (b"dpo_score.schema", str(SCHEMA_VERSION))):
            if told.get(key) != value.encode():
                yield name, f"its {key.decode()} is not {value}"
        if REDONE in table.column_names and not pc.all(pc.equal(table[REDONE], "float32"), min_count=0).as_py():
            yield name, f"column {REDONE} holds another number format than float32"


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


# --- sums and the lists they are sums of ------------------------------------------------------------------------------


def _sums(block: Block) -> Damage:
    """Where token values or sums of turns are stored: sums and token counts are those of the lists."""
    table = block.values
    for role in ("ref", "policy"):
        lists = [f"{role}_{side}_token_logps" for side in ("chosen", "rejected")]
        if not all(name in table.column_names for name in lists):
            lists = []
        lengths = [_lengths(table[name]) for name in lists]
        shared = np.minimum(*lengths) if lists else None
        for place, side in enumerate(("chosen", "rejected")):
            total = f"{role}_{side}_logps"
            if total not in table.column_names:
                continue
            if lists:
                values = pc.list_flatten(table[lists[place]]).to_numpy()
                expected = {total: lengths[place], f"{total}_shared": shared}
                for name, first in expected.items():
                    if name in table.column_names and not _equal(
                        table[name], _sum_first(values, lengths[place], first)
                    ):
                        yield block.main, f"column {name} is not the sum of {lists[place]}"
                counts = f"{side}_tokens"
                if not np.array_equal(table[counts].to_numpy(), lengths[place]):
                    yield block.main, f"column {counts} is not the length of {lists[place]}"
            turns = f"{role}_{side}_turn_logps"
            if turns in table.column_names and not _adds_up(table[turns], table[total]):
                yield block.main, f"column {turns} does not add up to {total}"


def _lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    found: NDArray[np.int64] = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    return found


def _equal(column: pa.ChunkedArray, expected: NDArray[np.float64]) -> bool:
    return column.null_count == 0 and bool(np.array_equal(column.to_numpy(), expected))


def _sum_first(values: NDArray[Any], lengths: NDArray[np.int64], first: Any) -> NDArray[np.float64]:
    """Of each list its first `first` values added up one after the other in float64, as they are when they are stored.

    values: the lists one behind the other. Lists of like length are added up together, a position at a time.
    """
    starts, sums = np.cumsum(lengths) - lengths, np.zeros(len(lengths))
    order = np.argsort(first, kind="stable")
    counts = first[order]
    begun = 0
    for position in range(int(counts[-1]) if len(counts) else 0):
        begun += int(np.searchsorted(counts[begun:], position, side="right"))
        rows = order[begun:]
        sums[rows] += values[starts[rows] + position]
    return sums


def _adds_up(turns: pa.ChunkedArray, total: pa.ChunkedArray) -> bool:
    values, lengths = pc.list_flatten(turns).to_numpy(), _lengths(turns)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.bincount(rows, values, len(lengths))
    sizes = np.bincount(rows, np.abs(values), len(lengths))
    return bool((np.abs(sums - total.to_numpy()) <= TURN_TOLERANCE * (1.0 + sizes)).all())


# --- scores against the reference they go on from ---------------------------------------------------------------------


def _same_as_given(block: Block) -> Damage:
    """What a policy's part repeats of its reference's part is the same bit for bit."""
    given = block.given
    if given is None or block.before is None:
        return
    at = pc.index_in(block.values["row_id"], value_set=given["row_id"].combine_chunks())
    if at.null_count:
        yield block.main, f"holds rows that {block.before.name} did not score"
        return
    if len(at) != given.num_rows or not np.array_equal(at.to_numpy(), np.arange(given.num_rows)):
        given = given.take(at)
    for name in given.column_names:
        repeated = name in block.values.column_names and name not in (REDONE, *DERIVED)
        if repeated and not _same_bits(block.values[name], given[name]):
            yield block.main, f"column {name} is not that of the reference's part"


def _same_bits(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Equal values; of columns of the data, where NaN may occur, equal with NaN for NaN."""
    if one.equals(other):
        return True
    if not pa.types.is_floating(one.type) or one.type != other.type or one.null_count != other.null_count:
        return False
    values = (one.to_numpy(), other.to_numpy())
    return bool(one.is_valid().equals(other.is_valid()) and np.array_equal(values[0], values[1], equal_nan=True))


# --- what follows from the log-probs ----------------------------------------------------------------------------------


def _derived(block: Block, allowed: Allowed, unproved: dict[str, str]) -> Damage:
    """The derived columns, computed again from the log-probs."""
    policy = block.record.stage.removeprefix("scores/")
    fields = block.manifest.identities.policies[policy]
    metadata = block.values.schema.metadata or {}
    try:
        loss = stored_loss(metadata, allowed)
        said = json.loads(metadata.get(b"dpo_score.loss", b"null"))
    except (ConfigError, ValueError, LookupError, TypeError, RecursionError) as error:
        yield block.main, f"does not say which loss it was computed with ({type(error).__name__}: {error})"
        return
    if any(named is not None and named != fields.get("loss") for named in (_as_json(loss.identity()), said)):
        yield block.main, "its loss is not the one the manifest names"
    known = loss.custom is None or loss.custom.call is not not_run
    if loss.custom is not None and not known:
        why = f"custom loss {loss.name!r}; --loss-file FILE runs a file of yours of sha256 {loss.custom.sha256}"
        unproved[block.record.stage] = f"{' and '.join(OF_CUSTOM)} not recomputed: {why}"
    reference = block.manifest.identities.reference_of(policy)
    again = derive_table(block.values, loss, has_reference=has_reference(reference))
    for column in (name for name in DERIVED if known or name not in OF_CUSTOM):
        if not again[column].equals(block.values[column]):
            yield block.main, f"column {column} does not follow from the stored log-probs"


def _as_json(value: Any) -> Any:
    """The value as it comes back from a file."""
    return json.loads(json.dumps(value))


# --- the loss that a part says it was computed with -------------------------------------------------------------------


def allowed_losses(paths: Sequence[str], manifest: Manifest) -> Allowed:
    """What may be run, imported once. ConfigError for a file that no scores of this run were computed with."""
    known, found = sorted(set(_customs(manifest))), {}
    for path in paths:
        sha256 = _sha256(path)
        functions = [function for _, digest, function in known if digest == sha256]
        if not functions:
            stored = ", ".join(f"{name} (sha256 {digest})" for name, digest, _ in known) or "no custom loss"
            raise ConfigError(f"--loss-file {path}: its sha256 is {sha256}; the scores were computed with {stored}")
        found.update({(sha256, function): load_custom(f"{path}:{function}") for function in functions})
    return found


def _customs(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """Name, sha256 and function of every custom loss of a run."""
    for fields in manifest.identities.policies.values():
        loss = fields.get("loss", {})
        if "custom" in loss:
            yield str(loss.get("name")), str(loss["custom"].get("sha256")), str(loss["custom"].get("function"))


def _sha256(path: str) -> str:
    with translated(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def stored_loss(metadata: Mapping[bytes, bytes], allowed: Allowed) -> ResolvedLoss:
    """ConfigError, ValueError, LookupError or TypeError when the metadata of a part does not say which loss it was."""
    spec = LossSpec.model_validate_json(metadata[b"dpo_score.loss_spec"])
    if not is_custom(spec.name):
        return parse_loss(spec)
    known = json.loads(metadata[b"dpo_score.loss"])
    function, sha256 = str(known["custom"]["function"]), str(known["custom"]["sha256"])
    custom = allowed.get((sha256, function), CustomLoss("", function, sha256, not_run))
    return ResolvedLoss(spec.name, float(known["beta"]), None, (), parse_modifiers(spec.params), custom)
