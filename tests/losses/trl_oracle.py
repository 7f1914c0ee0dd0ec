"""TRL's own loss code, run on numbers: DPOTrainer._compute_loss with a model that answers from a table.

Per-token log-probs are multiples of 2⁻¹⁰, so every sum is exact in float32 and only the loss arithmetic is compared.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_score.losses.parse import LossInputs


@dataclass(frozen=True)
class Batch:
    """Token log-probs (pairs, tokens), zero beyond each length, for policy and reference, chosen and rejected."""

    policy: tuple[NDArray[Any], NDArray[Any]]
    reference: tuple[NDArray[Any], NDArray[Any]]
    log_sum_sq: tuple[NDArray[Any], NDArray[Any]]
    lengths: tuple[NDArray[Any], NDArray[Any]]

    def __len__(self) -> int:
        return len(self.lengths[0])

    def pair(self, i: int) -> Batch:
        return Batch(*(tuple(x[i : i + 1] for x in field) for field in self.fields))

    @property
    def fields(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        return [self.policy, self.reference, self.log_sum_sq, self.lengths]

    def shared(self, values: NDArray[Any]) -> NDArray[Any]:
        m = np.minimum(*self.lengths)
        return np.where(np.arange(values.shape[1]) < m[:, None], values, 0.0).sum(1)

    def inputs(self) -> LossInputs:
        (pc, pr), (rc, rr), (sc, sr), (nc, nr) = self.fields
        sums = [x.sum(1) for x in (pc, pr, rc, rr)]
        return LossInputs(
            *sums,
            nc.astype(float),
            nr.astype(float),
            *(self.shared(x) for x in (pc, pr, rc, rr)),
            sc.sum(1),
            sr.sum(1),
        )


def random_batch(seed: int, pairs: int = 6, tokens: int = 12) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = tuple(rng.integers(1, tokens + 1, pairs) for _ in range(2))

    def values(scale: float) -> tuple[NDArray[Any], NDArray[Any]]:
        drawn = (np.round(-rng.gamma(1.0, scale, (pairs, tokens)) * 1024 - 1) / 1024 for _ in range(2))
        return tuple(np.where(np.arange(tokens) < n[:, None], x, 0.0) for x, n in zip(drawn, lengths, strict=True))

    return Batch(values(2.0), values(2.0), values(1.0), lengths)


def trl_loss(batch: Batch, name: str, beta: float, dtype: torch.dtype = torch.float32, **options: Any) -> float:
    """The scalar that TRL would back-propagate for this batch."""
    loss, _ = trl_compute(batch, name, beta, dtype, **options)
    return loss


def trl_compute(
    batch: Batch, name: str, beta: float, dtype: torch.dtype = torch.float32, empty_prompt: bool = False, **options: Any
) -> tuple[float, dict[str, float]]:
    """Loss and the metrics TRL logs for a batch."""
    from trl.trainer.dpo_trainer import DPOTrainer

    tokens = batch.policy[0].shape[1]
    mask = torch.cat([torch.as_tensor(np.arange(tokens) < n[:, None]) for n in batch.lengths]).long()
    first = mask[:, :1] if empty_prompt else torch.zeros_like(mask[:, :1])
    mask = torch.cat([first, mask], dim=1)
    outputs = _outputs(batch, dtype)
    settings = {
        "beta": beta,
        "loss_types": [name],
        "loss_weights": [1.0],
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "use_weighting": False,
    }
    trainer = SimpleNamespace(
        **(settings | options),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    trainer.model = model = _Answering(outputs)
    references = [_ld_sum(batch, x, trainer.ld_alpha, dtype) for x in batch.reference]
    data = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": references[0],
        "ref_rejected_logps": references[1],
    }
    loss = DPOTrainer._compute_loss(trainer, model, data, False)
    return float(loss), {key: value[0] for key, value in trainer._metrics["eval"].items()}


class _Answering:
    training = False

    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs

    def __call__(self, **_: Any) -> Any:
        return self.outputs


def _outputs(batch: Batch, dtype: torch.dtype) -> Any:
    logps, squares = (torch.as_tensor(np.concatenate(x)).to(dtype) for x in (batch.policy, batch.log_sum_sq))
    zero = torch.zeros_like(logps)
    return SimpleNamespace(
        log_probs=logps, log_sum_sq_probs=squares, entropy=zero, mean_logits=zero, is_top1=zero.bool()
    )


def _ld_sum(batch: Batch, values: NDArray[Any], ld_alpha: float | None, dtype: torch.dtype) -> torch.Tensor:
    """What TRL's compute_ref_log_probs stores: the sum, LD-weighted when asked."""
    full, shared = values.sum(1), batch.shared(values)
    return torch.as_tensor(full if ld_alpha is None else shared + ld_alpha * (full - shared)).to(dtype)
