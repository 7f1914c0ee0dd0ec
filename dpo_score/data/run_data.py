"""The data of a configuration, opened in one way by every command that reads it.

What a row means depends on settings that stand in different places of a configuration; read here, they cannot differ
between a run and what shows, exports or verifies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpo_score.config.schema import RunConfig
from dpo_score.data.dataset import Dataset, open_datasets


def open_data(
    config: RunConfig, *, sha256: Callable[[str], str] | None = None, keep_columns: Sequence[str] | None = None
) -> tuple[Dataset, ...]:
    """The sets of `config`. `keep_columns`: instead of those that it names. Raises DataError."""
    return open_datasets(
        config.data,
        seed=config.seed,
        sha256=sha256,
        keep_columns=config.keep_columns if keep_columns is None else keep_columns,
        keep_nulls=config.text.keep_nulls,
    )
