"""What OUT holds, read back as arrays: the rows of each scored policy, and what its numbers depend on.

Promises: reads only committed Parquet parts and the manifest; loads no model and no tokenizer; policies come in
natural order (step-9 before step-10). Does not look at the data files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_score.config.checkpoint_glob import natural
from dpo_score.errors import DamageError, UsageError, nearest
from dpo_score.metrics.arrays import COLUMNS, Texts, collect
from dpo_score.metrics.compare import ScoredPolicy, ScoringSettings
from dpo_score.storage.base import Store
from dpo_score.storage.commits import CommitRecord, read_records, record_name
from dpo_score.storage.fingerprint import has_reference
from dpo_score.storage.manifest import Manifest, peek_manifest, read_manifest
from dpo_score.storage.open import open_store
from dpo_score.storage.resume import FileState, file_state, missing_rows

STEP = re.compile(
    r"""(?: [-_.]? (?:step|checkpoint|ckpt|iter|epoch) [-_.]?
          | (?<! \d e) [-_]        # 5e-7 is one number
          | (?<= [^\W\d_]) [.] )  # 0.05 is one, 1.2 a version
        (\d+) $""",
    re.IGNORECASE | re.VERBOSE,
)
"""The end of a checkpoint's name that tells its step: a whole number after a separator or a word such as step."""


class Reading(Protocol):
    """Tells a person how far a look at many rows is: `with reading(label, rows) as read: … read(rows of a part)`."""

    def __call__(self, label: str, rows: int, unit: str = "rows") -> AbstractContextManager[Callable[[int], None]]: ...


def unseen(label: str, rows: int, unit: str = "rows") -> AbstractContextManager[Callable[[int], None]]:
    """A look that nobody watches."""
    return nullcontext(lambda read: None)


def open_out(out: str, mend: bool = True) -> tuple[Store, Manifest]:
    """The store and manifest of a folder that a run wrote; UsageError where there is none.

    `mend`: a damaged manifest is restored from its copy under commits/; otherwise the copy is read and nothing changes.
    """
    store = open_store(out)
    manifest = read_manifest(store) if mend else peek_manifest(store)
    if manifest is None:
        raise UsageError(f"{out} holds no run: it has no manifest.json. Name a folder that `dpo-score run` wrote")
    return store, manifest


def read_summary(store: Store, manifest: Manifest, out: str) -> Mapping[str, Any]:
    """What summary.json holds. UsageError where there is none yet, DamageError where it is not as it was written."""
    name = "summary.json"
    if not store.exists(name):
        raise UsageError(f"{out} has no {name}: the run has not finished; the same `dpo-score run` resumes it")
    record = next((file for file in manifest.outputs if file.name == name), None)
    if record is not None and file_state(store, record) is not FileState.SOUND:
        raise DamageError(
            f"{store.url(name)} is not as the run wrote it: its checksum is not the one in manifest.json. The "
            "same `dpo-score run` writes it again; `dpo-score verify` looks at the other files"
        )
    summary: Mapping[str, Any] = store.read_json(name)
    return summary


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
    """The score parts that a commit record names, in block order."""
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
    if not names:
        raise UsageError(f"--policies {asked!r} names no policy: name some of {', '.join(known)}, or leave it out")
    for name in names:
        if name not in known:
            raise UsageError(f"{out} has no scored policy {name!r}; {nearest(name, known)}")
    return list(dict.fromkeys(names))


def read_scored(
    store: Store,
    manifest: Manifest,
    policy: str,
    slices: Sequence[str] = (),
    columns: pa.Table | None = None,
    read: Callable[[int], None] = lambda rows: None,
) -> ScoredPolicy:
    """All scored rows of one policy, part by part: of each part only the columns that a comparison reads.

    slices: further columns to group by. columns: those of them that scores lack, by row_id. read: told of rows read.
    """
    kept: list[pa.Table] = []

    def tables() -> Iterator[pa.Table]:
        for name in parts(store, policy):
            table = _only_scored(store.read_table(name, _present(store, name, (*IDS, *COLUMNS, *slices))))
            kept.append(table.select(IDS))
            read(table.num_rows)
            yield table

    rows = collect(sliced(tables(), columns), slices=slices)
    ids = pa.concat_tables(kept)
    return ScoredPolicy(
        name=policy,
        step=step_of(policy, str(manifest.notes.get("names", {}).get(policy, ""))),
        row_ids=Texts(ids["row_id"]),
        pair_ids=Texts(ids["pair_id"]),
        rows=rows,
        marks=_marks(ids["marks"]),
        settings=settings(manifest, policy),
    )


