"""`dpo-score select OUT --to DIR`: the kept pairs as a data set, and for every row of OUT why it is in or out.

    DIR/data/<split>-00000-of-0000N.parquet   the kept rows in input order, with ref_chosen_logps, ref_rejected_logps,
                                              select_score and select_rank
    DIR/selection.parquet                     one line for every row of OUT: score, rank, kept, reason
    DIR/selection.json                        rule, settings, threshold, counts, what OUT was computed from
    DIR/dpo_score.json, load_ref_logps.py     what the values belong to, and the trainer that checks it
    DIR/README.md                             the card by which load_dataset(DIR) finds the splits

In: an output folder whose data files are as they were scored. The values are those of OUT: no model is loaded and
nothing is computed. The same command gives the same bytes; a folder of another request is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from dpo_score.config.schema import RunConfig
from dpo_score.engine.context import open_context, run_context
from dpo_score.engine.plan import RunPlan
from dpo_score.engine.prepare import resolve_plan
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, IdentityError, UsageError
from dpo_score.export.contract import contract
from dpo_score.export.dataset import DatasetWriter, ScoredPairs, weighted
from dpo_score.export.layout import VALUES
from dpo_score.export.precompute import (
    config_of_run,
    export_of,
    loader_source,
    noise_of,
    refuse_foreign_files,
    split_rows,
)
from dpo_score.results.card import CONTRACT, LOADER, README, data_set
from dpo_score.results.run_folder import open_out
from dpo_score.results.select import Selected
from dpo_score.results.source_text import TextSource, text_source
from dpo_score.storage.base import Store, json_bytes
from dpo_score.storage.commits import CommitRecord, read_records
from dpo_score.storage.fingerprint import diff, listed
from dpo_score.storage.manifest import Manifest

SELECTION, REASONS = "selection.json", "selection.parquet"
COPIED = ("row_id", "pair_id", "pair_digest", *(f"{name}{suffix}" for name in VALUES for suffix in ("", "_shared")))
"""Columns of OUT's reference parts that go into the data set, or that its weighted sums are made of."""


def write_selection(out: str, selected: Selected, folder: str, progress: Progress) -> str:
    """Write DIR; returns its URL. Raises UsageError when OUT's data or models have changed, IdentityError for a folder
    of another request, StorageError, Interrupted."""
    source, manifest = open_out(out)
    changed = text_source(source, manifest)
    if isinstance(changed, str):
        raise UsageError(f"--to writes the rows of the data, and {changed}")
    config = config_of_run(out, "trl", folder)
    plan = _plan_of_run(source, manifest, config, progress)
    kept = pl.concat(
        frame.filter("kept").select("row_id", "select_score", "select_rank") for frame in selected.frames()
    )
    if not len(kept):
        raise ConfigError("the rule keeps no pair: there is no data set to write")
    rows = np.array(TextSource(config, plan.datasets).row_of_each(kept["row_id"]), np.int64)
    plan = replace(plan, rows=replace(plan.rows, sample=tuple(np.unique(rows).tolist()), limit=None, share=(0, 1)))
    export = replace(export_of(plan, "trl", None), emit_ids=False, per_token=False, selection=selected.summary)
    chosen = ScoredPairs(weighted(_values(source, kept.to_arrow()), export.ld_alpha), rows)
    with run_context(config, progress, folder) as context:
        store = context.store
        if store.exists(SELECTION):
            _refuse_other_request(store, selected.summary)
        else:
            refuse_foreign_files(store, folder, restart=False)
        writer = DatasetWriter(context, plan, export, chosen)
        due = writer.pending()
        with progress.stage("data set", plan.rows.wanted, plan.rows.wanted - sum(s.stop - s.start for s in due)):
            for shard in due:
                context.stop.check()
                writer.write(shard)
        splits = split_rows(writer)
        counts = {"rows": len(kept), "scored": len(kept), "rejected": {}, "splits": splits}
        if plan.references[0].source is not None:
            store.write_bytes(CONTRACT, json_bytes(contract(plan, export, counts, noise_of(source))))
            store.write_bytes(LOADER, loader_source().encode())
        _write_reasons(store, selected)
        store.write_bytes(SELECTION, json_bytes(selected.summary))
        store.write_bytes(README, _card(store, selected.summary, splits).encode())
        return store.url()


