"""Where and when a run happens: recorded beside the numbers, never among them."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib import metadata

from dpo_score.logps.numerics import Numerics

LIBRARIES = ("dpo-score", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "peft")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def host() -> str:
    return platform.node()


def versions(numerics: Numerics | None) -> dict[str, str]:
    """Libraries, Python, processor or GPU, kernel: what may move the last bits."""
    found = {name: version for name in LIBRARIES if (version := _version(name)) is not None}
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    found["machine"] = platform.machine()
    if numerics is not None and numerics.device_kind == "cuda":
        import torch

        found["device"] = torch.cuda.get_device_name(numerics.device)
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
