"""What every number of a summary means: one sentence and a source each. Shown by reports; holds no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_score.metrics import health

DEFINITIONS: Mapping[str, str] = {
    "loss": "mean of the configured loss over the pairs for which it is finite",
    "margins": "β(Δc − Δr), Δ = log π − log ρ of an answer: how much more the policy than the reference prefers "
    "chosen (DPO, arXiv 2305.18290)",
    "margins_nats": "Δc − Δr, the margin without β, in nats",
    "chosen_rewards": "βΔc, the implicit reward of the chosen answer (DPO, arXiv 2305.18290 section 4)",
    "rejected_rewards": "βΔr, the implicit reward of the rejected answer (DPO, arXiv 2305.18290 section 4)",
    "accuracy": "share of pairs with a positive margin among pairs without a tie (interval: Wilson 1927, or its "
    "cluster-robust form where a prompt or group repeats)",
    "ties": "pairs whose two rewards are exactly equal",
    "labelled_ties": "pairs that the data calls a tie: left out of accuracy",
    "rewards/chosen": "mean of βΔc, as TRL's DPOTrainer logs it",
    "rewards/rejected": "mean of βΔr, as TRL's DPOTrainer logs it",
    "rewards/accuracies": "share of pairs with a positive margin, a tie counting as wrong, as TRL's DPOTrainer logs it",
    "rewards/margins": "mean margin, as TRL's DPOTrainer logs it",
    "logps/chosen": "mean summed log-probability of chosen answers under the policy, as TRL's DPOTrainer logs it",
    "logps/rejected": "mean summed log-probability of rejected answers under the policy, as TRL's DPOTrainer logs it",
    "reference_sum": "share of pairs whose chosen answer is more probable under the reference alone (ranking "
    "accuracy, arXiv 2405.19534)",
    "reference_per_token": "the same by mean log-probability per token (arXiv 2405.19534)",
    "policy_sum": "share of pairs whose chosen answer is more probable under the policy alone (ranking accuracy, "
    "arXiv 2405.19534)",
    "policy_per_token": "the same by mean log-probability per token (arXiv 2405.19534)",
    "flipped_right": "pairs that the policy alone ranks right and the reference alone wrong (arXiv 2405.19534)",
    "flipped_wrong": "pairs that the policy alone ranks wrong and the reference alone right (arXiv 2405.19534)",
    "longer_wins": "accuracy of preferring the answer with more scored tokens, equal lengths left out",
    "shorter_wins": "accuracy of preferring the answer with fewer scored tokens, equal lengths left out",
    "truncated": "pairs of which at least one answer was cut",
    "without_truncated": "accuracy and margin over the pairs of which no answer was cut; null when none was cut",
    "macro": "mean over groups, each group counting once",
    "length_controlled_accuracy": "accuracy at equal lengths, from a logistic regression of the outcome on the "
    "length difference (after AlpacaEval 2, arXiv 2404.04475)",
    "pearson_margin_length": "correlation of the margin with nc − nr (Pearson 1895)",
    "spearman_margin_length": "rank correlation of the margin with nc − nr (Spearman 1904)",
    "ece": "mean gap between confidence max(σ(m), σ(−m)) and accuracy over ten bins, m the margin (arXiv 1706.04599)",
    "brier": "mean of (1 − σ(margin))² (Brier 1950)",
    "nll": "mean of −log σ(margin): the Bradley–Terry log-loss of the labels",
    "best_beta": "the β with the least mean −log σ(β(Δc − Δr)) (temperature scaling, arXiv 1706.04599)",
    **health.DEFINITIONS,
}
