"""What a run wrote at its end, made again from the parts: summary.json, README.md, pipeline.yaml, grids of `rescore`.

In: the score parts that records name, and the manifest. Out: where what is stored differs from what follows from
them. Sums are rounded once, so only another processor's exp and log may move a last bit: numbers agree within
TOLERANCE. Columns of the data that pairs are grouped by are read from the data again, where it is there unchanged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_score.config.schema import LossSpec, RunConfig
from dpo_score.data.types import ids_digest, row_place
from dpo_score.errors import DamageError
from dpo_score.losses.custom import is_custom
from dpo_score.losses.parse import ResolvedLoss, parse_loss
from dpo_score.results import noise, rewardbench
from dpo_score.results.card import CONTRACT, README, SUMMARY, card
from dpo_score.results.rescore import GRIDS, PolicyGrid
from dpo_score.results.source_text import PIPELINE, stored_config
from dpo_score.storage.base import FileRecord, Store, json_bytes, parse_json
from dpo_score.storage.commits import CHECKSUM, CommitRecord, read_record, record_name, unsealed
from dpo_score.storage.manifest import MANIFEST, Manifest, installed_version
from dpo_score.storage.parquet import fitted
from dpo_score.storage.resume import FileState, file_state
from dpo_score.tokenization.rewardbench import text_of

TOLERANCE = 1e-9
SHOWN = 3
PLAIN = ("n", "scored", "mean", "value", "ties", "labelled_ties", "overflow", "truncated", "margin_mean", "margin_max")
"""Numbers that every release computes alike; how intervals are made may change with a release."""
Damage = Iterator[tuple[str, str]]


@dataclass(slots=True)
class Totals:
    """What the records and parts of the run's reference add up to: the `data` and `marks` of summary.json."""

    counts: dict[str, int] = field(default_factory=dict)
    marks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, record: CommitRecord, table: pa.Table) -> None:
        for name, count in record.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        marks = table["marks"].combine_chunks()
        if not len(marks.flatten()):
            return
        for row_id, names in zip(table["row_id"].to_pylist(), marks.to_pylist(), strict=True):
            for name in names or ():
                entry = self.marks.setdefault(name, {"pairs": 0, "first": row_id})
                entry["pairs"] += 1


# --- summary.json -----------------------------------------------------------------------------------------------------


def summary_damage(
    manifest: Manifest, summary: Mapping[str, Any], totals: Totals, policies: Mapping[str, Mapping[str, Any]]
) -> Damage:
    """Where summary.json is not what the parts hold. `policies`: the numbers of each, made again."""
    if not summary:
        return
    this_release = by_this_release(manifest, summary)
    data = {"data": _data_again(manifest, summary, totals), "text": {**summary.get("text", {}), "marks": totals.marks}}
    again = {**summary, "schema_version": manifest.schema_version, **data, "policies": summary.get("policies", {})}
    found = list(_differences(summary, _as_json(again), "", plain=False))
    for name, numbers in policies.items():
        stored = summary["policies"][name]
        found += _differences(stored, _as_json(numbers), f"policies.{name}", plain=not this_release)
    if found:
        more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
        yield SUMMARY, f"does not follow from the parts: {'; '.join(found[:SHOWN])}{more}"


def by_this_release(manifest: Manifest, summary: Mapping[str, Any]) -> bool:
    """Whether this release made the folder, so that intervals and sentences come out the same as well."""
    same = manifest.versions.get("dpo-score") == installed_version("dpo-score")
    return same and (not summary or "failed" in summary)


