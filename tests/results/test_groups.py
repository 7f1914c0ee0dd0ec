"""`--slice`: a column of scores, of data or a built-in one groups the pairs of run, compare and report alike."""

from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_score.cli.main import main
from dpo_score.config.schema import DataSpec
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import ConfigError, UsageError
from dpo_score.report.build import report, tables
from dpo_score.results.compare import compare
from tests.run_fixtures import Runner, preference_rows, sentence, write_rows

ROWS = 90


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    draw = random.Random(3)
    found = preference_rows(count)
    for index, row in enumerate(found):
        row |= {"lang": draw.choice(["de", "fr", None]), "depth": index, "tags": ["x"] if index % 2 else ["x", "y"]}
    found[4]["chosen"] = None
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", rows())


def sizes(groups: dict[str, Any], key: str = "scored") -> dict[str, int]:
    return {name: cell[key] for name, cell in groups.items()}


def expected(column: str) -> Counter[str]:
    """Groups of the rows that can be scored."""
    return Counter(row[column] or "(no value)" for index, row in enumerate(rows()) if index != 4)


def test_a_run_sums_up_columns_of_the_data_that_scores_do_not_carry(runner: Runner, data: Path, tmp_path: Path) -> None:
    found = runner(data, tmp_path / "out", slice=["lang", "depth", "tags", "length", "turns"])
    policy = found.summary["policies"]["better"]
    assert "lang" not in pl.read_parquet(f"{tmp_path}/out/scores/better/*.parquet").columns
    assert sizes(policy["slices"]["lang"]) == expected("lang")
    assert list(policy["slices"]["depth"]) == ["0 to 23", "24 to 45", "46 to 67", "68 to 89"]
    assert sizes(policy["slices"]["tags"]) == {"x": 45, "x, y": 44}
    assert sizes(policy["slices"]["turns"]) == {"2": 89}
    assert sum(sizes(policy["slices"]["length"]).values()) == 89
    assert policy["slice_cuts"]["turns"]["how"].startswith("messages of prompt and answer")
    stored = json.loads((tmp_path / "out/summary.json").read_text())["policies"]["better"]
    assert stored["slices"] == policy["slices"]
    assert stored["slice_cuts"]["depth"] == {
        "how": "bins between its quartiles",
        "groups": ["0 to 23", "24 to 45", "46 to 67", "68 to 89"],
    }


def test_what_a_group_holds_is_what_the_stored_rows_hold(runner: Runner, data: Path, tmp_path: Path) -> None:
    found = runner(data, tmp_path / "out", slice=["lang"], keep_columns="lang")
    german = found.summary["policies"]["better"]["slices"]["lang"]["de"]
    stored = pl.read_parquet(f"{tmp_path}/out/scores/better/*.parquet").filter(pl.col("lang") == "de")
    assert german["scored"] == stored.height
    assert german["margins"]["mean"] == pytest.approx(stored["margins"].mean(), rel=1e-12)
    assert german["chosen_rewards"]["mean"] == pytest.approx(stored["chosen_rewards"].mean(), rel=1e-12)
    assert german["loss"]["mean"] == pytest.approx(stored["loss"].mean(), rel=1e-12)
    assert german["accuracy"]["value"] == pytest.approx((stored["margins"] > 0).mean(), rel=1e-12)


def test_a_slice_changes_no_identity_and_asks_for_no_forward_pass(
    runner: Runner, data: Path, tmp_path: Path, forwards: list[int]
) -> None:
    first = runner(data, tmp_path / "out").summary["policies"]["better"]
    forwards.clear()
    again = runner(data, tmp_path / "out", slice=["lang"]).summary["policies"]["better"]
    assert forwards == []
    assert again["overall"] == first["overall"]
    assert sizes(again["slices"]["lang"]) == expected("lang")


@pytest.mark.parametrize("how", [{"limit": 70}, {"sample": 20, "seed": 5}])
def test_only_the_rows_of_the_run_count(runner: Runner, data: Path, tmp_path: Path, how: dict[str, int]) -> None:
    found = runner(data, tmp_path / "out", slice=["lang"], **how).summary["policies"]["better"]
    stored = pl.read_parquet(f"{tmp_path}/out/scores/better/*.parquet")["source_row"]
    langs = [rows()[row]["lang"] or "(no value)" for row in stored]
    assert sizes(found["slices"]["lang"]) == Counter(langs)


