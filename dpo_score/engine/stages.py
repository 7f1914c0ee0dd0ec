"""The two stages: a block of token ids in, the tables of a committed block out.

Stage two reads reference values only from what stage one committed. Every input row of a block ends in exactly one of
scored or rejected, in order. A block is committed whole (parts, rejects, then the record that means done) or not at
all. Which blocks are computed is resume.py's part; models and cache are model_logprobs.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.engine.block_inputs import BlockText
from dpo_score.engine.context import RunContext
from dpo_score.engine.model_logprobs import BlockLogprobs
from dpo_score.engine.plan import SCHEMA_VERSION, PolicyTask, ReferenceTask, RunPlan, Task
from dpo_score.errors import DataError
from dpo_score.escape import seen
from dpo_score.logprobs.types import SequenceLogps, Unscored
from dpo_score.losses.columns import derive_table
from dpo_score.results import schemas as tables
from dpo_score.storage.stage import REJECTED_ROWS, part_file

Reasons = dict[int, tuple[str, str]]
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What one block leaves behind: tables by file name (empty ones are not written), counts, notes."""

    tables: Mapping[str, pa.Table]
    counts: Mapping[str, int]
    row_ids: Sequence[str]
    notes: Mapping[str, Any]


def reference_block(
    plan: RunPlan, reference: ReferenceTask, text: BlockText, values: BlockLogprobs | None
) -> BlockResult:
    """Stage one for one block. `values` is None where there is no model: no reference, or columns of the data."""
    bare = tables.without_ids(text.table)
    notes = _NOTHING
    if values is not None:
        (table, reasons), notes = _with_values(plan, "ref", bare, values), values.notes
    else:
        table, reasons = _from_columns(bare, reference)
    stage, place = reference.stage, (text.block, plan.rows.blocks)
    found = {
        stage.part(*place): _keep_rows(table, reasons),
        part_file(stage.rejects, *place): tables.reject_rows(text.table, reasons),
    }
    if not reference.name:
        found[part_file(REJECTED_ROWS, *place)] = tables.reject_table(text.rejected)
    counts = {
        "rows": text.stop - text.start,
        "scored": table.num_rows - len(reasons),
        **_codes("data", [item.code for item in text.rejected]),
        **_codes("reference", [code for code, _ in reasons.values()]),
    }
    return BlockResult(found, counts, bare["row_id"].to_pylist(), notes)


def policy_block(
    plan: RunPlan, policy: PolicyTask, text: BlockText, reference_part: pa.Table, values: BlockLogprobs | None
) -> BlockResult:
    """Stage two for one block, whose `text` holds the rows of `reference_part`. `values` is None for a policy that
    equals its reference: its values are taken over."""
    ids = text.table
    table, reasons, notes = _taken_over(reference_part), Reasons(), _NOTHING
    if values is not None:
        (table, reasons), notes = _with_values(plan, "policy", reference_part, values), values.notes
    scored = derive_table(_keep_rows(table, reasons), policy.loss, has_reference=policy.reference.exists)
    stage, place = policy.stage, (text.block, plan.rows.blocks)
    found = {
        stage.part(*place): scored,
        part_file(stage.rejects, *place): tables.reject_rows(ids, reasons),
    }
    counts = {"scored": scored.num_rows, **_codes("policy", [code for code, _ in reasons.values()])}
    return BlockResult(found, counts, ids["row_id"].to_pylist(), notes)


def part_metadata(task: Task) -> dict[str, str]:
    """What every part says of itself: schema, identity, and for scores the loss as it was asked for and resolved."""
    found = {"dpo_score.schema": str(SCHEMA_VERSION), "dpo_score.identity": task.identity}
    if isinstance(task, PolicyTask):
        found["dpo_score.loss"] = json.dumps(task.loss.identity(), sort_keys=True)
        found["dpo_score.loss_spec"] = task.loss_spec.model_dump_json()
    return found


def _with_values(plan: RunPlan, role: str, table: pa.Table, found: BlockLogprobs) -> tuple[pa.Table, Reasons]:
    reasons = _unscored(found)
    empty = _blank(plan.stats)
    entries = [empty if isinstance(entry, Unscored) else entry for entry in found.entries]
    columns = tables.value_columns(role, entries, plan.stats, plan.config.compute.per_token)
    if plan.config.text.score == "all-assistant":
        columns |= tables.turn_columns(role, entries, found.sequences)
    return _with_dtype(tables.with_columns(table, columns), found), reasons


