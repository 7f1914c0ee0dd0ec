"""Numbers made again from the parts: summary.json of a run, and the grids of `rescore`.

In: the score parts that records name. Out: where what is stored differs from what follows from them. Sums are
exactly rounded, so only another processor's exp and log may move a last bit: numbers agree within TOLERANCE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dpo_score.config.schema import LossSpec
from dpo_score.losses.custom import is_custom
from dpo_score.losses.parse import ResolvedLoss, parse_loss
from dpo_score.metrics.groups import LENGTH
from dpo_score.results import noise
from dpo_score.results.rescore import PolicyGrid
from dpo_score.storage.base import Store, json_bytes, parse_json
from dpo_score.storage.commits import CommitRecord
from dpo_score.storage.manifest import Manifest

TOLERANCE = 1e-9
SHOWN = 3
PLAIN = ("n", "scored", "mean", "value", "ties", "labelled_ties", "overflow", "truncated", "margin_mean", "margin_max")
"""Numbers that every release computes alike; how intervals are made may change with a release."""


WHOLE = ("marks", "rejected")
"""Fields that hold counts by name, of which none may be added or left out."""


@dataclass(slots=True)
class Totals:
    """What the records and parts of the run's reference add up to: the `data` and `marks` of summary.json."""

    counts: dict[str, int] = field(default_factory=dict)
    marks: dict[str, dict[str, Any]] = field(default_factory=dict)
    noise: Mapping[str, Any] | None = None

    def add(self, record: CommitRecord, table: pa.Table) -> None:
        for name, count in record.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        if record.block == 0:
            self.noise = record.notes.get("noise")
        marks = table["marks"].combine_chunks()
        if not len(marks.flatten()):
            return
        for row_id, names in zip(table["row_id"].to_pylist(), marks.to_pylist(), strict=True):
            for name in names or ():
                entry = self.marks.setdefault(name, {"pairs": 0, "first": row_id})
                entry["pairs"] += 1


def data_differences(summary: Mapping[str, Any], totals: Totals) -> list[str]:
    """Where `data` and `text.marks` of summary.json are not what the parts of the reference hold."""
    rejected = {name: n for name, n in totals.counts.items() if name.startswith("rejected/")}
    data = {"rows": totals.counts.get("rows", 0), "scored_by_reference": totals.counts.get("scored", 0)}
    again = {"data": {**data, "rejected": rejected}, "text": {"marks": totals.marks}}
    return list(_differences(summary, _as_json(again), "", plain=False))


def policy_differences(stored: Mapping[str, Any], again: Mapping[str, Any], plain: bool) -> list[str]:
    """Where the numbers of a policy in summary.json are not those made again. `plain`: only the names in PLAIN."""
    return list(_differences(stored, _as_json(again), "", plain))


def stored_slices(stored: Mapping[str, Any], columns: list[str]) -> list[str]:
    """The slices of a policy that can be made again from its parts alone."""
    return [name for name in stored.get("slices", {}) if name in columns or name == LENGTH]


def noise_again(totals: Totals, own: CommitRecord | None, margins: Any) -> dict[str, Any]:
    """The noise floor under a policy's margins, as a run sums it up."""
    note = own.notes.get("noise") if own is not None else None
    if note is None and totals.noise is not None:
        return {"margin_mean": 0.0, "margin_max": 0.0, "share_below": 0.0}
    found = noise.of_policy(note, totals.noise, margins)
    return {name: found[name] for name in ("margin_mean", "margin_max", "share_below")}


def _as_json(value: Mapping[str, Any]) -> Any:
    """The value as it comes back from a file."""
    return parse_json(json_bytes(value), "")


def _differences(stored: Any, again: Any, path: str, plain: bool) -> Iterator[str]:
    """Paths at which what was made again is not what is stored; what is only stored is left alone."""
    if isinstance(again, Mapping):
        if not isinstance(stored, Mapping):
            yield path
            return
        if path.rpartition(".")[2] in WHOLE and stored.keys() != again.keys():
            yield f"{path} (it names {', '.join(sorted(stored.keys() ^ again.keys()))} on one side alone)"
        for name, value in again.items():
            inner = f"{path}.{name}" if path else str(name)
            if name in stored:
                yield from _differences(stored[name], value, inner, plain)
            elif not plain:
                yield inner
    elif isinstance(again, list) and isinstance(stored, list) and len(again) == len(stored):
        for place, (one, other) in enumerate(zip(stored, again, strict=True)):
            yield from _differences(one, other, f"{path}[{place}]", plain)
    elif plain and path.rpartition(".")[2] not in PLAIN:
        return
    elif not _same(stored, again):
        yield f"{path} ({_shown(stored)} is stored, {_shown(again)} follows)"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, int | float):
        return bool(one == other)
    return isinstance(other, int | float) and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-12)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value!r:.40}"


# --- grids of rescore -------------------------------------------------------------------------------------------------


def grid_losses(summary: Mapping[str, Any]) -> list[ResolvedLoss] | str:
    """The losses of a grid, or in one sentence why they cannot be computed again."""
    specs = summary.get("specs")
    if not isinstance(specs, list):
        return "was written before grids said their losses in full; the same `rescore` adds them"
    if any(is_custom(str(spec.get("name"))) for spec in specs):
        return "a custom loss, which is code: not recomputed"
    return [parse_loss(LossSpec.model_validate(spec)) for spec in specs]


def grid_differences(
    store: Store, manifest: Manifest, folder: str, summary: Mapping[str, Any], losses: list[ResolvedLoss]
) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of a grid, whose files are known to be as its summary.json records them."""
    reference = summary.get("reference_policy")
    names = list(dict.fromkeys(row["policy"] for row in summary["rows"]))
    rows: list[dict[str, Any]] = []
    left_out = {}
    for name in names:
        grid = PolicyGrid(store, manifest, name, losses, reference)
        for part, table in grid.tables():
            file = f"{folder}/{name}/{part}"
            if not store.exists(file):
                yield file, "is missing, though scores have such a part"
            elif not store.read_table(file).replace_schema_metadata(None).equals(table):
                yield file, "does not follow from the scores"
        rows += grid.summary()
        if grid.left_out:
            left_out[name] = grid.left_out
    again = {"rows": rows, "left_out": left_out, "losses": [loss.identity() for loss in losses]}
    found = list(_differences(summary, _as_json(again), "", plain=False))
    if found:
        yield f"{folder}/summary.json", f"does not follow from the scores: {'; '.join(found[:SHOWN])}"