def test_json_lines_and_several_sets_of_which_one_lacks_the_column(runner: Runner, tmp_path: Path) -> None:
    lines = [{key: row[key] for key in ("prompt", "chosen", "rejected", "lang")} for row in rows(12)[5:]]
    (tmp_path / "with.jsonl").write_text("\n".join(json.dumps(row) for row in lines))
    bare = write_rows(tmp_path / "without.parquet", preference_rows(9, seed=1))
    config = runner.config(bare, tmp_path / "out", slice=["lang"])
    both = (DataSpec(name="with", path=str(tmp_path / "with.jsonl")), *config.data)
    found = run(config.model_copy(update={"data": both}), Progress(quiet=True))
    counted = sizes(found.summary["policies"]["better"]["slices"]["lang"])
    assert counted == Counter([row["lang"] or "(no value)" for row in lines] + ["(no value)"] * 9)
    by_data = compare([str(tmp_path / "out")], slices=["data"])["slices"]["data"]["groups"]
    assert sizes(by_data, "pairs") == {"with": 7, "without": 9}


def test_turns_of_conversations(runner: Runner, tmp_path: Path) -> None:
    draw = random.Random(1)

    def turns(count: int) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": sentence(draw, 5)} for i in range(count)]

    def answer() -> list[dict[str, str]]:
        return [{"role": "assistant", "content": sentence(draw, 5)}]

    table = [{"prompt": turns(count), "chosen": answer(), "rejected": answer()} for count in (1, 3, 1, 5, 1)]
    data = write_rows(tmp_path / "chat.parquet", table)
    template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    runner(data, tmp_path / "out", chat_template=template)
    found = compare([str(tmp_path / "out")], slices=["turns"])["slices"]["turns"]
    assert sizes(found["groups"], "pairs") == {"2": 3, "4": 1, "6": 1}


def test_an_expanded_row_gives_its_value_to_each_of_its_pairs(runner: Runner, tmp_path: Path) -> None:
    draw = random.Random(2)
    table = [
        {
            "prompt": sentence(draw, 6),
            "chosen": [sentence(draw, 6)],
            "rejected": [sentence(draw, 6) for _ in range(3)],
            "topic": f"t{index % 2}",
        }
        for index in range(4)
    ]
    data = write_rows(tmp_path / "best-of-4.parquet", table)
    found = runner(data, tmp_path / "out", slice=["topic"], render="raw")
    assert sizes(found.summary["policies"]["better"]["slices"]["topic"]) == {"t0": 6, "t1": 6}


def test_compare_and_report_group_a_run_that_was_made_without(
    runner: Runner, data: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    out = str(tmp_path / "out")
    runner(data, Path(out), policy=[f"better={models['better']}", f"worse={models['worse']}"])
    found = compare([out], baseline="worse", slices=["lang", "length"])
    assert sizes(found["slices"]["lang"]["groups"], "pairs") == expected("lang")
    assert set(found["slices"]["lang"]["groups"]["de"]["policies"]) == {"better", "worse"}
    report(out, slices=["lang"])
    assert "By lang" in (tmp_path / "out/report.html").read_text()
    assert "**By lang" in tables(out, "md", slices=["lang"])
    again = compare([out, out], policies="better", slices=["lang"])
    assert sizes(again["slices"]["lang"]["groups"], "pairs") == expected("lang")


def test_a_report_keeps_the_slices_of_its_run_until_the_data_has_gone(
    runner: Runner, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    runner(data, out, slice=["lang", "length"])
    report(str(out))
    assert "By lang" in (out / "report.html").read_text()
    data.write_bytes(data.read_bytes() + b" ")
    report(str(out))
    html = (out / "report.html").read_text()
    assert "By lang" not in html
    assert "No slices: --slice lang" in html
    with pytest.raises(UsageError, match="--keep-columns"):
        report(str(out), slices=["lang"])
    report(str(out), slices=["length"])
    assert "By length" in (out / "report.html").read_text()


def test_a_column_that_is_nowhere_is_refused_with_those_that_are(runner: Runner, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--slice colour: no such column.*depth, lang.*length, turns") as refused:
        runner(data, tmp_path / "out", slice=["colour"])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out/manifest.json").exists()
    runner(data, tmp_path / "out")
    with pytest.raises(UsageError, match=r"--slice colour: no such column.*depth, lang"):
        compare([str(tmp_path / "out")], slices=["colour"])


def test_on_the_command_line(runner: Runner, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    command = ["run", f"--data={data}", f"--reference={runner.models['reference']}", f"--out={out}", "--quiet"]
    with suppress(SystemExit):
        main([*command, f"--policy=p={runner.models['better']}", f"--cache-dir={runner.cache}", "--slice=lang"])
    assert "by lang (each of its values)" in capsys.readouterr().out
    with suppress(SystemExit):
        main(["compare", out, "--slice", "depth", "--slice", "turns"])
    shown = capsys.readouterr().out
    assert "by depth (bins between its quartiles)" in shown
    assert "by turns (messages of prompt and answer" in shown
    with pytest.raises(SystemExit) as stop:
        main(["compare", out, "--slice", "lang", "--fail-if", "accuracy[lang=de] < 1.01"])
    assert stop.value.code == 5
