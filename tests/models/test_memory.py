"""What a token costs, what running out looks like, and that long rows keep to the bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_score.models import memory
from dpo_score.models.loader import ModelLoader
from tests.models.model_folders import Fp32, save_adapter, source
from tests.tiny import save_tiny, tiny_config

SCORE_ONE_LONG_ROW = """
import json, resource, sys
import numpy as np, torch
from dataclasses import replace
from dpo_score.models import memory
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.data.types import TokenSequence
from tests.logprobs.engine import numerics_for
from tests.tiny import tiny_model

length, vocabulary = map(int, sys.argv[1:])
model = tiny_model("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                   max_position_embeddings=length, vocab_size=vocabulary)
numerics = numerics_for(model, "fast", batch_tokens=256, threads=torch.get_num_threads())
def score(prompt, response):
    rng = np.random.default_rng(0)
    row = TokenSequence(rng.integers(0, 256, prompt).astype(np.int32), rng.integers(0, 256, response).astype(np.int32))
    return PairScorer(model, numerics).score([row])[0]
score(10, 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = score(length - length // 4, length // 4)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
bound = memory.peak_bytes(model.config.to_dict(), numerics, 0, length)
print(json.dumps([len(result.token_logps), bool(np.isfinite(result.token_logps).all()), grown, bound]))
"""


def growth(length, vocabulary=260):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCORE_ONE_LONG_ROW, str(length), str(vocabulary)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    scored, finite, grown, bound = json.loads(done.stdout.splitlines()[-1])
    assert (scored, finite) == (length // 4, True)
    return grown, bound


@pytest.mark.slow
@pytest.mark.parametrize("length", [32_768, 65_536])
def test_long_rows_stay_within_the_bound(length):
    grown, bound = growth(length)
    assert grown <= bound


@pytest.mark.slow
def test_memory_does_not_follow_the_vocabulary():
    """Logits of 8k rows over 200k entries would be 6.5 GB."""
    grown, bound = growth(32_768, vocabulary=200_000)
    assert grown <= bound


def test_running_out_of_memory_is_recognised_and_other_errors_are_not():
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert memory.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ..."))
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_this_machine_has_memory():
    assert memory.total_memory("cpu") > 2**28


def test_a_token_costs_more_in_a_wider_model_and_less_in_16_bits():
    small, wide = tiny_config("llama").to_dict(), tiny_config("llama", hidden_size=64, intermediate_size=256).to_dict()
    assert memory.token_bytes(small, "float32") < memory.token_bytes(wide, "float32")
    assert memory.token_bytes(small, "float16") < memory.token_bytes(small, "float32")


def test_a_wrapped_text_model_is_looked_up_inside():
    text = tiny_config("llama").to_dict()
    assert memory.token_bytes({"text_config": text}, "float32") == memory.token_bytes(text, "float32")


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own advice, given while the folders are written
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["q_proj", "lm_head"]])
def test_clones_are_those_that_merging_adapters_leaves(tmp_path, targets):
    base = save_tiny(tmp_path / "base")
    adapters = [
        save_adapter(tmp_path / name, base, seed=seed, target_modules=targets) for seed, name in enumerate("ab")
    ]
    loader = ModelLoader()
    for adapter in adapters:
        loader.load(source(adapter), Fp32())
    kept = sum(clone.nbytes for clone in loader._base.slot._pristine.values())
    files = [path for adapter in adapters for path in source(adapter).adapter_files]
    assert memory.clone_bytes(source(base).weights, files, 10**9) == kept


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_clones_of_modules_that_no_file_names_may_be_all_of_the_base(tmp_path):
    base = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["lm_head"])
    assert memory.clone_bytes(source(base).weights, source(adapter).adapter_files, 1000) == 4000
    assert memory.clone_bytes((tmp_path / "pytorch_model.bin",), source(adapter).adapter_files, 1000) == 4000
