"""Any grid of losses and betas over the log-probabilities that OUT holds: no model, no GPU, one pass.

OUT/scores is never rewritten: a grid has a folder of its own, rescored/<digest>/, named by what was asked. Its summary
is written last and sealed: it names every file of the grid with its sha256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.config.load import loss_params
from dpo_score.config.schema import LossSpec
from dpo_score.errors import ConfigError, UsageError, nearest
from dpo_score.losses.columns import check_columns, derive_table
from dpo_score.losses.parse import ResolvedLoss, parse_loss
from dpo_score.metrics.summary import summarise
from dpo_score.results.run_folder import open_out, policy_names
from dpo_score.results.run_folder import parts as committed
from dpo_score.storage.base import FileRecord, Store
from dpo_score.storage.commits import sealed
from dpo_score.storage.fingerprint import digest, has_reference
from dpo_score.storage.manifest import Manifest

GRIDS, SUMMARY = "rescored", "summary.json"
KEPT = ("row_id", "loss_name", "beta", "loss", "chosen_rewards", "rejected_rewards", "margins")


@dataclass(frozen=True, slots=True)
class Rescored:
    """One policy. `rows`: of the summary, one a loss. `left_out`: pairs that the reference policy has no values for."""

    rows: Sequence[dict[str, Any]] = ()
    files: Sequence[FileRecord] = ()
    left_out: int = 0


def rescore(
    out: str,
    losses: str,
    betas: str | None,
    label_smoothing: float | None,
    params: Sequence[str],
    reference_policy: str | None,
) -> dict[str, Any]:
    """One row per pair × combination in rescored/<digest>/<policy>/, and a summary of every combination.

    Its `left_out`: policy → pairs without a row, because `reference_policy` rejected them.
    """
    grid = _grid(losses, betas, label_smoothing, params)
    store, manifest = open_out(out)
    asked = {"losses": [loss.identity() for loss in grid], "reference_policy": reference_policy}
    folder = f"{GRIDS}/{digest(asked)[:16]}"
    names = _names(policy_names(store, manifest), reference_policy, out)
    policies = {name: _policy(store, manifest, name, grid, folder, reference_policy) for name in names}
    found: dict[str, Any] = {"rows": [row for policy in policies.values() for row in policy.rows], **asked}
    found["left_out"] = {name: policy.left_out for name, policy in policies.items() if policy.left_out}
    files = [file.to_json() for policy in policies.values() for file in policy.files]
    store.write_json(f"{folder}/{SUMMARY}", sealed({**found, "files": files}))
    return {"folder": store.url(folder), **found}


def _names(scored: Sequence[str], reference: str | None, out: str) -> list[str]:
    """The policies to rescore: all but the one that takes the reference's place, which must be scored itself."""
    if not scored:
        raise UsageError(f"{out} holds no scored policy yet: let `dpo-score run` finish one")
    if reference is not None and reference not in scored:
        raise ConfigError(
            f"--reference-policy {reference!r} is no scored policy of {out}; {nearest(reference, scored)}"
        )
    names = sorted(name for name in scored if name != reference)
    if not names:
        raise ConfigError(f"--reference-policy {reference!r} is the only scored policy of {out}: no other is left")
    return names


def _grid(losses: str, betas: str | None, label_smoothing: float | None, params: Sequence[str]) -> list[ResolvedLoss]:
    names = [name.strip() for name in losses.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--loss takes losses, a comma list such as sigmoid,ipo; got {losses!r}")
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
) -> Rescored:
    parts = committed(store, policy)
    tables, left_out = _tables(store, policy, parts, reference)
    for loss in grid:
        check_columns(set(tables[0].column_names), loss)
    with_reference = reference is not None or has_reference(manifest.identities.reference_of(policy))
    if any(loss.whole_set for loss in grid):
        tables = [pa.concat_tables(tables)]
        parts = [f"scores/{policy}/part-00000-of-00001.parquet"]
    derived = [
        [derive_table(table, loss, has_reference=with_reference, whole_set=loss.whole_set) for loss in grid]
        for table in tables
    ]
    files = []
    for name, versions in zip(parts, derived, strict=True):
        rows = [_rows(table, loss) for table, loss in zip(versions, grid, strict=True)]
        files.append(store.write_table(f"{folder}/{policy}/{name.rsplit('/', 1)[-1]}", pa.concat_tables(rows), {}))
    tables_of = [[versions[index] for versions in derived] for index in range(len(grid))]
    summary = [_summary_row(policy, loss, own) for loss, own in zip(grid, tables_of, strict=True)]
    return Rescored(summary, files, left_out)


def _tables(store: Store, policy: str, parts: Sequence[str], reference: str | None) -> tuple[list[pa.Table], int]:
    """The score parts, and how many pairs they lack; with `reference`, its log-probs stand for the reference's."""
    tables = [store.read_table(name).replace_schema_metadata(None) for name in parts]
    if reference is None:
        return tables, 0
    places = [name.replace(f"scores/{policy}/", f"scores/{reference}/") for name in parts]
    joined = [_joined(table, _part_of(store, place, reference)) for table, place in zip(tables, places, strict=True)]
    return joined, sum(table.num_rows for table in tables) - sum(table.num_rows for table in joined)


def _part_of(store: Store, name: str, reference: str) -> pa.Table:
    if not store.exists(name):
        raise UsageError(f"--reference-policy {reference!r} has no {name} yet: let `dpo-score run` finish it")
    return store.read_table(name)


def _joined(table: pa.Table, other: pa.Table) -> pa.Table:
    """`table` with the values of the policy `other` as the reference's. Rows that `other` rejected are left out."""
    where = pc.index_in(table["row_id"], value_set=other["row_id"].combine_chunks())
    table, where = table.filter(pc.is_valid(where)), where.drop_null()
    for name in [n for n in table.column_names if n.startswith("ref_")]:
        source = "policy_" + name.removeprefix("ref_")
        if source in other.column_names:
            table = table.set_column(table.column_names.index(name), name, other[source].take(where))
    return table


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
