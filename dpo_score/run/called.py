"""A run asked for by a program: options by their command-line names, results instead of printed tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpo_score.config import RunConfig
from dpo_score.errors import ConfigError, nearest
from dpo_score.options import BY_NAME
from dpo_score.pipeline import load_config

if TYPE_CHECKING:
    from dpo_score.run.finish import Outcome

LISTS = ("data", "policy", "loss_param", "slice")


def run(pipeline: str | None = None, *, restart: bool = False, quiet: bool = True, **options: Any) -> Outcome:
    """`dpo-score run`: score every policy into `out`; the same call again resumes.

    `.summary` holds the numbers, `.failures` the policies that could not be scored, `.raise_failures()` raises them.
    """
    from dpo_score.run import engines
    from dpo_score.run.progress import Progress

    return engines.run(configured(pipeline, options), Progress(quiet), restart=restart)


def configured(pipeline: str | None, options: Mapping[str, Any]) -> RunConfig:
    """The configuration that a command line with these options gives; options that are None are not set."""
    given = {}
    for name, value in options.items():
        if name not in BY_NAME:
            raise ConfigError(f"unknown option {name!r}: {nearest(name, BY_NAME)}")
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        given[name] = [plain] if name in LISTS and isinstance(plain, str) else plain
    return load_config(pipeline, {name: value for name, value in given.items() if value is not None})