IDS = ("row_id", "pair_id", "marks")


def scored_row_ids(store: Store, policy: str) -> pa.ChunkedArray:
    """The ids of the rows that have scores."""
    columns = ["row_id", "policy_chosen_logps", "policy_rejected_logps"]
    tables = [_only_scored(store.read_table(name, columns)).select(["row_id"]) for name in parts(store, policy)]
    return pa.concat_tables(tables)["row_id"]


def score_columns(store: Store, policy: str) -> list[str]:
    """The columns of a policy's scores."""
    with store.open_table(parts(store, policy)[0]) as file:
        names: list[str] = file.schema_arrow.names
    return names


def _present(store: Store, name: str, wanted: Sequence[str]) -> list[str]:
    with store.open_table(name) as file:
        return [column for column in file.schema_arrow.names if column in wanted]


def _only_scored(table: pa.Table) -> pa.Table:
    table = table.replace_schema_metadata(None)
    sums = [table["policy_chosen_logps"], table["policy_rejected_logps"]]
    return table.filter(pc.and_(*map(pc.is_valid, sums))) if any(column.null_count for column in sums) else table


def share_equal(first: ScoredPolicy, policy: ScoredPolicy) -> ScoredPolicy:
    """`policy` with the ids, marks and arrays of `first` in place of its equal ones: these are in memory once then."""
    if policy.row_ids != first.row_ids or policy.pair_ids != first.pair_ids or policy.marks != first.marks:
        return policy
    own, known = policy.rows, first.rows
    rows = replace(
        own,
        values=_shared(own.values, known.values),
        flags=_shared(own.flags, known.flags),
        labels=_shared(own.labels, known.labels),
        clusters=_shared({"": own.clusters}, {"": known.clusters})[""],
    )
    return replace(policy, row_ids=first.row_ids, pair_ids=first.pair_ids, marks=first.marks, rows=rows)


def _shared(own: Mapping[str, NDArray[Any]], known: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays of `own`, by name; where `known` has one of the same name and bytes, that one."""

    def same(name: str, values: NDArray[Any]) -> bool:
        other = known.get(name)
        return other is not None and values.dtype == other.dtype and bool(np.array_equal(_bytes(values), _bytes(other)))

    return {name: known[name] if same(name, values) else values for name, values in own.items()}


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return values.view(np.uint8)


def _marks(column: pa.ChunkedArray) -> Sequence[Sequence[str] | None]:
    """The marks of each row; rows without one share an empty list, since most are such."""
    empty: Sequence[str] = ()
    if not len(pc.list_flatten(column)):
        return [empty] * len(column)
    return [marks or empty for marks in column.to_pylist()]


def joined(table: pa.Table, found: pa.Table) -> pa.Table:
    """`table` with the other columns of `found` that it lacks, by row_id; null where a row is not found."""
    at = pc.index_in(table["row_id"], value_set=found["row_id"].combine_chunks())
    for name in found.column_names:
        if name not in table.column_names:
            table = table.append_column(found.schema.field(name), found[name].take(at))
    return table


def sliced(tables: Iterable[pa.Table], found: pa.Table | None) -> Iterator[pa.Table]:
    """Score tables with what they lack of `found`, whose rows are in the same order."""
    for table in tables:
        yield table if found is None or not len(table) else joined(table, _span(found, table))


def _span(found: pa.Table, table: pa.Table) -> pa.Table:
    """The rows of `found` from the first to the last of `table`: looked up in fewer, a part costs what it holds."""
    first, last = (pc.index(found["row_id"], table["row_id"][place]).as_py() for place in (0, -1))
    return found.slice(first, last - first + 1) if 0 <= first <= last else found


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
