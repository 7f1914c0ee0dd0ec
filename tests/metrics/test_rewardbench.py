"""Sections, leaderboard and Ties equal RewardBench's arithmetic, written out independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.metrics import rewardbench as bench
from tests.rewardbench_oracle import twin_sections, twin_ties

NAMES = sorted(bench.SIZES)


@given(st.dictionaries(st.sampled_from([*NAMES, "other"]), st.floats(0, 1), min_size=1))
def test_sections_are_those_of_the_twin(accuracy: dict[str, float]) -> None:
    found, expected = bench.sections(accuracy), twin_sections(accuracy)
    assert found.keys() == expected.keys()
    assert [found[name] for name in expected] == pytest.approx(list(expected.values()), abs=1e-12)


def test_math_weighs_as_much_as_all_code() -> None:
    code = {f"hep-{name}": 0.0 for name in ("cpp", "go", "java", "js", "python", "rust")}
    assert bench.sections({"math-prm": 1.0, **code}) == {"Reasoning": 0.5}


def test_the_leaderboard_halves_prior_sets_and_leaves_out_what_is_missing() -> None:
    assert (
        bench.leaderboard({"Chat": 1.0, "Chat Hard": 1.0, "Safety": 1.0, "Reasoning": 1.0, "Prior Sets": 0.0}) == 8 / 9
    )
    assert bench.leaderboard({"Chat": 1.0, "Prior Sets": 0.0}) == pytest.approx(2 / 3)
    assert bench.leaderboard({}) is None


def test_prior_sets_are_a_plain_mean() -> None:
    assert bench.sections({"shp": 1.0, "summarize": 0.0, "anthropic_harmless": 1.0}) == {"Prior Sets": 0.5}


def test_a_tie_is_wrong_there_and_left_out_when_corrected() -> None:
    scores = np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -1.0])
    exact = bench.by_subset(["a"] * 4, *scores, tie_loses=True)["a"]
    corrected = bench.by_subset(["a"] * 4, *scores, tie_loses=False)["a"]
    assert (exact.n, exact.wins, exact.ties, exact.accuracy) == (4, 2, 1, 0.5)
    assert corrected.accuracy == pytest.approx(2 / 3)
    assert bench.by_subset(["a"], np.zeros(1), np.zeros(1), tie_loses=False)["a"].accuracy is None


def test_subsets_are_counted_apart_and_say_how_many_there_should_be() -> None:
    found = bench.pair_summary(["hep-go", "mine", "hep-go"], np.array([1.0, 1.0, 1.0]), np.array([0.0, 2.0, 2.0]), True)
    assert found["subsets"]["hep-go"] == {"n": 2, "wins": 1, "ties": 0, "accuracy": 0.5, "of": 164}
    assert found["subsets"]["mine"] == {"n": 1, "wins": 0, "ties": 0, "accuracy": 0.0}
    assert (found["sections"], found["leaderboard"]) == ({"Reasoning": 0.5}, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(values=st.lists(st.floats(-7e4, 7e4), min_size=1, max_size=20))
def test_rounding_is_torchs(dtype: str, values: list[float]) -> None:
    array = np.array(values)
    expected = torch.from_numpy(array).float().to(getattr(torch, dtype)).double().numpy()
    once = bench.rounded(array.astype(np.float32).astype(np.float64), dtype)
    np.testing.assert_array_equal(once, expected)


def test_sixteen_bits_swallow_small_differences() -> None:
    policy, reference = np.array([-500.1]), np.array([-500.0])
    assert bench.ratio(policy, reference)[0] == pytest.approx(-0.1)
    assert bench.ratio(policy, reference, "float16")[0] == 0.0


# --- RewardBench 2 ------------------------------------------------------------------------------------------------


def prompt(right: list[float], wrong: list[float], name: str = "1", subset: str = "Math") -> bench.Prompt:
    return bench.Prompt(name, subset, right, wrong)


@pytest.mark.parametrize(
    ("wrong", "result"), [([0.0, 0.5, 0.9], 1.0), ([0.0, 1.0, 0.9], 0.5), ([1.0] * 3, 0.25), ([0.0, 1.1, 0.9], 0.0)]
)
def test_the_right_answer_must_have_the_highest_reward(wrong: list[float], result: float) -> None:
    assert prompt([1.0], wrong).result == result


def test_subsets_are_averaged_plainly() -> None:
    prompts = [prompt([1.0], [0.0, 0.0, 0.0]), prompt([0.0], [1.0, 0.0, 0.0]), prompt([1.0], [0.0] * 3, subset="Focus")]
    found = bench.best_of_n(prompts)
    assert found["subsets"]["Math"] == {"prompts": 2, "score": 0.5}
    assert found["average"] == 0.75


SCORES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=4)


@given(st.lists(st.tuples(SCORES, SCORES, SCORES, SCORES), min_size=1, max_size=5))
def test_ties_are_those_of_the_twin(prompts: list[tuple[list[float], ...]]) -> None:
    named = {}
    for number, (ref_right, ref_wrong, right, wrong) in enumerate(prompts):
        named[f"ref:{number}"] = (ref_right[:1], ref_wrong)
        named[f"tied:{number}"] = (right, wrong)
    found = bench.ties([prompt(*scores, name=name, subset="Ties") for name, scores in named.items()])
    assert found["score"] == pytest.approx(twin_ties(named), abs=1e-12)


@given(st.lists(st.tuples(SCORES, SCORES, SCORES, SCORES), min_size=1, max_size=3))
def test_ties_do_not_depend_on_beta(prompts: list[tuple[list[float], ...]]) -> None:

    def score(scale: float) -> float:
        made = [
            prompt([scale * x for x in scores[i]], [scale * x for x in scores[i + 1]], f"{kind}:{number}", "ties")
            for number, scores in enumerate(prompts)
            for i, kind in ((0, "ref"), (2, "tied"))
        ]
        return float(bench.ties(made)["score"])

    assert score(2.0) == pytest.approx(score(1.0))
    assert score(0.5) == pytest.approx(score(1.0))


def test_ties_without_both_kinds_have_no_score() -> None:
    found = bench.best_of_n([prompt([1.0], [0.0], "ref:1", "Ties")])
    assert found["subsets"]["Ties"]["score"] is None
    assert found["subsets"]["Ties"]["ref_accuracy"] == 1.0
    assert found["average"] is None
