"""`report` on a real run: the file, its texts and tokens, and what is said when they cannot be had."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from dpo_score.errors import UsageError
from dpo_score.report.build import report, tables, write_report
from dpo_score.results.run_folder import open_out
from tests.engine.whole_runs.small_run import WORDS, small_run

SPOKEN = sorted(set(WORDS) - {"the", "over", "a", "while", "box"})
"""Words of the data that a report does not use itself."""


def page(**options: object) -> str:
    out = small_run().out
    report(str(out), **options)  # type: ignore[arg-type]
    return (out / "report.html").read_text("utf-8")


def test_texts_and_token_colours_come_from_the_data() -> None:
    html = page()
    assert "What changed most from step-10" in html
    assert 'class="up' in html
    assert "Texts are left out" not in html
    assert "&lt;|im_end|&gt;" in html


def test_no_text_leaves_every_text_out() -> None:
    html = page(no_text=True)
    assert "lazy" not in html
    assert "<details><summary>What" in html
    assert "--no-text" in html


@pytest.mark.parametrize("how", ["report", "tables"])
def test_no_text_shows_no_text_as_the_name_of_a_group(how: str) -> None:
    columns = ["prompt", "subset", "length", "chosen_tokens"]
    found = page(no_text=True, slices=columns) if how == "report" else written(no_text=True, slices=columns)
    assert not [word for word in SPOKEN if re.search(rf"\b{word}\b", found)]
    assert "group 30" in found
    assert "numbered" in found
    assert "up to 32" in found
    assert "lazy" in (page(slices=columns) if how == "report" else written(slices=columns))


def written(**options: Any) -> str:
    return "".join(tables(str(small_run().out), form, **options) for form in ("md", "csv", "tex"))


def test_changed_data_is_said_and_its_text_not_shown() -> None:
    run = small_run()
    before = run.data.read_bytes()
    try:
        run.data.write_bytes(before[:-1] + b"x")
        html = page()
    finally:
        run.data.write_bytes(before)
    assert "Texts are left out" in html
    assert "lazy" not in html


def test_it_can_be_written_at_the_end_of_a_run_and_twice_alike() -> None:
    store, _ = open_out(str(small_run().out))
    write_report(store, str(small_run().out))
    first = store.read_bytes("report.html")
    write_report(store, str(small_run().out))
    assert store.read_bytes("report.html") == first


def test_an_unknown_format_or_baseline_is_refused() -> None:
    out = str(small_run().out)
    with pytest.raises(UsageError, match="html"):
        tables(out, "htm")
    with pytest.raises(UsageError, match="step-10"):
        report(out, baseline="step-11")
    assert tables(out, "md", "step-10").count("**") >= 12


def test_reports_import_neither_torch_nor_transformers() -> None:
    """Of a run without token values: colouring tokens is what needs the tokenizer."""
    out = small_run(per_token=False).out
    code = (
        "import sys; from dpo_score.cli.main import main\n"
        "for arguments in (['report', sys.argv[1]], ['compare', sys.argv[1]], ['audit', sys.argv[1]]):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as stopped: assert not stopped.code, stopped.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
