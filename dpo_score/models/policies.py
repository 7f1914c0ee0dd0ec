"""What a policy is: full weights, an adapter over a base, or a checkpoint that borrows a base's configuration."""

from __future__ import annotations

from pathlib import Path

from dpo_score.config.schema import PolicySpec
from dpo_score.errors import HalfWrittenError, ModelError
from dpo_score.models import weights as files
from dpo_score.models.locate import locate
from dpo_score.models.resolve import ModelSource, Resolver, without_adapter


def resolve_policy(
    policy: PolicySpec, reference: ModelSource | None, policy_base: str | None, resolver: Resolver
) -> ModelSource:
    """The source of one policy. An adapter's base is, in this order: the policy's own model or `base:`,
    `policy_base`, and what the adapter's config names; `reference` stands for the reference's base weights.

    Raises ModelError when the base cannot be told.
    """
    if policy.model is not None and policy.adapter is None:
        place = locate(policy.model, revision=policy.revision, allow_pickle=resolver.allow_pickle)
        if files.is_state(place.path):
            return _state(policy, place.path, policy_base, reference, resolver)
        if not (place.path.is_dir() and files.is_adapter(place.path)):
            return resolver.full(policy.model, place)
        model = None
    else:
        revision = policy.revision if policy.model is None else None
        place = locate(str(policy.adapter), revision=revision, allow_pickle=resolver.allow_pickle)
        model = policy.model
    base = _base(place.path, model or policy.base or policy_base, policy, reference, resolver)
    return resolver.over(base, place, f"{base.name}+{policy.adapter or policy.model}")


def _state(
    policy: PolicySpec, path: Path, policy_base: str | None, reference: ModelSource | None, resolver: Resolver
) -> ModelSource:
    said = policy.base or policy_base
    if said is None:
        text = (
            f"policy {policy.name!r}: {path} is a checkpoint without config.json, so its architecture and tokenizer "
            "must come from a base: say `base: reference` in the policy (or --policy-base reference), or another MODEL"
        )
        # a folder of transformers' own file names may be one whose config.json is still to come
        raise ModelError(text) if path.is_file() or files.lone_states(path) else HalfWrittenError(text, path)
    return resolver.state_over(_base(path, said, policy, reference, resolver), path, str(policy.model))


def _base(
    folder: Path, said: str | None, policy: PolicySpec, reference: ModelSource | None, resolver: Resolver
) -> ModelSource:
    if said == "reference":
        if reference is None:
            raise ModelError(f"policy {policy.name!r} stands on `reference`, but the run has no reference model")
        return without_adapter(reference)
    if said is not None:
        return resolver.resolve(said, revision=policy.revision if said == policy.model else None)
    config = folder / files.ADAPTER_CONFIG
    named = files.read_json(config).get("base_model_name_or_path") if config.is_file() else None
    if reference is not None and reference.adapter is None and named == reference.name:
        return reference
    return resolver.named_base(folder)
