"""A configuration → a `Job`: every name resolved, every `auto` decided, OUT's manifest opened or compared.

Order matters: what OUT already decided (numerics, block size, rendered date, cache files) is read first and
wins over what would be decided today. Nothing here runs a model except the one-off check of the fast path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from dpo_score.config.schema import ComputeSpec, ModelSpec, PolicySpec, RunConfig
from dpo_score.data.dataset import Dataset, mean_text_bytes, open_data
from dpo_score.engine.context import RunContext
from dpo_score.engine.doctor import cuda_settings
from dpo_score.engine.environment import commit_lines, commits, continued, host, names, now, pinned, versions
from dpo_score.engine.limits import warn_of_lengths
from dpo_score.engine.model_logprobs import cache_fields, overlaid, placed, trusted
from dpo_score.engine.plan import (
    PolicyTask,
    ReferenceTask,
    RowBlocks,
    RunPlan,
    block_rows,
    extra_fields,
    loss_spec,
    sampled,
    text_notice,
    waiting,
    with_numerics,
)
from dpo_score.errors import ConfigError, ModelError
from dpo_score.logprobs.numerics import present, resolve_numerics, ways, with_own_softmax
from dpo_score.losses.parse import parse_loss
from dpo_score.models.limits import text_limits
from dpo_score.models.numerics import Numerics
from dpo_score.models.parallel.sharding import refuse_undealt
from dpo_score.models.resolve import ModelSource, Resolver, resolve_policy
from dpo_score.results.groups import check_slices
from dpo_score.results.rewardbench import check_pairing
from dpo_score.storage.fingerprint import Identities
from dpo_score.storage.manifest import Manifest, ManifestRequest, open_manifest, read_manifest
from dpo_score.tokenization.choose import REFERENCE, choose_tokenizer, renderer_of
from dpo_score.tokenization.render import Renderer
from dpo_score.tokenization.rewardbench import text_of

Turn = Callable[[], AbstractContextManager[None]]


class Preparation:
    """One pass over a configuration; `job()` is its result. `computes`: may load models and run custom losses."""

    def __init__(self, config: RunConfig, context: RunContext, computes: bool = True) -> None:
        self.config, self.context = config, context
        self.found: Manifest | None = read_manifest(context.store)
        self.resolver = Resolver(
            context.cache_dir,
            context.digests.sha256,
            allow_pickle=config.allow_pickle,
            trust_remote_code=config.trust_remote_code,
            say=context.progress.say,
            quantization=config.compute.quantization,
        )
        self.losses = {policy.name: parse_loss(loss_spec(config, policy), computes) for policy in config.policies}
        self.datasets = self._open_data()
        self.config = self._settled(config)
        self.reference = self._resolve_reference()
        self.policies = {policy.name: self._resolve_policy(policy) for policy in config.policies}
        self.config = pinned(self.config, self.reference, self.policies)
        found = (self.reference, *self.policies.values())
        check_placement(config.compute, [s for s in found if isinstance(s, ModelSource)], context.progress.say)
        self.renderer = self._make_renderer()
        self.numerics = self._decide_numerics()
        self.rows = self._decide_rows()
        self.versions = self._environment(computes and context.pool is None)

    def _settled(self, config: RunConfig) -> RunConfig:
        """`config` with commits in place of branches, and the text settings that a benchmark asks for."""
        check_pairing(config.rewardbench, self.datasets)
        data = tuple(dataset.spec for dataset in self.datasets)
        text = text_of(config.rewardbench, config.text) if config.rewardbench else config.text
        return config.model_copy(update={"data": data, "text": text})

    def _open_data(self) -> tuple[Dataset, ...]:
        return open_data(self.config, sha256=self.context.digests.sha256, keep_columns=self._kept_columns())

    def _kept_columns(self) -> tuple[str, ...]:
        """--keep-columns, and the columns that the reference or a loss reads."""
        specs = [spec for spec in (self.config.reference, *(p.reference for p in self.config.policies)) if spec]
        references = [name for spec in specs for name in (spec.columns or ())]
        offsets = [loss.modifiers.offset_column for loss in self.losses.values()]
        names = (*self.config.keep_columns, *references, *(name for name in offsets if name))
        return tuple(dict.fromkeys(names))

    def _resolve_reference(self) -> ModelSource | None:
        spec = self.config.reference
        if spec is None or spec.columns is not None:
            self._require_reference_free(spec is None)
            return None
        return self._resolved(spec)

    def _resolved(self, spec: ModelSpec) -> ModelSource:
        return self.resolver.resolve(spec.model, revision=spec.revision, adapter=spec.adapter)

    def _require_reference_free(self, nothing: bool) -> None:
        for policy in self.config.policies:
            if nothing and policy.reference is None and not self.losses[policy.name].reference_free:
                raise ConfigError(
                    f"policy {policy.name!r}: loss {self.losses[policy.name].name!r} compares with a reference, and "
                    "none is named. Add --reference MODEL (or columns:CHOSEN,REJECTED), or choose a reference-free "
                    "loss such as simpo, orpo or cpo"
                )

    def _resolve_policy(self, policy: PolicySpec) -> ModelSource | str:
        """The source, or why there is none (the other policies go on)."""
        try:
            return resolve_policy(policy, self.reference, self.config.policy_base, self.resolver)
        except ModelError as error:
            if waiting(policy, error):
                self.context.skipped[policy.name] = str(error)
            return str(error)

    def _make_renderer(self) -> Renderer:
        first = self._text_model()
        text = self.config.text
        if text.date is None and self.found is not None:
            text = text.model_copy(update={"date": self.found.notes.get("date")})
        models = {REFERENCE: self.reference, **self.policies}
        homes = ((name, str(m.tokenizer_folder)) for name, m in models.items() if isinstance(m, ModelSource))
        self.tokenizer = choose_tokenizer(self.config, text, self.datasets, homes, self.context.progress.say)
        sources = [model for model in models.values() if isinstance(model, ModelSource)]
        warn_of_lengths(sources, text.max_length, self.context.progress.warn)
        limits = text_limits(first.config, text.max_length) if first else None
        return renderer_of(self.config, self.tokenizer, text, limits)

    def _text_model(self) -> ModelSource | None:
        """Whose tokenizer and context limit hold for all: the reference's, else the first policy's that resolves."""
        sources = [source for source in self.policies.values() if isinstance(source, ModelSource)]
        first = self.reference or next(iter(sources), None)
        if first is None and self.policies:
            raise ModelError(next(text for text in self.policies.values() if isinstance(text, str)))
        return first

    def _decide_numerics(self) -> Numerics | None:
        """Once for the run: from the manifest, else resolved and, for the fast path, checked on the model."""
        if self.found is not None and self.found.numerics.get("run"):
            return overlaid(Numerics.from_json(self.found.numerics["run"]), self.config.compute)
        model = self._text_model()
        if model is None:
            return None
        rows = sum(dataset.rows for dataset in self.datasets)
        numerics = resolve_numerics(self.config.compute, model.config, parameters(model), rows_hint=rows)
        if self.config.rewardbench == "exact":
            numerics = with_own_softmax(numerics)
        return trusted(self.context, model, numerics, any_dtype=self.config.compute.dtype == "auto")

    def _environment(self, computes: bool) -> dict[str, str]:
        """Versions and device, held against those that OUT was begun with."""
        here = versions(placed(self.numerics, self.context.device) if computes and self.numerics else None)
        if computes and self.numerics and self.numerics.device_kind == "cuda" and present(self.numerics.device):
            for finding in cuda_settings():
                self.context.progress.warn(f"{finding.what}: {finding.seen}: {finding.way_out}")
        begun = self.found.versions if self.found is not None else here
        return continued(begun, here, self.config.strict_env, self.context.progress.warn)

    def _decide_rows(self) -> RowBlocks:
        total = sum(dataset.rows for dataset in self.datasets)
        sample = sampled(total, self.config.sample, self.config.seed)
        if self.found is not None:
            size = self.found.block_rows
        else:
            model = self._text_model()
            bytes_ = sum(mean_text_bytes(d) * d.rows for d in self.datasets) / max(total, 1)
            kind = self.numerics.device_kind if self.numerics else "cpu"
            size = block_rows(len(sample) if sample else total, bytes_, parameters(model) if model else 1, kind)
        return RowBlocks(total, size, self.config.limit, sample, self.config.share)

    def text_fields(self) -> dict[str, Any]:
        return {
            "data": {dataset.spec.name: dataset.fingerprint() for dataset in self.datasets},
            "text": self.renderer.identity(),
            "sample": self.config.sample,
            "seed": self.config.seed if self.config.sample else None,
            "keep_columns": list(self.config.keep_columns),
        }

    def reference_fields(self, source: ModelSource | None, columns: Sequence[str] | None) -> dict[str, Any]:
        return {
            "weights": source.key if source else None,
            "columns": list(columns) if columns else None,
            "numerics": self.numerics.to_json() if self.numerics else None,
            "block_rows": self.rows.block_rows,
            "stats": sorted(self.stats()),
            "per_token": self.config.compute.per_token,
        }

    def stats(self) -> tuple[str, ...]:
        """--stats, and what a loss needs (WPO weighting reads Σ log Σp²)."""
        needed = ["wpo"] if any(loss.modifiers.wpo for loss in self.losses.values()) else []
        return tuple(dict.fromkeys((*self.config.compute.stats, *needed)))

    def plan(self) -> RunPlan:
        spec = self.config.reference
        run = Identities(self.text_fields(), self.reference_fields(self.reference, spec.columns if spec else None))
        own = self._reference_task("", spec, self.reference, run)
        policies = tuple(self._policy_task(policy, own, run) for policy in self.config.policies)
        brought = {policy.reference.name: policy.reference for policy in policies if policy.reference.name}
        return RunPlan(
            config=self.config,
            datasets=self.datasets,
            rows=self.rows,
            tokenizer=self.tokenizer,
            renderer=self.renderer,
            extra=extra_fields(self.datasets, self._kept_columns()),
            references=(own, *brought.values()),
            policies=policies,
            identities=replace(run, policies={p.name: p.fields for p in policies if p.source is not None}),
            stats=self.stats(),
        )

    def _reference_task(self, name: str, spec: Any, source: ModelSource | None, run: Identities) -> ReferenceTask:
        columns = spec.columns if spec is not None else None
        fields = self.reference_fields(source, columns)
        identity = replace(run, reference=fields).reference_digest
        plan = ReferenceTask(name, source, columns, self.numerics if source else None, fields, identity)
        stored = self.found.numerics.get(plan.stage) if self.found and name and source else None
        return plan if stored is None else with_numerics(plan, Numerics.from_json(stored), run)

    def _numerics_of(self, policy: str) -> Numerics | None:
        """The run's, or the slower ones that OUT had to score a policy with."""
        stored = self.found.identities.policies.get(policy, {}).get("numerics") if self.found else None
        if self.numerics is None or stored is None:
            return self.numerics
        return next((way for way in ways(self.numerics) if way.to_json() == stored), self.numerics)

    def _policy_task(self, policy: PolicySpec, own: ReferenceTask, run: Identities) -> PolicyTask:
        reference = own
        if policy.reference is not None:
            spec = policy.reference
            source = None
            if spec.columns is None:
                source = self._resolved(spec)
            reference = self._reference_task(policy.name, spec, source, run)
        found = self.policies[policy.name]
        source, failure = (found, None) if isinstance(found, ModelSource) else (None, found)
        loss, spec_of_loss = self.losses[policy.name], loss_spec(self.config, policy)
        numerics = self._numerics_of(policy.name)
        plan = PolicyTask(policy.name, source, loss, spec_of_loss, reference, numerics, {}, "", failure)
        return identified(plan, run)


