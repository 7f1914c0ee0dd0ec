"""Every loss that TRL has, against TRL's own code, pair by pair."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dpo_score.config.schema import LossSpec
from dpo_score.losses.columns import derive_table
from dpo_score.losses.parse import LossInputs, evaluate, parse_loss
from dpo_score.metrics.summary import summarise
from tests.losses.trl_oracle import Batch, random_batch, trl_compute, trl_loss

pytest.importorskip("trl")
TOLERANCE = 4e-7

PAIRWISE = [
    ("sigmoid", {}),
    ("robust", {"label_smoothing": 0.1}),
    ("hinge", {}),
    ("ipo", {}),
    ("exo_pair", {"label_smoothing": 1e-3}),
    ("nca_pair", {}),
    ("bco_pair", {}),
    ("sppo_hard", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {}),
    ("sigmoid_norm", {}),
    ("sft", {}),
]
F_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "sft"]


def ours(batch: Batch, name: str, beta: float, **options: Any) -> np.ndarray:
    spec = LossSpec(name=name, beta=beta, **options)
    return evaluate(parse_loss(spec), batch.inputs())


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("name", "options"), PAIRWISE)
def test_each_pair_has_the_loss_that_trl_computes_for_it(name: str, options: dict[str, Any], beta: float) -> None:
    batch = random_batch(seed=len(name))
    found = ours(batch, name, beta, **options)
    for i in range(len(batch)):
        expected = trl_loss(batch.pair(i), name, beta, torch.float64, **options)
        assert found[i] == pytest.approx(expected, rel=TOLERANCE, abs=1e-30)


@pytest.mark.parametrize("name", F_LOSSES)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
def test_f_divergences(name: str, divergence: str) -> None:
    batch = random_batch(seed=3)
    epsilon = {"exo_pair": 1e-3, "robust": 0.1}.get(name, 0.0)
    found = ours(batch, name, 0.1, label_smoothing=epsilon or None, params={"f_divergence": divergence})
    for i in range(len(batch)):
        options = {"label_smoothing": epsilon, "f_divergence_type": divergence}
        expected = trl_loss(batch.pair(i), name, 0.1, torch.float64, **options)
        assert found[i] == pytest.approx(expected, rel=TOLERANCE, abs=1e-30)


@pytest.mark.parametrize("name", F_LOSSES)
@pytest.mark.parametrize("f_alpha", [0.5, 0.9, 1.5])
def test_alpha_divergence(name: str, f_alpha: float) -> None:
    """TRL takes exp(t) − 1 in float32 whatever the dtype, so the same formula is run on float32 tensors."""
    batch = random_batch(seed=3)
    epsilon = {"exo_pair": 1e-3, "robust": 0.1}.get(name, 0.0)
    params = {"f_divergence": "alpha_divergence", "f_alpha": f_alpha}
    loss = parse_loss(LossSpec(name=name, beta=0.1, label_smoothing=epsilon or None, params=params))
    found = evaluate(loss, in_float32(batch.inputs()))
    for i in range(len(batch)):
        options = {"label_smoothing": epsilon, "f_divergence_type": "alpha_divergence"}
        expected = trl_loss(batch.pair(i), name, 0.1, f_alpha_divergence_coef=f_alpha, **options)
        assert float(found[i]) == pytest.approx(expected, rel=2e-6, abs=1e-30)


def in_float32(inputs: LossInputs) -> LossInputs:
    arrays = {name: getattr(inputs, name) for name in LossInputs.__dataclass_fields__}
    return LossInputs(**{k: None if v is None else torch.as_tensor(v, dtype=torch.float32) for k, v in arrays.items()})


def test_alpha_close_to_one_is_reverse_kl() -> None:
    batch = random_batch(seed=4)
    params = {"f_divergence": "alpha_divergence", "f_alpha": 1.0 + 1e-7}
    assert np.array_equal(ours(batch, "sigmoid", 0.1, params=params), ours(batch, "sigmoid", 0.1))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_losses_over_the_whole_set_have_the_batch_mean_of_trl(name: str, epsilon: float) -> None:
    batch = random_batch(seed=5, pairs=17)
    expected = trl_loss(batch, name, 0.1, torch.float64, label_smoothing=epsilon)
    assert ours(batch, name, 0.1, label_smoothing=epsilon).mean() == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sft", "nca_pair"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_alpha(name: str, alpha: float) -> None:
    batch = random_batch(seed=6)
    found = ours(batch, name, 0.1, params={"ld_alpha": alpha})
    for i in range(len(batch)):
        assert found[i] == pytest.approx(
            trl_loss(batch.pair(i), name, 0.1, torch.float64, ld_alpha=alpha), rel=TOLERANCE
        )


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sft"])
def test_wpo_weighting(name: str) -> None:
    batch = random_batch(seed=7)
    for alpha in (None, 0.3):
        params: dict[str, Any] = {"wpo": True} | ({} if alpha is None else {"ld_alpha": alpha})
        found = ours(batch, name, 0.1, params=params)
        for i in range(len(batch)):
            expected = trl_loss(batch.pair(i), name, 0.1, torch.float64, use_weighting=True, ld_alpha=alpha)
            assert found[i] == pytest.approx(expected, rel=TOLERANCE)


def test_a_weighted_sum_is_trls_sum_of_loss_types() -> None:
    batch = random_batch(seed=8)
    options = {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    found = ours(batch, "0.8*sigmoid+0.2*bco_pair+1*sft", 0.1)
    for i in range(len(batch)):
        assert found[i] == pytest.approx(trl_loss(batch.pair(i), "", 0.1, torch.float64, **options), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_trl_divides_by_one_token_more_on_an_empty_prompt(name: str) -> None:
    """A known difference: TRL's mask then counts the first token, which has no log-prob; ours counts scored tokens."""
    batch = random_batch(seed=9).pair(0)
    expected, _ = trl_compute(batch, name, 0.1, torch.float64, empty_prompt=True)
    longer = Batch(batch.policy, batch.reference, batch.log_sum_sq, tuple(n + 1 for n in batch.lengths))
    assert ours(longer, name, 0.1)[0] == pytest.approx(expected, rel=TOLERANCE)
    assert ours(batch, name, 0.1)[0] != pytest.approx(expected, rel=1e-3)


