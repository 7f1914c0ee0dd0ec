"""`dpo-score run`: both stages block by block, then the summary.

    prepare → for each reference: its blocks → for each policy: its blocks → finish

Committed blocks are not computed again. A policy that fails is reported, a half-written checkpoint of a glob is left
for the next run with the reason, and the others go on. The first signal stops between two packs, and the same command
resumes. Who computes the blocks, this process or workers of a cluster, is decided in executors/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import pyarrow as pa

from dpo_score.config.schema import RunConfig
from dpo_score.engine.block_inputs import BlockText, BlockTexts, TextPlan
from dpo_score.engine.context import RunContext, run_context
from dpo_score.engine.environment import versions
from dpo_score.engine.finish import Outcome, finish
from dpo_score.engine.limits import TokenGuard, refuse_other_kind, refuse_unfit
from dpo_score.engine.model_logprobs import (
    CachedLogprobs,
    Computed,
    FastPathRefusedError,
    LogprobSource,
    Lookup,
    noise_name,
    warn_slower,
)
from dpo_score.engine.plan import PolicyFailure, PolicyTask, ReferenceTask, RunPlan, Task
from dpo_score.engine.prepare import prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.resume import missing_of, pending_blocks, refuse_changed_input
from dpo_score.engine.stages import (
    BlockResult,
    part_metadata,
    policy_block,
    reference_block,
    scored_rows,
    write_block,
)
from dpo_score.engine.text_processes import encoded_apart, process_count
from dpo_score.engine.threads import background_writer, prefetch
from dpo_score.errors import ConfigError, GroupLostError, HalfWrittenError, ModelError, WeightsChangedError
from dpo_score.report.trackers import check_trackers
from dpo_score.results import noise
from dpo_score.results.card import CONTRACT
from dpo_score.results.schemas import STATS, sequences
from dpo_score.storage.base import Store
from dpo_score.storage.commits import CommitRecord, commit, discard_stage, read_records
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.manifest import forget_policy, read_manifest, save_manifest
from dpo_score.storage.manifest import restart as restart_manifest
from dpo_score.storage.resume import row_ranges

WithWorkers: TypeAlias = Callable[[RunConfig, RunContext], AbstractContextManager[tuple[RunConfig, RunContext]]]
"""Adds workers to a context for as long as they are needed (executors/choose.py)."""

GROUP_ATTEMPTS = 3
"""How often the processes of a tensor-parallel group are started for one stage."""


def run(
    config: RunConfig, progress: Progress, restart: bool = False, with_workers: WithWorkers | None = None
) -> Outcome:
    """Score every policy of `config`; returns what was found, errors of single policies included.

    Args:
        restart: throw away what earlier runs computed in this folder.

    Raises UsageError before any work, StorageError, Interrupted.
    """
    with run_context(config, progress, checked_out(config)) as context:
        if restart:
            discard_results(context.store)
        if with_workers is None:
            plan, _ = prepare(config, context)
            return end_run(context, plan, run_stages(context, plan))
        with with_workers(config, context) as (config, working):
            plan, _ = prepare(config, working)
            failures = run_stages(working, plan)
        return end_run(context, plan, failures)


def checked_out(config: RunConfig) -> str:
    """The folder of the results. ConfigError for a request that lacks it, or a policy, or a tracker it names."""
    if config.out is None:
        raise ConfigError("no folder for the results: add --out DIR (or `out:` to the pipeline file)")
    if not config.policies:
        raise ConfigError("no policy: add --policy NAME=MODEL, or use `dpo-score precompute` for the reference alone")
    check_trackers(config.log_to)
    return config.out


def discard_results(store: Store) -> None:
    """--restart: delete what runs wrote here. ConfigError where `precompute` wrote a data set that needs it."""
    if store.exists(CONTRACT):
        raise ConfigError(
            f"{store.url()} also holds a data set with reference log-probs (data/, {CONTRACT}), which --restart would "
            "leave without its records: choose another --out, or delete the folder"
        )
    restart_manifest(store)


def run_stages(context: RunContext, plan: RunPlan) -> dict[str, PolicyFailure]:
    """Every block of both stages that is missing; returns the policies that are not scored, with the reason."""
    scored = [policy for policy in plan.policies if policy.failure is None]
    for name, failure in plan.unloadable.items():  # before hours of stage one, while it can still be mended
        context.progress.say(f"{name}: cannot be loaded, so this run will not score it: {failure.reason}")
    with context.progress.run(len(plan.references) + len(scored)):
        plan = run_references(context, plan)
        found = {policy.name: score_policy(context, plan, policy) for policy in plan.policies}
    return {name: failure for name, failure in found.items() if failure is not None}


def end_run(context: RunContext, plan: RunPlan, failures: dict[str, PolicyFailure]) -> Outcome:
    """The summary, and what people read."""
    context.stop.check()
    return finish(context, plan, failures)


# --- the two stages ---------------------------------------------------------------------------------------------------


def run_references(context: RunContext, plan: RunPlan) -> RunPlan:
    """Stage one for the run's reference and for those that policies have of their own.

    Returns the plan with the paths they were scored on.
    """
    for reference in plan.references:
        refuse_other_kind(plan.renderer, reference.source)
        plan = compute_stage(context, plan, reference)
    return plan


def score_policy(context: RunContext, plan: RunPlan, policy: PolicyTask) -> PolicyFailure | None:
    """Stage two for one policy. None when every wanted row is scored, else why not."""
    if policy.failure is not None:
        failure = _scored_before(context, plan, policy, policy.failure)
    else:
        try:
            refuse_unfit(context, plan, policy)
            compute_stage(context, plan, policy)
            return None
        except ModelError as error:
            if isinstance(error, WeightsChangedError):  # no later run could complete what is stored of them
                context.reopen_manifest()
                discard_stage(context.store, policy.stage.name, policy.stage.folders)
            if isinstance(error, HalfWrittenError) and not read_records(context.store, policy.stage.name):
                with context.manifest_lock():  # nothing is stored of these weights, so the next run may find others
                    forget_policy(context.store, policy.name)
            spec = next(spec for spec in plan.config.policies if spec.name == policy.name)
            failure = PolicyFailure.of(spec, error)
    if failure is not None and failure.waits:
        context.progress.say(f"{policy.name}: skipped, the same command scores it once it is whole: {failure.reason}")
    return failure


def _scored_before(
    context: RunContext, plan: RunPlan, policy: PolicyTask, failure: PolicyFailure
) -> PolicyFailure | None:
    """None for a policy that does not load but of which every wanted row is committed, else why it is not scored."""
    manifest = read_manifest(context.store)
    if manifest is None or policy.name not in manifest.identities.policies:
        return failure
    missing = missing_of(context, plan.rows, policy.stage, prove=True)
    if not missing:
        context.progress.say(f"{policy.name}: scored before; its folder is not read again")
        return None
    rows = f"{row_ranges(missing)} of {plan.rows.wanted:,} are not scored"
    return replace(failure, reason=f"{rows}, counted from 0, and it cannot be loaded: {failure.reason}")


def compute_stage(context: RunContext, plan: RunPlan, task: Task) -> RunPlan:
    """Every block of one task that is missing.

    How the run computes is checked on the model when it is loaded. Where the check refuses it, the task is scored in
    the slower way that the check found right: the manifest and the returned plan say so from then on.
    """
    try:
        _compute_pending(context, plan, task)
    except FastPathRefusedError as refusal:
        plan = with_own_numerics(context, plan, task, refusal)
        _compute_pending(context, plan, plan.task(task.stage))
    return plan


def with_own_numerics(context: RunContext, plan: RunPlan, task: Task, refusal: FastPathRefusedError) -> RunPlan:
    """The plan with slower numerics for one task, which become part of its identity in the manifest.

    ModelError for the run's own reference: its numerics were checked before the first block, and all values depend on
    them.
    """
    if isinstance(task, ReferenceTask) and not task.name:
        raise ModelError(f"{task.label}: {refusal}. Say --path plain, which is slower, and choose another --out")
    numerics = refusal.numerics
    warn_slower(context.progress, task.label, numerics, refusal)
    plan = plan.with_numerics(task, numerics)
    policy = next(policy for policy in plan.policies if policy.name == task.name)
    with context.manifest_lock():
        found = read_manifest(context.store)
        assert found is not None
        known = isinstance(task, PolicyTask) or policy.name in found.identities.policies
        changed = replace(found.identities, policies={policy.name: policy.fields} if known else {})
        stages = {task.stage.name: numerics.to_json()} if isinstance(task, ReferenceTask) else {}
        save_manifest(
            context.store,
            replace(found, identities=found.identities.joined(changed), numerics={**found.numerics, **stages}),
        )
    return plan


def _compute_pending(context: RunContext, plan: RunPlan, task: Task) -> None:
    """The blocks of one task that are missing: by the workers where there are any, else here.

    Where a process that holds a part of the model dies, its group is started again for what is still missing.
    """
    for attempt in range(1, GROUP_ATTEMPTS + 1):
        pending = pending_blocks(context, plan, task)
        if not pending:
            context.progress.nothing_to_do(task.label)
            return
        if context.workers is not None:
            context.workers.work(plan, task, pending)
            return
        try:
            compute_blocks(context, plan, task, block_steps(context, plan, task), pending)
            return
        except GroupLostError as lost:
            context.loader.close()
            if attempt == GROUP_ATTEMPTS:
                raise
            context.progress.warn(f"{task.label}: {lost.reason}; its processes are started again")


# --- blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PreparedBlock:
    """A block before its values are computed: `text` holds the rows of the task, `lookup` what the cache knows of them
    (None where the task has no model); `reference_part` is what stage one stored, for a policy."""

    text: BlockText
    lookup: Lookup | None
    reference_part: pa.Table | None
    tokens: int


class BlockSteps:
    """What is done with each block of a task, in three steps for three threads: before its values are computed, with
    the model, and afterwards. The model is loaded at the first value that the cache lacks."""

    def __init__(
        self,
        plan: RunPlan,
        task: Task,
        logprobs: LogprobSource | None,
        reference_part: Callable[[int], pa.Table],
        check: Callable[[pa.Table], None] = lambda table: None,
    ) -> None:
        """`reference_part`: what stage one stored of a block; `check`: refuses token ids that a model cannot take."""
        self._plan, self._task, self._logprobs = plan, task, logprobs
        self._reference_part, self._check = reference_part, check

    def prepare(self, text: BlockText) -> PreparedBlock:
        """Keys and cached values of a block. Nothing here waits for a model, or makes one wait."""
        self._check(text.table)
        tokens, part = unique_tokens(text.table), None
        if isinstance(self._task, PolicyTask):
            part = self._reference_part(text.block)
            text = scored_rows(text, part)
        lookup = None if self._logprobs is None else self._logprobs.look_up(sequences(text.table))
        return PreparedBlock(text, lookup, part, tokens)

    def compute(self, block: PreparedBlock) -> Computed | None:
        """The values that the cache lacks; the noise floor is measured on the first block."""
        if self._logprobs is None or block.lookup is None:
            return None
        sample = 2 * noise.sample_size(block.text.table) if block.text.block == 0 else 0
        return self._logprobs.compute(block.lookup, sample)

    def result(self, block: PreparedBlock, computed: Computed | None) -> BlockResult:
        """New values into the cache, and the tables of the block."""
        role = "ref" if isinstance(self._task, ReferenceTask) else "policy"
        values = None
        if self._logprobs is not None and computed is not None:
            self._logprobs.keep(role, computed)
            values = computed.values
        if isinstance(self._task, ReferenceTask):
            return reference_block(self._plan, self._task, block.text, values)
        assert block.reference_part is not None
        return policy_block(self._plan, self._task, block.text, block.reference_part, values)


def block_steps(context: RunContext, plan: RunPlan, task: Task) -> BlockSteps:
    """The steps of a task whose blocks are committed to the folder."""
    logprobs = None
    if task.source is not None and task.numerics is not None and not _taken_over(task):
        source, stats = task.source, [STATS[name] for name in plan.stats]
        snapshot, noise_then = plan.cache_snapshots.get(source.key), plan.cache_snapshots.get(noise_name(source), ())
        upcoming = plan.model_after(source)
        then = (snapshot, upcoming, noise_then)
        logprobs = CachedLogprobs(context, source, task.numerics, stats, *then, plan.pictures)
    guard = TokenGuard(plan.tokenizer, task.source, plan.config.text.max_length)

    def stored(block: int) -> pa.Table:
        assert isinstance(task, PolicyTask)
        part = context.store.read_table(task.reference.stage.part(block, plan.rows.blocks))
        return part.replace_schema_metadata(None)

    return BlockSteps(plan, task, logprobs, stored, guard.check)


def _taken_over(task: Task) -> bool:
    return isinstance(task, PolicyTask) and task.equals_reference


def compute_blocks(
    context: RunContext,
    plan: RunPlan,
    task: Task,
    steps: BlockSteps,
    blocks: Sequence[int],
    committed: Callable[[CommitRecord], None] = lambda record: None,
) -> None:
    """Compute and commit `blocks` in order: the next is read and looked up while one is computed, and the last is
    derived and written. This thread does nothing but ask the model.

    `committed` is called with the record of each block, in the thread that writes.
    """
    context.reopen_manifest()
    texts = BlockTexts(context, plan, plan.references[0].identity, keep=plan.reads_texts_after(task))
    done = plan.rows.mine - plan.rows.count(blocks)
    device = task.numerics.device_kind if task.numerics is not None else "cpu"
    count = process_count(context.compute.text_processes, plan.rows.count(blocks), device)
    with (
        context.progress.stage(task.label, plan.rows.mine, done),
        encoded_apart(TextPlan.of(plan), texts.missing(blocks) if count else (), count, context.progress) as made,
        background_writer() as submit,
        closing(prefetch(map(steps.prepare, texts.each(blocks, made)))) as prepared,
    ):
        for block in prepared:
            context.stop.check()
            rows = block.text.stop - block.text.start
            context.progress.block(rows, block.tokens)
            computed = steps.compute(block)
            submit(partial(_commit, context, plan, task, block.text, partial(steps.result, block, computed), committed))
            context.progress.rows(rows)


def unique_tokens(text: pa.Table) -> int:
    """Tokens of a block with each pair's prompt counted once: what progress is measured by."""
    return sum(len(text[f"{part}_ids"].combine_chunks().flatten()) for part in ("prompt", "chosen", "rejected"))


def _commit(
    context: RunContext,
    plan: RunPlan,
    task: Task,
    text: BlockText,
    derive: Callable[[], BlockResult],
    committed: Callable[[CommitRecord], None],
) -> None:
    result = derive()
    refuse_changed_input(context, plan, text.start, text.stop)
    record = CommitRecord(
        stage=task.stage.name,
        block=text.block,
        blocks=plan.rows.blocks,
        start=text.start,
        stop=text.stop,
        identity=task.identity,
        files=write_block(context, result, part_metadata(task)),
        counts=result.counts,
        row_ids_digest=digest(list(result.row_ids)),
        notes=result.notes,
        versions=versions(None),
    )
    commit(context.store, record)
    committed(record)
