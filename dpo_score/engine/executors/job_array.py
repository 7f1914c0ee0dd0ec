"""A run in N independent processes, for schedulers that know job arrays and nothing else, and its end.

    dpo-score run PIPELINE --blocks 0/3     dpo-score run PIPELINE --blocks 1/3     …     dpo-score finish OUT

Each process works on its own contiguous run of blocks, stage one before stage two, under a lock of its own share. The
first to come decides the numerics for all while the others wait. Each writes down what it was asked for before it
works, so that the end knows what must be there. N processes leave what one process would have left; they may be
repeated, killed and run in any order. The folders OUT and, where it is not empty at the start, CACHE must be the same
for all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import groupby

from dpo_score.config.load import dump_config, with_secrets_again
from dpo_score.config.schema import PolicySpec, RunConfig
from dpo_score.engine.context import RunContext, run_context
from dpo_score.engine.finish import Outcome, manifest_with_warnings
from dpo_score.engine.plan import RunPlan
from dpo_score.engine.prepare import prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.resume import missing_of
from dpo_score.engine.run import checked_out, end_run, run_stages
from dpo_score.errors import ConfigError, UsageError
from dpo_score.results.source_text import PIPELINE, stored_config
from dpo_score.storage.base import Store
from dpo_score.storage.commits import CommitRecord, read_records
from dpo_score.storage.manifest import Manifest, read_manifest, reopen_manifest, save_manifest
from dpo_score.storage.open import open_store
from dpo_score.storage.stage import Stage

SHOWN_STAGES = 8


def run_share(config: RunConfig, progress: Progress, restart: bool = False) -> Outcome:
    """One share of both stages; the outcome has no summary. Raises as `engine.run.run` does."""
    if restart:
        raise ConfigError(
            "--restart with --blocks would have each process throw away what the others computed: delete the folder "
            "once, then start them"
        )
    index, shares = config.share
    with run_context(config, progress, checked_out(config), share=f"{index}-of-{shares}") as context:
        plan, _ = _begun(config, context)
        progress.say(f"share {index} of {shares}: {len(list(plan.rows)):,} blocks, {plan.rows.mine:,} rows")
        failures = run_stages(context, plan)
        with context.manifest_lock():
            save_manifest(context.store, manifest_with_warnings(context))
    progress.say(f"share {index} of {shares} is done; when all are: dpo-score finish {config.out}")
    failed = {name: failure.reason for name, failure in failures.items() if not failure.waits}
    return Outcome(str(config.out), {"policies": {}}, failed)


def _begun(config: RunConfig, context: RunContext) -> tuple[RunPlan, Manifest]:
    """The job; OUT/manifest.json and pipeline.yaml are there afterwards, and tell of it. Both are written by one at a
    time."""
    store = context.store
    if read_manifest(store) is None:
        context.progress.say("the first share to come decides the numerics for all: the others wait for it")
        with store.turn():
            if read_manifest(store) is None:
                plan, manifest = prepare(config, context)
                _write_down(store, plan.config)
                return plan, manifest
    plan, manifest = prepare(config, context, lock=store.turn)
    with store.turn():
        _write_down(store, plan.config)
    return plan, manifest


def _write_down(store: Store, config: RunConfig) -> None:
    """Into OUT/pipeline.yaml what this share was asked for, beside the policies that others were."""
    policies = {policy.name: policy for policy in (*_others(store, config), *config.policies)}
    whole = config.model_copy(update={"blocks": None, "policies": tuple(policies.values())})
    content = dump_config(whole).encode()
    if not store.exists(PIPELINE) or store.read_bytes(PIPELINE) != content:
        reopen_manifest(store)
        store.write_bytes(PIPELINE, content)


def _others(store: Store, config: RunConfig) -> list[PolicySpec]:
    """The policies in OUT/pipeline.yaml, with what they take from that file where `config` says otherwise."""
    if not store.exists(PIPELINE):
        return []
    before = stored_config(store)
    loss = None if before.loss == config.loss else before.loss
    base = None if before.policy_base == config.policy_base else before.policy_base
    return [p.model_copy(update={"loss": p.loss or loss, "base": p.base or base}) for p in before.policies]


def finish(out: str, progress: Progress, without: Sequence[str] = (), allowed: Collection[str] = ()) -> Outcome:
    """The summary, the card and the report of what the shares left, and state `complete`. Computes nothing.

    `without`: policies to leave out. `allowed`: what the user consents to (source_text.CONSENT).
    UsageError naming the blocks that are missing, or too many.
    """
    config = _begun_at(out, allowed)
    with run_context(config, progress, out) as context:
        found = read_manifest(context.store)
        assert found is not None
        config = _left(config, found, without)
        plan, _ = prepare(config, context, computes=False)
        unscored = [policy for policy in plan.policies if policy.failure and _missing(context, plan, policy.stage)]
        unnamed = sorted({*found.identities.policies} - {*without} - {policy.name for policy in plan.policies})
        stages = [task.stage for task in plan.tasks if task not in unscored]
        _refuse_missing(context, plan, [*stages, *map(Stage.scores, unnamed)], out)
        _refuse_more(context.store, plan, out)
        return end_run(context, plan, {policy.name: policy.failure for policy in unscored if policy.failure})


def _begun_at(out: str, allowed: Collection[str]) -> RunConfig:
    """What OUT was asked for. Raises UsageError where nothing was."""
    store = open_store(out)
    if read_manifest(store) is None:
        raise UsageError(f"{out} holds no run: it has no manifest.json")
    if not store.exists(PIPELINE):
        raise UsageError(
            f"{out} has no {PIPELINE}: the run that was begun there has not ended, and no share (--blocks I/N) was "
            "started. Start the same command again, or its shares"
        )
    return with_secrets_again(stored_config(store, allowed), store.url(PIPELINE)).model_copy(update={"out": out})


def _left(config: RunConfig, found: Manifest, without: Sequence[str]) -> RunConfig:
    names = list(dict.fromkeys((*(policy.name for policy in config.policies), *found.identities.policies)))
    if unknown := sorted(set(without) - set(names)):
        raise ConfigError(f"--without {unknown[0]}: the run has no such policy; it has {', '.join(names)}")
    return config.model_copy(update={"policies": tuple(p for p in config.policies if p.name not in without)})


def _refuse_missing(context: RunContext, plan: RunPlan, stages: Sequence[Stage], out: str) -> None:
    missing = {stage: blocks for stage in stages if (blocks := _missing(context, plan, stage))}
    if not missing:
        return
    shown = [f"  {stage}: {_ranges(blocks)} of {len(list(plan.rows))} blocks" for stage, blocks in missing.items()]
    more = f"\n  … and {len(shown) - SHOWN_STAGES} more stages" if len(shown) > SHOWN_STAGES else ""
    whole = "the same command without --blocks" if "://" in out else f"dpo-score run {out}/{PIPELINE} --out {out}"
    raise UsageError(
        f"{out} is not finished; what is missing, counted from 0:\n" + "\n".join(shown[:SHOWN_STAGES]) + more + "\n"
        f"Run the shares that did not end well once more with the same command, or all of it at once: {whole} (what is "
        "committed is not computed again). A policy that a run was given and no share: give it to them, too; one that "
        "none could score: --without NAME"
    )


def _missing(context: RunContext, plan: RunPlan, stage: Stage) -> list[int]:
    """Blocks that are not committed, or with fewer rows than are wanted now (an earlier --limit)."""
    size = plan.rows.block_rows
    missing = missing_of(context, plan.rows, stage)
    return [block for start, stop in missing for block in range(start // size, -(-stop // size))]


def _refuse_more(store: Store, plan: RunPlan, out: str) -> None:
    """Rows beyond --limit were not scored for nothing: the shares were not all started with one command."""
    stops = [
        record.stop
        for record in read_records(store, Stage.reference().name).values()
        if isinstance(record, CommitRecord)
    ]
    scored = max(stops, default=0)
    if scored > plan.rows.wanted:
        raise UsageError(
            f"{out}/{PIPELINE} asks for the first {plan.rows.wanted:,} rows, but {scored:,} are scored: the shares "
            "were started with different --limit. Start one of them again without it (what is committed is not "
            "computed again), then finish"
        )


def _ranges(blocks: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs = [[block for _, block in run] for _, run in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
