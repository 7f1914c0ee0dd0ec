"""Reference values back into the data set: input rows in input order, as Parquet that `load_dataset` finds.

Promises: one output row for every pair, and one for every row that gave none; a file is committed whole, then its
record; memory holds a few megabytes of rows whatever the size of blocks, files and row groups. Values come from
what stage one committed: nothing is computed here but the LD-weighted sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_score.engine.block_inputs import BlockTexts
from dpo_score.engine.context import RunContext
from dpo_score.engine.environment import versions
from dpo_score.engine.plan import SCHEMA_VERSION, RunPlan
from dpo_score.engine.resume import refuse_changed_input
from dpo_score.engine.threads import prefetch
from dpo_score.errors import IdentityError
from dpo_score.export.input_rows import OriginalRows
from dpo_score.export.layout import (
    MASKS,
    TOKEN_IDS,
    VALUES,
    Export,
    RowSlice,
    RunRows,
    SetPlan,
    Shard,
    as_scored,
    built_columns,
    per_item,
    plan_set,
    renamed,
    shards_of,
    splits_of,
)
from dpo_score.results.source_text import TextSource
from dpo_score.storage.base import FileRecord
from dpo_score.storage.commits import CommitRecord, StoredRecord, commit, read_records, record_name
from dpo_score.storage.fingerprint import diff, digest, listed
from dpo_score.storage.parquet import common_schema, fitted
from dpo_score.storage.resume import Action, BlockRange, file_states, next_action, settle
from dpo_score.storage.stage import part_file

GROUP_BYTES = 8 << 20


class DatasetWriter:
    """Writes the files of one data set: `pending` says which, `write` makes and commits one.

    `chosen`: the pairs to write, with their values, where these are not all that stage one committed in this folder;
    `plan` names their rows.
    """

    def __init__(self, context: RunContext, plan: RunPlan, export: Export, chosen: ScoredPairs | None = None) -> None:
        self._context, self._plan, self._export, self._chosen = context, plan, export, chosen
        self.shards = tuple(shards_of(splits_of(plan.datasets), plan.rows))
        self.identity = digest({"reference": plan.references[0].identity, "export": export.fields()})
        self._rows = RunRows(plan)
        self._plans: tuple[SetPlan, ...] = ()
        self._texts = BlockTexts(context, plan, plan.references[0].identity) if export.emit_ids else None

    def pending(self) -> list[Shard]:
        """Files without a sound record; what is left of them is cleared away."""
        pending = []
        for shard in self.shards:
            name = record_name(shard.stage, shard.index, shard.of)
            record = read_records(self._context.store, shard.stage).get(name)
            self._refuse_other_export(record)
            expected = BlockRange(shard.index, shard.of, shard.start, shard.stop)
            action = next_action(self.identity, expected, record, file_states(self._context.store, record))
            warning = settle(self._context.store, name, action, record, [shard.name])
            if warning:
                self._context.progress.warn(warning)
            if action is not Action.SKIP:
                pending.append(shard)
        return pending

    def _refuse_other_export(self, record: StoredRecord | None) -> None:
        if not isinstance(record, CommitRecord) or record.identity == self.identity:
            return
        changes = diff(record.notes.get("export"), self._export.fields())
        raise IdentityError(
            f"{self._context.store.url()} was written for another request; what differs (old → new):\n"
            f"{listed(changes)}\nChoose another --out, or --restart to write it anew (the log-probs are in the cache)"
        )

    def files(self) -> list[FileRecord]:
        """The committed files, in order."""
        stages = dict.fromkeys(shard.stage for shard in self.shards)
        records = [record for stage in stages for _, record in sorted(read_records(self._context.store, stage).items())]
        return [file for record in records if isinstance(record, CommitRecord) for file in record.files]

    def write(self, shard: Shard) -> None:
        """One file and its record. Raises DataError when an input changed meanwhile, StorageError."""
        schema = common_schema(plan.schema for plan in self._planned()) or self._plan_of(shard).schema
        names = renamed(schema.names, dict(self._export.renames))
        final = pa.schema([column.with_name(name) for column, name in zip(schema, names, strict=True)])
        metadata = {"dpo_score.schema": str(SCHEMA_VERSION), "dpo_score.identity": self.identity}
        with closing(prefetch(self._grouped(shard))) as groups:  # made while the one before is compressed
            parts = (fitted(table, schema).rename_columns(names) for table in self._counted(groups))
            file = self._context.store.write_tables(shard.name, final, parts, metadata)
        refuse_changed_input(self._context, self._plan, shard.start, shard.stop)
        commit(self._context.store, self._record(shard, file))

    def _record(self, shard: Shard, file: FileRecord) -> CommitRecord:
        return CommitRecord(
            stage=shard.stage,
            block=shard.index,
            blocks=shard.of,
            start=shard.start,
            stop=shard.stop,
            identity=self.identity,
            files=(file,),
            counts={"rows": file.rows},
            row_ids_digest="",
            notes={"export": self._export.fields()},
            versions=versions(None),
        )

    def _planned(self) -> tuple[SetPlan, ...]:
        if not self._plans:
            sets = range(len(self._plan.datasets))
            self._plans = tuple(plan_set(self._plan, self._rows, self._export, index) for index in sets)
        return self._plans

    def _plan_of(self, shard: Shard) -> SetPlan:
        return self._planned()[self._rows.set_of(shard.start)]

    def _counted(self, groups: Iterable[tuple[int, pa.Table]]) -> Iterator[pa.Table]:
        for rows, table in groups:
            yield table
            self._context.progress.rows(rows)

    def _grouped(self, shard: Shard) -> Iterator[tuple[int, pa.Table]]:
        """Tables large enough to be a row group each, and how many input rows each is made of."""
        waiting: list[pa.Table] = []
        rows = 0
        for count, table in self._tables(shard):
            waiting.append(table)
            rows += count
            if sum(t.nbytes for t in waiting) > GROUP_BYTES:
                yield rows, pa.concat_tables(waiting)
                waiting, rows = [], 0
        if waiting:
            yield rows, pa.concat_tables(waiting)

    def _tables(self, shard: Shard) -> Iterator[tuple[int, pa.Table]]:
        """The output rows of a few input rows, and how many these are."""
        index, plan = self._rows.set_of(shard.start), self._plan_of(shard)
        originals = OriginalRows(self._plan.datasets[index], plan.source, self._rows.first_row(index))
        for block, pieces in groupby(self._rows.slices(shard.start, shard.stop), key=lambda piece: piece.block):
            values = self._chosen or self._values(block)
            if isinstance(values, StoredValues) and not values.codes and not plan.columns.built:
                values = ScoredPairs(values.table, self._row_numbers(values.table["row_id"]))
            for piece in pieces:
                source = originals.take(piece.rows)
                if isinstance(values, ScoredPairs):
                    table = self._scored_table(plan, source, piece, values)
                else:
                    table = self._table(plan, source, piece, values)
                yield len(piece.rows), table

    def _values(self, block: int) -> StoredValues:
        store, blocks = self._context.store, self._plan.rows.blocks
        table = store.read_table(part_file("reference", block, blocks)).replace_schema_metadata(None)
        names = [part_file(f"rejects/{kind}", block, blocks) for kind in ("data", "reference")]
        rejects = [store.read_table(name, ["row_id", "code"]) for name in names if store.exists(name)]
        if self._texts is not None:
            table = _beside(table, self._texts.block(block).table.select(["row_id", *TOKEN_IDS, *MASKS]))
        return StoredValues.of(weighted(table, self._export.ld_alpha), rejects)

    def _table(self, plan: SetPlan, source: pa.Table, piece: RowSlice, values: StoredValues) -> pa.Table:
        """The output rows of some input rows."""
        items, text = piece.items, self._plan.renderer.text
        pairs = [as_scored(item, text) for item in items] if plan.columns.built else []
        given, ids = per_item(source, piece.units), [item.source.row_id for item in items]
        columns = {plan.kept[name]: given[name] for name in plan.source.names}
        columns |= built_columns(plan.columns, pairs, text)
        columns |= values.columns(ids, self._export.added().names)
        columns["row_id"] = pa.array(ids, pa.string())
        columns["pair_id"] = pa.array([getattr(item, "pair_id", None) for item in items], pa.string())
        return pa.table([columns[name] for name in plan.schema.names], schema=plan.schema)

    def _scored_table(self, plan: SetPlan, source: pa.Table, piece: RowSlice, values: ScoredPairs) -> pa.Table:
        """The same for rows of which only scored pairs are written: they are read as pairs again only where a column is
        built from the text that was scored."""
        found, row_of_each = values.among(piece.rows)
        columns = {plan.kept[name]: source[name].take(row_of_each) for name in plan.source.names}
        if plan.columns.built:
            ids, text = set(found["row_id"].to_pylist()), self._plan.renderer.text
            pairs = [as_scored(item, text) for item in piece.items if item.source.row_id in ids]
            columns |= built_columns(plan.columns, pairs, text)
        columns |= {name: found[name] for name in self._export.added().names if name in found.column_names}
        columns["status"] = pa.array(["scored"] * len(found), pa.string())
        return pa.table([columns[name] for name in plan.schema.names], schema=plan.schema)

    def _row_numbers(self, row_ids: pa.ChunkedArray) -> NDArray[np.int64]:
        """The number of each pair's row among the rows of all sets."""
        source = TextSource(self._plan.config, self._plan.datasets)
        return np.array(source.row_of_each(row_ids.to_pylist()), np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class ScoredPairs:
    """Scored pairs in the order of the data. `table`: row_id, pair_id, pair_digest and values; `rows`: the number of
    each one's row among the rows of all sets, ascending."""

    table: pa.Table
    rows: NDArray[np.int64]

    def among(self, rows: Sequence[int]) -> tuple[pa.Table, pa.Array]:
        """The pairs of `rows` (ascending), and for each of them the place of its row in `rows`."""
        first, last = np.searchsorted(self.rows, (rows[0], rows[-1] + 1))
        own = self.rows[first:last]
        return self.table.slice(first, last - first), pa.array(np.searchsorted(np.asarray(rows), own))


@dataclass(frozen=True, slots=True)
class StoredValues:
    """What stage one says of the rows of a block, by row_id."""

    table: pa.Table
    places: Mapping[str, int]
    codes: Mapping[str, str]

    @classmethod
    def of(cls, table: pa.Table, rejects: Sequence[pa.Table]) -> StoredValues:
        places = {row_id: place for place, row_id in enumerate(table["row_id"].to_pylist())}
        codes = {row["row_id"]: row["code"] for reject in rejects for row in reject.to_pylist()}
        return cls(table, places, codes)

    def columns(self, row_ids: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
        """Values in the order of `row_ids`, null for rows that were not scored; `status` says why."""
        found = self.table.take(pa.array([self.places.get(row_id) for row_id in row_ids], pa.int64()))
        status = ["scored" if row_id in self.places else self.codes[row_id] for row_id in row_ids]
        columns = {name: found[name] for name in names if name in found.column_names}
        return {**columns, "status": pa.array(status, pa.string())}


def _beside(table: pa.Table, text: pa.Table) -> pa.Table:
    """`table` with the columns of `text` for the same row_ids, in its own order."""
    places = {row_id: place for place, row_id in enumerate(text["row_id"].to_pylist())}
    found = text.take(pa.array([places[row_id] for row_id in table["row_id"].to_pylist()], pa.int64()))
    for name in found.column_names[1:]:
        table = table.append_column(name, found[name])
    return table


def weighted(table: pa.Table, ld_alpha: float | None) -> pa.Table:
    """Sums in which tokens beyond the shorter answer's length count `ld_alpha` (LD-DPO, arXiv 2409.06411)."""
    if ld_alpha is None:
        return table
    for name in VALUES:
        total, shared = table[name].to_numpy(), table[f"{name}_shared"].to_numpy()
        values = pa.array(shared + ld_alpha * (total - shared), pa.float64())
        table = table.set_column(table.column_names.index(name), name, values)
    return table
