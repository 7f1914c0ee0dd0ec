"""Every causal architecture that the installed transformers can build tiny, scored and held against float64.

    python -m tests.parity.architectures                  all of them, a table
    python -m tests.parity.architectures llama phi3       some of them
    python -m tests.parity.architectures --list           their names

A model with random weights is asked by the check at load how it may be scored, then scores rows that share prompts,
that are empty, of one token, longer than its windows, and on both sides of every length at which its configuration
changes something. The oracle is the same model in float64, one row at a time, its own logits (fp32 where its experts
know no float64). Exit 1 if a scored row is further off than max(1e-4, 2e-7·|logp|).
"""

from __future__ import annotations

import argparse
import copy
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as notices

from dpo_score.config.schema import ComputeSpec
from dpo_score.data.types import TokenSequence
from dpo_score.errors import ModelError
from dpo_score.logprobs.lengths import changing_lengths, fresh_rope, length_rules, smallest_window
from dpo_score.logprobs.numerics import resolve_numerics
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.self_check import check_model
from dpo_score.logprobs.types import SequenceLogps
from dpo_score.models.numerics import Numerics

VOCAB = 260
WINDOW = 16
SECONDS = 120
LARGEST = 10**7
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff", "d_ff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dim_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size"), WINDOW),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "n_groups", "mamba_n_groups", "decoder_sparse_step", "mamba_expand"), 2),
    **dict.fromkeys(("embed_dim", "out_hidden_size"), 32),
    "image_size": 16,
    "patch_size": 8,
    "depth": 2,
    "spatial_merge_size": 2,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "time_step_rank": 4,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 259,
    "index_topk": 32,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "attention_chunk_size": 32,
    "num_kv_shared_layers": 0,
    "is_decoder": True,
    **dict.fromkeys(("log_scaling_n_floor", "speech_encoder_chunk_size"), 512),
}
LONGEST = 8192
"""Tokens of the longest row that is tried: one of xLSTM's 16,384 fails in transformers itself, and takes minutes."""
BOTH = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
SPECIAL: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_groups": 1},
    "bamba": {"mamba_d_head": 16, "mamba_n_heads": 4, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
              "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 4},
    "zamba2": {"hybrid_layer_ids": [1], "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "deepseek_v3": {"num_key_value_heads": 4},
    **{key: {"num_key_value_heads": 4} for key in ("deepseek_v2", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite")},
    **{key: {"num_key_value_heads": 4} for key in ("axk1", "axk2", "bailing_hybrid")},
    **{key: {"num_key_value_heads": 4} for key in ("kimi_linear", "longcat_flash", "minicpm3", "youtu")},
    **{key: {"rotary_dim": 8} for key in ("codegen", "gptj")},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_hidden_layers": None},
    "roc_bert": {"pad_token_id": 0, "pronunciation_vocab_size": 32, "shape_vocab_size": 32},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    **{key: {"global_head_dim": 16} for key in ("gemma4_text", "gemma4_unified_text")},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 32, "indexer_compress_ratio": 4},
    "qwen4_exp": {"text_config": {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2,
                  "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 32, "indexer_compress_ratio": 4,
                  "rope_parameters": MROPE}},
    "cohere_compass_text": {"layer_types": [*BOTH], "rope_parameters": BOTH},
    "cohere_compass": {"text_config": {"layer_types": [*BOTH], "rope_parameters": BOTH}},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 16, "per_layer_config": {},
                        "mlp_layer_types": ["dense", "sparse"], "shared_experts_intermediate_size": 16,
                        "layer_types": ["indexed_attention", "sliding_attention"]},
    "blt": {"encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_vocab": 64,
            "encoder_config": {"hidden_size_global": 64}, "decoder_config": {"hidden_size_global": 64},
            "global_config": {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}},
    **{key: {"text_config": {"rope_parameters": MROPE}} for key in (
        "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm46v", "glm4v", "glm_ocr", "glmga")},
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [0, 1, 1]}}},
    **{key: {"decoder_start_token_id": 0} for key in ("t5", "longt5", "switch_transformers")},
    "mistral_large4": {"text_config": {"num_key_value_heads": 4}},
    "kimi_k25": {"text_config": {"num_key_value_heads": 4}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [16, 16]}},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4,
             "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "intermediate_size": 64,
                     "activation_sparsity_pattern": None, "laurel_rank": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "xlm": {"n_heads": 4, "emb_dim": 32, "n_words": VOCAB, "causal": True},
    "mpt": {"n_heads": 4},
    "ctrl": {"n_embd": 32, "dff": 64},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": WINDOW},
}  # fmt: skip
SPREADS = {"switch_transformers": 0.05}
"""Standard deviation of the random weights, where 0.2 would make the model's own fp32 differ from float64 by more than
what is asked here (attention without a scale, experts chosen by it)."""
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
             "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}  # fmt: skip
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 4.0}
LONG = {"num_hidden_layers": 1, "max_position_embeddings": 32_768}
"""One layer, for lengths beyond those that the check at load tries."""
YARN = {**ROPE, "rope_type": "yarn"}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama+longrope": ("llama", {"rope_parameters": LONG_ROPE}),
    "phi3+longrope": (
        "phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64, "sliding_window": None},
    ),
    "phi3+longrope+window": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}),
    "phimoe+longrope": ("phimoe", {"rope_parameters": {**LONG_ROPE, "short_mscale": 1.0, "long_mscale": 1.2},
                                   "original_max_position_embeddings": 64, "sliding_window": None}),
    "minicpm3+longrope": ("minicpm3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}),
    "llama+dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "llama+dynamic+original": ("llama", {"rope_parameters": {**DYNAMIC, "original_max_position_embeddings": 64}}),
    "llama+yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2+yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3+yarn": ("qwen3", {"rope_parameters": YARN}),
    "olmo3+yarn": ("olmo3", {"rope_parameters": YARN}),
    "gpt_oss+yarn": ("gpt_oss", {"rope_parameters": YARN}),
    "deepseek_v3+yarn": ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "ministral3+scaled": ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5}}),
    "phimoe+long window": ("phimoe", {**LONG, "sliding_window": 9000}),
    "llama+long longrope": ("llama", {**LONG, "rope_parameters": {**LONG_ROPE,
                                      "original_max_position_embeddings": 12_288}}),
    "llama+long dynamic": ("llama", {"num_hidden_layers": 1, "max_position_embeddings": 16_384,
                                     "rope_parameters": DYNAMIC}),
    "ministral3+long scaled": ("ministral3", {**LONG, "rope_parameters": {
        **YARN, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 10_000}}),
    "llama4_text+scaled": ("llama4_text", {"attn_temperature_tuning": True, "floor_scale": 48, "attn_scale": 0.5,
                                           "no_rope_layers": [1, 0]}),
    "llama+linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}),
    "llama+llama3": ("llama", {"rope_parameters": {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0,
                                                   "high_freq_factor": 4.0}}),
    "llama+bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama+tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2+window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "starcoder2+window": ("starcoder2", {"sliding_window": WINDOW}),
    "mistral+nowindow": ("mistral", {"sliding_window": None}),
    "granite+scaled": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
                                   "embedding_multiplier": 6.0}),
    "gemma3_text+linear": ("gemma3_text", {"rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}}),
    "lfm2+attention": ("lfm2", {"layer_types": ["full_attention", "full_attention"]}),
    "gemma4_text+experts": ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                                            "moe_intermediate_size": 16}),
    "gemma4_text+shared": ("gemma4_text", {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention", "full_attention"]}),
    "gemma4_text+bidirectional": ("gemma4_text", {"use_bidirectional_attention": "all"}),
    "falcon+alibi": ("falcon", {"alibi": True}),
    "falcon+multihead": ("falcon", {"num_kv_heads": 4, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon+grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3_text+bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "bert+encoder": ("bert", {"is_decoder": False}),
    "roberta+encoder": ("roberta", {"is_decoder": False}),
}  # fmt: skip
SPREAD = (
    "llama", "llama+longrope", "llama+dynamic", "phi3+longrope", "phi3+longrope+window", "phimoe+longrope", "mistral",
    "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gemma3_text+bidirectional", "gpt2", "gpt_oss", "cohere2", "biogpt",
    "bert", "bert+encoder", "bloom", "deepseek_v3", "deepseek_v32", "mixtral", "olmo2", "opt", "qwen3_next", "mamba",
    "falcon_h1", "lfm2", "cpmant", "llama4_text", "t5", "fsmt", "qwen2_vl", "gemma4_text+shared",
)  # fmt: skip
"""What continuous integration tries: each way of scoring, and what has gone wrong somewhere."""


@dataclass(frozen=True, slots=True)
class Line:
    """One architecture: how it was scored, and how far at most a row is from the oracle (nats of the whole row)."""

    name: str
    way: str
    worst: float | None
    bound: float | None
    seconds: float
    note: str = ""

    @property
    def wrong(self) -> bool:
        return self.worst is not None and self.bound is not None and not self.worst <= self.bound


def names() -> list[str]:
    """All types of transformers with next-token logits, the variants, encoder-decoders, and what reads pictures."""
    others = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    return [
        *sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        *VARIANTS,
        *sorted(others - {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}),
    ]


def tiny(name: str) -> Any:
    """A model of two layers with random weights large enough for errors to show."""
    kind, changes = VARIANTS.get(name, (name, {}))
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto = AutoModelForCausalLM
    else:
        seq2seq = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForImageTextToText
    config = _config(kind, _small(AutoConfig.for_model(kind)), changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters: its parts for pictures or sound are not known here")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 or key.endswith(("sinks", "bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SPREADS.get(kind, 0.2))
    model.eval()
    with torch.inference_mode():  # a size that does not fit another is the fault of this file, and shows here
        ids = torch.arange(1, 13)[None]
        model(input_ids=ids, use_cache=False, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return model


def _small(known: Any) -> dict[str, Any]:
    """What makes a configuration small, of those settings that it has; for its parts too."""
    given = {key: value for key, value in SMALL.items() if _has(known, key)}
    if _has(known, "layer_types") and known.layer_types:
        kinds = list(dict.fromkeys(known.layer_types))
        given["layer_types"] = (kinds * 2)[:2] if len(kinds) < 3 else kinds[:2]
    parts = {name: getattr(known, name, None) for name in known.sub_configs}
    return given | {name: _small(part) for name, part in parts.items() if part is not None}


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except RuntimeError:  # it differs between layers
        return True


def _config(kind: str, given: dict[str, Any], changes: dict[str, Any]) -> Any:
    """The configuration with what it takes of `given`; some attributes are only views of others."""
    for key, value in {**SPECIAL.get(kind, {}), **changes}.items():
        given[key] = given[key] | value if isinstance(given.get(key), dict) and isinstance(value, dict) else value
    given = {k: v for k, v in given.items() if (k, v) != ("num_hidden_layers", None)}
    while True:
        try:
            return AutoConfig.for_model(kind, **given)
        except AttributeError as error:
            view = re.search(r"property '(\w+)' of .* has no setter", str(error))
            name = view[1] if view is not None else ""
            name = {"layers_block_type": "layer_types"}.get(name, name) if name not in given else name
            if name not in given:
                raise
            del given[name]


def rows(config: dict[str, Any], encoder_decoder: bool = False) -> list[TokenSequence]:
    """Pairs that share prompts and rows of awkward lengths; around every length that matters, on both sides of it."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> Any:
        return rng.integers(0, 250, n).astype(np.int32)

    long, short = ids(60), ids(7)
    found = [TokenSequence(long, ids(n)) for n in (5, 20, 1, 40)]
    found += [TokenSequence(short, answer) for answer in (found[0].response, ids(3))]
    found += [TokenSequence(ids(1), ids(8)), TokenSequence(ids(90), ids(30))]
    if not encoder_decoder:
        found += [TokenSequence(ids(0), ids(9)), TokenSequence(ids(0), ids(2))]
    others = (smallest_window(config), length_rules(config).alone_above)
    lengths = {*changing_lengths(config), *(length for length in others if length is not None)}
    for length in sorted(length for length in lengths if length <= LONGEST):
        prompt = ids(max(length - 6, 0))
        found += [TokenSequence(prompt, ids(length - len(prompt) + more)) for more in (-1, 0, 1, 40)]
    return [row for row in found if len(row.response) and len(row.prompt) + len(row.response) > 1]


def oracle(model: Any, sequences: Sequence[TokenSequence]) -> tuple[list[float], str]:
    """The log-probability of each row in float64, or in fp32 where the model cannot; one forward a row."""
    try:
        exact = copy.deepcopy(model).double()
        if hasattr(exact, "set_experts_implementation"):
            exact.set_experts_implementation("eager")
        return [_row(exact, s) for s in sequences], ""
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return [_row(model, s) for s in sequences], "oracle fp32"


@torch.inference_mode()
def _row(model: Any, sequence: TokenSequence) -> float:
    fresh_rope(model)
    prompt, response = (torch.from_numpy(x.astype(np.int64))[None] for x in (sequence.prompt, sequence.response))
    if model.config.is_encoder_decoder:
        start = getattr(model.config, "decoder_start_token_id", None)
        start = torch.tensor([[model.config.decoder.bos_token_id if start is None else start]])
        decoder = torch.cat([start, response[:, :-1]], 1)
        logits = model(input_ids=prompt, decoder_input_ids=decoder, use_cache=False).logits[0]
        target = response[0]
    else:
        whole = torch.cat([prompt, response], 1)
        first = max(prompt.shape[1], 1)
        logits = model(input_ids=whole, use_cache=False).logits[0][first - 1 : -1]
        target = whole[0, first:]
    logp = torch.log_softmax(logits.double(), -1)
    return float(logp.gather(1, target[:, None]).sum())


def tried(name: str) -> Line:
    """One architecture, as `dpo-score run` would score it by default."""
    began = time.perf_counter()
    try:
        with _deadline(SECONDS):
            model = tiny(name)
    except Exception as error:  # noqa: BLE001 - whatever a foreign configuration raises is a line of the table
        return Line(name, "not built", None, None, time.perf_counter() - began, _short(error))
    config = model.config.to_dict()
    sequences = rows(config, model.config.is_encoder_decoder)
    asked = resolve_numerics(ComputeSpec(device="cpu", threads=torch.get_num_threads()), config, None)
    try:
        with _deadline(SECONDS):
            check = check_model(model, asked)
            results = PairScorer(model, check.numerics).score(sequences)
            expected, note = oracle(model, sequences)
    except ModelError as error:
        return Line(name, "refused", None, None, time.perf_counter() - began, _short(error))
    except Exception as error:  # noqa: BLE001
        return Line(name, "ERROR", float("inf"), 0.0, time.perf_counter() - began, _short(error))
    worst, bound = 0.0, 1e-4
    for result, total in zip(results, expected, strict=True):
        if not isinstance(result, SequenceLogps):
            note = f"{note} {result.code}"
            continue
        off, allowed = abs(float(result.token_logps.sum(dtype=np.float64)) - total), max(1e-4, 2e-7 * abs(total))
        if off / allowed >= worst / bound:
            worst, bound = off, allowed
    why = "" if check.numerics == asked else check.reason
    return Line(name, way(check.numerics), worst, bound, time.perf_counter() - began, f"{note} {why}".strip())


def way(numerics: Numerics) -> str:
    if numerics.path == "fast":
        return "fast"
    return "plain, one row" if numerics.one_row else "plain"


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(asked: Sequence[str]) -> int:
    notices.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrong = 0
    print("| type | scored | max off (nats) | seconds | notes |\n|---|---|---|---|---|", flush=True)
    for name in asked or names():
        line = tried(name)
        wrong += line.wrong
        off = "" if line.worst is None else f"**{line.worst:.1e}**" if line.wrong else f"{line.worst:.1e}"
        print(f"| {name} | {line.way} | {off} | {line.seconds:.1f} | {line.note} |", flush=True)
    print(f"\n{wrong} wrong of {len(asked or names())}")
    return int(bool(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="types or variants; default: all")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--spread", action="store_true", help="only those of continuous integration")
    options = parser.parse_args()
    if options.list:
        print("\n".join(names()))
        sys.exit(0)
    sys.exit(main(SPREAD if options.spread else options.names))
