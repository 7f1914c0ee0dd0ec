"""What OUT holds, read back as arrays: the rows of each scored policy, and what its numbers rest on.

Promises: reads only committed Parquet parts and the manifest; loads no model and no tokenizer; policies come in
natural order (step-9 before step-10). Does not look at the data files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.config.checkpoint_glob import natural
from dpo_score.errors import UsageError, nearest
from dpo_score.metrics.arrays import collect
from dpo_score.metrics.compare import ScoredPolicy, ScoringSettings
from dpo_score.storage.base import Store
from dpo_score.storage.commits import CommitRecord, read_records, record_name
from dpo_score.storage.fingerprint import has_reference
from dpo_score.storage.manifest import Manifest, peek_manifest, read_manifest
from dpo_score.storage.open import open_store
from dpo_score.storage.resume import missing_rows

NOT_COMPARED = ("source_file", "source_row", "pair_digest", "compute_dtype", "status")
"""Columns that tell where a row comes from: no comparison of policies reads them."""
STEP = re.compile(
    r"""(?: [-_.]? (?:step|checkpoint|ckpt|iter|epoch) [-_.]?
          | (?<! \d e) [-_]        # 5e-7 is one number
          | (?<= [^\W\d_]) [.] )  # 0.05 is one, 1.2 a version
        (\d+) $""",
    re.IGNORECASE | re.VERBOSE,
)
"""The end of a checkpoint's name that tells its step: a whole number after a separator or a word such as step."""


def open_out(out: str, mend: bool = True) -> tuple[Store, Manifest]:
    """The store and manifest of a folder that a run wrote; UsageError where there is none.

    `mend`: a damaged manifest is restored from its copy under commits/; otherwise the copy is read and nothing changes.
    """
    store = open_store(out)
    manifest = read_manifest(store) if mend else peek_manifest(store)
    if manifest is None:
        raise UsageError(f"{out} holds no run: it has no manifest.json. Name a folder that `dpo-score run` wrote")
    return store, manifest


def missing_of_policy(store: Store, manifest: Manifest, policy: str, rows: int) -> list[tuple[int, int]]:
    """Ranges [start, stop) of the first `rows` rows that a policy has no committed scores of."""
    stage = f"scores/{policy}"
    records = read_records(store, stage)
    ranges = manifest.block_ranges(rows)
    return missing_rows((r, records.get(record_name(stage, r.block, r.blocks)), ()) for r in ranges)


def policy_names(store: Store, manifest: Manifest) -> list[str]:
    """Policies with at least one committed part, in natural order."""
    return sorted((name for name in manifest.identities.policies if parts(store, name)), key=natural)


def parts(store: Store, policy: str) -> list[str]:
    """The score parts that a commit record vouches for, in block order."""
    records = read_records(store, f"scores/{policy}").values()
    names = [file.name for record in records if isinstance(record, CommitRecord) for file in record.files]
    return sorted(name for name in names if name.startswith("scores/") and store.exists(name))


def chosen_names(store: Store, manifest: Manifest, asked: str | None, out: str) -> list[str]:
    """`--policies`: all, or a comma list. Raises UsageError for an unknown one, and when nothing is scored."""
    known = policy_names(store, manifest)
    if not known:
        raise UsageError(f"{out} holds no scored policy yet: let `dpo-score run` finish one")
    if asked in (None, "", "all"):
        return known
    names = [name.strip() for name in str(asked).split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(f"{out} has no scored policy {name!r}; {nearest(name, known)}")
    return list(dict.fromkeys(names))


def read_scored(store: Store, manifest: Manifest, policy: str) -> ScoredPolicy:
    """All scored rows of one policy."""
    return as_scored(manifest, policy, scored_rows(store, policy, all_columns=False))


def scored_rows(store: Store, policy: str, all_columns: bool = True) -> pa.Table:
    """The stored columns of the rows that have scores, but for lists of token values and ids.

    `all_columns`: else only those that a comparison reads (NOT_COMPARED are left out).
    """
    left_out = () if all_columns else NOT_COMPARED
    columns = {name: [c for c in _bare_columns(store, name) if c not in left_out] for name in parts(store, policy)}
    return _scored_rows(store.read_table(name, kept) for name, kept in columns.items())


def shared_ids(policies: Sequence[ScoredPolicy]) -> list[ScoredPolicy]:
    """The policies, of which those with the same rows share one list of ids: texts are most of what they hold."""
    first = policies[0]
    return [
        replace(policy, row_ids=first.row_ids, pair_ids=first.pair_ids)
        if policy.row_ids == first.row_ids and policy.pair_ids == first.pair_ids
        else policy
        for policy in policies
    ]


def as_scored(manifest: Manifest, policy: str, table: pa.Table, slices: Sequence[str] = ()) -> ScoredPolicy:
    """Those rows as arrays. `slices`: further columns to group by."""
    return ScoredPolicy(
        name=policy,
        step=step_of(policy, str(manifest.notes.get("names", {}).get(policy, ""))),
        row_ids=table["row_id"].to_pylist(),
        pair_ids=table["pair_id"].to_pylist(),
        rows=collect([table], slices=slices),
        marks=_marks(table["marks"]),
        settings=settings(manifest, policy),
    )


def _marks(column: pa.ChunkedArray) -> Sequence[Sequence[str] | None]:
    """The marks of each row; rows without one share an empty list, since most are such."""
    if not len(pc.list_flatten(column)):
        return [()] * len(column)
    empty: Sequence[str] = ()
    return [marks or empty for marks in column.to_pylist()]


def _bare_columns(store: Store, name: str) -> list[str]:
    """The columns of a part but for its lists of token values and ids, which are most of its bytes."""
    with store.open_table(name) as file:
        return [column for column in file.schema_arrow.names if not column.endswith(("_token_logps", "_ids"))]


def _scored_rows(tables: Iterable[pa.Table]) -> pa.Table:
    kept = []
    for table in tables:
        table = table.replace_schema_metadata(None)
        if table["policy_chosen_logps"].null_count or table["policy_rejected_logps"].null_count:
            there = pc.and_(pc.is_valid(table["policy_chosen_logps"]), pc.is_valid(table["policy_rejected_logps"]))
            table = table.filter(there)
        kept.append(table)
    return pa.concat_tables(kept)


def step_of(*names: str) -> int | None:
    """The training step in the first of a checkpoint's names that has one, as STEP reads it."""
    found = (STEP.search(name.rstrip("/")) for name in names)
    return next((int(match[1]) for match in found if match), None)


def settings(manifest: Manifest, policy: str) -> ScoringSettings:
    """What must be equal for rewards of two policies to be subtracted."""
    fields = manifest.identities.policies[policy]
    reference = manifest.identities.reference_of(policy)
    text = dict(manifest.identities.text.get("text") or {})
    loss = dict(fields["loss"])
    return ScoringSettings(
        reference=_short(reference.get("weights") or reference.get("columns")),
        beta=float(loss.pop("beta")),
        loss=json.dumps(loss, sort_keys=True),
        truncation=f"{text.pop('truncation', None)}, max_length {text.pop('max_length', None)}",
        template=json.dumps(text, sort_keys=True),
        dtype=f"{_dtype(fields)}, reference {_dtype(reference)}",
        has_reference=has_reference(reference),
    )


def _dtype(fields: Mapping[str, Any]) -> str:
    return str((fields.get("numerics") or {}).get("dtype"))


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)
