"""Every setting of a run, once: its name, where it lands in the configuration, its type, panel and help line.

The command line (`--max-length`), the environment (`DPO_SCORE_MAX_LENGTH`) and flat keys of a pipeline file
(`max_length:`) are all read off this table, so they cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST, DATA, MODELS, TEXT, LOSS, COMPUTE, OUTPUT, SAFETY = (
    "What most people need first",
    "Data",
    "Models",
    "Text",
    "Loss",
    "Compute",
    "Output",
    "Safety",
)


@dataclass(frozen=True, slots=True)
class Option:
    """`path`: where the value goes in the configuration; `("data", "*", k)` sets k on every data set lacking it."""

    name: str
    path: tuple[str, ...]
    type: Any
    panel: str
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _o(name: str, path: str, kind: Any, panel: str, text: str) -> Option:
    return Option(name, tuple(path.split(".")), kind, panel, text)


OPTIONS: tuple[Option, ...] = (
    _o("data", "data", list[str], FIRST, "[NAME=]PATH: file, folder, glob, URL or hub data set; repeatable"),
    _o("reference", "reference.model", str, FIRST, "folder, hub id, package:NAME/FILE or columns:CHOSEN,REJECTED"),
    _o(
        "policy",
        "policies",
        list[str],
        FIRST,
        "NAME=MODEL[+ADAPTER], or a glob (half-written checkpoints wait); repeatable",
    ),
    _o("out", "out", str, FIRST, "folder for the results"),
    _o("loss", "loss.name", str, FIRST, "a loss, a comma list (rescore), a weighted sum, or path.py:function"),
    _o("beta", "loss.beta", float, FIRST, "strength of the KL constraint (null: the loss's own default)"),
    _o("max_length", "text.max_length", int, FIRST, "cut prompt + answer to N tokens (null: the model's limit)"),
    _o("dtype", "compute.dtype", str, FIRST, "auto, float32, float16 or bfloat16"),
    _o("limit", "limit", int, FIRST, "only the first N rows"),
    _o("split", "data.*.split", str, DATA, "train, test, …; a comma list"),
    _o("data_revision", "data.*.revision", str, DATA, "commit, tag or branch of a hub data set"),
    _o("format", "data.*.format", str, DATA, "auto, or a family of `dpo-score formats`"),
    _o("map", "data.*.map", str, DATA, "columns by hand: prompt=a,chosen=b,rejected=c"),
    _o("pairing", "data.*.pairing", str, DATA, "best-worst, all, adjacent or random, for lists of answers"),
    _o("preference", "data.*.preference", str, DATA, "better or safer, where a set carries both labels"),
    _o("keep_ties", "data.*.keep_ties", bool, DATA, "score labelled ties instead of rejecting them"),
    _o("sample", "sample", int, DATA, "N rows drawn at random with --seed"),
    _o("seed", "seed", int, DATA, "for --sample and --pairing random"),
    _o("max_bad_rows", "max_bad_rows", float, DATA, "a share (< 1) or a count of rejected rows; more ends in exit 3"),
    _o("reference_revision", "reference.revision", str, MODELS, "commit, tag or branch of the reference"),
    _o("policy_base", "policy_base", str, MODELS, "base of adapters: reference, or a MODEL"),
    _o("tokenizer", "text.tokenizer", str, MODELS, "another tokenizer than the reference's"),
    _o("quantization", "compute.quantization", str, MODELS, "int8 or nf4 (bitsandbytes)"),
    _o("render", "text.render", str, TEXT, "auto, chat or raw"),
    _o("chat_template", "text.chat_template", str, TEXT, "a Jinja file, or the template itself"),
    _o("chat_template_kwargs", "text.chat_template_kwargs", str, TEXT, "JSON object handed to the template"),
    _o("system", "text.system", str, TEXT, "system text"),
    _o("system_mode", "text.system_mode", str, TEXT, "fill, replace, drop or merge-user"),
    _o("prompt_split", "text.prompt_split", str, TEXT, "auto, marker or trl: where an implicit prompt ends"),
    _o("score", "text.score", str, TEXT, "completion, last or all-assistant: which tokens count"),
    _o("truncation", "text.truncation", str, TEXT, "keep_start, keep_end or reject"),
    _o("keep_nulls", "text.keep_nulls", bool, TEXT, "keep keys that are null by Arrow's padding, as TRL does"),
    _o("date", "text.date", str, TEXT, "YYYY-MM-DD for templates that print the date"),
    _o("label_smoothing", "loss.label_smoothing", float, LOSS, "null: the loss's own default"),
    _o("loss_param", "loss.params", list[str], LOSS, "KEY=VALUE; repeatable"),
    _o("device", "compute.device", str, COMPUTE, "auto, cpu, cuda, cuda:1, mps"),
    _o("batch_tokens", "compute.batch_tokens", str, COMPUTE, "token budget of one forward pass, or auto"),
    _o("compile", "compute.compile", str, COMPUTE, "auto, on or off: compile each layer"),
    _o("path", "compute.path", str, COMPUTE, "auto, fast or plain engine"),
    _o("threads", "compute.threads", int, COMPUTE, "CPU threads (default: all)"),
    _o("per_token", "compute.per_token", bool, COMPUTE, "keep every token's log-probability"),
    _o("stats", "compute.stats", str, COMPUTE, "wpo, entropy, top1 (comma list)"),
    _o("engine", "compute.engine", str, COMPUTE, "auto, local or ray (auto: ray where there are several GPUs)"),
    _o("ray_address", "compute.ray_address", str, COMPUTE, "a running Ray cluster"),
    _o("workers", "compute.workers", int, COMPUTE, "with Ray or --tensor-parallel: how many (default: what fits)"),
    _o("blocks", "blocks", str, COMPUTE, "I/N: only the I-th (from 0) of N shares of the blocks, for job arrays"),
    _o("device_map", "compute.device_map", str, COMPUTE, "auto: spread one model over devices (accelerate)"),
    _o("tensor_parallel", "compute.tensor_parallel", int, COMPUTE, "N devices for one model; G make G/N replicas"),
    _o("cache_dir", "cache_dir", str, OUTPUT, "log-probs by content, converted models (default: the user's cache)"),
    _o("slice", "slices", list[str], OUTPUT, "also by this column of data or scores, length or turns; repeatable"),
    _o("keep_columns", "keep_columns", str, OUTPUT, "input columns to carry along (comma list)"),
    _o("emit_ids", "emit_ids", bool, OUTPUT, "precompute: write token ids beside the values"),
    _o("rewardbench", "rewardbench", str, OUTPUT, "exact or corrected"),
    _o("log_to", "log_to", str, OUTPUT, "mlflow, wandb, tensorboard"),
    _o("strict_env", "strict_env", bool, SAFETY, "refuse to resume under other versions or devices"),
    _o("allow_pickle", "allow_pickle", bool, SAFETY, "read .bin/.pt weights, which can run code"),
    _o("trust_remote_code", "trust_remote_code", bool, SAFETY, "run Python that comes with a model"),
)
BY_NAME: dict[str, Option] = {option.name: option for option in OPTIONS}


def default_cache_dir() -> Path:
    """DPO_SCORE_CACHE_DIR, else dpo-score under the user's cache folder (XDG_CACHE_HOME)."""
    import os

    root = os.environ.get("DPO_SCORE_CACHE_DIR")
    if root and "://" not in root:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-score"
