"""Commits of models that came from the hub: written down for every run, so that a branch that moves is no riddle later.

`pinned` puts them into the configuration that OUT/pipeline.yaml keeps; the manifest notes `names` and `commits`.
"""

from __future__ import annotations

from collections.abc import Mapping

from dpo_score.config.schema import RunConfig
from dpo_score.engine.plan import RunPlan
from dpo_score.models.resolve import ModelSource

Sources = Mapping[str, ModelSource | str]
"""Policy → its source, or why there is none."""


def pinned(config: RunConfig, reference: ModelSource | None, policies: Sources) -> RunConfig:
    """`config` with commits in place of branches and tags."""
    named = config.reference
    if named is not None and reference is not None:
        commit = _of_revision(reference, both=named.adapter is not None)
        named = named.model_copy(update={"revision": commit or named.revision})
    specs = []
    for spec in config.policies:
        source = policies.get(spec.name)
        both = spec.model is not None and spec.adapter is not None
        commit = _of_revision(source, both) if isinstance(source, ModelSource) else None
        specs.append(spec.model_copy(update={"revision": commit or spec.revision}))
    return config.model_copy(update={"reference": named, "policies": tuple(specs)})


def _of_revision(source: ModelSource, both: bool) -> str | None:
    """The commit that `revision` stands for: of the model where model and adapter are named, else of the one named."""
    return source.adapter_commit if source.adapter is not None and not both else source.commit


def names(plan: RunPlan) -> dict[str, str]:
    """How the models of a run were called: "reference" and the policies."""
    return {name: source.name for name, source in _sources(plan).items()}


def commits(plan: RunPlan) -> dict[str, dict[str, str]]:
    """Name → commit of the base and of the adapter; only those that came from the hub."""
    found = {name: {"model": s.commit, "adapter": s.adapter_commit} for name, s in _sources(plan).items()}
    known = {name: {kind: commit for kind, commit in kinds.items() if commit} for name, kinds in found.items()}
    return {name: kinds for name, kinds in known.items() if kinds}


def commit_lines(plan: RunPlan) -> list[str]:
    """A line for each model from the hub."""
    called = names(plan)
    return [
        f"{name}: {called[name]}, " + ", ".join(f"{kind} at commit {commit}" for kind, commit in kinds.items())
        for name, kinds in commits(plan).items()
    ]


def _sources(plan: RunPlan) -> dict[str, ModelSource]:
    named = {"reference": plan.references[0].source} | {policy.name: policy.source for policy in plan.policies}
    return {name: source for name, source in named.items() if source is not None}
