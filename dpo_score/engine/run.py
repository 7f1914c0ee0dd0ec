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
from dpo_score.engine.context import Desk, desk_at
from dpo_score.engine.environment import versions
from dpo_score.engine.finish import Outcome, finish
from dpo_score.engine.input_check import refuse_changed_input
from dpo_score.engine.limits import TokenGuard, refuse_other_kind, refuse_unfit
from dpo_score.engine.model_logprobs import FastPathRefusedError, ModelValues, plain
from dpo_score.engine.own_references import on_plain_path
from dpo_score.engine.plan import Job, PolicyJob, ReferenceJob, waiting
from dpo_score.engine.prepare import identified, prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.publish import publish
from dpo_score.engine.restart import throw_away
from dpo_score.engine.resume import due_blocks, missing_of
from dpo_score.engine.signals import listening
from dpo_score.engine.stages import BlockResult, metadata, part, policy_block, reference_block, write_block
from dpo_score.engine.threads import ahead, behind
from dpo_score.errors import ConfigError, HalfWrittenError, ModelError
from dpo_score.logprobs.numerics import Numerics
from dpo_score.models.resolve import ModelSource
from dpo_score.report.trackers import check_trackers
from dpo_score.storage.commits import CommitRecord, commit, read_records
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.io import open_store
from dpo_score.storage.manifest import Manifest, forget_policy, read_manifest, save_manifest
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
    with at_desk(config, progress, check(config)) as desk:
        if restart:
            throw_away(desk.store)
        job, manifest = prepare(config, desk)
        return ended(desk, job, run_stages(desk, job, manifest))


def check(config: RunConfig) -> str:
    """What a run cannot do without, before any work; returns its folder."""
    if config.out is None:
        raise ConfigError("no folder for the results: add --out DIR (or `out:` to the pipeline file)")
    if not config.policies:
        raise ConfigError("no policy: add --policy NAME=MODEL, or use `dpo-score precompute` for the reference alone")
    check_trackers(config.log_to)
    return config.out


def run_stages(desk: Desk, job: Job, manifest: Manifest) -> dict[str, str]:
    """Every block of both stages that is due; returns the policies that failed, with the reason."""
    job = run_references(desk, job)
    return {policy.name: text for policy in job.policies if (text := _try_policy(desk, job, manifest, policy))}


def ended(desk: Desk, job: Job, failures: Mapping[str, str]) -> Outcome:
    """The summary, and what people read."""
    desk.stop.check()
    outcome = finish(desk, job, failures)
    publish(desk, job)
    return outcome


@contextmanager
def at_desk(config: RunConfig, progress: Progress, out: str, share: str | None = None) -> Iterator[Desk]:
    """OUT, or one share of it, locked and swept, signals heard, the model let go at the end."""
    if config.blocks is not None and share is None:
        raise ConfigError("--blocks divides `dpo-score run` alone: leave it out here")
    store = open_store(out, warnings_to=progress.warn)
    with store.share(share) if share else store.lock(), listening() as stop:
        store.sweep()
        with closing(desk_at(config, progress, store)) as desk:
            desk.stop = stop
            if share:
                desk.turn = store.turn
            yield desk


def run_references(desk: Desk, job: Job) -> Job:
    """Stage one for the run's reference and for those that policies brought along; the job with the paths they took."""
    for reference in job.references:
        job = _try_reference(desk, job, reference)
    return job


def _try_reference(desk: Desk, job: Job, reference: ReferenceJob) -> Job:
    """The job, on the plain path where a policy's own reference needs it."""
    refuse_other_kind(job.renderer, reference.source)
    try:
        run_reference(desk, job, reference)
    except FastPathRefusedError as refusal:
        job = on_plain_path(desk, job, reference, refusal)
        run_reference(desk, job, next(other for other in job.references if other.name == reference.name))
    return job


