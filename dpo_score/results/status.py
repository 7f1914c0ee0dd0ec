"""`dpo-score status`: what an output folder holds, read from its manifest and commit records alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_score.results.run_folder import missing_of_policy, open_out
from dpo_score.storage.base import Store
from dpo_score.storage.commits import CommitRecord, read_records
from dpo_score.storage.manifest import Manifest


def status(out: str) -> dict[str, Any]:
    """State, identities, and per stage: blocks committed, rows, scored, rejected, and rows that are missing."""
    store, manifest = open_out(out)
    policies = sorted(manifest.identities.policies)
    covered = max((record.stop for record in _records(store, "reference")), default=0)
    missing = {name: missing_of_policy(store, manifest, name, covered) for name in policies}
    return {
        "out": out,
        "state": manifest.state,
        "total_rows": manifest.total_rows,
        "block_rows": manifest.block_rows,
        "started": manifest.started,
        "finished": manifest.finished,
        "identities": {
            "text": manifest.identities.text_digest,
            "reference": manifest.identities.reference_digest,
            **{name: manifest.identities.policy_digest(name) for name in policies},
        },
        "stages": [
            _stage(store, manifest, "reference", []),
            *(_stage(store, manifest, f"scores/{name}", missing[name]) for name in policies),
        ],
        "warnings": list(manifest.warnings),
    }


def _records(store: Store, stage: str) -> list[CommitRecord]:
    return [record for record in read_records(store, stage).values() if isinstance(record, CommitRecord)]


def _stage(store: Store, manifest: Manifest, stage: str, missing: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """`missing`: row ranges [start, stop) that the reference has and this policy has not."""
    records = _records(store, stage)
    counts = [record.counts for record in records]
    return {
        "stage": stage,
        "done": len(records),
        "blocks": records[0].blocks if records else manifest.blocks,
        "rows": sum(record.stop - record.start for record in records),
        "scored": sum(count.get("scored", 0) for count in counts),
        "rejected": sum(n for count in counts for name, n in count.items() if name.startswith("rejected/")),
        "missing": [list(rows) for rows in missing],
    }
