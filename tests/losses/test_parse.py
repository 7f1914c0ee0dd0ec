"""What a user may ask for, what is refused and how, and what identifies a loss."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpo_score.config.schema import LossSpec
from dpo_score.errors import ConfigError
from dpo_score.losses.parse import LOSSES, parse_loss

SHEET = """
    sigmoid cdpo robust hinge ipo ipo_sum exo_pair nca_pair bco_pair sppo_hard apo_zero apo_down discopop
    sigmoid_norm sft simpo simpo_hinge orpo cpo slic kto_pair r_dpo dpop odpo aot aot_unpaired
"""


def test_every_loss_of_the_formula_sheet_is_there_with_its_definition() -> None:
    assert set(LOSSES) == set(SHEET.split())
    for loss in LOSSES.values():
        assert len(loss.definition) > 20


def test_defaults_are_the_losss_own() -> None:
    assert (parse_loss(LossSpec()).beta, parse_loss(LossSpec()).label_smoothing) == (0.1, 0.0)
    simpo = parse_loss(LossSpec(name="simpo"))
    assert (simpo.beta, simpo.params) == (2.0, {"gamma_beta_ratio": 0.25})
    assert parse_loss(LossSpec(name="exo_pair")).label_smoothing == 1e-3
    assert parse_loss(LossSpec(name="hinge")).label_smoothing is None


def test_a_sum_has_weights_and_one_beta() -> None:
    loss = parse_loss(LossSpec(name="0.8*sigmoid + 0.2*bco_pair+1*sft"))
    assert loss.name == "0.8*sigmoid+0.2*bco_pair+1*sft"
    assert [(term.weight, term.loss.name) for term in loss.terms] == [(0.8, "sigmoid"), (0.2, "bco_pair"), (1.0, "sft")]
    assert loss.beta == 0.1
    assert parse_loss(LossSpec(name="1e-3*sft+2e+1*sigmoid")).terms[1].weight == 20.0


@pytest.mark.parametrize(
    ("name", "params", "free"),
    [
        ("sigmoid", {}, False),
        ("sigmoid", {"reference_free": True}, True),
        ("sigmoid", {"reference_free": "true"}, True),
        ("simpo", {}, True),
        ("simpo+sft", {}, True),
        ("sigmoid+sft", {}, False),
    ],
)
def test_which_losses_need_no_reference(name: str, params: dict[str, Any], free: bool) -> None:
    assert parse_loss(LossSpec(name=name, params=params)).reference_free is free


REFUSED = [
    ({"name": "sigmod"}, "did you mean 'sigmoid'"),
    ({"name": "sigmoid*2"}, "cannot read"),
    ({"name": "1.2.3*sigmoid"}, "not a finite number"),
    ({"name": ""}, "cannot read"),
    ({"beta": 0.0}, "above 0"),
    ({"beta": -0.1}, "above 0"),
    ({"beta": float("nan")}, "above 0"),
    ({"label_smoothing": 0.6}, "between 0 and 0.5"),
    ({"label_smoothing": -0.1}, "between 0 and 0.5"),
    ({"name": "robust", "label_smoothing": 0.5}, "below 0.5"),
    ({"name": "exo_pair", "label_smoothing": 0.0}, "infinite"),
    ({"name": "hinge", "label_smoothing": 0.1}, "no label smoothing"),
    ({"params": {"taw": 1}}, "did you mean 'tau'"),
    ({"params": {"tau": 1}}, "does not read the parameter 'tau'"),
    ({"name": "discopop", "params": {"tau": 0}}, "above 0"),
    ({"name": "discopop", "params": {"tau": "warm"}}, "above 0"),
    ({"name": "dpop", "params": {"lambda": True}}, "at least 0"),
    ({"name": "kto_pair", "params": {"kl": -1}}, "at least 0"),
    ({"params": {"f_divergence": "forward"}}, "did you mean 'forward_kl'"),
    ({"params": {"f_alpha": 0.3}}, "only with f_divergence=alpha_divergence"),
    ({"name": "nca_pair", "params": {"f_divergence": "forward_kl"}}, "does not read"),
    ({"params": {"ld_alpha": 1.5}}, "between 0 and 1"),
    ({"params": {"wpo": "maybe"}}, "true or false"),
    ({"name": "odpo"}, "offset_column"),
    ({"name": "aot", "params": {"wpo": True}}, "sorting"),
    ({"name": "aot+sft"}, "stands alone"),
    ({"name": "sigmoid+simpo"}, "different default betas"),
]


@pytest.mark.parametrize(("spec", "words"), REFUSED, ids=str)
def test_what_cannot_be_computed_is_refused_with_the_way_out(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_loss(LossSpec(**spec))


def test_the_default_divergence_may_be_named_for_any_loss() -> None:
    assert parse_loss(LossSpec(name="nca_pair", params={"f_divergence": "reverse_kl"})).params == {}


def test_the_identity_is_json_and_tells_apart_whatever_changes_a_number() -> None:
    specs = [
        LossSpec(),
        LossSpec(beta=0.2),
        LossSpec(name="cdpo"),
        LossSpec(label_smoothing=0.1),
        LossSpec(params={"ld_alpha": 0.5}),
        LossSpec(params={"wpo": True}),
        LossSpec(params={"f_divergence": "forward_kl"}),
        LossSpec(params={"f_divergence": "alpha_divergence"}),
        LossSpec(params={"f_divergence": "alpha_divergence", "f_alpha": 0.6}),
        LossSpec(name="discopop"),
        LossSpec(name="discopop", params={"tau": 0.1}),
        LossSpec(name="sigmoid+sft"),
        LossSpec(name="sigmoid+2*sft"),
    ]
    identities = [json.dumps(parse_loss(spec).identity(), sort_keys=True, allow_nan=False) for spec in specs]
    assert len(set(identities)) == len(specs)


def test_naming_a_default_changes_no_identity() -> None:
    spelled = LossSpec(name="discopop", beta=0.1, params={"tau": 0.05, "f_divergence": "reverse_kl"})
    assert parse_loss(spelled).identity() == parse_loss(LossSpec(name="discopop")).identity()


def test_parameters_in_force_include_defaults_and_changed_modifiers() -> None:
    loss = parse_loss(LossSpec(name="cpo", params={"alpha": 2, "ld_alpha": 0.5}))
    assert loss.params == {"alpha": 2.0, "ld_alpha": 0.5}
    assert parse_loss(LossSpec(name="cpo+slic", beta=1)).params == {"cpo.alpha": 1.0, "slic.lambda": 0.1}
    divergence = {"f_divergence": "alpha_divergence"}
    assert parse_loss(LossSpec(params=divergence)).params == divergence | {"f_alpha": 0.5}
