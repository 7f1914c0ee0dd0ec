"""`dpo-score audit OUT`: labels worth a second look, as a Parquet file to review. Loads no model.

Promises: only pairs that all audited policies scored; texts (and the marks of near-duplicates, which need them) only
where the data is unchanged, else null with the reason said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.data.types import Pair
from dpo_score.metrics.compare import align_policies
from dpo_score.metrics.suspect_labels import Audit, Suspect, label_audit, near_duplicates, similarity
from dpo_score.results.groups import read_policies
from dpo_score.results.run_folder import chosen_names, open_out, parts
from dpo_score.results.source_text import TextSource, plain_text, text_source
from dpo_score.storage.base import Store
from dpo_score.storage.manifest import Manifest

FILE = "audit.parquet"
COMPARED = 20_000
"""Suspects, most confident first, among which near-duplicates are looked for."""
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


def audit(out: str, policies: str | None = None, no_text: bool = False) -> dict[str, Any]:
    """Write OUT/audit.parquet, one row a suspect; returns counts, the file and the first ten rows."""
    store, manifest = open_out(out)
    names = chosen_names(store, manifest, policies, out)
    found = label_audit(align_policies(read_policies(store, manifest, names)))
    pairs, reason = _pairs(store, manifest, found, no_text)
    rows = rows_of(found, pairs, _sources(store, names[0], found))
    store.write_table(FILE, pa.Table.from_pylist(rows, schema=SCHEMA), {})
    return {
        "file": store.url(FILE),
        "pairs": found.pairs,
        "policies": names,
        "ranked_against": found.against,
        "identical_answers": len(found.suspects) - found.against,
        "near_identical": sum((row["answer_similarity"] or 0.0) >= 0.8 for row in rows),
        "near_duplicates": sum(row["near_duplicate_of"] is not None for row in rows),
        "texts": reason,
        "first": [{key: row[key] for key in ("row_id", "finding", "confidence", "copies")} for row in rows[:10]],
    }


def _pairs(store: Store, manifest: Manifest, found: Audit, no_text: bool) -> tuple[dict[str, Pair], str | None]:
    """Texts of the suspects, or why there are none."""
    source: TextSource | str = "--no-text" if no_text else text_source(store, manifest)
    if isinstance(source, str):
        return {}, f"texts are left out: {source}"
    return source.pairs(suspect.row_id for suspect in found.suspects), None


def _sources(store: Store, policy: str, found: Audit) -> dict[str, dict[str, Any]]:
    """row_id → dataset, source_file, source_row."""
    wanted = pa.array([suspect.row_id for suspect in found.suspects], pa.string())
    columns = ["row_id", "dataset", "source_file", "source_row"]
    tables = [store.read_table(name, columns).replace_schema_metadata(None) for name in parts(store, policy)]
    rows = pa.concat_tables(tables)
    return {row["row_id"]: row for row in rows.filter(pc.is_in(rows["row_id"], value_set=wanted)).to_pylist()}


def rows_of(found: Audit, pairs: Mapping[str, Pair], sources: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One dictionary a suspect, with the columns of SCHEMA."""
    texts = {row_id: texts_of(pair) for row_id, pair in pairs.items()}
    twins = _twins(found.suspects, texts)
    return [_row(suspect, sources.get(suspect.row_id, {}), texts, twins) for suspect in found.suspects]


def texts_of(pair: Pair) -> dict[str, str]:
    """Prompt, chosen and rejected as strings that Parquet can hold."""
    texts = {
        "prompt": plain_text(pair.prompt),
        "chosen": plain_text(pair.chosen),
        "rejected": plain_text(pair.rejected),
    }
    return {side: text.encode("utf-8", "backslashreplace").decode() for side, text in texts.items()}


def _twins(suspects: Sequence[Suspect], texts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """row_id → an earlier suspect whose three texts together are nearly the same, whichever answer was chosen."""
    known = [suspect.row_id for suspect in suspects[:COMPARED] if suspect.row_id in texts]
    joined = [
        "\n".join([texts[row]["prompt"], *sorted((texts[row]["chosen"], texts[row]["rejected"]))]) for row in known
    ]
    found = near_duplicates(joined)
    return {row: known[other] for row, other in zip(known, found, strict=True) if other is not None}


def _row(
    suspect: Suspect,
    source: Mapping[str, Any],
    texts: Mapping[str, Mapping[str, str]],
    twins: Mapping[str, str],
) -> dict[str, Any]:
    text = texts.get(suspect.row_id)
    return {
        "row_id": suspect.row_id,
        **{name: source.get(name) for name in ("dataset", "source_file", "source_row")},
        "pair_id": suspect.pair_id,
        "finding": suspect.finding,
        "confidence": suspect.confidence,
        "margins": list(suspect.margins.items()),
        "reference_agrees": suspect.reference_agrees,
        "marks": list(suspect.marks),
        "copies": suspect.copies,
        "answer_similarity": None if text is None else similarity(text["chosen"], text["rejected"]),
        "near_duplicate_of": twins.get(suspect.row_id),
        **{side: None if text is None else text[side] for side in ("prompt", "chosen", "rejected")},
    }