def _blank(stats: Sequence[str]) -> Any:
    """Stands in for a row that is about to be rejected, so that columns keep their length."""
    nothing = np.zeros(0, np.float32)
    return SequenceLogps(nothing, {tables.STATS[name]: nothing for name in stats})


def _unscored(found: BlockLogprobs) -> Reasons:
    reasons: Reasons = {}
    for index, entry in enumerate(found.entries):
        if isinstance(entry, Unscored):
            side = tables.SIDES[index % 2]
            reasons.setdefault(index // 2, (entry.code, f"{side}: {entry.reason}"))
    return reasons


def _with_dtype(table: pa.Table, found: BlockLogprobs) -> pa.Table:
    """`compute_dtype`: float32 where a pack overflowed 16 bits and was computed again, else null."""
    redone = {index // 2 for index in found.redone}
    before = table["compute_dtype"].to_pylist() if "compute_dtype" in table.column_names else [None] * table.num_rows
    dtypes = ["float32" if row in redone else before[row] for row in range(table.num_rows)]
    if "compute_dtype" in table.column_names:
        table = table.drop_columns("compute_dtype")
    return table.append_column("compute_dtype", pa.array(dtypes, pa.string()))


def _from_columns(bare: pa.Table, reference: ReferenceTask) -> tuple[pa.Table, Reasons]:
    """Reference values that are in the data, or nulls where the run has no reference."""
    reasons: Reasons = {}
    columns: dict[str, Any] = {}
    for index, side in enumerate(tables.SIDES):
        columns[f"ref_{side}_logps"] = pa.nulls(bare.num_rows, pa.float64())
        columns[f"ref_{side}_logps_shared"] = pa.nulls(bare.num_rows, pa.float64())
        if reference.columns is not None:
            name = reference.columns[index]
            values = _numbers(bare, name)
            finite = pc.fill_null(pc.is_finite(values), False).to_pylist()
            for row in (row for row, ok in enumerate(finite) if not ok):
                reasons.setdefault(row, ("no_reference_value", f"column {name!r} holds no finite number"))
            columns[f"ref_{side}_logps"] = values
    table = tables.with_columns(bare, columns)
    return table.append_column("compute_dtype", pa.nulls(bare.num_rows, pa.string())), reasons


def _numbers(bare: pa.Table, name: str) -> pa.Array:
    """A column as float64, null where a text is no number. DataError where none is one: another column was meant."""
    column = bare[name].combine_chunks()
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        return column.cast(pa.float64())
    values = pa.array([_number(value) for value in column.to_pylist()], pa.float64())
    if values.null_count == len(values) > column.null_count:
        row = column.is_valid().to_pylist().index(True)
        raise DataError(
            f"row {bare['row_id'][row]} of {bare['source_file'][row]}: column {name!r} holds "
            f"{seen(column[row].as_py(), 40)!r}, which is no number: --reference columns:CHOSEN,REJECTED names two "
            "columns of log-probs"
        )
    return values


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _taken_over(reference_part: pa.Table) -> pa.Table:
    """A policy with the reference's weights and numerics: its values are the reference's, bit for bit."""
    for name in reference_part.column_names:
        if name.startswith("ref_"):
            reference_part = reference_part.append_column("policy_" + name.removeprefix("ref_"), reference_part[name])
    return reference_part


def scored_rows(text: BlockText, reference_part: pa.Table) -> BlockText:
    """The rows of `text` that stage one scored, in its order."""
    kept = pc.is_in(text.table["row_id"], value_set=reference_part["row_id"].combine_chunks())
    return replace(text, table=text.table.filter(kept))


def _keep_rows(table: pa.Table, reasons: Reasons) -> pa.Table:
    if not reasons:
        return table
    return table.filter(pa.array([row not in reasons for row in range(table.num_rows)]))


def _codes(where: str, codes: Sequence[str]) -> dict[str, int]:
    return {f"rejected/{where}/{code}": codes.count(code) for code in sorted(set(codes))}


def write_block(context: RunContext, result: BlockResult, describe: Mapping[str, str]) -> tuple[Any, ...]:
    """Write the tables of a block that hold anything (score and reference parts always); returns file records."""
    return tuple(
        context.store.write_table(name, table, describe)
        for name, table in result.tables.items()
        if table.num_rows or not name.startswith("rejects/")
    )
