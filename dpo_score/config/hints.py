"""Names that people know from other programs, and what they are called here.

The command line, keys of a pipeline file and arguments in Python all ask `meant_by`. The names are options of TRL,
transformers, lm-evaluation-harness and RewardBench, and words that come to mind first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

from dpo_score.errors import nearest

_GROUPS = (
    (
        "--policy NAME=MODEL for a checkpoint to score, --reference MODEL for the frozen model",
        "model model_name_or_path model_name models model_path checkpoint checkpoints policies model_args pretrained",
    ),
    ("--reference MODEL", "ref_model reference_model ref base_model sft_model ref_model_name_or_path"),
    (
        "--policy NAME=BASE+ADAPTER, or --policy NAME=ADAPTER with --policy-base reference",
        "adapter adapters peft lora peft_model adapter_name_or_path use_peft",
    ),
    (
        "--batch-tokens N, the most tokens in one forward pass; auto finds it",
        "batch_size bs per_device_train_batch_size per_device_eval_batch_size precompute_ref_batch_size",
    ),
    (
        "--data [NAME=]PATH: a file, folder, glob or data set on the hub",
        "tasks task dataset datasets dataset_name train_file input inputs file",
    ),
    ("--data org/name:CONFIG", "dataset_config dataset_config_name subset"),
    ("--split NAME", "dataset_split splits dataset_train_split dataset_test_split"),
    ("--out DIR", "output_dir output output_path save_dir out_dir outdir o"),
    (
        "--limit N for the first N rows, --sample N for N rows drawn at random",
        "num_samples n_samples max_samples limit_samples samples num_rows max_rows debug n",
    ),
    (
        "--max-length N, for prompt and answer together",
        "max_seq_length max_seq_len seq_len max_len cutoff_len max_prompt_length max_completion_length",
    ),
    ("--loss NAME", "loss_type objective loss_fn"),
    ("--dtype float32, float16 or bfloat16", "torch_dtype precision bf16 fp16 fp32 half"),
    ("--quantization int8 or nf4", "load_in_8bit load_in_4bit int8 nf4 quantize"),
    (
        "--device cpu, cuda or cuda:1; all GPUs are used where Ray is installed",
        "gpu gpus cuda cpu num_gpus use_cpu",
    ),
    ("--threads N for CPU threads, --workers N with Ray", "num_workers num_proc num_processes n_jobs jobs j"),
    ("--tensor-parallel N", "tp tp_size tensor_parallel_size parallelize"),
    ("--restart", "overwrite overwrite_output_dir force fresh"),
    ("the same command again: a run resumes by itself", "resume resume_from_checkpoint continue"),
    ("--log-to wandb, mlflow or tensorboard", "report_to wandb mlflow tensorboard wandb_args logger"),
    ("the pipeline file without an option: dpo-score run FILE.yaml", "config config_file yaml recipe"),
    (
        "--reference-revision, --data-revision, or `revision:` of a policy in a pipeline file",
        "revision model_revision commit branch",
    ),
    (
        "--map prompt=A,chosen=B,rejected=C",
        "columns column_mapping rename_columns prompt_column chosen_column rejected_column",
    ),
    ("--render chat", "apply_chat_template chat use_chat_template"),
    ("--system TEXT", "system_instruction system_prompt"),
    ("--truncation keep_start, keep_end or reject", "truncation_mode truncation_side"),
    ("no --reference at all, or --loss-param reference_free=true", "ref_free reference_free"),
    ("--cache-dir DIR", "cache use_cache cache_path hf_cache"),
    ("--slice COLUMN", "group_by by slices groups"),
    ("--quiet to print less; there is no way to print more", "verbose v log_level logging_level"),
    (
        "a trainer for that: dpo-score scores and does not train",
        "lr learning_rate epochs num_train_epochs max_steps optim warmup_steps warmup_ratio weight_decay lora_r",
    ),
)
"""What to use here, and the names that other programs have for it."""
MEANINGS: dict[str, str] = {name: here for here, names in _GROUPS for name in names.split()}


def option_meant(typed: str, flags: Collection[str]) -> str | None:
    """What to say of an option that a command with these `flags` does not have; None where nothing is near.

    By meaning where the command has an option of that meaning, else the flag or the known name that is spelled most
    alike: `--precission` is `--precision`, which is `--dtype` here.
    """
    name = _plain(typed)
    own = {_plain(flag): f"did you mean {flag}?" for flag in flags if flag.startswith("--")}
    said = {other: f"use {here}" for other, meaning in MEANINGS.items() if (here := _within(meaning, flags))} | own
    close = difflib.get_close_matches(name, said, n=1, cutoff=0.6) or [flag for flag in own if flag.startswith(name)]
    return said[close[0]] if close else None


def _within(here: str, flags: Collection[str]) -> str:
    """The parts of a meaning whose options are among `flags`; one without an option is for commands that score."""
    if not here.startswith("--"):
        return here if "--policy" in flags or "--reference" in flags else ""
    return ", ".join(part for part in re.split(r", (?=--)", here) if part.split()[0] in flags)


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def meant_by(name: str, known: Iterable[str]) -> str:
    """What to use in place of an unknown name: by meaning, else the nearest known name, else all known ones."""
    here = MEANINGS.get(_plain(name))
    return nearest(name, known) if here is None else f"use {here}"
