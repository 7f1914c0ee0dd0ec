"""The end of a run: committed parts → summary.json, the data-set card, the resolved pipeline; then `complete`.

Everything is read back from the files, in block order, so the summary of a resumed run equals that of an
uninterrupted one. No times and no host names in summary.json.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_score.config.checkpoint_glob import natural
from dpo_score.config.load import dump_config
from dpo_score.data.types import MARKS, EncodedPair
from dpo_score.engine.block_inputs import TEXT_FOLDER
from dpo_score.engine.context import RunContext
from dpo_score.engine.environment import now
from dpo_score.engine.plan import SCHEMA_VERSION, PolicyFailure, RunPlan, text_notice
from dpo_score.engine.resume import missing_of
from dpo_score.engine.threads import map_threads
from dpo_score.errors import BadRowsError, PolicyFailedError, UsageError
from dpo_score.metrics.summary import summarise
from dpo_score.report.build import FILE as REPORT
from dpo_score.report.build import write_report
from dpo_score.report.trackers import log_run, tensorboard_folder
from dpo_score.results import groups as slices
from dpo_score.results import noise, rewardbench
from dpo_score.results.card import README, SUMMARY, card, data_set
from dpo_score.results.run_folder import sliced
from dpo_score.results.source_text import TextSource
from dpo_score.storage.base import FileRecord, Store, json_bytes
from dpo_score.storage.commits import CommitRecord, read_records, record_name
from dpo_score.storage.manifest import Manifest, finish_manifest, read_manifest, reopen_manifest
from dpo_score.storage.stage import REJECTED_ROWS, Stage, part_file
from dpo_score.tokenization.flags import example


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run ends with.

    failures: policy → why it was not scored; summary["skipped"] holds the checkpoints that were not whole yet.
    report: where the page for people is; None where none was written.
    """

    out: str
    summary: Mapping[str, Any]
    failures: Mapping[str, str] = field(default_factory=dict)
    max_bad_rows: float | None = None
    report: str | None = None

    def raise_failures(self) -> None:
        """PolicyFailedError, also where every policy waits; BadRowsError for a set of which nothing was scored, or for
        more rejects than --max-bad-rows."""
        if self.failures:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in self.failures.items())
            raise PolicyFailedError(f"the run finished, but these policies were not scored:\n{lines}")
        if self.summary.get("skipped") and not self.summary["policies"]:
            names = ", ".join(self.summary["skipped"])
            raise PolicyFailedError(f"the run finished and no policy was scored: none is whole yet of {names}")
        for name, summary in self.summary["policies"].items():
            counts = summary["overall"]
            refuse_nothing_scored({name: (c["n"], c["scored"]) for name, c in summary["datasets"].items()}, self.out)
            check_bad_rows(f"policy {name!r}", counts["n"], counts["n"] - counts["scored"], self.max_bad_rows, self.out)


def refuse_nothing_scored(counts: Mapping[str, tuple[int, int]], out: str) -> None:
    """BadRowsError for a data set of which every row was rejected. counts: set → rows, scored rows."""
    for name, (rows, scored) in counts.items():
        if rows and not scored:
            raise BadRowsError(
                f"nothing of data set {name!r} was scored: all {rows:,} rows were rejected; see {out}/rejects for "
                "row, code and reason"
            )


def scored_of_sets(store: Store, plan: RunPlan) -> dict[str, tuple[int, int]]:
    """Data set → its pairs and rejected rows, its pairs with reference log-probs."""
    scored: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for folder, count in (("reference", scored), ("rejects/data", lost), ("rejects/reference", lost)):
        for table in _tables(store, plan, folder, ["dataset"]):
            count.update(table["dataset"].to_pylist())
    names = [dataset.spec.name for dataset in plan.datasets]
    return {name: (scored[name] + lost[name], scored[name]) for name in names}


def check_bad_rows(label: str, rows: int, bad: int, allowed: float | None, out: str) -> None:
    """`allowed` below 1 is a share of the rows, else a count; null allows any number."""
    if allowed is None or bad <= (allowed * rows if allowed < 1 else allowed):
        return
    raise BadRowsError(
        f"{label}: {bad} of {rows} rows were rejected, more than --max-bad-rows {allowed:g} allows. Scores are kept; "
        f"see {out}/rejects for row, code and reason"
    )