def _plan_of_run(source: Store, manifest: Manifest, config: RunConfig, progress: Progress) -> RunPlan:
    """The plan that OUT was computed by, without its policies. Numerics come from its manifest: no model is loaded.

    Raises IdentityError when text settings, tokenizer or the reference's weights are not those of OUT any more.
    """
    with closing(open_context(config, Progress(quiet=True), source)) as context:
        plan = resolve_plan(config, context, computes=False)
    for warning in context.progress.warnings:
        progress.warn(warning)
    now, then = plan.identities.reference.get("weights"), manifest.identities.reference.get("weights")
    if now != then:
        changes = diff({"weights": then}, {"weights": now})
        raise IdentityError(f"{source.url()}: the reference is not the one that was scored with:\n{listed(changes)}")
    return plan


def _values(source: Store, kept: pa.Table) -> pa.Table:
    """OUT's reference values of the kept pairs, with their score and rank; both are in the order of the data.

    UsageError where OUT lacks one of them.
    """
    wanted = kept["row_id"].combine_chunks()
    found: list[pa.Table] = []
    for _, record in sorted(read_records(source, "reference").items()):
        for file in record.files if isinstance(record, CommitRecord) else ():
            if not file.name.startswith("reference/"):
                continue
            with source.open_table(file.name) as opened:
                columns = [name for name in COPIED if name in opened.schema_arrow.names]
            table = source.read_table(file.name, columns).replace_schema_metadata(None)
            next_ones = wanted.slice(sum(part.num_rows for part in found), len(table))  # both are in the data's order
            found.append(table.filter(pc.is_in(table["row_id"].cast(wanted.type), value_set=next_ones)))
    table = pa.concat_tables(found)
    if not table["row_id"].cast(wanted.type).combine_chunks().equals(wanted):
        raise UsageError(
            f"{source.url()} lacks the reference's values of kept pairs: `dpo-score verify` says what is gone"
        )
    for name in ("select_score", "select_rank"):
        table = table.append_column(name, kept[name])
    return table


def _write_reasons(store: Store, selected: Selected) -> None:
    """selection.parquet, a piece at a time."""
    frames = selected.frames()
    first = next(frames)
    tables = (pl.concat([first.clear(), frame], how="diagonal").to_arrow() for frame in chain([first], frames))
    store.write_tables(REASONS, first.to_arrow().schema, tables, {})


def _refuse_other_request(store: Store, summary: Mapping[str, Any]) -> None:
    """IdentityError when DIR holds the selection of another rule, other settings, or another run."""
    changes = diff(store.read_json(SELECTION), json.loads(json_bytes(summary)))
    if changes:
        raise IdentityError(
            f"{store.url()} holds another selection; what differs (old → new):\n{listed(changes)}\nChoose another --to"
        )


def _card(store: Store, summary: Mapping[str, Any], splits: Mapping[str, int]) -> str:
    data = data_set(store)
    configs = [{"split": name, "path": f"data/{name}-*.parquet"} for name in splits]
    listed_configs = data.configs if data else [{"config_name": "default", "data_files": configs}]
    head = yaml.safe_dump({"tags": ["dpo", "preference"], "configs": list(listed_configs)}, sort_keys=False)
    counts = dict(summary["counts"])
    reasons = "\n".join(f"| {reason} | {count:,} |" for reason, count in counts.items())
    text = _CARD.format(
        rule=summary["rule"],
        keeps=summary["keeps"],
        source=summary["source"],
        reasons=reasons,
        rows=summary["rows"],
        judged=summary["judged"],
        policies=", ".join(summary["policies"]),
    )
    return f"---\n{head}---\n{text}" + (f"\n{data.text}" if data else "")


_CARD = """# Preference pairs selected for training

`dpo-score select` kept pairs by the rule `{rule}`: {keeps} (source: {source}). \
The policies {policies} were the judges: {judged}. `select_score` is what the rule gave each pair, `select_rank` its \
place (1 is kept first).

| {rows:,} rows | |
|---|---|
{reasons}

`selection.parquet` has a line for each of them with the reason; `selection.json` holds the settings and what the \
scores were computed from.
"""
