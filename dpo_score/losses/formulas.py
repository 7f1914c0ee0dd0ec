"""Every loss: its formula with its source, and the table of names that `--loss` accepts. Elementwise and pure.

Symbols: πc, πr policy sums of log p over the scored tokens; ρc, ρr the reference's; Δ = π − ρ; s(Δ) the score of
the chosen f-divergence (Δ itself for reverse KL), δ = s(Δc) − s(Δr); nc, nr scored tokens; β, ε as configured;
L = log σ in its stable form. All values in nats, all arrays of shape (pairs,): NumPy, torch or `Dual`.

To add a loss, write a function from (`FormulaInputs`, `LossSettings`) to one number a pair, and a row of `_TABLE`:

>>> import numpy as np
>>> def squared_loss(x, settings):  # its docstring: the formula, and the paper it is from
...     return (1.0 - settings.beta * (x.chosen - x.rejected)) ** 2
>>> row = Loss("squared", squared_loss)
>>> x = FormulaInputs(chosen=np.array([2.0]), rejected=np.array([-3.0]), nll=np.array([4.0]), chosen_tokens=8.0)
>>> float(row.formula(x, LossSettings(beta=0.1))[0])
0.25
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from dpo_score.losses.ops import (
    Array,
    clamp_max,
    exp,
    log1mexp,
    log_sigmoid,
    rank_partner,
    relu,
    sigmoid,
)

MAX_EXPONENT = 80.0


@dataclass(frozen=True, slots=True, eq=False)
class FormulaInputs:
    """What formulas read. `chosen`/`rejected` are the policy sums after LD weighting, `nll` the plain −πc."""

    chosen: Array
    rejected: Array
    nll: Array
    ref_chosen: Array = None
    ref_rejected: Array = None
    delta_chosen: Array = None
    delta_rejected: Array = None
    score_chosen: Array = None
    score_rejected: Array = None
    chosen_tokens: Array = None
    rejected_tokens: Array = None
    offset: Array = None

    @property
    def delta(self) -> Array:
        """δ = s(Δc) − s(Δr)."""
        return self.score_chosen - self.score_rejected

    @property
    def means(self) -> tuple[Array, Array]:
        """πc/nc and πr/nr: mean log p per scored token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


@dataclass(frozen=True, slots=True)
class LossSettings:
    """β, ε and the loss's own parameters, resolved and checked."""

    beta: float
    epsilon: float = 0.0
    params: Mapping[str, float] = field(default_factory=dict)


def f_score(delta: Array, divergence: str, f_alpha: float) -> Array:
    """s(Δ) = f'(e^Δ) up to a constant that cancels. f-DPO, arXiv 2309.16240."""
    if divergence == "forward_kl":
        return 1.0 - exp(-delta)
    if divergence == "js_divergence":
        return math.log(2.0) + log_sigmoid(delta)
    if divergence == "alpha_divergence" and abs(f_alpha - 1.0) >= 1e-6:
        exponent = clamp_max((f_alpha - 1.0) * delta, MAX_EXPONENT)
        return (exp(exponent) - 1.0) / (f_alpha - 1.0)
    return delta


def _smoothed(z: Array, epsilon: float) -> Array:
    """−(1−ε)L(z) − εL(−z). ε = 0 leaves the second term out, so that 0·∞ never occurs."""
    if epsilon == 0.0:
        return -log_sigmoid(z)
    return -(1.0 - epsilon) * log_sigmoid(z) - epsilon * log_sigmoid(-z)


def sigmoid_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−L(βδ); with ε > 0 −(1−ε)L(βδ) − εL(−βδ). DPO, arXiv 2305.18290 eq. 7; cDPO, Mitchell 2023."""
    return _smoothed(s.beta * x.delta, s.epsilon)


def robust_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """[−(1−ε)L(βδ) + εL(−βδ)] / (1−2ε): unbiased under label flips of rate ε. arXiv 2403.00409."""
    z = s.beta * x.delta
    if s.epsilon == 0.0:
        return -log_sigmoid(z)
    return (-(1.0 - s.epsilon) * log_sigmoid(z) + s.epsilon * log_sigmoid(-z)) / (1.0 - 2.0 * s.epsilon)


def hinge_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """max(0, 1 − βδ). RSO, arXiv 2309.06657."""
    return relu(1.0 - s.beta * x.delta)


def ipo_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """(s(Δc)/nc − s(Δr)/nr − 1/(2β))². IPO, arXiv 2310.12036 eq. 17, averaged per token; β is the paper's τ."""
    gap = x.score_chosen / x.chosen_tokens - x.score_rejected / x.rejected_tokens - 1.0 / (2.0 * s.beta)
    return gap * gap


