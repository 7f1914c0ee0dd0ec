"""`dpo-score precompute`: stage one alone. The cache is filled and, with --out, the data set is written with values.

    DIR/data/<split>-00000-of-0000N.parquet   the rows, in input order, with ref_chosen_logps and ref_rejected_logps
    DIR/rejects/                               the rows that have none, and why
    DIR/dpo_score.json                         what the values belong to; load_ref_logps.py checks it
    DIR/README.md                              the card by which load_dataset(DIR) finds the splits

Promises: the same command again computes nothing and changes nothing; an interrupted one goes on where it stopped.
Without --out only the cache remains.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_score.config.load import dump_config
from dpo_score.config.schema import LossSpec, RunConfig
from dpo_score.engine.context import RunContext, run_context
from dpo_score.engine.environment import now
from dpo_score.engine.executors.choose import Executor, choose_executor, with_workers
from dpo_score.engine.finish import (
    check_bad_rows,
    manifest_with_warnings,
    marks,
    refuse_nothing_scored,
    scored_of_sets,
    total_counts,
    warn_of_marks,
)
from dpo_score.engine.plan import RunPlan
from dpo_score.engine.prepare import prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run_references
from dpo_score.errors import ConfigError
from dpo_score.export.contract import contract
from dpo_score.export.dataset import DatasetWriter
from dpo_score.export.layout import Export, consumer_of, renaming
from dpo_score.losses.custom import is_custom
from dpo_score.losses.parse import parse_loss
from dpo_score.models.limits import context_limit
from dpo_score.models.resolve import Resolver
from dpo_score.results.card import CONTRACT, LOADER, README, SUMMARY, card, data_set, described
from dpo_score.results.run_folder import open_out
from dpo_score.results.source_text import stored_config
from dpo_score.storage.base import FileRecord, Store, json_bytes
from dpo_score.storage.commits import CommitRecord, read_records
from dpo_score.storage.manifest import finish_manifest, read_manifest, reopen_manifest
from dpo_score.storage.manifest import restart as discard_results
from dpo_score.storage.stage import Stage

PIPELINE = "pipeline.yaml"
TRL_MAX_LENGTH = 1024
"""The default of DPOConfig.max_length in TRL 1.16."""
_SHARD = re.compile(r"data/\w+-\d{5,}-of-\d{5,}\.parquet")


@dataclass(frozen=True, slots=True, repr=False)
class PrecomputeOutcome:
    """`out` is None when only the cache was filled. `summary`: rows, scored, rejected by code, marks, splits."""

    out: str | None
    summary: Mapping[str, Any]
    max_bad_rows: float | None = None
    trl: bool = False

    def __repr__(self) -> str:
        scored, rows = self.summary["scored"], self.summary["rows"]
        return f"PrecomputeOutcome(out={self.out!r}, {scored:,} of {rows:,} rows scored)"

    def lines(self) -> Iterator[str]:
        """What a person reads at the end."""
        rows, scored = self.summary["rows"], self.summary["scored"]
        yield f"{rows:,} rows: {scored:,} pairs have reference log-probs"
        if self.summary["rejected"]:
            codes = ", ".join(f"{count} {code}" for code, count in self.summary["rejected"].items())
            yield f"not scored: {codes}" + (" (rejects/ says which and why)" if self.out else "")
        if self.out is None:
            yield "the values are in the cache; --out DIR writes the data set with them"
            return
        splits = ", ".join(f"{name} ({count:,} rows)" for name, count in self.summary["splits"].items())
        yield f"{self.out}: {splits}; load_dataset finds it"
        if self.trl:
            yield f"train: python {self.out}/{LOADER} --model_name_or_path MODEL --output_dir DIR (trl dpo's options)"
            yield f"in Python: DPOTrainerWithRefLogps of dpo_score.integrations.trl, train_dataset={self.out!r}"

    def raise_failures(self) -> None:
        """BadRowsError when nothing of a set was scored, or more rows were rejected than --max-bad-rows allows."""
        out = self.out or "the cache"
        refuse_nothing_scored({n: (s["rows"], s["scored"]) for n, s in self.summary["datasets"].items()}, out)
        bad = sum(self.summary["rejected"].values())
        check_bad_rows("reference", bad + self.summary["scored"], bad, self.max_bad_rows, out)


def precompute(
    config: RunConfig, progress: Progress, *, restart: bool = False, to: str = "trl", rename: str | None = None
) -> PrecomputeOutcome:
    """Stage one for `config`, and the data set when `config.out` is set. Policies are left out, but for the
    references that they bring along when only the cache is filled.

    `to`: who reads the data set (`layout.CONSUMERS`); `rename`: "column=name,…". Raises UsageError before any work,
    StorageError, Interrupted.
    """
    _refuse_no_model(config)
    if config.out is None:
        return _fill_cache(config, progress)
    out, config = config.out, config.model_copy(update={"policies": ()})
    with run_context(config, progress, out) as context:
        refuse_foreign_files(context.store, out, restart)
        if restart:
            _throw_away(context.store)
        if to == "trl" and "max_length" not in config.text.model_fields_set:
            config = _with_trl_length(config, context)
        with with_workers(config, context) as (config, working):
            plan, _ = prepare(config, working)
            _refuse_own_input(context.store, plan)
            export = export_of(plan, to, rename)
            plan = run_references(working, replace(plan, keeps_texts=export.emit_ids))
        return _write(context, plan, export)


def _with_trl_length(config: RunConfig, context: RunContext) -> RunConfig:
    """TRL's own default of max_length, or the model's limit where that is less: rows are cut as its trainer does."""
    spec = config.reference
    assert spec is not None
    resolver = Resolver.of(config, context.cache_dir, context.file_hashes.sha256)
    limit = context_limit(resolver.resolve_spec(spec).config)
    length = min(TRL_MAX_LENGTH, limit or TRL_MAX_LENGTH)
    context.progress.say(
        f"max_length {length}, the default of TRL's DPOConfig; --max-length N says another, which DPOConfig needs too"
    )
    return config.model_copy(update={"text": config.text.model_copy(update={"max_length": length})})


def export_run(out: str, to: str, folder: str | None, rename: str | None, progress: Progress) -> PrecomputeOutcome:
    """`dpo-score export OUT --to trl|ids`: the data of a finished run, with its reference log-probs, below `folder`.

    It is `precompute` with the settings that OUT recorded, and refuses what `precompute` refuses. The values come from
    the cache. Raises UsageError when OUT is no run.
    """
    if folder is None:
        raise ConfigError(f"--to {to} writes a data set: say where with --out DIR")
    return precompute(config_of_run(out, to, folder), progress, to=to, rename=rename)


def config_of_run(out: str, to: str, folder: str) -> RunConfig:
    """The configuration by which a run's data and reference are written to `folder`, without its policies.

    Raises UsageError when OUT is no finished run, ConfigError when no trainer would score the same tokens.
    """
    store, manifest = open_out(out)
    config = stored_config(store)
    if config.rewardbench == "exact":
        raise ConfigError(
            f"--to {to}: {out} was scored with --rewardbench exact, which adds and drops tokens that no trainer would. "
            "Run without it"
        )
    kept = {"max_length": config.text.max_length}  # set, so that it stays what the run scored with
    text = config.text.model_copy(update=kept | {"date": config.text.date or manifest.notes.get("date")})
    loss = LossSpec() if is_custom(config.loss.name) else config.loss  # code that OUT names is not run; it reads none
    given = {"out": folder, "policies": (), "rewardbench": None, "text": text, "loss": loss}
    return config.model_copy(update=given)


def _fill_cache(config: RunConfig, progress: Progress) -> PrecomputeOutcome:
    """In a folder that is gone afterwards, which the workers of this machine find and those of others would not."""
    _refuse_cluster(config)
    brought = tuple(policy for policy in config.policies if policy.reference is not None)
    with tempfile.TemporaryDirectory(prefix="dpo-score-") as folder, run_context(config, progress, folder) as context:
        config = config.model_copy(update={"policies": brought, "out": folder})
        with with_workers(config, context) as (config, working):
            plan, _ = prepare(config, working)
            plan = run_references(working, plan)
        summary = _summary(context.store, plan)
        warn_of_marks(context, plan, summary["marks"], summary["scored"])
        return PrecomputeOutcome(None, summary, config.max_bad_rows)


def _unfinished(store: Store) -> bool:
    manifest = read_manifest(store)
    return manifest is None or manifest.state != "complete"


def _write(context: RunContext, plan: RunPlan, export: Export) -> PrecomputeOutcome:
    writer = DatasetWriter(context, plan, export)
    due = writer.pending()
    if due:
        reopen_manifest(context.store)
    with context.progress.stage("data set", plan.rows.wanted, plan.rows.wanted - sum(s.stop - s.start for s in due)):
        for shard in due:
            context.stop.check()
            writer.write(shard)
    summary = {**_summary(context.store, plan), "splits": split_rows(writer)}
    warn_of_marks(context, plan, summary["marks"], summary["scored"])
    assert plan.config.out is not None
    if due or _unfinished(context.store):
        _finish(context, plan, export, summary)
    return PrecomputeOutcome(plan.config.out, summary, plan.config.max_bad_rows, export.consumer.name == "trl")


def _finish(context: RunContext, plan: RunPlan, export: Export, summary: Mapping[str, Any]) -> None:
    store = context.store
    store.write_bytes(CONTRACT, json_bytes(contract(plan, export, summary, noise_of(store))))
    store.write_bytes(LOADER, loader_source().encode())
    if not store.exists(SUMMARY):
        store.write_bytes(PIPELINE, dump_config(plan.config).encode())  # a run's own says more: its policies
    store.write_bytes(README, card(store).encode())
    beside = data_set(store)
    assert beside is not None
    names = [name for name in (PIPELINE, README, SUMMARY) if store.exists(name)]
    outputs = [*beside.files, *(described(store, name) for name in names)]
    for name in store.list(".work/text"):
        store.remove(name)
    finish_manifest(store, manifest_with_warnings(context), now(), outputs)


def noise_of(store: Store) -> Mapping[str, Any]:
    """What the first block's record says of the noise of its values."""
    first = next(iter(read_records(store, "reference").values()), None)
    found = first.notes.get("noise") if isinstance(first, CommitRecord) else None
    return found or {}


