"""A run in N independent processes, for schedulers that know job arrays and nothing else, and its end.

    dpo-score run PIPELINE --blocks 0/3     dpo-score run PIPELINE --blocks 1/3     …     dpo-score finish OUT

Promises: each process works on its own contiguous run of blocks, stage one before stage two, under a lock of its own
share; the first to come decides the numerics for all while the others wait; what N processes leave behind is what one
would have left. Processes may be repeated, killed and run in any order. Not here: how blocks are computed (local.py).
The folders OUT and, where it is not empty at the start, CACHE must be the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from dpo_score.config import RunConfig
from dpo_score.errors import ConfigError, UsageError
from dpo_score.pipeline import dump_config
from dpo_score.run.desk import Desk
from dpo_score.run.finish import Outcome
from dpo_score.run.job import Job, PolicyJob
from dpo_score.run.local import at_desk, check, ended, run_stages
from dpo_score.run.pair_texts import stored_config
from dpo_score.run.prepare import prepare
from dpo_score.run.progress import Progress
from dpo_score.store.manifest import Manifest, read_manifest, save_manifest
from dpo_score.store.records import CommitRecord, read_records, record_name
from dpo_score.store.storage import Store, open_store

SHOWN_STAGES = 8


def run_share(config: RunConfig, progress: Progress, restart: bool = False) -> Outcome:
    """One share of both stages; the outcome has no summary. Raises as `local.run` does."""
    if restart:
        raise ConfigError(
            "--restart with --blocks would have each process throw away what the others computed: delete the folder "
            "once, then start them"
        )
    index, shares = config.share
    with at_desk(config, progress, check(config), share=f"{index}-of-{shares}") as desk:
        job, manifest = _begun(config, desk)
        progress.say(f"share {index} of {shares}: {len(list(job.rows)):,} blocks, {job.rows.mine:,} rows")
        failures = run_stages(desk, job, manifest)
        _keep_warnings(desk)
    progress.say(f"share {index} of {shares} is done; when all are: dpo-score finish {config.out}")
    return Outcome(str(config.out), {"policies": {}}, failures)


def _begun(config: RunConfig, desk: Desk) -> tuple[Job, Manifest]:
    """The job; OUT/manifest.json and pipeline.yaml are there afterwards. The manifest is written by one at a time."""
    store = desk.store
    if read_manifest(store) is None:
        desk.progress.say("the first share to come decides the numerics for all: the others wait for it")
        with store.turn():
            if read_manifest(store) is None:
                job, manifest = prepare(config, desk)
                whole = job.config.model_copy(update={"blocks": None})
                store.write_bytes("pipeline.yaml", dump_config(whole).encode())
                return job, manifest
    return prepare(config, desk, opening=store.turn)


def _keep_warnings(desk: Desk) -> None:
    """What this process warned of, into the manifest that all share."""
    with desk.store.turn():
        found = read_manifest(desk.store)
        assert found is not None
        warnings = tuple(dict.fromkeys((*found.warnings, *desk.progress.warnings)))
        if warnings != found.warnings:
            save_manifest(desk.store, replace(found, warnings=warnings))


def finish(out: str, progress: Progress, without: Sequence[str] = ()) -> Outcome:
    """The summary, the card and the report of what the shares left, and state `complete`.

    `without`: policies to leave out. UsageError naming the blocks that are missing.
    """
    if read_manifest(open_store(out)) is None:
        raise UsageError(f"{out} holds no run: it has no manifest.json")
    config = stored_config(open_store(out)).model_copy(update={"out": out})
    with at_desk(_left(config, without), progress, out) as desk:
        job, _ = prepare(_left(config, without), desk)
        unscored = [policy for policy in job.policies if policy.failure and _missing(desk.store, job, policy.stage)]
        _refuse_missing(desk.store, job, unscored, out)
        failed = [policy for policy in unscored if policy.name not in desk.skipped]
        return ended(desk, job, {policy.name: str(policy.failure) for policy in failed})


def _left(config: RunConfig, without: Sequence[str]) -> RunConfig:
    names = [policy.name for policy in config.policies]
    if unknown := sorted(set(without) - set(names)):
        raise ConfigError(f"--without {unknown[0]}: the run has no such policy; it has {', '.join(names)}")
    return config.model_copy(update={"policies": tuple(p for p in config.policies if p.name not in without)})


def _refuse_missing(store: Store, job: Job, unscored: Sequence[PolicyJob], out: str) -> None:
    policies = [policy for policy in job.policies if policy not in unscored]
    stages = [*(r.stage for r in job.references), *(policy.stage for policy in policies)]
    missing = {stage: blocks for stage in stages if (blocks := _missing(store, job, stage))}
    if not missing:
        return
    shown = [f"  {stage}: {_ranges(blocks)} of {len(list(job.rows))} blocks" for stage, blocks in missing.items()]
    more = f"\n  … and {len(shown) - SHOWN_STAGES} more stages" if len(shown) > SHOWN_STAGES else ""
    raise UsageError(
        f"{out} is not finished; what is missing, counted from 0:\n" + "\n".join(shown[:SHOWN_STAGES]) + more + "\n"
        "Run the shares that did not end well once more with the same command, or all of it at once without --blocks "
        "(what is committed is not computed again). A policy that no share could score: --without NAME"
    )


def _missing(store: Store, job: Job, stage: str) -> list[int]:
    records = read_records(store, stage)
    names = {block: record_name(stage, block, job.rows.blocks) for block in job.rows}
    return [block for block, name in names.items() if not isinstance(records.get(name), CommitRecord)]


def _ranges(blocks: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs = [[block for _, block in run] for _, run in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
