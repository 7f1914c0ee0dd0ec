"""A configuration → a `RunPlan`: data opened, models found, every `auto` decided; then the folder's manifest.

One preparation for every command that scores: `run`, `precompute`, `score()` on objects in memory, the estimates of
`--dry-run`, and each worker of a cluster. What the folder has already decided (numerics, block size, the date that
templates print, cache files) is read first and used instead of what would be decided today. Nothing here runs a model
but the one-off check of the fast path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dpo_score.config.schema import ComputeSpec, ModelSpec, PolicySpec, RunConfig, TextSpec
from dpo_score.data.dataset import Dataset, has_pictures, mean_text_bytes, only_ids, open_data
from dpo_score.engine.context import ManifestLock, RunContext
from dpo_score.engine.environment import (
    commit_lines,
    compared_environment,
    host,
    model_commits,
    model_names,
    now,
    pinned,
    versions,
)
from dpo_score.engine.limits import warn_of_lengths
from dpo_score.engine.model_logprobs import cache_state, checked_numerics, continued_numerics, on_device
from dpo_score.engine.plan import (
    PICTURE_ROWS,
    PolicyFailure,
    PolicyTask,
    ReferenceTask,
    RowBlocks,
    RunPlan,
    block_rows,
    extra_fields,
    limited_rows,
    loss_spec,
    sampled,
    text_notice,
    with_numerics,
)
from dpo_score.errors import ConfigError, ModelError
from dpo_score.logprobs.numerics import present, remarks, resolve_numerics, ways, with_own_softmax
from dpo_score.losses.parse import ResolvedLoss, parse_loss
from dpo_score.models.limits import text_limits
from dpo_score.models.memory import kept_bytes
from dpo_score.models.numerics import Numerics
from dpo_score.models.resolve import ModelSource, Resolver, resolve_policy
from dpo_score.results.groups import check_slices
from dpo_score.results.rewardbench import check_pairing
from dpo_score.storage.fingerprint import Identities
from dpo_score.storage.manifest import Manifest, ManifestRequest, open_manifest, read_manifest
from dpo_score.tokenization.choose import REFERENCE, Home, choose_processor, choose_tokenizer, renderer_of
from dpo_score.tokenization.pictures import PictureInputs
from dpo_score.tokenization.rewardbench import text_of

if TYPE_CHECKING:
    from dpo_score.engine.in_memory import InMemoryModel


def prepare(
    config: RunConfig, context: RunContext, lock: ManifestLock = nullcontext, computes: bool = True
) -> tuple[RunPlan, Manifest]:
    """Resolve everything and open the manifest, inside `lock()`.

    Args:
        computes: whether blocks will be computed; else no model is loaded and no loss file of the user is run.

    Raises UsageError (data, model, configuration, identity, environment under --strict-env).
    """
    plan = resolve_plan(config, context, computes)
    check_slices(config.slices, plan.datasets, [column.name for column in plan.extra])
    request = ManifestRequest(
        identities=plan.identities,
        numerics={"run": plan.numerics.to_json()} if plan.numerics else {},
        block_rows=plan.rows.block_rows,
        total_rows=plan.rows.total,
        started=now(),
        host=host(),
        versions=checked_environment(context, plan, computes),
        cache_snapshots=_snapshots(context, plan),
        notes={
            "date": plan.renderer.identity()["date"],
            "names": model_names(plan),
            "commits": model_commits(plan),
            "columns": {dataset.spec.name: dataset.columns.to_json() for dataset in plan.datasets},
        },
        strict_env=config.strict_env,
        out=config.out or "",
    )
    with lock():
        manifest = open_manifest(context.store, request)
    for line in (*(dataset.summary() for dataset in plan.datasets), *commit_lines(plan), text_notice(plan)):
        context.progress.say(line)
    return replace(plan, cache_snapshots=manifest.cache_snapshots), manifest


def checked_environment(context: RunContext, plan: RunPlan, computes: bool = True) -> dict[str, str]:
    """Versions, and the device where this process computes, compared with those that the folder was begun with."""
    numerics = plan.numerics if computes and context.workers is None else None
    here = versions(on_device(numerics, context.compute.device) if numerics is not None else None)
    if numerics is not None and numerics.device_kind == "cuda" and present(numerics.device):
        from dpo_score.engine.doctor import cuda_settings  # torch

        for finding in cuda_settings():
            context.progress.warn(f"{finding.what}: {finding.seen}: {finding.way_out}")
    found = read_manifest(context.store)
    begun = found.versions if found is not None else here
    return compared_environment(begun, here, plan.config.strict_env, context.progress)


def resolve_plan(
    config: RunConfig,
    context: RunContext,
    computes: bool = True,
    in_memory: Mapping[str, InMemoryModel] | None = None,
    tokenizer: Any = None,
) -> RunPlan:
    """The plan of a run, without its manifest. Raises UsageError.

    Args:
        in_memory: models that the caller has loaded, by policy name ("" is the reference); `config` names the others.
        tokenizer: a loaded one, used instead of the models' own.
    """
    found, in_memory = read_manifest(context.store), in_memory or {}
    losses = {policy.name: parse_loss(loss_spec(config, policy), computes) for policy in config.policies}
    kept = _kept_columns(config, losses)
    datasets = open_data(config, sha256=context.file_hashes.sha256, keep_columns=kept)
    check_pairing(config.rewardbench, datasets)
    _require_reference(config, losses, in_memory)
    models = resolve_models(config, context, in_memory)
    check_placement(config.compute, models, context)
    config = _settled(config, datasets, models)

    text = _with_stored_date(config.text, found)
    homes = [home for _, home in _homes(models)]
    processor = choose_processor(config, text, datasets, homes, tokenizer)
    if processor is not None:
        tokenizer = processor.tokenizer
        _refuse_divided(config.compute)
    elif tokenizer is None:
        tokenizer = _tokenizer(config, text, datasets, models, context)
    warn_of_lengths([source for _, source in models.sources], text.max_length, context.progress.warn)
    limits = text_limits(models.first.config, text.max_length) if models.first else None
    renderer = renderer_of(config, tokenizer, text, limits, processor)
    room = kept_bytes() if processor is not None and len(models.sources) > 1 else 0
    pictures = None if processor is None else PictureInputs(processor, room)

    numerics = _decide_numerics(config, context, found, models, datasets, pictures)
    rows = _decide_blocks(config, found, models, datasets, numerics)
    needed = ["wpo"] if any(loss.modifiers.wpo for loss in losses.values()) else []
    stats = tuple(dict.fromkeys((*config.compute.stats, *needed)))
    plan = RunPlan(
        config=config,
        datasets=datasets,
        rows=rows,
        tokenizer=tokenizer,
        renderer=renderer,
        extra=extra_fields(datasets, kept),
        references=(),
        policies=(),
        identities=Identities({}),
        numerics=numerics,
        stats=stats,
        pictures=pictures,
    )
    return _with_tasks(plan, models, losses, found)


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunModels:
    """The models of a run as they were found. `own_references`: by the policy that each belongs to.

    `in_memory`: those that the caller has loaded; their sources have no files.
    """

    reference: ModelSource | None
    policies: Mapping[str, ModelSource | PolicyFailure]
    own_references: Mapping[str, ModelSource] = field(default_factory=dict)
    in_memory: Mapping[str, InMemoryModel] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[tuple[str, ModelSource], ...]:
        """(name, source) of the run's reference ("") and of the policies that were found, in order."""
        named = [("", self.reference), *self.policies.items()]
        return tuple((name, source) for name, source in named if isinstance(source, ModelSource))

    @property
    def first(self) -> ModelSource | None:
        """Whose tokenizer and context limit apply to all: the reference's, else those of the first policy."""
        return next((source for _, source in self.sources), None)

    @property
    def from_files(self) -> tuple[ModelSource, ...]:
        return tuple(source for name, source in self.sources if name not in self.in_memory)


