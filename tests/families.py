"""One tiny random model per architecture: what each adds to a plain decoder is what a scorer can get wrong."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.tiny import VOCAB, tiny_config

WINDOW = 8

OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 4096},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 0.3},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 4.0,
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 4096},
    "falcon": {"num_attention_heads": 4, "alibi": False, "multi_query": True},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "bert": {"is_decoder": True},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.5,
    },
}
VISION = ("gemma3", "qwen2_5_vl", "llava")


def family(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of a family of OVERRIDES or VISION, its weights large enough for errors to show."""
    torch.manual_seed(seed)
    if name in VISION:
        model = AutoModelForImageTextToText.from_config(_vision_config(name), dtype=torch.float32)
    else:
        config = _text_config(name, overrides)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    return model.to(dtype).eval()


def _text_config(name: str, overrides: dict[str, Any]) -> Any:
    settings = {**OVERRIDES[name], **overrides}
    if name == "falcon":
        return AutoConfig.for_model(name, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, **settings)
    return tiny_config(name, **settings)


def _randomise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith(("sinks", "bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def _vision_config(name: str) -> Any:
    text = {**tiny_config("llama").to_dict(), "model_type": {"gemma3": "gemma3_text", "llava": "llama"}.get(name)}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    if name == "qwen2_5_vl":
        text = {
            **{k: text[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        }
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 16}
    if name == "gemma3":
        text |= {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
        vision["model_type"] = "siglip_vision_model"
    if name == "llava":
        vision["model_type"] = "clip_vision_model"
    return AutoConfig.for_model(name, text_config=text, vision_config=vision)