def _data_again(manifest: Manifest, summary: Mapping[str, Any], totals: Totals) -> dict[str, Any]:
    """The `data` of summary.json. The rows of each set are only there; together they are those of the manifest."""
    data, stored = manifest.identities.text.get("data"), summary["data"]
    found = {
        **stored,
        "rows": totals.counts.get("rows", 0),
        "scored_by_reference": totals.counts.get("scored", 0),
        "rejected": {name: n for name, n in totals.counts.items() if name.startswith("rejected/")},
    }
    if not data:
        return found
    rows = {name: stored["datasets"].get(name, {}).get("rows", 0) for name in data}
    if sum(rows.values()) != manifest.total_rows:
        rows = dict.fromkeys(rows, f"{manifest.total_rows} of all sets")
    sets = {
        name: {"rows": rows[name], "format": each["format"]["name"], "polarity": each["format"]["polarity"]}
        for name, each in data.items()
    }
    return {**found, "datasets": sets, "files": sum(len(each["files"]) for each in data.values())}


def with_kept_slices(again: dict[str, Any], stored: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The numbers of a policy with slices that could not be made again as they are stored."""
    for name in names:
        for part in (("slices",), ("slice_cuts",), ("macro", "slices")):
            inside, known = again, stored
            for key in part:
                inside, known = inside[key], known[key]
            inside[name] = known[name]
    return again


class Benchmark:
    """RewardBench's table of a policy, where summary.json has one: the scores pass through, what it reads is kept."""

    def __init__(self, manifest: Manifest, policy: str, stored: Mapping[str, Any]) -> None:
        found = stored.get("rewardbench")
        self._setting = rewardbench.Setting.of(manifest, str(found["mode"]), policy) if found else None
        self._kept: list[pa.Table] = []

    def passing(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            if self._setting is not None:
                self._kept.append(table.select([name for name in rewardbench.COLUMNS if name in table.column_names]))
            yield table

    def summary(self, rejects: Iterable[pa.Table]) -> dict[str, Any]:
        if self._setting is None:
            return {}
        lost = [row for table in rejects for row in table["row_id"].to_pylist()]
        return {"rewardbench": rewardbench.summary(self._setting, iter(self._kept), lost)}


def noise_again(
    own: CommitRecord | None, reference: CommitRecord | None, margins: Sequence[NDArray[np.float64]]
) -> dict[str, Any]:
    """The noise floor under a policy's margins, as a run sums it up from the first records of both stages."""
    note, other = (None if record is None else record.notes.get("noise") for record in (own, reference))
    if note is None and other is not None:  # taken over from the reference: the noise of both cancels
        return {"policy": None, "reference": None, "margin_mean": 0.0, "margin_max": 0.0, "share_below": 0.0}
    return noise.of_policy(note, other, np.concatenate([np.empty(0), *margins]))


# --- README.md and pipeline.yaml --------------------------------------------------------------------------------------


def card_damage(store: Store, manifest: Manifest, summary: Mapping[str, Any]) -> Damage:
    """The card is the one that follows from summary.json, where this release wrote it."""
    written = README in {file.name for file in manifest.outputs} and by_this_release(manifest, summary)
    if written and store.read_bytes(README).decode() != card(store):
        yield README, "is not the card that follows from summary.json and the data set"


SAME = ("dtype", "device", "device_kind", "threads")
"""Numerics that every model of a run shares; its path and kernel may be slower ones."""


def numerics_damage(manifest: Manifest) -> Damage:
    """The numerics of the run are those that its reference was scored with."""
    run, reference = manifest.numerics.get("run", {}), manifest.identities.reference.get("numerics") or {}
    for name in SAME:
        if name in reference and run.get(name) != reference[name]:
            yield MANIFEST, f"numerics.run.{name} is {_shown(run.get(name))}, the reference's {_shown(reference[name])}"


def pipeline_damage(store: Store, manifest: Manifest, summary: Mapping[str, Any]) -> Damage:
    """pipeline.yaml asks for what the manifest says was computed."""
    if not summary or not store.exists(PIPELINE):
        return
    config, identities = stored_config(store), manifest.identities
    for name, (asked, done) in _asked_and_done(config, identities.text, identities.reference).items():
        if _as_json(asked) != done:
            yield PIPELINE, f"{name} is {_shown(asked)}, the manifest says {_shown(done)}"
    for name, policy in summary["policies"].items():
        if {*policy.get("slices", {})} != {*config.slices}:
            yield PIPELINE, f"slices are {_shown(list(config.slices))}, those of {name} in {SUMMARY} are others"


def _asked_and_done(
    config: RunConfig, text: Mapping[str, Any], reference: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Setting → as pipeline.yaml asks for it, as the manifest has it. Left out: what a run resolves by itself."""
    asked = text_of(config.rewardbench, config.text) if config.rewardbench else config.text
    stored = text.get("text", {})
    found = {
        f"text.{name}": (value, stored[name])
        for name, value in asked.model_dump(mode="json").items()
        if name in stored and (value is not None or name not in ("max_length", "date"))
    }
    found["keep_columns"] = (list(config.keep_columns), text.get("keep_columns", list(config.keep_columns)))
    if "limit_of_each_set" not in text and "sample" in text:
        found["sample"] = (config.sample, text["sample"])
    if "stats" in reference:
        found["compute.stats"] = (sorted(config.compute.stats), reference["stats"])
        found["compute.per_token"] = (config.compute.per_token, reference["per_token"])
    return found


# --- a data set with reference values ---------------------------------------------------------------------------------

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def export_damage(store: Store, manifest: Manifest, record: CommitRecord) -> Damage:
    """A file of an exported data set repeats what stage one committed: pairs, values, what became of each row."""
    told = record.notes.get("export", {})
    (file,) = record.files
    known = ("row_id", "pair_id", "pair_digest", "status", *_VALUES, *IDS)
    names = {name: told.get("renames", {}).get(name, name) for name in known}
    table, given = store.read_table(file.name), _given(store, manifest, record)
    if given is None or names["row_id"] not in table.column_names:
        return
    row_ids = table[names["row_id"]]
    if (table.schema.metadata or {}).get(b"dpo_score.identity", record.identity.encode()) != record.identity.encode():
        yield file.name, "its dpo_score.identity is not that of its commit record"
    if record.row_ids_digest:
        yield record.name, "has a row_ids_digest, which records of a data set have not"
    if not record.counts.get("rows") == file.rows == table.num_rows:
        yield record.name, f"counts {record.counts.get('rows')} rows, {file.name} holds {table.num_rows}"
    if len({row_place(row_id)[:2] for row_id in row_ids.to_pylist()}) != record.stop - record.start:
        yield record.name, f"covers rows {record.start} to {record.stop}, {file.name} holds others"
    at = pc.index_in(row_ids, value_set=given["row_id"].combine_chunks())
    for name in ("pair_id", "pair_digest", "status", *(_VALUES if told.get("ld_alpha") is None else ())):
        if names[name] in table.column_names:
            mine, theirs = table[names[name]], given[name].take(at)  # null: rejected rows have but a status
            if not mine.filter(pc.is_valid(theirs)).equals(theirs.drop_null()):
                yield file.name, f"column {names[name]} is not what stage one committed"
    if pc.any(pc.and_(pc.is_null(at), pc.equal(table[names["status"]], "scored"))).as_py():
        yield file.name, "holds scored rows that stage one did not commit"
    if all(names[name] in table.column_names for name in IDS):
        ids = [table[names[name]].to_pylist() for name in IDS]
        digests = [None if row[0] is None else ids_digest(*row).hexdigest() for row in zip(*ids, strict=True)]
        if digests != table[names["pair_digest"]].to_pylist():
            yield file.name, f"column {names['pair_digest']} is not the digest of the token ids"


_VALUES = ("ref_chosen_logps", "ref_rejected_logps")


def _given(store: Store, manifest: Manifest, record: CommitRecord) -> pa.Table | None:
    """Of every row of stage one in the blocks that a file covers: its pair, its values, and its status or code.

    None where one of these blocks is not there.
    """
    tables = []
    for block in range(record.start // manifest.block_rows, -(-record.stop // manifest.block_rows)):
        name = record_name("reference", block, manifest.blocks)
        found = read_record(store, name) if store.exists(name) else None
        if not isinstance(found, CommitRecord):
            return None  # which is said of stage one
        for file in found.files:
            table = store.read_table(file.name).replace_schema_metadata(None)
            if "code" in table.column_names:
                table = table.select(["row_id", "code"]).rename_columns(["row_id", "status"])
            tables.append(fitted(table, _GIVEN))
    return pa.concat_tables(tables) if tables else None


_GIVEN = pa.schema(
    [
        *((name, pa.string()) for name in ("row_id", "pair_id", "pair_digest", "status")),
        *((name, pa.float64()) for name in _VALUES),
    ]
)


def contract_damage(store: Store, manifest: Manifest, totals: Totals, exported: Sequence[CommitRecord]) -> Damage:
    """The contract beside an exported data set says what the manifest and the records say."""
    rows = sum(record.counts["rows"] for record in exported)
    if not exported or not store.exists(CONTRACT) or rows != totals.counts.get("rows"):
        return  # other rows were scored since: the contract is of those that the records of the data set count
    contract, identities = store.read_json(CONTRACT), manifest.identities
    told, numerics = exported[0].notes["export"], identities.reference.get("numerics") or {}
    rejected: Counter[str] = Counter()
    for name, count in totals.counts.items():
        if name.startswith("rejected/"):
            rejected[name.rpartition("/")[2]] += count
    splits: Counter[str] = Counter()
    for record in exported:
        splits[record.stage.partition("/")[2]] += record.counts["rows"]
    again = {
        **contract,
        "made_for": told["consumer"],
        "columns": told["renames"],
        "ld_alpha": told["ld_alpha"],
        "numerics": numerics,
        "dtype": numerics.get("dtype"),
        "reference": {**contract["reference"], "weights": identities.reference["weights"]},
        "rows": {
            **contract["rows"],
            "rejected": rejected,
            "scored": totals.counts.get("scored", 0),
            "rows": splits.total(),
            "splits": splits,
            "marks": totals.marks,
        },
    }
    text = identities.text["text"]
    alike = {"limit": "max_length", "template_date": "date"}
    shared = {name: text[alike.get(name, name)] for name in contract["text"] if alike.get(name, name) in text}
    again["text"] = {**contract["text"], **shared, "max_length": contract["text"]["max_length"]}
    found = list(_differences(contract, _as_json(again), "", plain=False))
    if found:
        yield CONTRACT, f"does not follow from the records: {'; '.join(found[:SHOWN])}"


# --- two JSON values --------------------------------------------------------------------------------------------------


def _as_json(value: Any) -> Any:
    """The value as it comes back from a file."""
    return parse_json(json_bytes(value), "")


def _differences(stored: Any, again: Any, path: str, plain: bool) -> Iterator[str]:
    """Paths at which what was made again is not what is stored. `plain`: only of the names in PLAIN."""
    if isinstance(again, Mapping):
        if not isinstance(stored, Mapping):
            yield path
            return
        for name in sorted(again.keys() | stored.keys()):
            inner = f"{path}.{name}" if path else str(name)
            if name in stored and name in again:
                yield from _differences(stored[name], again[name], inner, plain)
            elif not plain:
                yield f"{inner} (only {'stored' if name in stored else 'made again'})"
    elif plain and path.rpartition(".")[2] not in PLAIN:
        return
    elif isinstance(again, list) and isinstance(stored, list) and len(again) == len(stored):
        for place, (one, other) in enumerate(zip(stored, again, strict=True)):
            yield from _differences(one, other, f"{path}[{place}]", plain)
    elif not _same(stored, again):
        yield f"{path} ({_shown(stored)} is stored, {_shown(again)} follows)"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, int | float):
        return type(one) is type(other) and bool(one == other)
    return isinstance(other, int | float) and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-12)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value!r:.40}"


# --- grids of rescore -------------------------------------------------------------------------------------------------


def grids(store: Store) -> dict[str, list[str]]:
    """The files of each grid by its folder."""
    folders: dict[str, list[str]] = {}
    for name in store.list(GRIDS):
        folders.setdefault("/".join(name.split("/")[:2]), []).append(name)
    return folders


def grid_damage(
    store: Store, manifest: Manifest, folder: str, names: Sequence[str], unproved: dict[str, str], sound: bool
) -> Damage:
    """What is not as `rescore` wrote it, or, where the scores are `sound`, does not follow from them. `unproved`: grids
    that have nothing to be compared with."""
    summary = f"{folder}/{SUMMARY}"
    if summary not in names:
        unproved[folder] = f"no {SUMMARY}: `rescore` was interrupted; the same command writes it anew"
        return
    try:
        fields = store.read_json(summary)
        if isinstance(fields, dict) and not fields.keys() & {CHECKSUM, "files"}:
            unproved[folder] = "was written before grids carried checksums; the same `rescore` adds them"
            return
        known = unsealed(fields, store.url(summary))
        files = [FileRecord.from_json(file) for file in known["files"]]
    except (DamageError, LookupError, TypeError) as error:
        yield summary, str(error)
        return
    damage = [(file.name, "missing or altered since `rescore` wrote it") for file in files if not _sound(store, file)]
    named = {summary, *(file.name for file in files)}
    damage += [(name, f"{summary} does not name it") for name in sorted({*names} - named)]
    yield from damage
    if damage or not sound:
        return
    losses = _grid_losses(known)
    if isinstance(losses, str):
        unproved[folder] = losses
        return
    yield from _grid_differences(store, manifest, folder, known, losses)


def _sound(store: Store, file: FileRecord) -> bool:
    return file_state(store, file) is FileState.SOUND


def _grid_losses(summary: Mapping[str, Any]) -> list[ResolvedLoss] | str:
    """The losses of a grid, or in one sentence why they cannot be computed again."""
    specs = summary.get("specs")
    if not isinstance(specs, list):
        return "was written before grids said their losses in full; the same `rescore` adds them"
    if any(is_custom(str(spec.get("name"))) for spec in specs):
        return "a custom loss, which is code: not recomputed"
    return [parse_loss(LossSpec.model_validate(spec)) for spec in specs]


def _grid_differences(
    store: Store, manifest: Manifest, folder: str, summary: Mapping[str, Any], losses: list[ResolvedLoss]
) -> Damage:
    """Where the files of a grid, which are as its summary.json records them, do not follow from the scores."""
    reference = summary.get("reference_policy")
    rows: list[dict[str, Any]] = []
    left_out = {}
    recorded = {file["name"]: file["rows"] for file in summary["files"]}
    for name in dict.fromkeys(row["policy"] for row in summary["rows"]):
        grid = PolicyGrid(store, manifest, name, losses, reference)
        for part, table in grid.tables():
            file = f"{folder}/{name}/{part}"
            if not store.exists(file):
                yield file, "is missing, though scores have such a part"
            elif not store.read_table(file).replace_schema_metadata(None).equals(table):
                yield file, "does not follow from the scores"
            elif recorded.get(file) != table.num_rows:
                yield file, f"holds {table.num_rows} rows, {folder}/{SUMMARY} says {recorded.get(file)}"
        rows += grid.summary()
        if grid.left_out:
            left_out[name] = grid.left_out
    again = {**summary, "rows": rows, "left_out": left_out, "losses": [loss.identity() for loss in losses]}
    found = list(_differences(summary, _as_json(again), "", plain=False))
    if found:
        yield f"{folder}/{SUMMARY}", f"does not follow from the scores: {'; '.join(found[:SHOWN])}"