def ipo_sum_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """(Δc − Δr − 1/(2β))². IPO, arXiv 2310.12036 eq. 17, over sums."""
    gap = x.delta_chosen - x.delta_rejected - 1.0 / (2.0 * s.beta)
    return gap * gap


def exo_pair_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """σ(βδ)(L(βδ) − log(1−ε)) + σ(−βδ)(L(−βδ) − log ε). EXO-pref, arXiv 2402.00856 eq. 16, K = 2."""
    z = s.beta * x.delta
    towards = sigmoid(z) * (log_sigmoid(z) - math.log1p(-s.epsilon))
    return towards + sigmoid(-z) * (log_sigmoid(-z) - math.log(s.epsilon))


def nca_pair_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−L(βΔc) − ½L(−βΔc) − ½L(−βΔr). NCA, arXiv 2402.05369, K = 2."""
    chosen, rejected = s.beta * x.delta_chosen, s.beta * x.delta_rejected
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−L(βΔc) − L(−βΔr). BCO, arXiv 2404.04656, without the running reward shift."""
    return -log_sigmoid(s.beta * x.delta_chosen) - log_sigmoid(-(s.beta * x.delta_rejected))


def sppo_hard_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """(Δc − ½/β)² + (Δr + ½/β)². SPPO, arXiv 2405.00675 eq. 4.7 with win probabilities 1 and 0."""
    won, lost = x.delta_chosen - 0.5 / s.beta, x.delta_rejected + 0.5 / s.beta
    return won * won + lost * lost


def apo_zero_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """1 − σ(βΔc) + σ(βΔr). APO-zero, arXiv 2408.06266 eq. 7."""
    return 1.0 - sigmoid(s.beta * x.delta_chosen) + sigmoid(s.beta * x.delta_rejected)


def apo_down_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """σ(βΔc) + 1 − σ(β(Δc − Δr)). APO-down, arXiv 2408.06266 eq. 8."""
    return sigmoid(s.beta * x.delta_chosen) + 1.0 - sigmoid(s.beta * (x.delta_chosen - x.delta_rejected))


def discopop_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """z = βδ, m = σ(z/τ): −L(z)(1−m) + e^(−z)m. DiscoPOP, arXiv 2406.08414 eq. 5."""
    z = s.beta * x.delta
    mix = sigmoid(z / s.params["tau"])
    return -log_sigmoid(z) * (1.0 - mix) + exp(-z) * mix


def sigmoid_norm_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−L(β(s(Δc)/nc − s(Δr)/nr)). Length-normalised DPO, Tülu 3, arXiv 2411.15124."""
    return -log_sigmoid(s.beta * (x.score_chosen / x.chosen_tokens - x.score_rejected / x.rejected_tokens))


def sft_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−πc/nc: negative log-likelihood per chosen token. LD weighting does not touch it."""
    return x.nll / x.chosen_tokens


def _simpo_z(x: FormulaInputs, s: LossSettings) -> Array:
    chosen, rejected = x.means
    return s.beta * (chosen - rejected) - s.beta * s.params["gamma_beta_ratio"]


def simpo_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """z = β(πc/nc − πr/nr) − γ: −(1−ε)L(z) − εL(−z). SimPO, arXiv 2405.14734 eq. 6; γ = β·gamma_beta_ratio."""
    return _smoothed(_simpo_z(x, s), s.epsilon)


def simpo_hinge_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """max(0, 1 − z) with the z of simpo: the hinge variant of the SimPO authors' trainer."""
    return relu(1.0 - _simpo_z(x, s))


def orpo_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−c̄ − βL(log odds(c̄) − log odds(r̄)), c̄ = πc/nc, r̄ = πr/nr. ORPO, arXiv 2403.07691 eq. 4 and 7."""
    chosen, rejected = x.means
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - s.beta * log_sigmoid(log_odds)


def cpo_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−L(β(πc − πr)), smoothed by ε, − α·πc/nc. CPO, arXiv 2401.08417 eq. 3 with its NLL term."""
    return _smoothed(s.beta * (x.chosen - x.rejected), s.epsilon) + s.params["alpha"] * (x.nll / x.chosen_tokens)


def slic_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """max(0, β − πc + πr) − λπc; β is the margin. SLiC-HF, arXiv 2305.10425."""
    return relu(s.beta - x.chosen + x.rejected) + s.params["lambda"] * x.nll


def kto_pair_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """½[1 − σ(β(Δc − z))] + ½[1 − σ(β(z − Δr))], z the given KL. KTO, arXiv 2402.01306, λ = 1."""
    kl = s.params["kl"]
    chosen = 1.0 - sigmoid(s.beta * (x.delta_chosen - kl))
    return 0.5 * chosen + 0.5 * (1.0 - sigmoid(s.beta * (kl - x.delta_rejected)))


