"""Where and when a run happens: recorded beside the numbers, never among them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from dpo_score.errors import IdentityError
from dpo_score.logprobs.numerics import Numerics
from dpo_score.storage.fingerprint import diff, listed

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
    found = {name: version for name in LIBRARIES if (version := _version(name)) is not None}
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    found["machine"] = platform.machine()
    return found if numerics is None else {**found, **_computing(numerics)}


def _computing(numerics: Numerics) -> dict[str, str]:
    from dpo_score.logprobs.torch_settings import in_effect, present

    if not present(numerics.device):
        return {}
    return {"device": _device(numerics), "kernel": in_effect(numerics).kernel}


def _device(numerics: Numerics) -> str:
    import torch

    if numerics.device_kind == "cuda":
        return torch.cuda.get_device_name(numerics.device)
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"


@cache
def _processor() -> str:
    """The processor's name. Virtual machines give the same one to many, so it does not stand alone."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())


def continued(
    begun: Mapping[str, str], here: Mapping[str, str], strict: bool, warn: Callable[[str], None]
) -> dict[str, str]:
    """`here`, as far as it can be held against `begun`; each difference is said, and refused where `strict`."""
    found = _comparable(begun, here)
    changes = diff(begun, found)
    if changes and strict:
        raise IdentityError(
            f"--strict-env is set, and {host()} is another environment than the one this output folder was begun "
            f"in:\n{listed(changes)}\nRun it where it was begun, drop --strict-env, or choose another output folder"
        )
    for change in changes:
        warn(f"continued in another environment: {change}")
    return found


def _comparable(begun: Mapping[str, str], here: Mapping[str, str]) -> dict[str, str]:
    """`here`, with what `begun` says of what computes where only one of the two can tell."""
    libraries = {name: version for name, version in here.items() if name not in COMPUTING}
    return libraries | {name: here.get(name, begun[name]) for name in COMPUTING if name in begun}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
