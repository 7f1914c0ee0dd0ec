"""--restart of a run: deletes what runs wrote here, and nothing that a data set rests on."""

from __future__ import annotations

from dpo_score.errors import ConfigError
from dpo_score.results.card import CONTRACT
from dpo_score.storage.io import Store
from dpo_score.storage.manifest import restart


def discard_results(store: Store) -> None:
    """Raises ConfigError where `precompute` wrote a data set: it would outlive the values and records it belongs to."""
    if store.exists(CONTRACT):
        raise ConfigError(
            f"{store.url()} also holds a data set with reference log-probs (data/, {CONTRACT}), which --restart would "
            "leave without its records: choose another --out, or delete the folder"
        )
    restart(store)
