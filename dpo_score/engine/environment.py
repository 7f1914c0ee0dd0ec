"""Where and when a run happens: versions, device, and the commits of models from the hub.

They are recorded beside the numbers and are no part of them.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from dpo_score.config.schema import RunConfig
from dpo_score.engine.plan import RunPlan
from dpo_score.engine.progress import Progress
from dpo_score.errors import IdentityError
from dpo_score.logprobs.numerics import in_effect, present
from dpo_score.models.numerics import Numerics
from dpo_score.models.resolve import ModelSource
from dpo_score.storage.fingerprint import diff, listed
from dpo_score.storage.manifest import installed_version

LIBRARIES = ("dpo-score", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "peft")
COMPUTING = ("device", "kernel")
"""What only a process that computes can tell: one that cannot is no other environment."""


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def host() -> str:
    return platform.node()


def versions(numerics: Numerics | None) -> dict[str, str]:
    """Libraries and Python; with numerics also the device and the kernel that compute them here: what may move the
    last bits. Nothing of a device that this machine lacks."""
    found = {name: version for name in LIBRARIES if (version := installed_version(name)) is not None}
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    found["machine"] = platform.machine()
    if numerics is None or not present(numerics.device):
        return found
    import torch

    if numerics.device_kind == "cuda":
        device = torch.cuda.get_device_name(numerics.device)
    else:
        device = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {**found, "device": device, "kernel": in_effect(numerics).kernel}


@cache
def _processor() -> str:
    """The processor's name. Virtual machines give the same one to many, so it is not enough by itself."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())


def compared_environment(
    begun: Mapping[str, str], here: Mapping[str, str], strict: bool, progress: Progress
) -> dict[str, str]:
    """`here`, as far as it can be compared with `begun`; each difference is a warning, or an error if `strict`."""
    found = {name: version for name, version in here.items() if name not in COMPUTING}
    for name in COMPUTING:  # of what computes, `begun` answers where only one of the two can
        if name in begun:
            found[name] = here.get(name, begun[name])
    changes = diff(begun, found)
    if changes and strict:
        raise IdentityError(
            f"--strict-env is set, and {host()} is another environment than the one this output folder was begun "
            f"in:\n{listed(changes)}\nRun it where it was begun, drop --strict-env, or choose another output folder"
        )
    for change in changes:
        progress.warn(f"continued in another environment: {change}")
    return found


# --- commits of models that came from the hub ---


def pinned(config: RunConfig, reference: ModelSource | None, policies: Mapping[str, ModelSource]) -> RunConfig:
    """`config` with commits in place of branches and tags, as pipeline.yaml keeps it."""
    named = config.reference
    if named is not None and reference is not None:
        commit = _of_revision(reference, both=named.adapter is not None)
        named = named.model_copy(update={"revision": commit or named.revision})
    specs = []
    for spec in config.policies:
        source = policies.get(spec.name)
        both = spec.model is not None and spec.adapter is not None
        commit = _of_revision(source, both) if source is not None else None
        specs.append(spec.model_copy(update={"revision": commit or spec.revision}))
    return config.model_copy(update={"reference": named, "policies": tuple(specs)})


def _of_revision(source: ModelSource, both: bool) -> str | None:
    """The commit that `revision` names: of the model where model and adapter are named, else of the one named."""
    return source.adapter_commit if source.adapter is not None and not both else source.commit


def model_names(plan: RunPlan) -> dict[str, str]:
    """How the models of a run were called: "reference" and the policies."""
    return {name: source.name for name, source in _sources(plan).items()}


def model_commits(plan: RunPlan) -> dict[str, dict[str, str]]:
    """Name → commit of the base and of the adapter; only those that came from the hub."""
    found = {name: {"model": s.commit, "adapter": s.adapter_commit} for name, s in _sources(plan).items()}
    known = {name: {kind: commit for kind, commit in kinds.items() if commit} for name, kinds in found.items()}
    return {name: kinds for name, kinds in known.items() if kinds}


def commit_lines(plan: RunPlan) -> list[str]:
    """A line for each model from the hub."""
    names = model_names(plan)
    return [
        f"{name}: {names[name]}, " + ", ".join(f"{kind} at commit {commit}" for kind, commit in kinds.items())
        for name, kinds in model_commits(plan).items()
    ]


def _sources(plan: RunPlan) -> dict[str, ModelSource]:
    """The run's reference and the policies that were found."""
    named = {"reference": plan.references[0].source} | {policy.name: policy.source for policy in plan.policies}
    return {name: source for name, source in named.items() if source is not None}