def run_reference(desk: Desk, job: Job, reference: ReferenceJob) -> None:
    """Stage one for one reference."""
    todo = due_blocks(desk, job, reference.stage, reference.identity, _reference_outputs(reference))
    _let(desk, job, reference, todo)


def reference_work(desk: Desk, job: Job, reference: ReferenceJob) -> tuple[Stage, Compute]:
    """What is done with each block of stage one."""
    values = _model_values(desk, job, reference.source, reference.numerics)
    guard = TokenGuard(job.tokenizer, reference.source)

    def compute(text: BlockText) -> BlockResult:
        guard.check(text.table)
        return reference_block(job, reference, text, values)

    return Stage(reference.stage, reference.label, reference.identity, metadata(reference.identity)), compute


def _let(desk: Desk, job: Job, task: ReferenceJob | PolicyJob, todo: Sequence[int]) -> None:
    """Have the blocks of one stage computed: by the crew where there is one, else here."""
    if not todo:
        return
    if desk.crew is not None:
        desk.crew.work(job, task, todo)
    else:
        work(desk, job, *stage_work(desk, job, task), todo)


def stage_work(desk: Desk, job: Job, task: ReferenceJob | PolicyJob) -> tuple[Stage, Compute]:
    """What is done with each block of a stage. The model is loaded at the first miss."""
    return policy_work(desk, job, task) if isinstance(task, PolicyJob) else reference_work(desk, job, task)


def _try_policy(desk: Desk, job: Job, manifest: Manifest, policy: PolicyJob) -> str | None:
    """None when the policy is scored, else why not."""
    if policy.failure is not None:
        return _scored_before(desk, job, manifest, policy.name, policy.failure)
    try:
        refuse_unfit(desk, job, policy)
        run_policy(desk, job, policy)
    except FastPathRefusedError as refusal:
        desk.progress.warn(f"{policy.name}: scored on the plain path, which is slower: {refusal}")
        return _retry_plain(desk, job, manifest, policy)
    except ModelError as error:
        return _not_scored(desk, job, policy, error)
    return None


def _not_scored(desk: Desk, job: Job, policy: PolicyJob, error: ModelError) -> str | None:
    """Why not, or None for a checkpoint that waits. Weights of which nothing is stored may be others next time."""
    if isinstance(error, HalfWrittenError) and not read_records(desk.store, policy.stage):
        with desk.turn():
            forget_policy(desk.store, policy.name)
    if waiting(next(spec for spec in job.config.policies if spec.name == policy.name), error):
        desk.skipped[policy.name] = str(error)
    return _unless_waiting(desk, policy.name, str(error))


def _unless_waiting(desk: Desk, policy: str, reason: str) -> str | None:
    """`reason`, or None after saying that the policy is left for the next run."""
    if policy not in desk.skipped:
        return reason
    desk.progress.say(f"{policy}: skipped, the same command scores it once it is whole: {reason}")
    return None


def _retry_plain(desk: Desk, job: Job, manifest: Manifest, policy: PolicyJob) -> str | None:
    """The policy once more with plain numerics."""
    try:
        run_policy(desk, job, _made_plain(desk, manifest, policy))
    except ModelError as error:
        return str(error)
    return None


def _made_plain(desk: Desk, manifest: Manifest, policy: PolicyJob) -> PolicyJob:
    """The policy with plain numerics, which become part of its identity in OUT."""
    with desk.turn():
        manifest = read_manifest(desk.store) or manifest
        assert policy.numerics is not None
        again = identified(replace(policy, numerics=plain(policy.numerics)), manifest.identities)
        identities = manifest.identities.joined(replace(manifest.identities, policies={policy.name: again.fields}))
        save_manifest(desk.store, replace(manifest, identities=identities))
    return again


def run_policy(desk: Desk, job: Job, policy: PolicyJob) -> None:
    """Stage two for one policy."""
    folders = (policy.stage, f"rejects/{policy.name}")
    _let(desk, job, policy, due_blocks(desk, job, policy.stage, policy.identity, folders))


