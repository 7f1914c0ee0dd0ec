"""Preference metrics while a model trains: a callback scores the pairs at each evaluation and logs what it finds.

    python pipelines/metrics_while_training.py [MODEL [STEPS]]

MODEL is a folder or hub id with a chat template; without it, SmolLM2-135M-Instruct. Trains a small adapter with TRL's
DPOTrainer (`pip install trl peft`). A line beginning with `# %%` starts a cell for editors that run scripts as
notebooks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import peft
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dpo_score.integrations.callback import PreferenceMetrics

# %% A model, pairs to train on, and pairs that are only looked at.
name, steps = (*sys.argv[1:3], *("HuggingFaceTB/SmolLM2-135M-Instruct", "20")[len(sys.argv[1:3]) :])
data = Path(__file__).parents[1] / "data"
pairs = load_dataset("parquet", data_files={s: str(data / f"quickstart-{s}.parquet") for s in ("train", "test")})
shown = pairs["test"].select(range(8))

# %% An adapter over the model: without it, the model is its own reference ("base"), so none is loaded beside it.
folder = tempfile.mkdtemp(prefix="metrics-while-training-")
trainer = DPOTrainer(
    AutoModelForCausalLM.from_pretrained(name),
    args=DPOConfig(
        folder, max_steps=int(steps), per_device_train_batch_size=4, learning_rate=2e-4, eval_strategy="steps",
        eval_steps=max(int(steps) // 2, 1), bf16=False, report_to="none", save_strategy="no",
    ),
    train_dataset=pairs["train"].select_columns(["prompt", "chosen", "rejected"]),
    eval_dataset=shown.select_columns(["prompt", "chosen", "rejected"]),
    processing_class=AutoTokenizer.from_pretrained(name),
    peft_config=peft.LoraConfig(target_modules="all-linear"),
)  # fmt: skip

# %% The callback: any option of the command line by its name. Its numbers are those of dpo_score.score.
PreferenceMetrics.attach(trainer, shown, reference="base", name="shown", beta=trainer.args.beta)
trainer.train()

# %% At each evaluation the trainer's log has them, as TensorBoard and the like would.
for entry in trainer.state.log_history:
    if "eval_shown/margins" in entry:
        print(f"step {entry['step']}: accuracy {entry['eval_shown/accuracy']:.3f}, "
              f"margin {entry['eval_shown/margins']:+.4f} of {entry['eval_shown/scored']:.0f} pairs")  # fmt: skip
