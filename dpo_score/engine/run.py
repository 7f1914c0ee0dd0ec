"""One process, one device: both stages block by block, then the summary.

Promises: committed blocks are not computed again; the data record comes last; a policy that fails is reported, a
half-written checkpoint of a glob is skipped with the reason, and the others go on; the first signal stops between two
packs, and the same command resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa

from dpo_score.config.schema import RunConfig
from dpo_score.engine.block_inputs import BlockText, BlockTexts
from dpo_score.engine.context import RunContext, open_context
from dpo_score.engine.environment import versions
from dpo_score.engine.finish import Outcome, finish, publish
from dpo_score.engine.limits import TokenGuard, refuse_other_kind, refuse_unfit
from dpo_score.engine.model_logprobs import CachedLogprobs, FastPathRefusedError, way_in_words
from dpo_score.engine.plan import PolicyTask, ReferenceTask, RunPlan, waiting, with_numerics
from dpo_score.engine.prepare import identified, prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.resume import missing_of, pending_blocks, refuse_changed_input
from dpo_score.engine.signals import signal_handlers
from dpo_score.engine.stages import BlockResult, metadata, part, policy_block, reference_block, write_block
from dpo_score.engine.threads import background_writer, prefetch
from dpo_score.errors import ConfigError, HalfWrittenError, ModelError, WeightsChangedError
from dpo_score.models.numerics import Numerics
from dpo_score.models.resolve import ModelSource
from dpo_score.report.trackers import check_trackers
from dpo_score.results.card import CONTRACT
from dpo_score.storage.base import Store
from dpo_score.storage.commits import CommitRecord, commit, discard_stage, read_records
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.manifest import Manifest, forget_policy, read_manifest, restart, save_manifest
from dpo_score.storage.open import open_store
from dpo_score.storage.resume import row_ranges

Compute = Callable[[BlockText], BlockResult]


@dataclass(frozen=True, slots=True)
class Stage:
    """Whose blocks are worked on. `describe`: what each part says of itself."""

    name: str
    label: str
    identity: str
    describe: Mapping[str, str]


def run(config: RunConfig, progress: Progress, restart: bool = False) -> Outcome:
    """Score every policy of `config`; returns what was found, errors of single policies included.

    Raises UsageError before any work, StorageError, Interrupted.
    """
    with run_context(config, progress, check(config)) as context:
        if restart:
            discard_results(context.store)
        plan, manifest = prepare(config, context)
        return ended(context, plan, run_stages(context, plan, manifest))


def check(config: RunConfig) -> str:
    """What a run cannot do without, before any work; returns its folder."""
    if config.out is None:
        raise ConfigError("no folder for the results: add --out DIR (or `out:` to the pipeline file)")
    if not config.policies:
        raise ConfigError("no policy: add --policy NAME=MODEL, or use `dpo-score precompute` for the reference alone")
    check_trackers(config.log_to)
    return config.out


def run_stages(context: RunContext, plan: RunPlan, manifest: Manifest) -> dict[str, str]:
    """Every block of both stages that is due; returns the policies that failed, with the reason."""
    plan = run_references(context, plan)
    return {policy.name: text for policy in plan.policies if (text := _try_policy(context, plan, manifest, policy))}


def ended(context: RunContext, plan: RunPlan, failures: Mapping[str, str]) -> Outcome:
    """The summary, and what people read."""
    context.stop.check()
    outcome = finish(context, plan, failures)
    publish(context, plan)
    return outcome


@contextmanager
def run_context(config: RunConfig, progress: Progress, out: str, share: str | None = None) -> Iterator[RunContext]:
    """OUT, or one share of it, locked and swept, signals heard, the model let go at the end."""
    if config.blocks is not None and share is None:
        raise ConfigError("--blocks divides `dpo-score run` alone: leave it out here")
    store = open_store(out, warnings_to=progress.warn)
    with store.share(share) if share else store.lock(), signal_handlers() as stop:
        store.sweep()
        with closing(open_context(config, progress, store)) as context:
            context.stop = stop
            if share:
                context.turn = store.turn
            yield context


def run_references(context: RunContext, plan: RunPlan) -> RunPlan:
    """Stage one for the run's reference and for those that policies brought along; the job with the paths they took."""
    for reference in plan.references:
        plan = _try_reference(context, plan, reference)
    return plan


def _try_reference(context: RunContext, plan: RunPlan, reference: ReferenceTask) -> RunPlan:
    """The job, on the plain path where a policy's own reference needs it."""
    refuse_other_kind(plan.renderer, reference.source)
    try:
        run_reference(context, plan, reference)
    except FastPathRefusedError as refusal:
        plan = on_plain_path(context, plan, reference, refusal)
        run_reference(context, plan, next(other for other in plan.references if other.name == reference.name))
    return plan


def run_reference(context: RunContext, plan: RunPlan, reference: ReferenceTask) -> None:
    """Stage one for one reference."""
    todo = pending_blocks(context, plan, reference.stage, reference.identity, _reference_outputs(reference))
    _let(context, plan, reference, todo)