def identified(plan: PolicyTask, run: Identities) -> PolicyTask:
    """The job with the fields and the identity that follow from its source, numerics, loss and own reference."""
    fields: dict[str, Any] = {
        "weights": plan.source.key if plan.source else None,
        "numerics": plan.numerics.to_json() if plan.numerics else None,
        "loss": plan.loss.identity(),
    }
    if plan.reference.name:
        fields["reference"] = dict(plan.reference.fields)
    alone = Identities(run.text, run.reference, {plan.name: fields})
    return replace(plan, fields=fields, identity=alone.policy_digest(plan.name))


def prepare(
    config: RunConfig, context: RunContext, opening: Turn = nullcontext, computes: bool = True
) -> tuple[RunPlan, Manifest]:
    """Resolve everything and open the manifest, inside `opening()`.

    Raises UsageError (data, model, configuration, identity, environment under --strict-env).
    """
    preparation = Preparation(config, context, computes)
    plan = preparation.plan()
    check_slices(config.slices, plan.datasets, [field.name for field in plan.extra])
    request = ManifestRequest(
        identities=plan.identities,
        numerics={"run": preparation.numerics.to_json()} if preparation.numerics else {},
        block_rows=plan.rows.block_rows,
        total_rows=plan.rows.total,
        started=now(),
        host=host(),
        versions=preparation.versions,
        cache_snapshots=snapshots(context, plan),
        notes={
            "date": preparation.renderer.identity()["date"],
            "names": names(plan),
            "commits": commits(plan),
            "columns": {dataset.spec.name: dataset.columns.to_json() for dataset in plan.datasets},
        },
        strict_env=config.strict_env,
        out=config.out or "",
    )
    with opening():
        manifest = open_manifest(context.store, request)
    for line in (*(dataset.summary() for dataset in plan.datasets), *commit_lines(plan), text_notice(plan)):
        context.progress.say(line)
    return replace(plan, cache_snapshots=manifest.cache_snapshots), manifest


