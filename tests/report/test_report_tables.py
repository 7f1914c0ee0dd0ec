"""Tables as Markdown, CSV and LaTeX: same numbers, names escaped for each."""

from __future__ import annotations

import csv
import io

import pytest

from dpo_score.metrics.compare import align_policies, compare_policies
from dpo_score.metrics.diagnostics import diagnose
from dpo_score.report.numbers import numbers
from dpo_score.report.tables import CSV_COLUMNS, FORMATS, grids, write
from tests.metrics.scored import policies, scored


def found() -> dict[str, object]:
    names = [("=1+1", "a|b_c&d")[i % 2] for i in range(60)]
    made = policies(0, 60, {"one": 0.1, "two": 0.6})
    columns = {"lang": [("de", "fr")[i % 3 == 0] for i in range(60)]}
    return compare_policies(
        align_policies([scored(p.name, p.rows.values["margins_nats"], subsets=names, slices=columns) for p in made]),
        "one",
    )


def test_csv_is_long_and_exact_and_no_cell_is_a_formula() -> None:
    result = found()
    rows = list(csv.DictReader(io.StringIO(write(result, "csv"))))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert float(rows[0]["value"]) == result["policies"][0]["accuracy"]["value"]  # type: ignore[index]
    assert {row["group"] for row in rows} == {"", "d", "'=1+1", "a|b_c&d", "de", "fr"}
    french = {row["metric"]: row for row in rows if (row["group"], row["policy"], row["kind"]) == ("fr", "two", "lang")}
    cells = result["slices"]["lang"]["groups"]["fr"]["policies"]["two"]  # type: ignore[index]
    assert float(french["loss"]["value"]) == cells["loss"]["mean"]
    assert [float(french["margins"][end]) for end in ("low", "high")] == cells["margins"]["ci95"]
    assert set(french) == {"accuracy", "margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards"}


def test_csv_has_each_number_once_where_a_slice_is_the_subsets() -> None:
    names = ["a", "b"] * 10
    result = compare_policies(
        align_policies([scored("one", [1.0, -1.0] * 10, subsets=names, slices={"subset": names})])
    )
    rows = [tuple(row.values())[:6] for row in csv.DictReader(io.StringIO(write(result, "csv")))]
    assert len(set(rows)) == len(rows)
    assert {row[3] for row in rows if row[2] == "subset"} == {"a", "b"}


def test_markdown_has_a_cell_for_every_column() -> None:
    for line in write(found(), "md").splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (6, 7, 5, 9)
    assert "a\\|b\\_c&d" in write(found(), "md")


def test_latex_escapes_names_and_balances_environments() -> None:
    text = write(found(), "tex")
    assert r"a|b\_c\&d" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(grids(found()))


def test_what_explains_the_levels_stands_in_every_format() -> None:
    aligned = align_policies(policies(1, 80, {"one": 0.2, "two": 0.5}))
    result, reasons = compare_policies(aligned), numbers(aligned)
    rows = {(r["policy"], r["metric"]): r for r in csv.DictReader(io.StringIO(write(result, "csv", reasons)))}
    health = diagnose(aligned["two"].rows)["health"]
    assert float(rows["two", "drift_chosen"]["value"]) == health["drift_chosen"]["value"]
    assert [float(rows["two", "displaced"][end]) for end in ("low", "high")] == health["displaced"]["ci95"]
    assert rows["one", "longer_wins"]["kind"] == "ranking"
    for form in ("md", "tex"):
        text = write(result, form, reasons).replace("\\", "")
        assert all(
            name in text for name in ("reference_sum", "length_controlled_accuracy", "ece", "best_beta", "saturated")
        )


@pytest.mark.parametrize("form", FORMATS)
def test_a_single_policy_of_ties_has_tables_too(form: str) -> None:
    aligned = align_policies([scored("flat", [0.0, 0.0])])
    assert "flat" in write(compare_policies(aligned), form, numbers(aligned))
