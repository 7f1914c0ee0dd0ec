"""Summaries: every pair counted once, ties apart, TRL's names by TRL's rules, the same bytes however rows are cut."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_score.config.schema import LossSpec
from dpo_score.losses.columns import derive_table
from dpo_score.losses.parse import parse_loss
from dpo_score.metrics.intervals import wilson
from dpo_score.metrics.summary import summarise


def scores(margins: list[float | None], **columns: Any) -> pa.Table:
    """One pair a margin (nats), reference −10 for both answers, β = 0.5; None: a pair that was not scored."""
    n = len(margins)
    base: dict[str, Any] = {
        "row_id": [f"0:{i}" for i in range(n)],
        "dataset": ["set"] * n,
        "prompt_digest": [f"{i:032x}" for i in range(n)],
        "status": ["scored" if m is not None else "nonfinite_logp" for m in margins],
        "policy_chosen_logps": pa.array([None if m is None else m - 10.0 for m in margins], pa.float64()),
        "policy_rejected_logps": pa.array([None if m is None else -10.0 for m in margins], pa.float64()),
        "ref_chosen_logps": [-10.0] * n,
        "ref_rejected_logps": [-10.0] * n,
        "chosen_tokens": [4] * n,
        "rejected_tokens": [2] * n,
    }
    return derive_table(pa.table(base | columns), parse_loss(LossSpec(beta=0.5)))


def overall(*tables: pa.Table, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = summarise(tables, **options)["overall"]
    return found


def test_means_and_counts_by_hand() -> None:
    found = overall(scores([2.0, -1.0, 0.0, 4.0]))
    assert (found["n"], found["scored"], found["rejected"], found["ties"]) == (4, 4, {}, 1)
    assert found["margins"]["mean"] == 0.625
    assert found["margins_nats"]["mean"] == 1.25
    assert found["chosen_rewards"]["mean"] == 0.625
    assert found["rejected_rewards"]["mean"] == 0.0
    assert found["margins"]["std"] == pytest.approx(np.std([1.0, -0.5, 0.0, 2.0], ddof=1))
    assert found["margins"]["quantiles"]["p50"] == 0.5
    assert found["loss"]["mean"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in (1.0, -0.5, 0.0, 2.0)]))


def test_accuracy_leaves_ties_out_and_trls_counts_them_wrong() -> None:
    found = overall(scores([2.0, -1.0, 0.0, 4.0]))
    assert found["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["accuracy"]["n"] == 3
    assert found["accuracy"]["method"] == "Wilson"
    assert found["accuracy"]["ci95"] == pytest.approx(list(wilson(2, 3)))
    assert found["rewards/accuracies"] == 0.5


def test_trls_metric_names() -> None:
    found = overall(scores([2.0, -1.0]))
    assert {name: found[name] for name in found if "/" in name} == {
        "rewards/chosen": 0.25,
        "rewards/rejected": 0.0,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.25,
        "logps/chosen": -9.5,
        "logps/rejected": -10.0,
    }


def test_ranking_of_each_model_alone_and_of_length() -> None:
    found = overall(scores([2.0, -1.0, 4.0]))["ranking"]
    assert found["policy_sum"]["value"] == pytest.approx(2 / 3)
    assert found["policy_per_token"]["value"] == 1.0  # −8/4, −11/4, −6/4 against −10/2
    assert (found["reference_sum"]["value"], found["reference_sum"]["n"]) == (None, 0)
    assert found["reference_per_token"]["value"] == 1.0
    assert (found["longer_wins"]["value"], found["shorter_wins"]["value"]) == (1.0, 0.0)


def test_a_repeated_prompt_makes_intervals_robust() -> None:
    margins = [1.0, 1.0, -1.0, -1.0, 2.0, 2.0, 1.0, 1.0]
    apart = overall(scores(margins))
    together = overall(scores(margins, prompt_digest=[f"{i // 2:032x}" for i in range(8)]))
    assert (apart["clustered"], together["clustered"]) == (False, True)
    assert together["accuracy"]["method"] == "cluster-robust Clopper-Pearson (Korn-Graubard)"
    assert together["margins"]["mean"] == apart["margins"]["mean"]
    width = [c["margins"]["ci95"][1] - c["margins"]["ci95"][0] for c in (apart, together)]
    assert width[1] > width[0]


@pytest.mark.parametrize("digests", [[f"{i:032x}" for i in (0, 1, 2)], ["a", "b", "c"], [None, None, None]])
def test_groups_join_prompts(digests: list[str | None]) -> None:
    columns = {"prompt_digest": pa.array(digests, pa.string())}
    assert not overall(scores([1.0, 2.0, 3.0], **columns))["clustered"]
    grouped = scores([1.0, 2.0, 3.0], **columns, group_id=["g", "g", None])
    assert overall(grouped)["clustered"]


def test_a_prompt_that_repeats_in_another_table_is_found() -> None:
    first, second = (scores([1.0, 2.0], prompt_digest=[f"{a:032x}", f"{b:032x}"]) for a, b in ((1, 2), (2, 3)))
    assert overall(first, second)["clustered"]


def test_rejects_of_status_and_of_reject_tables_are_counted_by_code_and_data_set() -> None:
    tables = [scores([1.0, None, 2.0], dataset=["a", "a", "b"])]
    rejects = [pa.table({"dataset": ["a", "b", "b"], "code": ["tie", "tie", "null_field"]})]
    found = summarise(tables, rejects=rejects)
    assert (found["overall"]["n"], found["overall"]["scored"]) == (6, 2)
    assert found["overall"]["rejected"] == {"nonfinite_logp": 1, "null_field": 1, "tie": 2}
    assert found["datasets"]["a"]["rejected"] == {"nonfinite_logp": 1, "tie": 1}
    assert found["datasets"]["b"]["n"] == 3


def test_a_data_set_of_which_nothing_was_scored_is_still_reported() -> None:
    found = summarise([], rejects=[pa.table({"dataset": ["gone"], "code": ["tie"]})])
    assert (found["datasets"]["gone"]["n"], found["datasets"]["gone"]["scored"]) == (1, 0)
    assert found["overall"]["accuracy"]["reason"] == "no pair to count"
    assert found["overall"]["rewards/margins"] is None
    json.dumps(found, allow_nan=False)


def test_per_data_set_and_subset_with_macro_means() -> None:
    table = scores([1.0, -1.0, 1.0, 1.0], dataset=["a", "a", "a", "b"], subset=["x", "x", "y", "x"])
    found = summarise([table])
    assert {name: list(group) for name, group in found["subsets"].items()} == {"a": ["x", "y"], "b": ["x"]}
    assert found["subsets"]["a"]["x"]["accuracy"]["value"] == 0.5
    assert found["subsets"]["b"]["x"]["scored"] == 1
    macro = found["macro"]["subsets"]
    assert (macro["groups"], macro["accuracy"]) == (3, pytest.approx(2.5 / 3))
    assert (macro["margins"], macro["margins_nats"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert macro["margins"] == pytest.approx(macro["chosen_rewards"] - macro["rejected_rewards"])
    cells = [cell for group in found["subsets"].values() for cell in group.values()]
    assert macro["loss"] == pytest.approx(np.mean([cell["loss"]["mean"] for cell in cells]))
    assert found["macro"]["datasets"]["accuracy"] == pytest.approx((2 / 3 + 1) / 2)


def test_slices_by_length_and_by_a_column() -> None:
    table = scores([1.0, -1.0, 1.0], chosen_tokens=[30, 33, 5000], lang=["de", None, "de"])
    found = summarise([table], slices=["length", "lang"])
    lengths = {name: cell["scored"] for name, cell in found["slices"]["length"].items()}
    assert lengths == {"up to 32": 1, "33 to 64": 1, "over 2048": 1}
    assert {name: cell["scored"] for name, cell in found["slices"]["lang"].items()} == {"de": 2, "(no value)": 1}
    assert found["slice_cuts"]["lang"] == {"how": "its one value", "groups": ["de", "(no value)"]}
    macro = found["macro"]["slices"]["lang"]
    assert (macro["groups"], macro["accuracy"], macro["margins_nats"]) == (2, 0.5, 0.0)


def test_truncated_pairs_are_also_left_out() -> None:
    plain = scores([1.0, -1.0, 1.0], chosen_truncated=[False, False, False], rejected_truncated=[False] * 3)
    assert overall(plain)["without_truncated"] is None
    cut = overall(scores([1.0, -1.0, 1.0], chosen_truncated=[False, True, False], rejected_truncated=[False] * 3))
    assert cut["truncated"] == 1
    assert cut["accuracy"]["value"] == pytest.approx(2 / 3)
    assert cut["without_truncated"]["accuracy"]["value"] == 1.0
    assert cut["without_truncated"]["margins"]["n"] == 2


def test_labelled_ties_have_no_accuracy_and_their_own_count() -> None:
    found = overall(scores([1.0, -1.0, 0.0], tied=[False, True, True]))
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (1.0, 1)
    assert (found["ties"], found["labelled_ties"]) == (0, 2)


def test_overflow_is_counted_and_never_averaged() -> None:
    table = scores([1.0, -1.0])
    loss = parse_loss(LossSpec(name="discopop"))
    far = derive_table(scores([1.0, -8000.0]), loss)
    found = overall(derive_table(table, loss), far)
    assert found["loss"]["overflow"] == 1
    assert found["loss"]["n"] == 3
    assert math.isfinite(found["loss"]["mean"])


def test_without_a_reference_what_needs_one_is_null_with_the_reason() -> None:
    columns = scores([1.0, -1.0]).drop_columns(["ref_chosen_logps", "ref_rejected_logps"])
    found = overall(derive_table(columns, parse_loss(LossSpec(name="cpo"))))
    assert found["margins_nats"] == {
        "n": 0,
        "mean": None,
        "std": None,
        "ci95": None,
        "quantiles": None,
        "reason": "scored without a reference",
    }
    assert found["ranking"]["reference_sum"]["reason"] == "scored without a reference"
    assert found["accuracy"]["value"] == 0.5


def test_one_pair_has_a_mean_and_says_why_it_has_no_interval() -> None:
    found = overall(scores([1.0]))["margins"]
    assert (found["mean"], found["std"], found["ci95"]) == (0.5, None, None)
    assert "fewer than two" in found["reason"]


def test_the_bytes_do_not_depend_on_how_rows_are_cut_into_tables() -> None:
    rng = np.random.default_rng(0)
    table = scores(
        list(rng.normal(0.3, 2, 60)),
        prompt_digest=[f"{k:032x}" for k in rng.integers(0, 40, 60)],
        subset=[f"s{k}" for k in rng.integers(0, 3, 60)],
    )
    whole = json.dumps(summarise([table], slices=["length"]), allow_nan=False)
    for step in (1, 7, 59):
        cut = [table.slice(start, step) for start in range(0, 60, step)]
        assert json.dumps(summarise(iter(cut), slices=["length"]), allow_nan=False) == whole


def test_policy_equal_to_reference_ties_on_every_pair() -> None:
    found = overall(scores([0.0] * 5))
    assert (found["ties"], found["accuracy"]["value"], found["rewards/accuracies"]) == (5, None, 0.0)
    assert found["accuracy"]["reason"] == "every pair is a tie"
    assert found["loss"]["mean"] == 0.6931471805599453
    assert found["margins"]["ci95"] == [0.0, 0.0]
