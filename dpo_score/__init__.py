"""Offline batch scoring for Direct Preference Optimization.

The public names are loaded on first use: `import dpo_score` imports neither torch, transformers nor pyarrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_score.api import precompute, rescore, run, score, select
    from dpo_score.losses.compat import dpo_gradients, dpo_loss, get_batch_logps
    from dpo_score.losses.evaluate import evaluate_pairs
    from dpo_score.losses.torch import DPOLoss, sequence_logps

__version__ = "0.2.0"
__all__ = [
    "DPOLoss",
    "__version__",
    "dpo_gradients",
    "dpo_loss",
    "evaluate_pairs",
    "get_batch_logps",
    "precompute",
    "rescore",
    "run",
    "score",
    "select",
    "sequence_logps",
]
_HOMES = {
    "DPOLoss": "dpo_score.losses.torch",
    "dpo_gradients": "dpo_score.losses.compat",
    "dpo_loss": "dpo_score.losses.compat",
    "evaluate_pairs": "dpo_score.losses.evaluate",
    "get_batch_logps": "dpo_score.losses.compat",
    "precompute": "dpo_score.api",
    "rescore": "dpo_score.api",
    "run": "dpo_score.api",
    "score": "dpo_score.api",
    "select": "dpo_score.api",
    "sequence_logps": "dpo_score.losses.torch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