def loader_source() -> str:
    """The program that is written beside the data: it needs trl and datasets, and nothing of this package."""
    return (Path(__file__).parents[1] / "integrations" / LOADER).read_text(encoding="utf-8")


def export_of(plan: RunPlan, to: str, rename: str | None) -> Export:
    source = plan.references[0].source
    consumer = consumer_of(to, plan.config, plan.datasets, bool(source and source.is_encoder_decoder))
    text = plan.config.text
    return Export(
        consumer=consumer,
        emit_ids=plan.config.emit_ids or not consumer.texts,
        per_token=plan.config.compute.per_token,
        masks=any(dataset.format.holds_ids for dataset in plan.datasets)
        or text.score != "completion"
        or text.truncation == "keep_end",
        ld_alpha=parse_loss(plan.config.loss).modifiers.ld_alpha,
        renames=renaming(rename),
    )


def _summary(store: Store, plan: RunPlan) -> dict[str, Any]:
    counts, sets = total_counts(store, plan, Stage.reference()), scored_of_sets(store, plan)
    rejected: dict[str, int] = {}
    for name, count in counts.items():
        if name.startswith("rejected/"):
            code = name.rpartition("/")[2]
            rejected[code] = rejected.get(code, 0) + count
    return {
        "rows": counts.get("rows", 0),
        "scored": counts.get("scored", 0),
        "rejected": dict(sorted(rejected.items())),
        "marks": marks(store, plan),
        "datasets": {
            d.spec.name: {
                "format": d.format.full_name,
                "polarity": d.format.polarity,
                "rows": sets[d.spec.name][0],
                "scored": sets[d.spec.name][1],
            }
            for d in plan.datasets
        },
    }


