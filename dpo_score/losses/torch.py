"""DPO in training code: `DPOLoss` and `sequence_logps`, on torch tensors.

`DPOLoss` has the signature and semantics of torchtune's class of that name and calls the formula that scoring uses.
Batching, gathering across devices and the reference model are the caller's. The only file of losses/ that imports torch
when it is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpo_score.config.schema import LossSpec
from dpo_score.errors import DataError
from dpo_score.losses.parse import LossInputs, evaluate, parse_loss


class DPOLoss(nn.Module):
    """−(1−ε)·log σ(βδ) − ε·log σ(−βδ), δ = (πc − πr) − (ρc − ρr). DPO, arXiv 2305.18290 eq. 7; ε: cDPO.

    `beta` > 0, 0 ≤ `label_smoothing` ≤ 0.5, else ConfigError.

    >>> losses, chosen, rejected = DPOLoss(beta=0.5)(*torch.tensor([[-2.0], [-3.0], [-2.5], [-2.5]]))
    >>> round(losses.item(), 4), chosen.item(), rejected.item()
    (0.4741, 0.25, -0.25)
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self._loss = parse_loss(LossSpec(name="sigmoid", beta=beta, label_smoothing=label_smoothing))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, label_smoothing={self.label_smoothing}"

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(losses, chosen_rewards, rejected_rewards), each of shape (batch,), from four of shape (batch,) in nats.

        Differentiable in the policy log-probabilities; the rewards β·(π − ρ) are detached.
        """
        _check_one_shape(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
        losses: Tensor = evaluate(
            self._loss,
            LossInputs(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps),
        )
        chosen_rewards = self.beta * (policy_chosen_logps - reference_chosen_logps).detach()
        rejected_rewards = self.beta * (policy_rejected_logps - reference_rejected_logps).detach()
        return losses, chosen_rewards, rejected_rewards


def _check_one_shape(*tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise DataError(f"DPOLoss needs four tensors of one shape (batch,), got {', '.join(map(str, shapes))}")


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = False,
    label_pad_token_id: int = -100,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """Log-probability of each row's labels in nats, shape (batch,): summed, or per label with `average_log_prob`.

    `logits` (batch, length, vocabulary), `labels` (batch, length); positions labelled `label_pad_token_id` are left
    out. In a decoder-only model position t predicts label t + 1, so the first label is never scored; an
    encoder-decoder model's labels line up with its logits. 16-bit logits are computed in float32. A row without a
    label sums to 0 and averages to NaN. Neither argument is changed. DataError when the shapes do not fit.

    >>> logits = torch.zeros(1, 3, 4)  # three positions, at each of which four tokens are equally likely
    >>> round(sequence_logps(logits, torch.tensor([[-100, 1, 2]])).item(), 4)
    -2.7726
    """
    if logits.shape[:-1] != labels.shape:
        raise DataError(
            f"logits of shape {tuple(logits.shape)} need labels of shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    if not is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != label_pad_token_id
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    chosen = wide.gather(-1, labels.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    token_logps = (chosen - wide.logsumexp(-1)).masked_fill(~mask, 0.0)
    sums = token_logps.sum(-1)
    return sums / mask.sum(-1) if average_log_prob else sums
