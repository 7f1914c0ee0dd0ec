"""Hybrids three ways in one process: rows of one length a batch, right-padded batches, a prompt's state copied.

    python -m tests.benchmarks.bench_hybrids [--large]

Random weights, pairs of lengths as in HH; processor seconds of the same pairs, best of two, and their ratio.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_score.config.schema import ComputeSpec
from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.numerics import on_plain_path, resolve_numerics
from dpo_score.logprobs.padded import PaddedPath
from dpo_score.logprobs.scorer import PairScorer
from tests.families import family

LARGE = {
    "qwen3_next": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 49152,
                   "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
                   "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 8,
                   "num_experts_per_tok": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
                   "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64,
                   "linear_value_head_dim": 64},
    "lfm2": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 49152,
             "layer_types": ["conv", "conv", "conv", "full_attention"] * 3, "num_attention_heads": 12,
             "num_key_value_heads": 4},
}  # fmt: skip


class OneLength(PaddedPath):
    """Batches of rows of a single length, as before padding was trusted."""

    def plan(self, sequences):
        by_length: dict[int, list[int]] = {}
        for i, s in enumerate(sequences):
            by_length.setdefault(len(s.prompt) + len(s.response), []).append(i)
        batches = []
        for length, rows in sorted(by_length.items(), reverse=True):
            size = max(1, self.numerics.batch_tokens // length)
            batches += [tuple(rows[i : i + size]) for i in range(0, len(rows), size)]
        return batches


def pairs(count: int, vocabulary: int) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt = rng.integers(1, vocabulary, int(rng.integers(30, 220))).astype(np.int32)
        rows += [
            TokenSequence(prompt, rng.integers(1, vocabulary, int(rng.integers(10, 80))).astype(np.int32))
            for _ in range(2)
        ]
    return rows


def seconds(scorer: PairScorer, rows: list[TokenSequence]) -> float:
    took = []
    for _ in range(2):
        began = time.process_time()
        scorer.score(rows)
        took.append(time.process_time() - began)
    return min(took)


def main(large: bool) -> None:
    warnings.simplefilter("ignore")
    print("| family | parameters | one length (s) | padded (s) | forked (s) | padded / forked speed-up |")
    print("|---|---|---|---|---|---|")
    for name, shape in LARGE.items():
        if large:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape), dtype=torch.float32).eval()
        else:
            model = family(name)
        size = sum(p.numel() for p in model.parameters())
        numerics = resolve_numerics(ComputeSpec(device="cpu", threads=1), model.config.to_dict(), size)
        rows = pairs(12 if large else 40, 250)
        before = PairScorer(model, on_plain_path(numerics))
        before._path = OneLength(before._path.parts, on_plain_path(numerics))
        ways = [before, PairScorer(model, replace(on_plain_path(numerics))), PairScorer(model, numerics)]
        took = [seconds(scorer, rows) for scorer in ways]
        cells = " | ".join(f"{s:.2f}" for s in took)
        gains = f"{took[0] / took[1]:.2f}× / {took[0] / took[2]:.2f}×"
        print(f"| {name} | {size / 1e6:.1f} M | {cells} | {gains} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="about 100 M parameters instead of tiny models")
    main(parser.parse_args().large)