def resolve_models(config: RunConfig, context: RunContext, in_memory: Mapping[str, InMemoryModel]) -> RunModels:
    """Every model that `config` names, found and checked; none is loaded.

    A policy that does not load is a PolicyFailure, so that the others go on. ModelError where there is no model left
    whose tokenizer could be used, or where a reference does not load.
    """
    resolver = Resolver.of(config, context.cache_dir, context.file_hashes.sha256, context.progress.say)
    reference, spec = None, config.reference
    if "" in in_memory:
        reference = in_memory[""].source
    elif spec is not None and spec.columns is None:
        reference = resolver.resolve_spec(spec)
    base = None if "" in in_memory else reference

    policies: dict[str, ModelSource | PolicyFailure] = {}
    for policy in config.policies:
        if policy.name in in_memory:
            policies[policy.name] = in_memory[policy.name].source
            continue
        try:
            policies[policy.name] = resolve_policy(policy, base, config.policy_base, resolver)
        except ModelError as error:
            policies[policy.name] = PolicyFailure.of(policy, error)
    own = {
        policy.name: resolver.resolve_spec(policy.reference)
        for policy in config.policies
        if policy.reference is not None and policy.reference.columns is None
    }
    failures = [found for found in policies.values() if isinstance(found, PolicyFailure)]
    if failures and reference is None and len(failures) == len(policies):
        raise ModelError(failures[0].reason)
    return RunModels(reference, policies, own, in_memory)