def policy_work(desk: Desk, job: Job, policy: PolicyJob) -> tuple[Stage, Compute]:
    """What is done with each block of stage two."""
    blocks = job.rows.blocks
    values = None if policy.equals_reference else _model_values(desk, job, policy.source, policy.numerics)
    guard = TokenGuard(job.tokenizer, policy.source)

    def compute(text: BlockText) -> BlockResult:
        guard.check(text.table)
        found = desk.store.read_table(part(policy.reference.stage, text.block, blocks))
        return policy_block(job, policy, text, found.replace_schema_metadata(None), values)

    return Stage(policy.stage, policy.name, policy.identity, metadata(policy.identity, policy)), compute


def _model_values(desk: Desk, job: Job, source: ModelSource | None, numerics: Numerics | None) -> ModelValues | None:
    if source is None or numerics is None:
        return None
    from dpo_score.results.schemas import STATS

    stats = [STATS[name] for name in job.stats]
    return ModelValues(desk, source, numerics, stats, job.cache_snapshots.get(source.key), _next_after(job, source))


def _next_after(job: Job, source: ModelSource) -> ModelSource | None:
    """The model that comes after `source`: its weights are read while `source` computes."""
    sources = [found for _, found, _ in job.models]
    place = sources.index(source)
    return next((later for later in sources[place + 1 :] if later.digest != source.digest), None)


def work(desk: Desk, job: Job, stage: Stage, compute: Compute, todo: Sequence[int]) -> None:
    """Read ahead, compute, commit behind; in block order."""
    desk.reopen()
    texts = BlockTexts(desk, job, job.references[0].identity)
    with desk.progress.stage(stage.label, job.rows.mine, job.rows.mine - job.rows.count(todo)), behind() as submit:
        for text in ahead(texts.each(todo)):
            desk.stop.check()
            desk.progress.block(text.stop - text.start, unique_tokens(text.table))
            submit(partial(_commit, desk, job, stage, text, compute(text)))
            desk.progress.rows(text.stop - text.start)


def unique_tokens(text: pa.Table) -> int:
    """Tokens of a block with each pair's prompt counted once: what progress is measured by."""
    return sum(len(text[f"{part}_ids"].combine_chunks().flatten()) for part in ("prompt", "chosen", "rejected"))


def _commit(desk: Desk, job: Job, stage: Stage, text: BlockText, result: BlockResult) -> None:
    refuse_changed_input(desk, job, text.start, text.stop)
    record = CommitRecord(
        stage=stage.name,
        block=text.block,
        blocks=job.rows.blocks,
        start=text.start,
        stop=text.stop,
        identity=stage.identity,
        files=write_block(desk, result, stage.describe),
        counts=result.counts,
        row_ids_digest=digest(list(result.row_ids)),
        notes=result.notes,
        versions=versions(None),
    )
    commit(desk.store, record)
    desk.committed(record)


def _reference_outputs(reference: ReferenceJob) -> list[str]:
    folders = [reference.stage, f"rejects/{reference.stage}"]
    return folders if reference.name else [*folders, "rejects/data"]


def _scored_before(desk: Desk, job: Job, manifest: Manifest, policy: str, failure: str) -> str | None:
    """None for a policy that cannot be loaded but of which every wanted row is committed, else why it is not scored."""
    if policy not in manifest.identities.policies:
        return _unless_waiting(desk, policy, failure)
    missing = missing_of(desk.store, job.rows, f"scores/{policy}", prove=True)
    if not missing:
        desk.skipped.pop(policy, None)
        desk.progress.say(f"{policy}: scored before; its folder is not read again")
        return None
    rows = f"{row_ranges(missing)} of {job.rows.wanted:,} are not scored"
    return _unless_waiting(desk, policy, f"{rows}, counted from 0, and it cannot be loaded: {failure}")
