"""Effects in order: from a configuration to committed blocks, summaries and data sets.

The package is also the function `dpo_score.run(…)`: a module of that name would otherwise hide it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """`called.run`."""
        from dpo_score.run.called import run

        return run(*arguments, **options)


sys.modules[__name__].__class__ = _CallableRoom