def check_placement(compute: ComputeSpec, models: RunModels, context: RunContext) -> None:
    """ConfigError for a --tensor-parallel or --device-map that cannot be; one line about the latter.

    `--tensor-parallel N` divides every layer over N devices, by transformers' plan for the architecture;
    `--device-map auto` (accelerate) puts whole layers on different devices.
    """
    if compute.tensor_parallel > 1:
        for flag, given in (
            ("--device-map", compute.device_map is not None),
            ("--quantization", compute.quantization is not None),
            ("--compile on", compute.compile == "on"),
            ("--device mps", compute.device == "mps"),
        ):
            if given:
                together = f"--tensor-parallel {compute.tensor_parallel} and {flag}"
                raise ConfigError(f"{together} do not go together: choose one")
        if ":" in compute.device:
            raise ConfigError(
                f"--device {compute.device} names one GPU; --tensor-parallel takes several: say --device cuda"
            )
        from dpo_score.models.parallel.sharding import refuse_undealt  # transformers

        for _, source in models.sources:
            refuse_undealt(source, compute.tensor_parallel)
    if compute.device_map is not None:
        if find_spec("accelerate") is None:
            raise ConfigError(
                f"--device-map {compute.device_map} needs accelerate, which is not installed: pip install accelerate"
            )
        context.progress.say(
            f"--device-map {compute.device_map}: the layers of a model are spread over the GPUs, of which one computes "
            "at a time; it saves memory, not time"
        )


# --- configuration, text, numerics, blocks ----------------------------------------------------------------------------


def _kept_columns(config: RunConfig, losses: Mapping[str, ResolvedLoss]) -> tuple[str, ...]:
    """--keep-columns, and the columns that the reference or a loss reads."""
    specs = [spec for spec in (config.reference, *(policy.reference for policy in config.policies)) if spec]
    references = [name for spec in specs for name in (spec.columns or ())]
    offsets = [loss.modifiers.offset_column for loss in losses.values()]
    return tuple(dict.fromkeys((*config.keep_columns, *references, *(name for name in offsets if name))))


def _require_reference(
    config: RunConfig, losses: Mapping[str, ResolvedLoss], in_memory: Mapping[str, InMemoryModel]
) -> None:
    """ConfigError for a loss that compares with a reference where there is none."""
    for policy in config.policies:
        has_one = config.reference is not None or policy.reference is not None or "" in in_memory
        if not has_one and not losses[policy.name].reference_free:
            raise ConfigError(
                f"policy {policy.name!r}: loss {losses[policy.name].name!r} compares with a reference, and none is "
                "named. Add --reference MODEL (or columns:CHOSEN,REJECTED; in Python give reference=…), or choose a "
                "reference-free loss such as simpo, orpo or cpo"
            )