def snapshots(context: RunContext, plan: RunPlan) -> dict[str, list[str]]:
    """Cache files that exist now, by the weights they belong to: lookups of this OUT see these and no others."""
    return {
        source.key: list(context.cache.namespace(cache_fields(source, numerics)).snapshot())
        for _, source, numerics in plan.models
    }


def parameters(source: ModelSource) -> int:
    """Parameters by the size of the weight files: close enough for block sizes and estimates."""
    width = 4 if "32" in str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32") else 2
    return sum(path.stat().st_size for path in source.weights) // width


# --- placement ------------------------------------------------------------


def check_placement(compute: ComputeSpec, sources: Iterable[ModelSource], say: Callable[[str], None]) -> None:
    """ConfigError for a --tensor-parallel or --device-map that cannot be; one line about the latter."""
    if compute.tensor_parallel > 1:
        _refuse_together(compute)
        for source in sources:
            refuse_undealt(source, compute.tensor_parallel)
    if compute.device_map is not None:
        if find_spec("accelerate") is None:
            raise ConfigError(
                f"--device-map {compute.device_map} needs accelerate, which is not installed: pip install accelerate"
            )
        say(
            f"--device-map {compute.device_map}: the layers of a model are spread over the GPUs, of which one computes "
            "at a time; it makes room, not speed"
        )


def _refuse_together(compute: ComputeSpec) -> None:
    """Options that say otherwise how a model is laid out or run."""
    for flag, given in (
        ("--device-map", compute.device_map is not None),
        ("--quantization", compute.quantization is not None),
        ("--compile on", compute.compile == "on"),
        ("--device mps", compute.device == "mps"),
    ):
        if given:
            raise ConfigError(f"--tensor-parallel {compute.tensor_parallel} and {flag} do not go together: choose one")
