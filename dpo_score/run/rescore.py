"""Any grid of losses and betas over the log-probabilities that OUT holds: no model, no GPU, one pass.

OUT/scores is never rewritten: a grid has a folder of its own, rescored/<digest>/, named by what was asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.config import LossSpec
from dpo_score.errors import ConfigError, UsageError
from dpo_score.pipeline import loss_params
from dpo_score.scores.derive import check_columns, derive_table
from dpo_score.scores.losses import ResolvedLoss, parse_loss
from dpo_score.scores.metrics import summarise
from dpo_score.store.identity import digest
from dpo_score.store.manifest import Manifest, read_manifest
from dpo_score.store.storage import Store, open_store

KEPT = ("row_id", "loss_name", "beta", "loss", "chosen_rewards", "rejected_rewards", "margins")


def rescore(
    out: str,
    losses: str,
    betas: str | None,
    label_smoothing: float | None,
    params: Sequence[str],
    reference_policy: str | None,
) -> dict[str, Any]:
    """One row per pair × combination in rescored/<digest>/<policy>/, and a summary of every combination."""
    store, grid = open_store(out), _grid(losses, betas, label_smoothing, params)
    manifest = read_manifest(store)
    if manifest is None:
        raise UsageError(f"{out} holds no run: name a folder that `dpo-score run` wrote")
    asked = {"losses": [loss.identity() for loss in grid], "reference_policy": reference_policy}
    folder = f"rescored/{digest(asked)[:16]}"
    rows = [
        row
        for policy in sorted(manifest.identities.policies)
        for row in _policy(store, manifest, policy, grid, folder, reference_policy)
    ]
    if not rows:
        raise UsageError(f"{out} holds no scored policy yet: let `dpo-score run` finish one")
    found = {"folder": store.url(folder), "rows": rows, **asked}
    store.write_json(f"{folder}/summary.json", {key: value for key, value in found.items() if key != "folder"})
    return found


def _grid(losses: str, betas: str | None, label_smoothing: float | None, params: Sequence[str]) -> list[ResolvedLoss]:
    names = [name.strip() for name in losses.split(",") if name.strip()]
    try:
        values = [float(b) for b in betas.split(",")] if betas else [None]
    except ValueError:
        raise ConfigError(f"--beta takes numbers, a comma list; got {betas!r}") from None
    settings = loss_params(params)
    return [
        parse_loss(LossSpec(name=name, beta=beta, label_smoothing=label_smoothing, params=settings))
        for name in names
        for beta in values
    ]


def _policy(
    store: Store, manifest: Manifest, policy: str, grid: Sequence[ResolvedLoss], folder: str, reference: str | None
) -> Iterator[dict[str, Any]]:
    parts = [name for name in store.list(f"scores/{policy}") if name.endswith(".parquet")]
    if not parts or policy == reference:
        return
    tables = [_stored(store, name, policy, reference) for name in parts]
    for loss in grid:
        check_columns(set(tables[0].column_names), loss)
    has_reference = reference is not None or _had_reference(manifest, policy)
    if any(loss.whole_set for loss in grid):
        tables = [pa.concat_tables(tables)]
        parts = [f"scores/{policy}/part-00000-of-00001.parquet"]
    derived = [
        [derive_table(table, loss, has_reference=has_reference, whole_set=loss.whole_set) for loss in grid]
        for table in tables
    ]
    for name, versions in zip(parts, derived, strict=True):
        rows = [_rows(table, loss) for table, loss in zip(versions, grid, strict=True)]
        store.write_table(f"{folder}/{policy}/{name.rsplit('/', 1)[-1]}", pa.concat_tables(rows), {})
    for index, loss in enumerate(grid):
        yield _summary_row(policy, loss, [versions[index] for versions in derived])


def _stored(store: Store, name: str, policy: str, reference: str | None) -> pa.Table:
    """A score part; with `reference`, that policy's log-probs stand where the reference's stood."""
    table = store.read_table(name).replace_schema_metadata(None)
    if reference is None:
        return table
    other = name.replace(f"scores/{policy}/", f"scores/{reference}/")
    if not store.exists(other):
        raise UsageError(f"--reference-policy {reference!r} has no {other}: it was not scored on the same blocks")
    return _joined(table, store.read_table(other), reference)


def _joined(table: pa.Table, other: pa.Table, reference: str) -> pa.Table:
    where = pc.index_in(table["row_id"], value_set=other["row_id"].combine_chunks())
    if where.null_count:
        raise UsageError(f"--reference-policy {reference!r} lacks {where.null_count} rows of a part: it rejected them")
    for name in [n for n in table.column_names if n.startswith("ref_")]:
        source = "policy_" + name.removeprefix("ref_")
        if source in other.column_names:
            table = table.set_column(table.column_names.index(name), name, other[source].take(where))
    return table


def _had_reference(manifest: Manifest, policy: str) -> bool:
    fields = manifest.identities.policies[policy].get("reference") or manifest.identities.reference
    return fields.get("weights") is not None or fields.get("columns") is not None


def _rows(table: pa.Table, loss: ResolvedLoss) -> pa.Table:
    table = table.append_column("loss_name", pa.array([loss.name] * table.num_rows, pa.string()))
    table = table.append_column("beta", pa.array([loss.beta] * table.num_rows, pa.float64()))
    return table.select(list(KEPT)).replace_schema_metadata(None)


def _summary_row(policy: str, loss: ResolvedLoss, tables: Sequence[pa.Table]) -> dict[str, Any]:
    overall = summarise(tables)["overall"]
    return {
        "policy": policy,
        "loss_name": loss.name,
        "beta": loss.beta,
        "n": overall["scored"],
        "loss": overall["loss"]["mean"],
        "accuracy": overall["accuracy"],
        "margins": overall["margins"]["mean"],
    }