def _settled(config: RunConfig, datasets: Sequence[Dataset], models: RunModels) -> RunConfig:
    """`config` with commits in place of branches, and the text settings that a benchmark asks for."""
    data = tuple(dataset.spec for dataset in datasets)
    text = text_of(config.rewardbench, config.text) if config.rewardbench else config.text
    config = config.model_copy(update={"data": data, "text": text})
    return pinned(config, models.reference, dict(models.sources))


def _with_stored_date(text: TextSpec, found: Manifest | None) -> TextSpec:
    """The date that the folder's first run put into chat templates, unless another is asked for."""
    return text if text.date or found is None else text.model_copy(update={"date": found.notes.get("date")})


def _homes(models: RunModels) -> list[Home]:
    """Where each model keeps its tokenizer; "" for a loaded one that does not say."""
    homes = []
    for name, source in models.sources:
        loaded = models.in_memory.get(name)
        homes.append((name or REFERENCE, loaded.tokenizer_home if loaded else str(source.tokenizer_folder)))
    return homes


def _refuse_divided(compute: ComputeSpec) -> None:
    """ConfigError for ways to hold a model that prompts with pictures are not scored in."""
    if compute.tensor_parallel > 1:
        raise ConfigError(
            "the data have pictures, which --tensor-parallel does not take yet: leave it out, or say --device-map auto"
        )


def _tokenizer(
    config: RunConfig, text: TextSpec, datasets: Sequence[Dataset], models: RunModels, context: RunContext
) -> Any:
    homes = _homes(models)
    if homes and not (homes[0][1] or text.tokenizer or only_ids(datasets)):
        raise ModelError("the loaded model does not say where its tokenizer is: give tokenizer=…")
    known = homes[:1] + [home for home in homes[1:] if home[1]]
    return choose_tokenizer(config, text, datasets, known, context.progress.say)


def _decide_numerics(
    config: RunConfig,
    context: RunContext,
    found: Manifest | None,
    models: RunModels,
    datasets: Sequence[Dataset],
    pictures: PictureInputs | None,
) -> Numerics | None:
    """Once for the run: from the manifest, else resolved and, for the fast path, checked on the model.

    None where no model is read from files. Loaded models compute as they are (`InMemoryModel.numerics`).
    """
    if found is not None and found.numerics.get("run"):
        return continued_numerics(Numerics.from_json(found.numerics["run"]), config.compute)
    model = next(iter(models.from_files), None)
    if model is None:
        return None
    rows = sum(dataset.rows for dataset in datasets)
    numerics = resolve_numerics(config.compute, model.config, parameters(model), rows_hint=rows)
    for line in remarks(config.compute, numerics):
        context.progress.say(line)
    if config.rewardbench == "exact":
        numerics = with_own_softmax(numerics)
    return checked_numerics(context, model, numerics, config.compute.dtype == "auto", pictures)


def _decide_blocks(
    config: RunConfig,
    found: Manifest | None,
    models: RunModels,
    datasets: Sequence[Dataset],
    numerics: Numerics | None,
) -> RowBlocks:
    total = sum(dataset.rows for dataset in datasets)
    limited = limited_rows(config, datasets)
    sample = sampled(total, config.sample, config.seed) if limited is None else limited
    if found is not None:
        size = found.block_rows
    else:
        mean = sum(mean_text_bytes(dataset) * dataset.rows for dataset in datasets) / max(total, 1)
        kind = numerics.device_kind if numerics else "cpu"
        count = parameters(models.first) if models.first else 1
        size = block_rows(len(sample) if sample else total, mean, count, kind)
        size = min(size, PICTURE_ROWS) if has_pictures(datasets) else size
    return RowBlocks(total, size, config.limit if limited is None else None, sample, config.share)


def parameters(source: ModelSource) -> int:
    """Parameters by the size of the weight files: close enough for block sizes and estimates."""
    width = 4 if "32" in str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32") else 2
    return sum(path.stat().st_size for path in source.weights) // width