def split_rows(writer: DatasetWriter) -> dict[str, int]:
    rows = dict.fromkeys((shard.split for shard in writer.shards), 0)
    for file in writer.files():
        split = file.name.removeprefix("data/").rpartition("-of-")[0].rpartition("-")[0]
        rows[split] += file.rows
    return rows


# --- refusals and the way back ------------------------------------------------------------------------------------


UNREAD_OPTIONS = ("policy", "loss", "beta", "label_smoothing", "rewardbench", "slice")


def refuse_unread_options(given: Mapping[str, Any]) -> None:
    """ConfigError for an option that `precompute` does not read: it computes the reference alone."""
    for name in UNREAD_OPTIONS:
        if given.get(name):
            raise ConfigError(
                f"precompute does not read --{name.replace('_', '-')}: it computes the reference alone. "
                "Leave it out; `dpo-score run` scores policies"
            )


def _refuse_no_model(config: RunConfig) -> None:
    if config.reference is None:
        raise ConfigError("no reference: add --reference MODEL, whose log-probs are to be computed")
    if config.reference.columns is not None:
        raise ConfigError(
            f"reference {config.reference.model!r}: these values stand in the data already; name a MODEL to compute "
            "others"
        )


def _refuse_cluster(config: RunConfig) -> None:
    """Without --out, workers share a folder of this machine."""
    address = config.compute.ray_address or os.environ.get("RAY_ADDRESS")
    if address and choose_executor(config, Progress(quiet=True)) is Executor.RAY:
        raise ConfigError(
            f"precompute without --out works in a folder of this machine, which a cluster ({address}) does not see: "
            "add --out DIR, under a path that all its machines see, or say --engine local"
        )


def refuse_foreign_files(store: Store, out: str, restart: bool) -> None:
    """A folder that is somebody's data set, or a run's, is not written into."""
    if store.list("scores") and (restart or not store.exists(CONTRACT)):
        raise ConfigError(f"{out} holds the scores of a run: give the data set a folder of its own (--out DIR)")
    if read_manifest(store) is None and any(_SHARD.fullmatch(name) for name in store.list("data")):
        raise ConfigError(f"{out}/data holds Parquet files that were not written here: choose another --out")


def _refuse_own_input(store: Store, plan: RunPlan) -> None:
    roots = tuple(root.rstrip("/") + "/" for root in (store.url(), str(Path(store.url()).resolve())))
    for dataset in plan.datasets:
        for file in dataset.files:
            path = file.path if "://" in file.path else str(Path(file.path).resolve())
            if path.startswith(roots):
                raise ConfigError(f"{file.path} lies inside --out, where the data set is written: choose another --out")


def _throw_away(store: Store) -> None:
    """--restart: files of the data set first, then all that the other stages wrote."""
    stages = {name.split("/")[2] for name in store.list("commits/data")}
    names = {file.name for stage in stages for r in read_records(store, f"data/{stage}").values() for file in _files(r)}
    if read_manifest(store) is not None:
        names |= {name for name in store.list("data") if _SHARD.fullmatch(name)}
    discard_results(store)
    for name in sorted(names | {CONTRACT, LOADER}):
        store.remove(name)


def _files(record: Any) -> tuple[FileRecord, ...]:
    return getattr(record, "files", ())
