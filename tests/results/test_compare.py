"""`compare` on a real run: policies of one folder and of two, gates, and what is refused."""

from __future__ import annotations

import json

import pytest

from dpo_score.cli.console import compared, sparkline, summary_lines
from dpo_score.cli.main import main
from dpo_score.config.checkpoint_glob import natural
from dpo_score.errors import ConfigError, FailIfError, UsageError
from dpo_score.metrics.compare import align_policies, compare_policies
from dpo_score.results.compare import compare, raise_failed
from dpo_score.results.run_folder import step_of
from tests.engine.whole_runs.small_run import small_run
from tests.metrics.scored import scored


def test_all_policies_of_a_folder_in_natural_order() -> None:
    found = compare([str(small_run().out)])
    assert [(p["name"], p["step"], p["pairs"]) for p in found["policies"]] == [
        ("step-10", 10, 39),
        ("step-20", 20, 39),
        ("step-30", 30, 39),
    ]
    assert found["baseline"] is None
    assert set(found["subsets"]["subset"]) == {"a", "b"}


def test_two_folders_are_told_apart_and_differ_by_nothing_when_equal() -> None:
    out, again = str(small_run().out), str(small_run(per_token=False).out)
    found = compare([out, again], policies="step-10")
    assert [p["name"] for p in found["policies"]] == ["1/step-10", "2/step-10"]
    assert found["baseline"] == "1/step-10"
    assert found["versus_baseline"]["margins"][0]["mean"] == 0.0
    assert found["versus_baseline"]["margins"][0]["p"] == 1.0


def test_a_baseline_is_added_to_the_named_policies() -> None:
    found = compare([str(small_run().out)], policies="step-30", baseline="step-10")
    assert {p["name"] for p in found["policies"]} == {"step-10", "step-30"}


def test_unknown_names_are_refused_with_the_nearest() -> None:
    out = str(small_run().out)
    with pytest.raises(UsageError, match="did you mean 'step-10'"):
        compare([out], policies="step-11")
    with pytest.raises(UsageError, match="did you mean 'step-10'"):
        compare([out], baseline="step-1")


def test_a_gate_that_speaks_of_a_baseline_takes_the_first_policy_and_says_so() -> None:
    out = str(small_run().out)
    found = compare([out], fail_if=["diff.accuracy.high < 0"])
    assert found["baseline"] == "step-10"
    assert found["notes"] == ["the baseline is step-10, the first policy; name another with --baseline"]
    assert any("the baseline is step-10" in line for line in summary_lines(found))
    assert compare([out], fail_if=["accuracy.low < 1"])["baseline"] is None
    found = compare([out], fail_if=["accuracy.low < 1"])
    with pytest.raises(FailIfError, match="step-10"):
        raise_failed(found)


def test_a_gate_on_the_baseline_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="none is left to test"):
        compare([str(small_run().out)], policies="step-10", baseline="step-10", fail_if=["accuracy < 0.99"])


def test_pairs_that_were_left_out_are_called_what_they_are() -> None:
    ids = [f"pair {i}" for i in range(4)]
    a, b = (scored(name, [1.0, -1.0, 1.0, 1.0], pair_ids=ids) for name in "ab")
    c = scored("c", [1.0, -1.0, 1.0], pair_ids=ids[:3])
    assert "left out: 1 pairs only a has (row 0:3 …)" in list(summary_lines(compare_policies(align_policies([a, c]))))
    three = list(summary_lines(compare_policies(align_policies([a, b, c]))))
    assert "left out: 1 pairs of a that not all others have (row 0:3 …)" in three
    assert not any("only" in line for line in three[1:])


def test_exit_codes_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    out = str(small_run().out)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", out, "--json", "--fail-if", "accuracy < 1"])
    assert stopped.value.code == 5
    assert json.loads(capsys.readouterr().out)["failed"]
    with pytest.raises(SystemExit) as stopped:
        main(["compare", out, "--fail-if", "accuracy[nowhere] < 1"])
    assert stopped.value.code == 2


def test_the_terminal_says_the_sentence_first(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare([str(small_run().out)], baseline="step-10")
    compared(found)
    text = capsys.readouterr().out
    assert " ".join(text.split()).startswith(found["sentence"])
    assert "margins against step-10" in text


def test_a_sparkline_shows_even_a_single_pair() -> None:
    assert sparkline([0, 1, 800]) == " ▁█"
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("name", "step"), [("step-40", 40), ("checkpoint-1200/", 1200), ("v2", None), ("final", None), ("run_7", 7)]
)
def test_steps_are_read_from_names(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_natural_order() -> None:
    assert sorted(["s-10", "s-9", "s", "a-100"], key=natural) == ["a-100", "s", "s-9", "s-10"]