def _snapshots(context: RunContext, plan: RunPlan) -> dict[str, list[str]]:
    """What the cache holds now for every model: lookups of this OUT see these files and no others."""
    states = [cache_state(context, source, numerics) for _, source, numerics in plan.models]
    return {name: files for state in states for name, files in state.items()}


# --- tasks and identities ---------------------------------------------------------------------------------------------


def _with_tasks(
    plan: RunPlan, models: RunModels, losses: Mapping[str, ResolvedLoss], found: Manifest | None
) -> RunPlan:
    """The plan with the tasks of both stages; each carries the identity that its blocks are committed under."""
    spec = plan.config.reference
    run = Identities(_text_fields(plan), _reference_fields(plan, models.reference, spec.columns if spec else None))
    own = _reference_task(plan, "", spec, models, run, found)
    policies = []
    for policy in plan.config.policies:
        reference = own
        if policy.reference is not None:
            reference = _reference_task(plan, policy.name, policy.reference, models, run, found)
        resolved = models.policies[policy.name]
        source, failure = (resolved, None) if isinstance(resolved, ModelSource) else (None, resolved)
        task = PolicyTask(
            name=policy.name,
            source=source,
            loss=losses[policy.name],
            loss_spec=loss_spec(plan.config, policy),
            reference=reference,
            numerics=_policy_numerics(plan, policy, models, found),
            failure=failure,
        )
        policies.append(task.identified(run))
    brought = {policy.reference.name: policy.reference for policy in policies if policy.reference.name}
    fields = {policy.name: policy.fields for policy in policies if policy.source is not None}
    return replace(
        plan,
        references=(own, *brought.values()),
        policies=tuple(policies),
        identities=replace(run, policies=fields),
    )


def _text_fields(plan: RunPlan) -> dict[str, Any]:
    config, limited = plan.config, limited_rows(plan.config, plan.datasets)
    return {
        "data": {dataset.spec.name: dataset.fingerprint() for dataset in plan.datasets},
        "text": plan.renderer.identity(),
        "sample": config.sample if limited is None else len(limited),
        **({"limit_of_each_set": config.limit} if limited is not None else {}),
        "seed": config.seed if config.sample else None,
        "keep_columns": list(config.keep_columns),
    }


def _reference_fields(plan: RunPlan, source: ModelSource | None, columns: Iterable[str] | None) -> dict[str, Any]:
    return {
        "weights": source.key if source else None,
        "columns": list(columns) if columns else None,
        "numerics": plan.numerics.to_json() if plan.numerics else None,
        "block_rows": plan.rows.block_rows,
        "stats": sorted(plan.stats),
        "per_token": plan.config.compute.per_token,
    }


def _reference_task(
    plan: RunPlan, name: str, spec: ModelSpec | None, models: RunModels, run: Identities, found: Manifest | None
) -> ReferenceTask:
    """`name` is empty for the run's own reference, whose numerics are the run's; that of a policy may be on the plain
    path, which the manifest knows."""
    source = models.own_references.get(name) if name else models.reference
    columns = spec.columns if spec is not None else None
    fields = _reference_fields(plan, source, columns)
    numerics = plan.numerics if source is not None else None
    if name in models.in_memory and source is not None:
        numerics = models.in_memory[name].numerics(plan.config.compute, plan.pictures)
    task = ReferenceTask(name, source, columns, numerics, fields, replace(run, reference=fields).reference_digest)
    stored = found.numerics.get(task.stage.name) if found and name and source else None
    return task if stored is None else with_numerics(task, Numerics.from_json(stored), run)


def _policy_numerics(plan: RunPlan, policy: PolicySpec, models: RunModels, found: Manifest | None) -> Numerics | None:
    """The run's, or the slower ones that the folder had to score a policy with."""
    if policy.name in models.in_memory:
        return models.in_memory[policy.name].numerics(plan.config.compute, plan.pictures)
    stored = found.identities.policies.get(policy.name, {}).get("numerics") if found else None
    if plan.numerics is None or stored is None:
        return plan.numerics
    return next((way for way in ways(plan.numerics) if way.to_json() == stored), plan.numerics)