def reference_work(context: RunContext, plan: RunPlan, reference: ReferenceTask) -> tuple[Stage, Compute]:
    """What is done with each block of stage one."""
    values = _model_values(context, plan, reference.source, reference.numerics)
    guard = TokenGuard(plan.tokenizer, reference.source, plan.config.text.max_length)

    def compute(text: BlockText) -> BlockResult:
        guard.check(text.table)
        return reference_block(plan, reference, text, values)

    return Stage(reference.stage, reference.label, reference.identity, metadata(reference.identity)), compute


def _let(context: RunContext, plan: RunPlan, task: ReferenceTask | PolicyTask, todo: Sequence[int]) -> None:
    """Have the blocks of one stage computed: by the crew where there is one, else here."""
    if not todo:
        return
    if context.pool is not None:
        context.pool.work(plan, task, todo)
    else:
        work(context, plan, *stage_work(context, plan, task), todo)


def stage_work(context: RunContext, plan: RunPlan, task: ReferenceTask | PolicyTask) -> tuple[Stage, Compute]:
    """What is done with each block of a stage. The model is loaded at the first miss."""
    return policy_work(context, plan, task) if isinstance(task, PolicyTask) else reference_work(context, plan, task)


def _try_policy(context: RunContext, plan: RunPlan, manifest: Manifest, policy: PolicyTask) -> str | None:
    """None when the policy is scored, else why not."""
    if policy.failure is not None:
        return _scored_before(context, plan, manifest, policy.name, policy.failure)
    try:
        refuse_unfit(context, plan, policy)
        run_policy(context, plan, policy)
    except FastPathRefusedError as refusal:
        context.progress.warn(f"{policy.name}: {way_in_words(refusal.numerics)}, which is slower: {refusal}")
        return _retry(context, plan, manifest, replace(policy, numerics=refusal.numerics))
    except ModelError as error:
        return _not_scored(context, plan, policy, error)
    return None


def _not_scored(context: RunContext, plan: RunPlan, policy: PolicyTask, error: ModelError) -> str | None:
    """Why not, or None for a checkpoint that waits. Weights of which nothing is stored may be others next time; of
    weights that changed while they were scored nothing stays stored, since no later run could complete it."""
    if isinstance(error, WeightsChangedError):
        context.reopen()
        discard_stage(context.store, policy.stage, (policy.stage, f"rejects/{policy.name}"))
    if isinstance(error, HalfWrittenError) and not read_records(context.store, policy.stage):
        with context.turn():
            forget_policy(context.store, policy.name)
    if waiting(next(spec for spec in plan.config.policies if spec.name == policy.name), error):
        context.skipped[policy.name] = str(error)
    return _unless_waiting(context, policy.name, str(error))


def _unless_waiting(context: RunContext, policy: str, reason: str) -> str | None:
    """`reason`, or None after saying that the policy is left for the next run."""
    if policy not in context.skipped:
        return reason
    context.progress.say(f"{policy}: skipped, the same command scores it once it is whole: {reason}")
    return None


def _retry(context: RunContext, plan: RunPlan, manifest: Manifest, policy: PolicyTask) -> str | None:
    """The policy once more, with the numerics that it now has."""
    try:
        run_policy(context, plan, _with_own_numerics(context, manifest, policy))
    except ModelError as error:
        return _not_scored(context, plan, policy, error)
    return None


def _with_own_numerics(context: RunContext, manifest: Manifest, policy: PolicyTask) -> PolicyTask:
    """The policy with its own numerics, which become part of its identity in OUT."""
    with context.turn():
        manifest = read_manifest(context.store) or manifest
        again = identified(policy, manifest.identities)
        identities = manifest.identities.joined(replace(manifest.identities, policies={policy.name: again.fields}))
        save_manifest(context.store, replace(manifest, identities=identities))
    return again


def run_policy(context: RunContext, plan: RunPlan, policy: PolicyTask) -> None:
    """Stage two for one policy."""
    folders = (policy.stage, f"rejects/{policy.name}")
    _let(context, plan, policy, pending_blocks(context, plan, policy.stage, policy.identity, folders))


def policy_work(context: RunContext, plan: RunPlan, policy: PolicyTask) -> tuple[Stage, Compute]:
    """What is done with each block of stage two."""
    blocks = plan.rows.blocks
    values = None if policy.equals_reference else _model_values(context, plan, policy.source, policy.numerics)
    guard = TokenGuard(plan.tokenizer, policy.source, plan.config.text.max_length)

    def compute(text: BlockText) -> BlockResult:
        guard.check(text.table)
        found = context.store.read_table(part(policy.reference.stage, text.block, blocks))
        return policy_block(plan, policy, text, found.replace_schema_metadata(None), values)

    return Stage(policy.stage, policy.name, policy.identity, metadata(policy.identity, policy)), compute


def _model_values(
    context: RunContext, plan: RunPlan, source: ModelSource | None, numerics: Numerics | None
) -> CachedLogprobs | None:
    if source is None or numerics is None:
        return None
    from dpo_score.results.schemas import STATS

    stats = [STATS[name] for name in plan.stats]
    return CachedLogprobs(
        context, source, numerics, stats, plan.cache_snapshots.get(source.key), _next_after(plan, source)
    )


