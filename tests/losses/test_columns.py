"""Derived columns: exact where nothing moved, null where nothing is known, one bit pattern whatever the block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_score.config.schema import LossSpec
from dpo_score.errors import ConfigError
from dpo_score.losses.columns import DERIVED, derive, derive_table, needed_columns
from dpo_score.losses.parse import LOSSES, parse_loss

LN2 = 0.6931471805599453


def table(n: int = 50, seed: int = 0, stats: bool = True) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {"row_id": [f"0:{i}" for i in range(n)], "offset": rng.random(n)}
    for side in ("chosen", "rejected"):
        columns[f"{side}_tokens"] = rng.integers(1, 40, n)
        for role in ("ref", "policy"):
            columns[f"{role}_{side}_logps"] = -rng.gamma(5.0, 8.0, n)
            columns[f"{role}_{side}_logps_shared"] = columns[f"{role}_{side}_logps"] * rng.random(n)
        if stats:
            columns[f"policy_{side}_log_sum_sq_probs"] = -rng.gamma(5.0, 4.0, n)
    return pa.table(columns)


def loss(name: str = "sigmoid", **spec: Any) -> Any:
    params = {"offset_column": "offset"} if name == "odpo" else {}
    return parse_loss(LossSpec(name=name, params=params | spec.pop("params", {}), **spec))


def pair(pc: float | None, pr: float | None, rc: float | None, rr: float | None, nc: int = 3, nr: int = 5) -> pa.Table:
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    columns = {name: pa.array([v], pa.float64()) for name, v in zip(names, (pc, pr, rc, rr), strict=True)}
    return pa.table(columns | {"chosen_tokens": [nc], "rejected_tokens": [nr]})


def row(found: pa.Table) -> dict[str, Any]:
    return {name: found[name][0].as_py() for name in DERIVED}


def test_policy_equal_to_reference_is_exact() -> None:
    assert row(derive_table(pair(-123.456, -7.89, -123.456, -7.89), loss())) == {
        "chosen_rewards": 0.0,
        "rejected_rewards": 0.0,
        "margins": 0.0,
        "margins_nats": 0.0,
        "accuracy": None,
        "dpo_weight": 0.5,
        "loss": LN2,
        "loss_code": None,
    }


def test_one_pair_by_hand() -> None:
    found = row(derive_table(pair(-8.0, -10.0, -10.0, -9.0), loss(beta=0.5)))
    assert found["chosen_rewards"] == 1.0
    assert found["rejected_rewards"] == -0.5
    assert found["margins"] == 1.5
    assert found["margins_nats"] == 3.0
    assert found["accuracy"] == 1.0
    assert found["loss"] == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-15)
    assert found["dpo_weight"] == pytest.approx(1 / (1 + math.exp(1.5)), rel=1e-15)


def test_rewards_are_beta_delta_whatever_the_loss() -> None:
    plain = derive_table(table(), loss(beta=0.3))
    for name in LOSSES:
        found = derive_table(table(), loss(name, beta=0.3), whole_set=True)
        assert found["chosen_rewards"].equals(plain["chosen_rewards"]), name
        assert found["margins"].equals(plain["margins"]), name


@pytest.mark.parametrize("name", [name for name in LOSSES if not LOSSES[name].whole_set])
def test_bits_do_not_depend_on_the_block(name: str) -> None:
    whole = derive_table(table(), loss(name))
    blocks = [derive_table(table().slice(start, 7), loss(name)) for start in range(0, 50, 7)]
    assert whole.equals(pa.concat_tables(blocks).combine_chunks())


def test_deriving_again_replaces_the_columns_with_the_same_ones() -> None:
    once = derive_table(table(), loss())
    assert derive_table(once, loss()).equals(once)


def test_columns_are_float64_but_the_code() -> None:
    schema = derive_table(table(), loss()).schema
    assert {name: str(schema.field(name).type) for name in DERIVED if name != "loss_code"} == dict.fromkeys(
        [name for name in DERIVED if name != "loss_code"], "double"
    )
    assert schema.field("loss_code").type == pa.string()


def test_a_row_without_policy_values_is_null_throughout() -> None:
    both = pa.concat_tables([pair(-8.0, -10.0, -10.0, -9.0), pair(None, None, -10.0, -9.0)])
    found = derive_table(both, loss())
    assert [found[name][1].as_py() for name in DERIVED] == [None] * len(DERIVED)
    assert found["loss"][0].as_py() is not None


def test_a_row_without_a_reference_in_a_set_with_one_is_null_not_rescaled() -> None:
    both = pa.concat_tables([pair(-8.0, -10.0, -10.0, -9.0), pair(-8.0, -10.0, None, None)])
    found = derive_table(both, loss("simpo"))
    assert found["loss"].null_count == 0
    assert found["margins"].to_pylist()[1] is None


@pytest.mark.parametrize(
    ("name", "params", "scored"),
    [
        ("sigmoid", {"f_divergence": "forward_kl"}, (-900.0, -1.0, -100.0, -1.0)),
        ("hinge", {"f_divergence": "forward_kl"}, (-900.0, -1.0, -100.0, -1.0)),
        ("discopop", {}, (-8100.0, -1.0, -100.0, -1.0)),
        ("orpo", {}, (0.0, 0.0, -1.0, -1.0)),
    ],
)
def test_overflow_is_null_with_a_code_and_no_nan_anywhere(
    name: str, params: dict[str, Any], scored: tuple[float, ...]
) -> None:
    found = row(derive_table(pair(*scored), loss(name, params=params)))
    assert (found["loss"], found["loss_code"], found["dpo_weight"]) == (None, "overflow", None)
    assert math.isfinite(found["margins"])


def test_far_but_finite_values_do_not_overflow() -> None:
    found = row(derive_table(pair(-5000.0, -1.0, -1.0, -5000.0), loss(beta=1.0)))
    assert (found["loss"], found["loss_code"], found["dpo_weight"]) == (9998.0, None, 1.0)


def test_a_pair_without_scored_tokens_has_no_length_normalised_loss() -> None:
    found = row(derive_table(pair(-1.0, -2.0, -1.0, -2.0, nc=0), loss("ipo")))
    assert (found["loss"], found["loss_code"]) == (None, None)


def test_one_scored_token_is_enough_for_a_length_normalised_loss() -> None:
    found = row(derive_table(pair(-1.0, -2.0, -1.0, -2.0, nc=1), loss("ipo", beta=0.5)))
    assert found["loss"] == 1.0  # (0 − 1/(2β))²


def test_without_a_reference() -> None:
    scores = table().drop_columns([name for name in table().column_names if name.startswith("ref_")])
    simpo, cpo = (derive_table(scores, loss(name)) for name in ("simpo", "cpo"))
    policy, tokens = np.asarray(scores["policy_chosen_logps"]), np.asarray(scores["chosen_tokens"])
    assert np.array_equal(np.asarray(simpo["chosen_rewards"]), 2.0 * (policy / tokens))
    assert np.array_equal(np.asarray(cpo["chosen_rewards"]), 0.1 * policy)
    assert simpo["margins_nats"].null_count == len(scores)
    assert simpo["accuracy"].null_count == 0


def test_a_reference_of_nulls_is_no_reference() -> None:
    nulls = pa.concat_tables([pair(-1.0, -2.0, None, None), pair(-3.0, -4.0, None, None)])
    assert derive_table(nulls, loss("cpo"))["margins"].to_pylist() == [pytest.approx(0.1)] * 2
    assert derive_table(nulls, loss("cpo"), has_reference=True)["margins"].null_count == 2


def test_reference_free_drops_the_reference_from_the_loss_and_not_from_the_rewards() -> None:
    found = row(derive_table(pair(-8.0, -10.0, -10.0, -9.0), loss(beta=0.5, params={"reference_free": True})))
    assert found["loss"] == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-15)
    assert found["margins"] == 1.5


def test_ld_alpha_changes_rewards_too() -> None:
    scores = table(1)
    v = {name: scores[name][0].as_py() for name in scores.column_names}

    def ld(role: str, side: str) -> float:
        shared = v[f"{role}_{side}_logps_shared"]
        return shared + 0.25 * (v[f"{role}_{side}_logps"] - shared)

    found = row(derive_table(scores, loss(params={"ld_alpha": 0.25})))
    assert found["chosen_rewards"] == 0.1 * (ld("policy", "chosen") - ld("ref", "chosen"))
    assert found["rejected_rewards"] == 0.1 * (ld("policy", "rejected") - ld("ref", "rejected"))


@pytest.mark.parametrize(
    ("name", "params", "missing", "way_out"),
    [
        ("sigmoid", {"wpo": True}, "policy_chosen_log_sum_sq_probs", "--stats wpo"),
        ("sigmoid", {}, "ref_chosen_logps", "--reference MODEL"),
        ("odpo", {}, "offset", "--keep-columns offset"),
        ("sigmoid", {"ld_alpha": 0.5}, "policy_chosen_logps_shared", "score the pairs again"),
    ],
)
def test_a_missing_column_is_named_with_the_flag_that_stores_it(
    name: str, params: dict[str, Any], missing: str, way_out: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){missing}.*{way_out}"):
        derive_table(table().drop_columns([missing]), loss(name, params=params))


def test_what_each_loss_reads_is_what_it_asks_for() -> None:
    """Every column that `needed_columns` does not name may be absent, and taking one away that it names is refused."""
    for name in LOSSES:
        needed = list(needed_columns(loss(name)).values())
        columns = {c: np.asarray(table()[c], dtype=float) for c in needed}
        derive(columns, loss(name), whole_set=True)
        for column in needed:
            with pytest.raises(ConfigError):
                derive({k: v for k, v in columns.items() if k != column}, loss(name), whole_set=True)


def test_losses_over_the_whole_set_are_left_to_rescore() -> None:
    with pytest.raises(ConfigError, match="dpo-score rescore"):
        derive_table(table(), loss("aot"))
    found = derive_table(table(), loss("aot"), whole_set=True)
    assert found.schema.field("loss").metadata == {b"scope": b"whole set"}
    assert not found.schema.field("margins").metadata


def test_a_missing_row_takes_no_rank_in_a_loss_over_the_whole_set() -> None:
    scores = table(20)
    hole = pair(None, None, None, None).select(["policy_chosen_logps", "policy_rejected_logps"])
    with_hole = pa.concat_tables([scores, hole], promote_options="default")
    assert (
        derive_table(with_hole, loss("aot"), whole_set=True)["loss"].to_pylist()[:20]
        == derive_table(scores, loss("aot"), whole_set=True)["loss"].to_pylist()
    )


def test_a_labelled_tie_has_no_accuracy() -> None:
    scores = pair(-8.0, -10.0, -10.0, -9.0).append_column("tied", pa.array([True]))
    assert row(derive_table(scores, loss()))["accuracy"] is None


def test_an_empty_table_keeps_its_schema() -> None:
    assert derive_table(table().slice(0, 0), loss()).schema == derive_table(table(), loss()).schema


def test_carried_columns_of_any_type_do_not_disturb() -> None:
    scores = pair(-8.0, -10.0, -10.0, -9.0)
    carried = {"id": pa.array([2**60 + 1]), "text": pa.array(["x"]), "flag": pa.array([True]), "none": pa.nulls(1)}
    for name, values in carried.items():
        scores = scores.append_column(name, values)
    found = derive_table(scores, loss())
    assert found["id"].to_pylist() == [2**60 + 1]
    assert row(found)["accuracy"] == 1.0
