"""`dpo-score audit OUT`: labels worth a second look, as a Parquet file to review. Loads no model.

Promises: only pairs that all audited policies scored; texts (and the marks of near-duplicates, which need them) only
where the data is unchanged, else null with the reason said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.data.types import Pair
from dpo_score.metrics.compare import align_policies
from dpo_score.metrics.suspect_labels import NEAR, Audit, Suspect, label_audit, near_duplicates, similarity
from dpo_score.results.groups import read_policies
from dpo_score.results.run_folder import Reading, chosen_names, open_out, parts, unseen
from dpo_score.results.source_text import TextSource, plain_text, text_source
from dpo_score.storage.base import Store
from dpo_score.storage.manifest import Manifest

FILE = "audit.parquet"
COMPARED = 20_000
"""Suspects, most confident first, among which near-duplicates are looked for."""
AT_ONCE = 5_000
"""Suspects whose rows are made together."""
TEXTS = pa.schema([("row_id", pa.string()), *((s, pa.large_string()) for s in ("prompt", "chosen", "rejected"))])
SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("dataset", pa.string()),
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
        ("pair_id", pa.string()),
        ("finding", pa.string()),
        ("confidence", pa.float64()),
        ("margins", pa.map_(pa.string(), pa.float64())),
        ("reference_agrees", pa.bool_()),
        ("marks", pa.list_(pa.string())),
        ("copies", pa.int64()),
        ("answer_similarity", pa.float64()),
        ("near_duplicate_of", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
    ]
)


def audit(out: str, policies: str | None = None, no_text: bool = False, reading: Reading = unseen) -> dict[str, Any]:
    """Write OUT/audit.parquet, one row a suspect; returns counts, the file and the first ten rows."""
    store, manifest = open_out(out)
    names = chosen_names(store, manifest, policies, out)
    found = label_audit(align_policies(read_policies(store, manifest, names, (), reading)))
    texts, reason = _texts(store, manifest, found, no_text)
    first: list[dict[str, Any]] = []
    near_identical = near_duplicates_found = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal near_identical, near_duplicates_found
        for rows in _rows(found, texts, _sources(store, names[0], found)):
            first.extend(rows[: 10 - len(first)])
            near_identical += sum((row["answer_similarity"] or 0.0) >= NEAR for row in rows)
            near_duplicates_found += sum(row["near_duplicate_of"] is not None for row in rows)
            yield pa.Table.from_pylist(rows, schema=SCHEMA)

    store.write_tables(FILE, SCHEMA, tables(), {})
    return {
        "file": store.url(FILE),
        "pairs": found.pairs,
        "policies": names,
        "ranked_against": found.against,
        "identical_answers": len(found.identical_rows),
        "near_identical": near_identical,
        "near_duplicates": near_duplicates_found,
        "texts": reason,
        "first": [{key: row[key] for key in ("row_id", "finding", "confidence", "copies")} for row in first],
    }


def _suspect_ids(found: Audit) -> pa.Array:
    return pa.array([found.aligned.first.row_ids[row] for row in found.rows.tolist()], pa.string())


def _texts(store: Store, manifest: Manifest, found: Audit, no_text: bool) -> tuple[pa.Table | None, str | None]:
    """Texts of the suspects by row_id, or why there are none."""
    source: TextSource | str = "--no-text" if no_text else text_source(store, manifest)
    if isinstance(source, str):
        return None, f"texts are left out: {source}"
    wanted = _suspect_ids(found)
    kept = []
    for pairs in source.batches(wanted.to_pylist(), AT_ONCE):
        kept.append(
            pa.Table.from_pylist([{"row_id": row_id, **texts_of(pair)} for row_id, pair in pairs.items()], TEXTS)
        )
    return pa.concat_tables([TEXTS.empty_table(), *kept]), None


def _sources(store: Store, policy: str, found: Audit) -> pa.Table:
    """Where the suspects come from, in their order."""
    wanted = _suspect_ids(found)
    columns = ["row_id", "dataset", "source_file", "source_row"]
    tables = (store.read_table(name, columns).replace_schema_metadata(None) for name in parts(store, policy))
    rows = pa.concat_tables([table.filter(pc.is_in(table["row_id"], value_set=wanted)) for table in tables])
    return rows.take(pc.index_in(wanted, value_set=rows["row_id"].combine_chunks()))


def _rows(found: Audit, texts: pa.Table | None, sources: pa.Table) -> Iterator[list[dict[str, Any]]]:
    """The rows of the file, AT_ONCE at a time: a dictionary a suspect, with the columns of SCHEMA."""
    known = TEXTS.empty_table() if texts is None else texts
    at = pc.index_in(sources["row_id"], value_set=known["row_id"].combine_chunks())
    twins = _twins(known.take(at.slice(0, COMPARED).drop_null()))
    for start in range(0, sources.num_rows, AT_ONCE):
        own = known.take(at.slice(start, AT_ONCE)).to_pylist()
        rows = zip(sources.slice(start, AT_ONCE).to_pylist(), own, strict=True)
        yield [_row(found.suspect(start + place), *row, twins) for place, row in enumerate(rows)]


def texts_of(pair: Pair) -> dict[str, str]:
    """Prompt, chosen and rejected as strings that Parquet can hold."""
    texts = {
        "prompt": plain_text(pair.prompt),
        "chosen": plain_text(pair.chosen),
        "rejected": plain_text(pair.rejected),
    }
    return {side: text.encode("utf-8", "backslashreplace").decode() for side, text in texts.items()}


def _twins(texts: pa.Table) -> dict[str, str]:
    """row_id → an earlier suspect whose three texts together are nearly the same, whichever answer was chosen."""
    known, rows = texts["row_id"].to_pylist(), texts.to_pylist()
    joined = ["\n".join([row["prompt"], *sorted((row["chosen"], row["rejected"]))]) for row in rows]
    found = near_duplicates(joined)
    return {row: known[other] for row, other in zip(known, found, strict=True) if other is not None}


def _row(
    suspect: Suspect, source: Mapping[str, Any], text: Mapping[str, str | None], twins: Mapping[str, str]
) -> dict[str, Any]:
    """`text`: all None where the texts are not known."""
    chosen, rejected = text["chosen"], text["rejected"]
    return {
        "row_id": suspect.row_id,
        **{name: source[name] for name in ("dataset", "source_file", "source_row")},
        "pair_id": suspect.pair_id,
        "finding": suspect.finding,
        "confidence": suspect.confidence,
        "margins": list(suspect.margins.items()),
        "reference_agrees": suspect.reference_agrees,
        "marks": list(suspect.marks),
        "copies": suspect.copies,
        "answer_similarity": None if chosen is None or rejected is None else similarity(chosen, rejected),
        "near_duplicate_of": twins.get(suspect.row_id),
        **{side: text[side] for side in ("prompt", "chosen", "rejected")},
    }