def r_dpo_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−L(β(Δc − Δr) + α(nc − nr)). arXiv 2403.19159: with reward r − αn the optimum has r = βΔ + αn + const."""
    length_gap = s.params["alpha"] * (x.chosen_tokens - x.rejected_tokens)
    return -log_sigmoid(s.beta * (x.delta_chosen - x.delta_rejected) + length_gap)


def dpop_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−L(β(Δc − Δr − λ·max(0, −Δc))). DPO-Positive, arXiv 2402.13228."""
    penalty = s.params["lambda"] * relu(-x.delta_chosen)
    return -log_sigmoid(s.beta * (x.delta_chosen - x.delta_rejected - penalty))


def odpo_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """−L(β(Δc − Δr) − offset). ODPO, arXiv 2402.10571; the offset comes from a column."""
    return -log_sigmoid(s.beta * (x.delta_chosen - x.delta_rejected) - x.offset)


def aot_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """cDPO on (πc − πr) against the (ρc − ρr) of equal rank over the whole set. AOT, arXiv 2406.05882.

    A row gets the term of its own rank in πc − πr.
    """
    policy = x.chosen - x.rejected
    return _smoothed(s.beta * (policy - rank_partner(policy, x.ref_chosen - x.ref_rejected)), s.epsilon)


def aot_unpaired_loss(x: FormulaInputs, s: LossSettings) -> Array:
    """cDPO on Δc against the Δr of equal rank over the whole set. AOT unpaired, arXiv 2406.05882.

    A row gets the term of its own rank in Δc.
    """
    return _smoothed(s.beta * (x.delta_chosen - rank_partner(x.delta_chosen, x.delta_rejected)), s.epsilon)


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss. `label_smoothing` None: the loss has no ε. `params`: its own parameters with their defaults.

    `reward_without_reference`: β·π ("sum") or β·π/n ("mean"), what the loss's own trainers log.
    """

    name: str
    formula: Callable[[FormulaInputs, LossSettings], Array]
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
    Loss("sigmoid", sigmoid_loss, label_smoothing=0.0, f_divergence=True),
    Loss("cdpo", sigmoid_loss, label_smoothing=0.0, f_divergence=True),
    Loss("robust", robust_loss, label_smoothing=0.0, f_divergence=True),
    Loss("hinge", hinge_loss, f_divergence=True),
    Loss("ipo", ipo_loss, lengths=True, f_divergence=True),
    Loss("ipo_sum", ipo_sum_loss),
    Loss("exo_pair", exo_pair_loss, label_smoothing=1e-3, f_divergence=True),
    Loss("nca_pair", nca_pair_loss),
    Loss("bco_pair", bco_pair_loss),
    Loss("sppo_hard", sppo_hard_loss),
    Loss("apo_zero", apo_zero_loss),
    Loss("apo_down", apo_down_loss),
    Loss("discopop", discopop_loss, params={"tau": 0.05}, f_divergence=True),
    Loss("sigmoid_norm", sigmoid_norm_loss, lengths=True, f_divergence=True),
    Loss("sft", sft_loss, reference=False, lengths=True, uses_beta=False, f_divergence=True),
    Loss(
        "simpo",
        simpo_loss,
        beta=2.0,
        label_smoothing=0.0,
        params={"gamma_beta_ratio": 0.25},
        reference=False,
        lengths=True,
        reward_without_reference="mean",
    ),
    Loss(
        "simpo_hinge",
        simpo_hinge_loss,
        beta=2.0,
        params={"gamma_beta_ratio": 0.25},
        reference=False,
        lengths=True,
        reward_without_reference="mean",
    ),
    Loss("orpo", orpo_loss, reference=False, lengths=True, reward_without_reference="mean"),
    Loss("cpo", cpo_loss, label_smoothing=0.0, params={"alpha": 1.0}, reference=False, lengths=True),
    Loss("slic", slic_loss, beta=1.0, params={"lambda": 0.1}, reference=False),
    Loss("kto_pair", kto_pair_loss, params={"kl": 0.0}),
    Loss("r_dpo", r_dpo_loss, params={"alpha": 0.01}, lengths=True),
    Loss("dpop", dpop_loss, params={"lambda": 50.0}),
    Loss("odpo", odpo_loss, offset=True),
    Loss("aot", aot_loss, label_smoothing=0.0, whole_set=True),
    Loss("aot_unpaired", aot_unpaired_loss, label_smoothing=0.0, whole_set=True),
)
LOSSES: Mapping[str, Loss] = MappingProxyType({loss.name: loss for loss in _TABLE})