def _next_after(plan: RunPlan, source: ModelSource) -> ModelSource | None:
    """The model that comes after `source`: its weights are read while `source` computes."""
    sources = [found for _, found, _ in plan.models]
    place = sources.index(source)
    return next((later for later in sources[place + 1 :] if later.digest != source.digest), None)


def work(context: RunContext, plan: RunPlan, stage: Stage, compute: Compute, todo: Sequence[int]) -> None:
    """Read ahead, compute, commit behind; in block order."""
    context.reopen()
    texts = BlockTexts(context, plan, plan.references[0].identity)
    with (
        context.progress.stage(stage.label, plan.rows.mine, plan.rows.mine - plan.rows.count(todo)),
        background_writer() as submit,
    ):
        for text in prefetch(texts.each(todo)):
            context.stop.check()
            context.progress.block(text.stop - text.start, unique_tokens(text.table))
            submit(partial(_commit, context, plan, stage, text, compute(text)))
            context.progress.rows(text.stop - text.start)


def unique_tokens(text: pa.Table) -> int:
    """Tokens of a block with each pair's prompt counted once: what progress is measured by."""
    return sum(len(text[f"{part}_ids"].combine_chunks().flatten()) for part in ("prompt", "chosen", "rejected"))


def _commit(context: RunContext, plan: RunPlan, stage: Stage, text: BlockText, result: BlockResult) -> None:
    refuse_changed_input(context, plan, text.start, text.stop)
    record = CommitRecord(
        stage=stage.name,
        block=text.block,
        blocks=plan.rows.blocks,
        start=text.start,
        stop=text.stop,
        identity=stage.identity,
        files=write_block(context, result, stage.describe),
        counts=result.counts,
        row_ids_digest=digest(list(result.row_ids)),
        notes=result.notes,
        versions=versions(None),
    )
    commit(context.store, record)
    context.committed(record)


def _reference_outputs(reference: ReferenceTask) -> list[str]:
    folders = [reference.stage, f"rejects/{reference.stage}"]
    return folders if reference.name else [*folders, "rejects/data"]


def _scored_before(context: RunContext, plan: RunPlan, manifest: Manifest, policy: str, failure: str) -> str | None:
    """None for a policy that cannot be loaded but of which every wanted row is committed, else why it is not scored."""
    if policy not in manifest.identities.policies:
        return _unless_waiting(context, policy, failure)
    missing = missing_of(context.store, plan.rows, f"scores/{policy}", prove=True)
    if not missing:
        context.skipped.pop(policy, None)
        context.progress.say(f"{policy}: scored before; its folder is not read again")
        return None
    rows = f"{row_ranges(missing)} of {plan.rows.wanted:,} are not scored"
    return _unless_waiting(context, policy, f"{rows}, counted from 0, and it cannot be loaded: {failure}")


# --- own references ------------------------------------------------------------


def on_plain_path(
    context: RunContext, plan: RunPlan, reference: ReferenceTask, refusal: FastPathRefusedError
) -> RunPlan:
    """The plan with slower numerics for one reference, and a warning. The run's own has had its numerics decided."""
    assert reference.numerics is not None
    if not reference.name:
        raise ModelError(f"{reference.label}: {refusal}. Say --path plain, which is slower, and choose another --out")
    context.progress.warn(f"{reference.label}: {way_in_words(refusal.numerics)}, which is slower: {refusal}")
    again = with_numerics(reference, refusal.numerics, plan.identities)
    policies = tuple(_following(policy, again, plan) for policy in plan.policies)
    _keep(context, again, next(policy for policy in policies if policy.name == again.name))
    references = tuple(again if other.name == again.name else other for other in plan.references)
    return replace(plan, references=references, policies=policies)


def _following(policy: PolicyTask, again: ReferenceTask, plan: RunPlan) -> PolicyTask:
    """The policy whose reference it is, with the identity that follows; any other as it was."""
    if policy.reference.name != again.name:
        return policy
    return identified(replace(policy, reference=again), plan.identities)


def _keep(context: RunContext, again: ReferenceTask, policy: PolicyTask) -> None:
    """Into OUT's manifest; a policy that could not be resolved has no identity there."""
    with context.turn():
        found = read_manifest(context.store)
        assert found is not None
        known = {policy.name: policy.fields} if policy.name in found.identities.policies else {}
        identities = found.identities.joined(replace(found.identities, policies=known))
        assert again.numerics is not None
        numerics = {**found.numerics, again.stage: again.numerics.to_json()}
        save_manifest(context.store, replace(found, identities=identities, numerics=numerics))


# --- restart ------------------------------------------------------------


def discard_results(store: Store) -> None:
    """Raises ConfigError where `precompute` wrote a data set: it would outlive the values and records it belongs to."""
    if store.exists(CONTRACT):
        raise ConfigError(
            f"{store.url()} also holds a data set with reference log-probs (data/, {CONTRACT}), which --restart would "
            "leave without its records: choose another --out, or delete the folder"
        )
    restart(store)
