"""Any grid of losses and betas over the log-probabilities that OUT holds: no model, no GPU, one pass.

OUT/scores is never rewritten: a grid has a folder of its own, rescored/<digest>/, named by what was asked. Its summary
is written last and sealed: it names every file of the grid with its sha256.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.config.load import loss_params
from dpo_score.config.schema import LossSpec
from dpo_score.errors import ConfigError, UsageError, nearest
from dpo_score.losses.columns import as_arrow, check_columns, derive, numeric_columns
from dpo_score.losses.parse import ResolvedLoss, parse_loss
from dpo_score.metrics.arrays import ScoreArrays, collect
from dpo_score.metrics.summary import accuracies, finite_mean
from dpo_score.results.run_folder import Reading, open_out, policy_names, unseen
from dpo_score.results.run_folder import parts as committed
from dpo_score.storage.base import FileRecord, Store
from dpo_score.storage.commits import sealed
from dpo_score.storage.fingerprint import digest, has_reference
from dpo_score.storage.manifest import Manifest

GRIDS, SUMMARY = "rescored", "summary.json"
KEPT = ("loss", "chosen_rewards", "rejected_rewards", "margins")
"""The derived columns of a grid's rows."""


def rescore(
    out: str,
    losses: str,
    betas: str | None,
    label_smoothing: float | None,
    params: Sequence[str],
    reference_policy: str | None,
    reading: Reading = unseen,
) -> dict[str, Any]:
    """One row per pair × combination in rescored/<digest>/<policy>/, and a summary of every combination.

    Its `left_out`: policy → pairs without a row, because `reference_policy` rejected them.
    """
    specs = _specs(losses, betas, label_smoothing, params)
    grid = [parse_loss(spec) for spec in specs]
    store, manifest = open_out(out)
    asked = {"losses": [loss.identity() for loss in grid], "reference_policy": reference_policy}
    folder = f"{GRIDS}/{digest(asked)[:16]}"
    rows: list[dict[str, Any]] = []
    files: list[FileRecord] = []
    left_out: dict[str, int] = {}
    names = _names(policy_names(store, manifest), reference_policy, out)
    with reading("rescore", len(names) * manifest.rows) as read:
        for name in names:
            policy = PolicyGrid(store, manifest, name, grid, reference_policy)
            for part, table in policy.tables():
                files.append(store.write_table(f"{folder}/{name}/{part}", table, {}))
                read(table.num_rows // len(grid))
            rows += policy.summary()
            left_out |= {name: policy.left_out} if policy.left_out else {}
    found: dict[str, Any] = {"rows": rows, **asked, "left_out": left_out}
    told = {"specs": [spec.model_dump() for spec in specs], "files": [file.to_json() for file in files]}
    store.write_json(f"{folder}/{SUMMARY}", sealed({**found, **told}))
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


def _specs(losses: str, betas: str | None, label_smoothing: float | None, params: Sequence[str]) -> list[LossSpec]:
    names = [name.strip() for name in losses.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--loss takes losses, a comma list such as sigmoid,ipo; got {losses!r}")
    try:
        values = [float(b) for b in betas.split(",")] if betas else [None]
    except ValueError:
        raise ConfigError(f"--beta takes numbers, a comma list; got {betas!r}") from None
    settings = loss_params(params)
    return [
        LossSpec(name=name, beta=beta, label_smoothing=label_smoothing, params=settings)
        for name in names
        for beta in values
    ]


CLUSTERED_BY = ("row_id", "dataset", "prompt_digest", "group_id", "tied")
"""What the summary of a grid reads of the scores beside the log-probs."""


class PolicyGrid:
    """One policy under every loss of a grid, part by part: what a part's file holds, and at the end the summary.

    Of each row only what the summary needs stays in memory: about 24 bytes a loss, and 100 more.
    """

    def __init__(
        self, store: Store, manifest: Manifest, policy: str, losses: Sequence[ResolvedLoss], reference: str | None
    ) -> None:
        self.left_out = 0
        """Pairs without a row, because the policy that takes the reference's place rejected them."""
        self._store, self._policy, self._losses, self._reference = store, policy, losses, reference
        own = manifest.identities.reference_of(policy)
        self._has_reference = reference is not None or has_reference(own)
        self._kept: list[pa.Table] = []
        self._arrays: list[list[dict[str, Any]]] = [[] for _ in losses]

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        """(name of the part, its rows under every loss, one loss after the other). ConfigError for a missing column."""
        names = committed(self._store, self._policy)
        parts: Iterator[tuple[str, pa.Table]] = ((name.rpartition("/")[2], self._part(name)) for name in names)
        if any(loss.whole_set for loss in self._losses):
            parts = iter([("part-00000-of-00001.parquet", pa.concat_tables([table for _, table in parts]))])
        for name, table in parts:
            yield name, pa.concat_tables([self._under(place, table) for place in range(len(self._losses))])
            self._kept.append(table.select([column for column in CLUSTERED_BY if column in table.column_names]))

    def _part(self, name: str) -> pa.Table:
        """The numbers of a part; with a policy as the reference, its log-probs in place of the reference's."""
        table = _numbers(self._store, name)
        if self._reference is not None:
            place = name.replace(f"scores/{self._policy}/", f"scores/{self._reference}/")
            if not self._store.exists(place):
                raise UsageError(
                    f"--reference-policy {self._reference!r} has no {place} yet: let `dpo-score run` finish it"
                )
            whole = table.num_rows
            table = _joined(table, _numbers(self._store, place))
            self.left_out += whole - table.num_rows
        for loss in self._losses:
            check_columns(set(table.column_names), loss)
        return table

    def _under(self, place: int, table: pa.Table) -> pa.Table:
        """The rows of a part under one loss; what its summary reads is kept."""
        loss = self._losses[place]
        columns = numeric_columns(table)
        derived = derive(columns, loss, has_reference=self._has_reference, whole_set=loss.whole_set)
        overflow = pc.equal(pa.array(derived["loss_code"], pa.string()), "overflow").fill_null(False)
        kept = {name: derived[name] for name in ("loss", "chosen_rewards", "rejected_rewards")}
        self._arrays[place].append({**kept, "overflow": overflow.to_numpy(zero_copy_only=False)})
        return pa.table(
            {
                "row_id": table["row_id"],
                "loss_name": pa.repeat(pa.scalar(loss.name, pa.string()), table.num_rows),
                "beta": pa.repeat(pa.scalar(loss.beta, pa.float64()), table.num_rows),
                **{name: as_arrow(derived[name]) for name in KEPT},
            }
        )

    def summary(self) -> list[dict[str, Any]]:
        """One row a loss, once all parts were made."""
        base = collect(_as_scored(table) for table in self._kept)
        return [self._summary_row(loss, base, parts) for loss, parts in zip(self._losses, self._arrays, strict=True)]

    def _summary_row(self, loss: ResolvedLoss, base: ScoreArrays, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        overflow = values.pop("overflow")
        rows = replace(base, values={**base.values, **values}, flags={**base.flags, "overflow": overflow})
        with np.errstate(all="ignore"):
            margins = values["chosen_rewards"] - values["rejected_rewards"]
        return {
            "policy": self._policy,
            "loss_name": loss.name,
            "beta": loss.beta,
            "n": len(rows),
            "loss": finite_mean(values["loss"]),
            "overflow": int(np.count_nonzero(overflow)),
            "accuracy": accuracies(rows, margins)["accuracy"],
            "margins": finite_mean(margins),
        }


def _numbers(store: Store, name: str) -> pa.Table:
    """The columns of a part that losses and summaries read: numbers, and what identifies rows; no lists."""
    with store.open_table(name) as file:
        schema = file.schema_arrow
    kept = [field.name for field in schema if not pa.types.is_nested(field.type)]
    texts = [field.name for field in schema if pa.types.is_string(field.type) and field.name not in CLUSTERED_BY]
    return store.read_table(name, [column for column in kept if column not in texts]).replace_schema_metadata(None)


def _as_scored(table: pa.Table) -> pa.Table:
    """Every row of a score part is scored; its log-probs are not needed for the summary of a grid."""
    zeros = pa.array(np.zeros(table.num_rows))
    return table.append_column("policy_chosen_logps", zeros).append_column("policy_rejected_logps", zeros)


def _joined(table: pa.Table, other: pa.Table) -> pa.Table:
    """`table` with the values of the policy `other` as the reference's. Rows that `other` rejected are left out."""
    where = pc.index_in(table["row_id"], value_set=other["row_id"].combine_chunks())
    table, where = table.filter(pc.is_valid(where)), where.drop_null()
    for name in [n for n in table.column_names if n.startswith("ref_")]:
        source = "policy_" + name.removeprefix("ref_")
        if source in other.column_names:
            table = table.set_column(table.column_names.index(name), name, other[source].take(where))
    return table
