"""`--slice COL`: the column that pairs are grouped by, from the scores where they carry it, else from the data.

Promises: a column of the scores wins, then what is built in (length, turns), then a column of the data; the data is
read again only for what scores lack, in one pass without a model, and only while it is what was scored; a column that
is nowhere is refused with those that are there. How a column makes groups is in metrics/groups.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dpo_score.data.dataset import Dataset, PairReader
from dpo_score.data.formats.transcripts import message_count
from dpo_score.data.types import Pair
from dpo_score.errors import ConfigError, UsageError
from dpo_score.escape import safe
from dpo_score.heap import return_memory
from dpo_score.losses.columns import DERIVED
from dpo_score.metrics.arrays import FLOATS, without_texts
from dpo_score.metrics.compare import AlignedPolicies, ScoredPolicy
from dpo_score.metrics.groups import BUILT_IN, DATA, DATASET, LENGTH, TURNS, means, text_of
from dpo_score.results.run_folder import (
    Reading,
    read_scored,
    score_columns,
    scored_row_ids,
    share_equal,
    unseen,
)
from dpo_score.results.schemas import COUNT_FIELDS, SIDES, TEXT_FIELDS
from dpo_score.results.source_text import text_source
from dpo_score.storage.base import Store
from dpo_score.storage.manifest import Manifest

STORED = (*(field.name for field in (*TEXT_FIELDS, *COUNT_FIELDS)), *FLOATS, "margins", "accuracy")
"""Columns that every score table has and that make sense to group by."""
INTERNAL = frozenset(
    (*STORED, *DERIVED, *(f"{role}_{side}_logps_shared" for role in ("policy", "ref") for side in SIDES), "tied")
)
OFFERED = (DATASET, "subset", "status", "chosen_truncated", "rejected_truncated", "prompt_tokens", "margins", "loss")
"""Of these the ones that a message names: what somebody would group by."""
LISTED = 40
GAP = 256
"""Rows between two wanted ones up to which reading on is cheaper than beginning anew."""


def check_slices(slices: Sequence[str], datasets: Sequence[Dataset], carried: Sequence[str]) -> None:
    """ConfigError for a --slice that neither scores nor data will have. `carried`: columns that the scores hold."""
    for name in slices:
        if name not in (*carried, *STORED, *BUILT_IN):
            _refuse_unless_there(name, datasets, carried)


def _refuse_unless_there(name: str, datasets: Sequence[Dataset], carried: Iterable[str]) -> None:
    columns = sorted({column for dataset in datasets for column in dataset.schema})
    if name not in columns:
        raise ConfigError(
            f"--slice {safe(name, 80)}: no such column. Columns of the data: {_listed(columns)}; built in: "
            f"{', '.join(BUILT_IN)}; of the scores: {_listed(_offered(carried))}"
        )


def _offered(columns: Iterable[str]) -> list[str]:
    """Columns of the scores without those that only the program reads."""
    return list(dict.fromkeys([*(name for name in columns if name in OFFERED or name not in INTERNAL), *OFFERED]))


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names) - LISTED:,} more)" if len(names) > LISTED else ""
    return ", ".join(safe(name, 80) for name in dict.fromkeys(names[:LISTED])) + more


def columns_of_data(
    slices: Sequence[str], datasets: Sequence[Dataset], carried: Sequence[str], rows: Sequence[int]
) -> pa.Table | None:
    """The columns of `slices` that scores lack, by row_id, of the rows of these numbers; None if they lack none."""
    names = [name for name in slices if name not in (*carried, *STORED) and name not in (LENGTH, DATA)]
    return from_data(datasets, rows, names) if names else None


def read_policies(
    store: Store,
    manifest: Manifest,
    policies: Sequence[str],
    slices: Sequence[str] = (),
    reading: Reading = unseen,
) -> list[ScoredPolicy]:
    """All scored rows of several policies; the first with `slices` to group by, since groups follow its rows."""
    stored = score_columns(store, policies[0]) if slices else []
    columns = slice_columns(store, manifest, policies[0], slices, stored) if slices else None
    found: list[ScoredPolicy] = []
    with reading("reading scores", len(policies) * manifest.rows) as read:
        for policy in policies:
            own = read_scored(store, manifest, policy, () if found else slices, None if found else columns, read)
            found.append(share_equal(found[0], own) if found else own)
            del own
            return_memory()  # of the columns of one policy, before those of the next are read
    return found


def numbered_groups(aligned: AlignedPolicies) -> AlignedPolicies:
    """For --no-text: the policies with no text of the data in the name of a group."""
    return replace(
        aligned, policies=tuple(replace(policy, rows=without_texts(policy.rows)) for policy in aligned.policies)
    )


def lacking(slices: Sequence[str], stored: Sequence[str]) -> list[str]:
    """The slices that are columns of the data: scores have the columns `stored`."""
    return [name for name in slices if name not in stored and name not in (LENGTH, DATA)]


def slice_columns(
    store: Store,
    manifest: Manifest,
    policy: str,
    slices: Sequence[str],
    stored: Sequence[str],
    remember: bool = True,
) -> pa.Table | None:
    """The columns of the data that scores with the columns `stored` lack, by row_id; None where they lack none.

    UsageError where a column cannot be had.
    """
    names = lacking(slices, stored)
    if not names:
        return None
    source = text_source(store, manifest, remember)
    if isinstance(source, str):
        raise UsageError(
            f"--slice {safe(names[0], 80)}: the scores have no such column (they can be grouped by "
            f"{_listed(_offered(stored))}), and {source}. "
            "To have a column of the data in the scores, score with --keep-columns"
        )
    for name in names:
        if name not in BUILT_IN:
            _refuse_unless_there(name, source.datasets, stored)
    return from_data(source.datasets, source.rows(scored_row_ids(store, policy).to_pylist()), names)


def from_data(datasets: Sequence[Dataset], rows: Sequence[int], names: Sequence[str]) -> pa.Table:
    """`row_id` and one column a name, for every pair of these rows (numbers through all sets, ascending)."""
    reader = PairReader([_keeping(dataset, names) for dataset in datasets])
    ids: list[str] = []
    values: dict[str, list[Any]] = {name: [] for name in names}
    for start, stop in _runs(rows):
        for unit in reader.units(start, stop):
            for pair in (item for item in unit if isinstance(item, Pair)):
                ids.append(pair.source.row_id)
                for name in names:
                    values[name].append(message_count(pair) if name == TURNS else pair.extra.get(name))
    arrays = [_array(found) for found in values.values()]
    fields = [pa.field(name, array.type, metadata=_meaning(name)) for name, array in zip(names, arrays, strict=True)]
    return pa.table([pa.array(ids, pa.string()), *arrays], schema=pa.schema([("row_id", pa.string()), *fields]))


def _meaning(name: str) -> dict[bytes, bytes] | None:
    return means(BUILT_IN[name]) if name in BUILT_IN else None


def _keeping(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The set with those of `names` that it has carried along."""
    kept = tuple(name for name in names if name in dataset.schema)
    return replace(dataset, reader=replace(dataset.reader, kept=(*dataset.reader.kept, *kept)))


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of rows that lie close together."""
    if not len(rows):
        return
    start = last = rows[0]
    for row in rows:
        if row - last > GAP:
            yield start, last + 1
            start = row
        last = row
    yield start, last + 1


def _array(values: Sequence[Any]) -> pa.Array:
    """Numbers where all values are, else texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds and kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    return pa.array([text_of(value) for value in values], pa.string())
