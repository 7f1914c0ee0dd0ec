"""The table of losses: formula, defaults, what each needs. One row per name that `--loss` accepts.

A loss that needs a reference cannot run without one unless `reference_free` sets ρ to 0. `whole_set` losses depend
on every pair at once and are computed by rescore only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from dpo_score.losses import formulas
from dpo_score.losses.formulas import Numbers, Settings
from dpo_score.losses.ops import Array


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss. `label_smoothing` None: the loss has no ε. `params`: its own parameters with their defaults.

    `reward_without_reference`: β·π ("sum") or β·π/n ("mean"), what the loss's own trainers log.
    """

    name: str
    formula: Callable[[Numbers, Settings], Array]
    beta: float = 0.1
    label_smoothing: float | None = None
    params: Mapping[str, float] = field(default_factory=dict)
    reference: bool = True
    lengths: bool = False
    whole_set: bool = False
    offset: bool = False
    uses_beta: bool = True
    f_divergence: bool = False
    reward_without_reference: Literal["sum", "mean"] = "sum"

    @property
    def definition(self) -> str:
        """The formula and its source, as documented."""
        return (self.formula.__doc__ or "").strip()


_TABLE = (
    Loss("sigmoid", formulas.sigmoid_loss, label_smoothing=0.0, f_divergence=True),
    Loss("cdpo", formulas.sigmoid_loss, label_smoothing=0.0, f_divergence=True),
    Loss("robust", formulas.robust_loss, label_smoothing=0.0, f_divergence=True),
    Loss("hinge", formulas.hinge_loss, f_divergence=True),
    Loss("ipo", formulas.ipo_loss, lengths=True, f_divergence=True),
    Loss("ipo_sum", formulas.ipo_sum_loss),
    Loss("exo_pair", formulas.exo_pair_loss, label_smoothing=1e-3, f_divergence=True),
    Loss("nca_pair", formulas.nca_pair_loss),
    Loss("bco_pair", formulas.bco_pair_loss),
    Loss("sppo_hard", formulas.sppo_hard_loss),
    Loss("apo_zero", formulas.apo_zero_loss),
    Loss("apo_down", formulas.apo_down_loss),
    Loss("discopop", formulas.discopop_loss, params={"tau": 0.05}, f_divergence=True),
    Loss("sigmoid_norm", formulas.sigmoid_norm_loss, lengths=True, f_divergence=True),
    Loss("sft", formulas.sft_loss, reference=False, lengths=True, uses_beta=False, f_divergence=True),
    Loss(
        "simpo",
        formulas.simpo_loss,
        beta=2.0,
        label_smoothing=0.0,
        params={"gamma_beta_ratio": 0.25},
        reference=False,
        lengths=True,
        reward_without_reference="mean",
    ),
    Loss(
        "simpo_hinge",
        formulas.simpo_hinge_loss,
        beta=2.0,
        params={"gamma_beta_ratio": 0.25},
        reference=False,
        lengths=True,
        reward_without_reference="mean",
    ),
    Loss("orpo", formulas.orpo_loss, reference=False, lengths=True, reward_without_reference="mean"),
    Loss("cpo", formulas.cpo_loss, label_smoothing=0.0, params={"alpha": 1.0}, reference=False, lengths=True),
    Loss("slic", formulas.slic_loss, beta=1.0, params={"lambda": 0.1}, reference=False),
    Loss("kto_pair", formulas.kto_pair_loss, params={"kl": 0.0}),
    Loss("r_dpo", formulas.r_dpo_loss, params={"alpha": 0.01}, lengths=True),
    Loss("dpop", formulas.dpop_loss, params={"lambda": 50.0}),
    Loss("odpo", formulas.odpo_loss, offset=True),
    Loss("aot", formulas.aot_loss, label_smoothing=0.0, whole_set=True),
    Loss("aot_unpaired", formulas.aot_unpaired_loss, label_smoothing=0.0, whole_set=True),
)
LOSSES: Mapping[str, Loss] = MappingProxyType({loss.name: loss for loss in _TABLE})
