"""What an output folder holds, read from its manifest and commit records alone."""

from __future__ import annotations

from typing import Any

from dpo_score.errors import UsageError
from dpo_score.storage.commits import CommitRecord, read_records
from dpo_score.storage.io import Store, open_store
from dpo_score.storage.manifest import read_manifest


def status(out: str) -> dict[str, Any]:
    """State, identities, and per stage: blocks committed, rows, scored, rejected."""
    store = open_store(out)
    manifest = read_manifest(store)
    if manifest is None:
        raise UsageError(f"{out} holds no run: it has no manifest.json")
    blocks = max(-(-manifest.total_rows // manifest.block_rows), 1)
    stages = ["reference", *(f"scores/{name}" for name in sorted(manifest.identities.policies))]
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
            **{name: manifest.identities.policy_digest(name) for name in sorted(manifest.identities.policies)},
        },
        "stages": [_stage(store, stage, blocks) for stage in stages],
        "warnings": list(manifest.warnings),
    }


def _stage(store: Store, stage: str, blocks: int) -> dict[str, Any]:
    records = [record for record in read_records(store, stage).values() if isinstance(record, CommitRecord)]
    counts = [record.counts for record in records]
    return {
        "stage": stage,
        "done": len(records),
        "blocks": records[0].blocks if records else blocks,
        "rows": sum(record.stop - record.start for record in records),
        "scored": sum(count.get("scored", 0) for count in counts),
        "rejected": sum(n for count in counts for name, n in count.items() if name.startswith("rejected/")),
    }