def test_trl_metric_names_have_trl_values() -> None:
    batch = random_batch(seed=10, pairs=9)
    _, logged = trl_compute(batch, "sigmoid", 0.1, torch.float64)
    summary = summarise([derive_table(score_table(batch), parse_loss(LossSpec()))])["overall"]
    for name in ("chosen", "rejected", "accuracies", "margins"):
        assert summary[f"rewards/{name}"] == pytest.approx(logged[f"rewards/{name}"], rel=TOLERANCE)
    for name in ("logps/chosen", "logps/rejected"):
        assert summary[name] == pytest.approx(logged[name], rel=TOLERANCE)


def score_table(batch: Batch, reference: bool = True) -> pa.Table:
    x = batch.inputs()
    columns = {"policy_chosen_logps": x.policy_chosen, "policy_rejected_logps": x.policy_rejected}
    columns |= {"chosen_tokens": x.chosen_tokens, "rejected_tokens": x.rejected_tokens}
    if reference:
        columns |= {"ref_chosen_logps": x.ref_chosen, "ref_rejected_logps": x.ref_rejected}
    return pa.table(columns)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_without_a_reference_losses_and_rewards_are_those_of_trls_trainers(name: str) -> None:
    batch = random_batch(seed=11)
    x = batch.inputs()
    beta = 0.3
    mean_c, mean_r = x.policy_chosen / x.chosen_tokens, x.policy_rejected / x.rejected_tokens
    table = derive_table(score_table(batch, reference=False), parse_loss(LossSpec(name=name, beta=beta)))
    fake = SimpleNamespace(
        alpha=0.0, beta=beta, label_smoothing=0.0, simpo_gamma=0.25 * beta, accelerator=SimpleNamespace(device="cpu")
    )
    if name == "orpo":
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer

        fake_inputs = [torch.as_tensor(v) for v in (mean_c, mean_r)]
        odds, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(fake, *fake_inputs)
        expected = -torch.as_tensor(mean_c) - odds
    else:
        from trl.experimental.cpo.cpo_trainer import CPOTrainer

        fake.loss_type = "simpo" if name == "simpo" else "sigmoid"
        pair = (mean_c, mean_r) if name == "simpo" else (x.policy_chosen, x.policy_rejected)
        expected, chosen, rejected = CPOTrainer.cpo_loss(fake, *(torch.as_tensor(v) for v in pair))
        expected = expected if name == "simpo" else expected - torch.as_tensor(mean_c)
    assert np.asarray(table["loss"]) == pytest.approx(expected.numpy(), rel=TOLERANCE)
    assert np.asarray(table["chosen_rewards"]) == pytest.approx(chosen.numpy(), rel=TOLERANCE)
    assert np.asarray(table["rejected_rewards"]) == pytest.approx(rejected.numpy(), rel=TOLERANCE)
    assert table["margins_nats"].null_count == len(batch)