def finish(context: RunContext, plan: RunPlan, failures: Mapping[str, PolicyFailure]) -> Outcome:
    """Write what a person reads, then mark the manifest complete."""
    summary = summary_of(context, plan, failures)
    warn_of_marks(context, plan, summary["text"]["marks"], summary["data"]["scored_by_reference"])
    warn_of_noise(context, summary)
    reopen_manifest(context.store)
    outputs = [
        _written(context.store, SUMMARY, json_bytes(summary)),
        _written(context.store, README, card(context.store).encode()),
        _written(context.store, "pipeline.yaml", dump_config(plan.config).encode()),
    ]
    beside = data_set(context.store)
    outputs += beside.files if beside is not None else ()
    for _ in map_threads(context.store.remove, context.store.list(TEXT_FOLDER), context.store.width):
        pass
    finish_manifest(context.store, manifest_with_warnings(context), now(), outputs)
    report = publish(context, plan)
    assert plan.config.out is not None
    failed = {name: failure.reason for name, failure in failures.items() if not failure.waits}
    return Outcome(plan.config.out, summary, failed, plan.config.max_bad_rows, report)


def manifest_with_warnings(context: RunContext) -> Manifest:
    """The stored manifest, with what this process warned of beside what others did."""
    found = read_manifest(context.store)
    assert found is not None
    return replace(found, warnings=tuple(dict.fromkeys((*found.warnings, *context.progress.warnings))))


def summary_of(context: RunContext, plan: RunPlan, failures: Mapping[str, PolicyFailure]) -> dict[str, Any]:
    """Numbers of every policy whose wanted blocks are all committed, whatever command scored it.

    `skipped` and `failed` say why the others that were asked for are not there.
    """
    store = context.store
    manifest = read_manifest(store)
    names = sorted(manifest.identities.policies, key=natural) if manifest else []
    scored = [name for name in names if not missing_of(context, plan.rows, Stage.scores(name))]
    unscored = [(name, failure) for name, failure in sorted(failures.items()) if name not in scored]
    sample, wanted = plan.rows.sample, plan.rows.wanted
    numbers = range(wanted) if sample is None else sample[:wanted]
    carried = [field.name for field in plan.extra]
    found = slices.columns_of_data(plan.config.slices, plan.datasets, carried, numbers)
    return {
        "schema_version": SCHEMA_VERSION,
        "data": _data_summary(store, plan),
        "text": {"marks": marks(store, plan), "render": text_notice(plan)},
        "policies": {name: _policy_summary(store, plan, name, found) for name in scored},
        "skipped": {name: failure.reason for name, failure in unscored if failure.waits},
        "failed": {name: failure.reason for name, failure in unscored if not failure.waits},
    }


WORTH_A_WARNING = frozenset(MARKS) - {"empty_answer"}
MARKED_SHARE = 0.01


def warn_of_marks(context: RunContext, plan: RunPlan, found: Mapping[str, Any], pairs: int) -> None:
    """What was done to the text of more than 1 % of the pairs, or is odd about it, with one of them to look at."""
    for mark, seen in found.items():
        if mark in WORTH_A_WARNING and seen["pairs"] > MARKED_SHARE * pairs:
            share = f"{seen['pairs']:,} of {pairs:,} pairs"
            line = f"{mark}: {MARKS[mark]}: {share}, e.g. row {seen['first']}"
            # the row is read again: another process, or an earlier one, may have made its tokens
            again = list(TextSource(plan.config, plan.datasets).pairs([seen["first"]]).values())
            encoded = (item for item in plan.renderer.encode(again) if isinstance(item, EncodedPair))
            context.progress.warn(line, "".join(f": {example(item)}" for item in encoded))


def _data_summary(store: Store, plan: RunPlan) -> dict[str, Any]:
    counts = total_counts(store, plan, Stage.reference())
    return {
        "rows": counts.pop("rows", 0),
        "files": sum(len(dataset.files) for dataset in plan.datasets),
        "datasets": {
            d.spec.name: {"rows": d.rows, "format": d.format.full_name, "polarity": d.format.polarity}
            for d in plan.datasets
        },
        "scored_by_reference": counts.pop("scored", 0),
        "rejected": counts,
    }


def total_counts(store: Store, plan: RunPlan, stage: Stage) -> dict[str, int]:
    """Counts of all wanted blocks of a stage, added up."""
    total: dict[str, int] = {}
    for record in _records(store, plan, stage):
        for name, count in record.counts.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))


def _policy_summary(store: Store, plan: RunPlan, name: str, columns: pa.Table | None) -> dict[str, Any]:
    """`columns`: columns to group by that scores lack."""
    scores = Stage.scores(name)
    own = next((policy.reference.stage for policy in plan.policies if policy.name == name), Stage.reference())
    rejects = [REJECTED_ROWS, own.rejects, scores.rejects]
    summary = summarise(
        sliced(_tables(store, plan, scores.name), columns),
        slices=plan.config.slices,
        rejects=(table for folder in rejects for table in _tables(store, plan, folder)),
    )
    loss = next((policy.loss.identity() for policy in plan.policies if policy.name == name), None)
    if loss is None:
        manifest = read_manifest(store)
        loss = manifest.identities.policies[name]["loss"] if manifest else None
    found = {"loss": loss, **summary, "noise": _noise(store, plan, name, own)}
    return {**found, "rewardbench": _rewardbench(store, plan, name, rejects)} if plan.config.rewardbench else found


