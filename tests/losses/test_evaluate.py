"""`evaluate_pairs`: one answer for lists, arrays, Series and tensors, and a clear error for anything unusable."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from dpo_score.errors import ConfigError, DataError, UsageError
from dpo_score.losses.evaluate import evaluate_pairs

FOUR = ([-8.0, -3.0], [-10.0, -2.0], [-10.0, -3.0], [-9.0, -4.0])


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_the_dictionary_by_hand() -> None:
    found = evaluate_pairs(*FOUR, beta=0.5)
    margins = [0.5 * 3, 0.5 * -2]
    assert found["margins"] == margins
    assert found["chosen_rewards"] == [1.0, 0.0]
    assert found["rejected_rewards"] == [-0.5, 1.0]
    assert found["loss"] == pytest.approx(sum(-math.log(sigma(m)) for m in margins) / 2, rel=1e-15)
    assert found["grad_chosen"] == pytest.approx([-0.5 * sigma(-m) / 2 for m in margins], rel=1e-15)
    assert found["grad_rejected"] == pytest.approx([0.5 * sigma(-m) / 2 for m in margins], rel=1e-15)
    assert found["mean_logratio_margin"] == 0.5


@pytest.mark.parametrize(
    "kind", [tuple, np.array, pl.Series, torch.tensor, lambda v: torch.tensor(v, requires_grad=True)]
)
def test_every_kind_of_input_gives_the_same_plain_numbers(kind: Any) -> None:
    found = evaluate_pairs(*(kind(v) for v in FOUR))
    expected = evaluate_pairs(*FOUR)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6)
        assert isinstance(found[key], float | list)


def test_policy_equal_to_reference() -> None:
    found = evaluate_pairs([-1.0], [-2.0], [-1.0], [-2.0])
    assert (found["loss"], found["margins"]) == (0.6931471805599453, [0.0])


def test_other_losses_and_their_own_beta() -> None:
    simpo = evaluate_pairs(*FOUR, beta=None, loss="simpo", chosen_tokens=[4, 3], rejected_tokens=[2, 2])
    assert simpo["losses"][0] == pytest.approx(-math.log(sigma(2 * (-2 + 5) - 0.5)), rel=1e-12)
    assert evaluate_pairs(*FOUR, loss="hinge")["losses"] == pytest.approx([0.7, 1.2])
    assert evaluate_pairs(*FOUR, loss="sft", chosen_tokens=[4, 3], rejected_tokens=[2, 2])["grad_rejected"] == [
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (([-1.0, -2.0], [-1.0], [-1.0], [-1.0]), "policy_chosen: 2, policy_rejected: 1"),
        (([], [], [], []), "no pairs"),
        (([-1.0], [float("nan")], [-1.0], [-1.0]), r"policy_rejected\[0\] is nan"),
        (([-1.0], [-1.0], [float("-inf")], [-1.0]), r"ref_chosen\[0\] is -inf"),
        (([-1.0], [None], [-1.0], [-1.0]), "policy_rejected"),
        ((["a"], [-1.0], [-1.0], [-1.0]), "not a number"),
        (([[-1.0]], [-1.0], [-1.0], [-1.0]), "one number for each pair"),
        (([-1.0], [-1.0], None, [-1.0]), "ref_chosen is None"),
    ],
)
def test_unusable_inputs_are_named(inputs: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        evaluate_pairs(*inputs)


def test_what_needs_more_than_sums_says_so() -> None:
    with pytest.raises(UsageError, match="chosen_tokens"):
        evaluate_pairs(*FOUR, loss="ipo")
    with pytest.raises(UsageError, match="score tables"):
        evaluate_pairs(*FOUR, loss="aot")
    with pytest.raises(UsageError, match="offset"):
        evaluate_pairs(*FOUR, loss="odpo", params={"offset_column": "x"})
    with pytest.raises(ConfigError, match="did you mean"):
        evaluate_pairs(*FOUR, loss="sigmoyd")
    with pytest.raises(DataError, match="pair 0 leaves"):
        evaluate_pairs([-9000.0], [-1.0], [-1.0], [-1.0], loss="discopop")


LIGHT = """
    losses.columns losses.custom losses.evaluate losses.formulas losses.ops losses.parse metrics.arrays metrics.compare
    metrics.diagnostics metrics.gate metrics.groups metrics.intervals metrics.paired_tests metrics.rewardbench
    metrics.sentences metrics.summary metrics.suspect_labels
"""


def test_everything_but_torch_loss_works_without_importing_torch() -> None:
    program = f"""
import importlib, sys
import dpo_score.losses
for name in {LIGHT.split()!r}:
    importlib.import_module("dpo_score." + name)
import polars, numpy
from dpo_score.losses.evaluate import evaluate_pairs
evaluate_pairs(polars.Series([-1.0]), [-2.0], numpy.array([-1.0]), (-2.0,))
heavy = [name for name in ("torch", "transformers", "scipy.stats", "scipy.optimize", "pandas") if name in sys.modules]
sys.exit(" ".join(heavy) or 0)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
