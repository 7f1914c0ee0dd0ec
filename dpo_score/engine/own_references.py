"""References that policies bring along: the path they are scored on, found out at their first block.

Promises: what is decided here is decided once: OUT's manifest keeps it, and a continued run begins with it.
"""

from __future__ import annotations

from dataclasses import replace

from dpo_score.engine.context import RunContext
from dpo_score.engine.model_logprobs import FastPathRefusedError, plain
from dpo_score.engine.plan import PolicyTask, ReferenceTask, RunPlan, with_numerics
from dpo_score.engine.prepare import identified
from dpo_score.errors import ModelError
from dpo_score.storage.manifest import read_manifest, save_manifest


def on_plain_path(
    context: RunContext, plan: RunPlan, reference: ReferenceTask, refusal: FastPathRefusedError
) -> RunPlan:
    """The job with plain numerics for one reference, said aloud. The run's own has had its numerics decided."""
    assert reference.numerics is not None
    if not reference.name:
        raise ModelError(f"{reference.label}: {refusal}. Say --path plain, which is slower, and choose another --out")
    context.progress.warn(f"{reference.label}: scored on the plain path, which is slower: {refusal}")
    again = with_numerics(reference, plain(reference.numerics), plan.identities)
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