def _rewardbench(store: Store, plan: RunPlan, name: str, rejects: Sequence[str]) -> dict[str, Any]:
    """The benchmark's table of one policy."""
    lost = (table["row_id"].to_pylist() for folder in rejects for table in _tables(store, plan, folder, ["row_id"]))
    manifest = read_manifest(store)
    assert manifest is not None
    setting = rewardbench.Setting.of(manifest, str(plan.config.rewardbench), name)
    tables = _tables(store, plan, Stage.scores(name).name)
    return rewardbench.summary(setting, tables, [row for rows in lost for row in rows])


def _noise(store: Store, plan: RunPlan, name: str, reference: Stage) -> dict[str, Any]:
    """The noise floor under this policy's margins, from the first block of both stages."""
    own, other = _first_note(store, plan, Stage.scores(name)), _first_note(store, plan, reference)
    if own is None and other is not None:  # taken over from the reference: the noise of both cancels
        return {"policy": None, "reference": None, "margin_mean": 0.0, "margin_max": 0.0, "share_below": 0.0}
    parts = _tables(store, plan, Stage.scores(name).name, ["margins_nats"])
    margins = [part["margins_nats"].drop_null().to_numpy() for part in parts]
    return noise.of_policy(own, other, np.concatenate([np.empty(0), *margins]))


def _first_note(store: Store, plan: RunPlan, stage: Stage) -> Mapping[str, Any] | None:
    first = next(_records(store, plan, stage), None)
    return first.notes.get("noise") if first is not None else None


def warn_of_noise(context: RunContext, summary: Mapping[str, Any]) -> None:
    """Margins that are smaller than the error they were computed with say nothing."""
    for name, policy in summary["policies"].items():
        floor, mean = policy["noise"]["margin_mean"], policy["overall"]["margins_nats"]["mean"]
        if floor is not None and mean is not None and floor > abs(mean) > 0.0:
            context.progress.warn(
                f"{name}: the mean margin, {mean:.2g} nats, is below the noise floor of its numerics, {floor:.2g} nats "
                "a pair: use --dtype float32"
            )


def marks(store: Store, plan: RunPlan) -> dict[str, Any]:
    """How many scored pairs carry each mark, with the first row that does."""
    found: dict[str, dict[str, Any]] = {}
    for table in _tables(store, plan, Stage.reference().name, ["row_id", "marks"]):
        for row_id, names in zip(table["row_id"].to_pylist(), table["marks"].to_pylist(), strict=True):
            for name in names:
                entry = found.setdefault(name, {"pairs": 0, "first": row_id})
                entry["pairs"] += 1
    return found


def _tables(store: Store, plan: RunPlan, folder: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    there = set(store.list(folder))
    names = (part_file(folder, block, plan.rows.blocks) for block in plan.rows)
    present = (name for name in names if name in there)
    return map_threads(lambda name: store.read_table(name, columns), present, store.width)


def _records(store: Store, plan: RunPlan, stage: Stage) -> Iterator[CommitRecord]:
    records = read_records(store, stage.name)
    names = (record_name(stage.name, block, plan.rows.blocks) for block in plan.rows)
    return (record for record in map_threads(records.get, names, store.width) if isinstance(record, CommitRecord))


def _written(store: Store, name: str, content: bytes) -> FileRecord:
    store.write_bytes(name, content)
    return FileRecord(name, len(content), 0, store.sha256(name))


# --- what people read -------------------------------------------------------------------------------------------------


REPORT_ROWS = 50_000
"""Pairs up to which a run writes its report by itself: beyond, memory would grow with the rows."""


def publish(context: RunContext, plan: RunPlan) -> str | None:
    """OUT/report.html, and --log-to. Neither can fail the run: a warning instead. Returns the page's place."""
    out, report = plan.config.out or "", None
    if plan.rows.wanted > REPORT_ROWS:
        context.progress.say(f"no report for more than {REPORT_ROWS:,} rows unasked: dpo-score report {out}")
    else:
        try:
            write_report(context.store, out)
            report = context.store.url(REPORT)
        except UsageError as error:
            context.progress.warn(f"no report: {error}")
    if "tensorboard" in plan.config.log_to:
        context.progress.say(f"TensorBoard: tensorboard --logdir {tensorboard_folder(out)}")
    for problem in log_run(plan.config.log_to, context.store, out) if plan.config.log_to else ():
        context.progress.warn(problem)
    return report
