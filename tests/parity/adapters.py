"""Every kind of adapter that the installed PEFT can build on a tiny model, ours against PEFT's own result.

    python -m tests.parity.adapters               all of them, a table
    python -m tests.parity.adapters DoRA LoHa     some of them
    python -m tests.parity.adapters --list        their names

Each adapter has every trained tensor moved, is saved by PEFT, and is read by `ModelLoader` over a base in float32. Its
logits are held against those of PEFT's own wrapper around a fresh base, nothing merged; then the adapter is taken off,
and the logits must be the base's own. Exit 1 if any is more than 1e-5 off, or refused although a weight file says it
all. Kinds that no table below describes are listed too, so that a new PEFT shows what it brings.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers.utils import logging as notices

from dpo_score.errors import ModelError
from dpo_score.models.limits import embedding_rows
from dpo_score.models.loader import ModelLoader
from tests.models.model_folders import Fp32, logits, read, source
from tests.tiny import VOCAB, save_tiny

BOUND = 1e-5
ADDED = 8
TARGETS = ["q_proj", "v_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EMBEDDINGS = ["embed_tokens", "lm_head"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "phi3": {},
    "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "qwen3_next": {**MOE, "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16,
                   "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8, "time_step_rank": 4},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """One adapter: PEFT's configuration class with its settings, over one of `BASES`. `added`: tokens that the base
    was given first. `resized`: the adapter is put over the base that has them already, not over the plain one.
    `refused`: words of the reason why it cannot be scored."""

    config: str
    settings: dict[str, Any]
    base: str = "llama"
    added: int = 0
    resized: bool = False
    refused: str = ""


def lora(base: str = "llama", **settings: Any) -> Kind:
    return Kind("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}, base)


def other(kind: str, refused: str = "", **settings: Any) -> Kind:
    return Kind(f"{kind}Config", {"target_modules": TARGETS, **settings}, refused=refused)


def of_input(kind: str, refused: str, **settings: Any) -> Kind:
    return Kind(f"{kind}Config", settings, refused=refused)


KINDS: dict[str, Kind] = {
    "LoRA": lora(),
    "LoRA, all linear layers": lora(target_modules="all-linear"),
    "DoRA": lora(use_dora=True),
    "rsLoRA": lora(use_rslora=True),
    "rank and alpha by pattern": lora(rank_pattern={"q_proj": 2, "1.*down_proj": 6}, alpha_pattern={"v_proj": 3}),
    "some layers": lora(layers_to_transform=[1], layers_pattern="layers"),
    "modules left out": lora(target_modules="all-linear", exclude_modules=["o_proj"]),
    "modules by expression": lora(target_modules=r".*\.(q_proj|up_proj)"),
    "bias of LoRA": lora(lora_bias=True),
    "all biases": lora("gpt2", bias="all", target_modules=["c_attn"], fan_in_fan_out=True),
    "biases of the layers": lora("gpt2", bias="lora_only", target_modules=["c_attn"], fan_in_fan_out=True),
    "Conv1D": lora("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "Conv1D, said to be Linear": lora("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=False),
    "fused projections": lora("phi3", target_modules=["qkv_proj", "gate_up_proj"]),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "gaussian": lora(init_lora_weights="gaussian"),
    "embeddings": lora(target_modules=["q_proj", *EMBEDDINGS]),
    "embedding, tied": lora("llama, tied", target_modules=["q_proj", "embed_tokens"]),
    "head, tied": lora("llama, tied", target_modules=["q_proj", "lm_head"]),
    "DoRA of an embedding": lora(use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "saved embeddings": lora(modules_to_save=EMBEDDINGS),
    "saved embedding, tied": lora("llama, tied", modules_to_save=["embed_tokens"]),
    "saved embedding, tied on purpose": lora("llama, tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "saved head, tied": lora("llama, tied", modules_to_save=["lm_head"]),
    "saved norm": lora(modules_to_save=["norm"]),
    "saved layer": lora(target_modules=["q_proj"], modules_to_save=["down_proj"]),
    "some tokens": lora(trainable_token_indices=[5, 6, 7]),
    "some tokens by name": lora(trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [9]}),
    "some tokens, tied": lora("llama, tied", trainable_token_indices=[5, 6, 7]),
    "a whole parameter": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "activated by tokens (aLoRA)": of_input("Lora", "invocation tokens", r=4, alora_invocation_tokens=[5, 6]),
    "experts, attention too": lora("qwen3_moe", target_parameters=EXPERTS, target_modules=["q_proj", "v_proj"]),
    "experts alone": lora("qwen3_moe", target_parameters=EXPERTS, target_modules=[]),
    "experts, rank by pattern": lora("qwen3_moe", target_parameters=EXPERTS, target_modules=[],
                                     rank_pattern={"experts.down_proj": 2}, alpha_pattern={"experts.gate_up_proj": 3}),
    "experts, rsLoRA": lora("qwen3_moe", target_parameters=EXPERTS, target_modules=[], use_rslora=True),
    "experts of one layer": lora("qwen3_moe", target_parameters=["layers.1.mlp.experts.down_proj"], target_modules=[]),
    "router": lora("qwen3_moe", target_parameters=["mlp.gate.weight"], target_modules=["q_proj"]),
    "experts, Mixtral": lora("mixtral", target_parameters=EXPERTS, target_modules=["q_proj"]),
    "router, Mixtral": lora("mixtral", target_parameters=["gate.weight"], target_modules=["q_proj"]),
    "saved router": lora("mixtral", target_modules=["q_proj"], modules_to_save=["gate"]),
    "experts, gpt-oss": lora("gpt_oss", target_parameters=EXPERTS, target_modules=["q_proj"]),
    "biases of experts, gpt-oss": lora("gpt_oss", target_parameters=["mlp.experts.down_proj_bias"],
                                       target_modules=["q_proj"]),
    "linear attention": lora("qwen3_next", target_modules=["in_proj_qkvz", "out_proj", "q_proj"]),
    "convolution": lora("lfm2", r=32, target_modules=["conv.conv", "in_proj", "q_proj"]),
    "state space": lora("mamba", target_modules=["in_proj", "x_proj"]),
    "new tokens, saved whole": lora(target_modules=["q_proj"]),
    "new tokens, trained whole": lora(target_modules=["q_proj"], modules_to_save=EMBEDDINGS),
    "new tokens, LoRA on them": lora(target_modules=["q_proj", *EMBEDDINGS]),
    "new tokens, row by row": lora(target_modules=["q_proj"], trainable_token_indices=[VOCAB, VOCAB + 1]),
    "AdaLoRA": other("AdaLora", init_r=6, target_r=4, total_step=10),
    "AdaMSS": other("Adamss", r=8, num_subspaces=2),
    "BEFT": other("Beft"),
    "BOFT": other("BOFT", boft_block_size=4),
    "C3A": other("C3A", block_size=8),
    "DEFT": other("Deft", r=4),
    "DEFT, QR": other("Deft", r=4, decomposition_method="qr"),
    "DeLoRA": other("Delora", r=4),
    "FourierFT": other("FourierFT", n_frequency=20),
    "FRoD": other("Frod", progressbar=False),
    "FRoD without projections": other("Frod", progressbar=False, save_projection=False),
    "GLoRA": other("Glora", r=4),
    "GraLoRA": other("Gralora", r=4, alpha=8),
    "GraLoRA, hybrid": other("Gralora", r=4, alpha=8, hybrid_r=2),
    "HiRA": other("Hira", r=4),
    "HRA": other("HRA", r=4),
    "IA3": other("IA3", feedforward_modules=["down_proj"]),
    "Lily": other("Lily", r=4),
    "norms (LN tuning)": Kind("LNTuningConfig", {"target_modules": ["norm", "input_layernorm"]}),
    "LoHa": other("LoHa", r=4),
    "LoKr": other("LoKr", r=4),
    "MiSS": other("Miss", r=4),
    "MiSS, mini": other("Miss", r=4, init_weights="mini", mini_r=2),
    "OFT": other("OFT", oft_block_size=4),
    "OSF": other("OSF", effective_rank=4),
    "PEANuT": other("Peanut", r=4),
    "PEANuT, deep": other("Peanut", r=4, depth=2),
    "PSOFT": other("Psoft", r=4, psoft_alpha=4),
    "PVeRA": Kind("PveraConfig", {"target_modules": TARGETS[:2], "r": 4}),
    "RandLoRA": other("RandLora", r=4),
    "RoAd": other("Road", group_size=8),
    "RoAd 4": other("Road", group_size=8, variant="road_4"),
    "SHiRA": other("Shira", r=4),
    "SuperTuning": other("Supertuning", sparsity=0.9),
    "SuperTuning with LoRA": other("Supertuning", sparsity=0.9, r=4, lora_alpha=8.0),
    "TinyLoRA": other("TinyLora", u=8),
    "TinyLoRA, one vector": other("TinyLora", u=8, weight_tying=1.0, save_projection=False),
    "tokens alone": Kind("TrainableTokensConfig", {"token_indices": list(range(4, 64)),
                                                   "target_modules": ["embed_tokens"]}),
    "tokens alone, tied": Kind("TrainableTokensConfig", {"token_indices": [5, 6]}, "llama, tied"),
    "UniLoRA": other("UniLora", r=4),
    "VB-LoRA": other("VBLoRA", r=4, num_vectors=20, vector_length=8, topk=2),
    "VB-LoRA, top k alone": other("VBLoRA", r=4, num_vectors=20, vector_length=8, topk=2, save_only_topk_weights=True),
    "VeRA": Kind("VeraConfig", {"target_modules": TARGETS[:2], "r": 4}),
    "VeRA without projections": Kind("VeraConfig", {"target_modules": TARGETS[:2], "r": 4, "save_projection": False}),
    "WaveFT": other("WaveFT", n_frequency=20),
    "adaption prompt": of_input("AdaptionPrompt", "learned keys", adapter_len=4, adapter_layers=2),
    "cartridge": of_input("Cartridge", "learned keys", num_virtual_tokens=4),
    "context prompt (CPT)": of_input("CPT", "learned tokens", cpt_token_ids=[1, 2], cpt_mask=[1, 1],
                                     cpt_tokens_type_mask=[1, 1]),
    "prefix": of_input("PrefixTuning", "learned keys", num_virtual_tokens=4),
    "prompt": of_input("PromptTuning", "learned tokens", num_virtual_tokens=4),
    "prompt of several tasks": of_input("MultitaskPromptTuning", "task number", num_virtual_tokens=4, num_tasks=2),
    "P-tuning": of_input("PromptEncoder", "learned tokens", num_virtual_tokens=4, encoder_hidden_size=16),
    "Poly": of_input("Poly", "task number", target_modules=TARGETS, r=4, n_tasks=2, n_skills=2),
    "shadow": of_input("Shadow", "second model", target_modules=TARGETS, r=4),
    "X-LoRA": of_input("XLora", "for each token", hidden_size=32, xlora_size=16),
}  # fmt: skip


def _new_tokens() -> dict[str, Kind]:
    """The recipes that add tokens, over the plain and the resized base, tied and untied."""
    found = {}
    for name in [name for name in KINDS if name.startswith("new tokens")]:
        recipe = KINDS.pop(name)
        for tied in (False, True):
            settings = {
                key: [part for part in value if not (tied and part == "lm_head")] if isinstance(value, list) else value
                for key, value in recipe.settings.items()  # of two tied embeddings the first is named
            }
            base = "llama, tied" if tied else "llama"
            for resized in (False, True):
                where = f"{'tied' if tied else 'untied'}, {'resized' if resized else 'plain'} base"
                found[f"{name} ({where})"] = Kind("LoraConfig", settings, base, ADDED, resized)
    return found


KINDS |= _new_tokens()
SPREAD = (
    "DoRA", "rank and alpha by pattern", "biases of the layers", "PiSSA", "saved norm", "some tokens, tied",
    "a whole parameter", "bias of LoRA", "experts, attention too", "router", "experts, gpt-oss", "AdaLoRA", "Lily",
    "IA3", "OFT", "RandLoRA", "UniLoRA", "VB-LoRA", "VeRA", "VeRA without projections", "Poly", "X-LoRA",
    *[name for name in KINDS if name.startswith("new tokens")],
)  # fmt: skip
"""What continuous integration tries: each way of merging, and what has gone wrong somewhere."""


@dataclass(frozen=True, slots=True)
class Line:
    """One adapter: how far ours is from PEFT's logits at most, and the base's from its own afterwards."""

    name: str
    found: str
    off: float | None = None
    base_off: float | None = None
    note: str = ""

    @property
    def wrong(self) -> bool:
        off = max(self.off or 0.0, self.base_off or 0.0)
        return self.found == "WRONG" or not off <= BOUND


def tried(name: str, folder: Path) -> Line:
    """One adapter made, saved, read by PEFT and by us."""
    kind, expected_refusal = KINDS[name], KINDS[name].refused
    try:
        base, adapter, expected = made(kind, folder)
    except Exception as error:  # noqa: BLE001 - whatever PEFT raises is a line of the table
        return Line(name, "not built", note=_short(error))
    loader = ModelLoader()
    try:
        found_source = source(base, adapter)
        model = loader.load(found_source, Fp32()).model
    except ModelError as error:
        true = bool(expected_refusal) and expected_refusal in str(error)
        return Line(name, "refused" if true else "WRONG", note=_short(error))
    if expected_refusal:
        return Line(name, "WRONG", note=f"scored, although it should be refused: {expected_refusal}")
    if kind.added and embedding_rows(found_source) != VOCAB + kind.added:
        return Line(name, "WRONG", note=f"{embedding_rows(found_source)} token ids are said to be known")
    merged = "beside the weights" if any(hasattr(module, "base_layer") for module in model.modules()) else "merged"
    found, wanted = logits(model), expected()
    if _off(wanted, logits(read(base))) < 1e-3:
        return Line(name, "WRONG", note="the adapter changes nothing, so this line would prove nothing")
    off = _off(found, wanted)
    bare = loader.load(source(base), Fp32()).model
    return Line(name, merged, off, _off(logits(bare), logits(read(base))))


def made(kind: Kind, folder: Path) -> tuple[Path, Path, Callable[[], torch.Tensor]]:
    """The base folder, the adapter folder, and what gives PEFT's own logits."""
    base, adapter = folder / "base", folder / "adapter"
    save_tiny(base, kind.base.partition(",")[0], **BASES[kind.base])
    model = read(base)
    over = base
    if kind.added:
        model.resize_token_embeddings(VOCAB + kind.added, mean_resizing=False)
        model.save_pretrained(folder / "resized")
        over = folder / "resized" if kind.resized else base
    settings = dict(kind.settings)
    if kind.config == "XLoraConfig":
        settings["adapters"] = {name: str(_saved(read(base), lora(), base, folder / name)) for name in ("0", "1")}
        model.config.use_cache = False
    _saved(model, Kind(kind.config, settings), over, adapter)

    def expected() -> torch.Tensor:
        fresh = read(folder / "resized" if kind.added else base)
        return logits(PeftModel.from_pretrained(fresh, adapter).eval())

    return over, adapter, expected


def _saved(model: Any, kind: Kind, base: Path, folder: Path) -> Path:
    """The folder of an adapter whose every trained tensor has moved, as after a few steps."""
    settings = {"task_type": "CAUSAL_LM", **kind.settings}
    wrapped = get_peft_model(model, getattr(peft, kind.config)(**settings))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.02)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return folder


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def not_described() -> list[str]:
    """Kinds that the installed PEFT has and no line of `KINDS` makes."""
    described = {kind.config for kind in KINDS.values()}
    return sorted(name for name in (c.__name__ for c in PEFT_TYPE_TO_CONFIG_MAPPING.values()) if name not in described)


def main(asked: Sequence[str]) -> int:
    notices.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrong = 0
    print(
        "| adapter | base | how | max off (logits) | base afterwards | notes |\n|---|---|---|---|---|---|", flush=True
    )
    for name in asked or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            line = tried(name, Path(folder))
        wrong += line.wrong
        off, after = ("" if x is None else f"{x:.1e}" for x in (line.off, line.base_off))
        mark = "**" if line.wrong else ""
        print(f"| {name} | {KINDS[name].base} | {mark}{line.found}{mark} | {off} | {after} | {line.note} |", flush=True)
    print(f"\n{wrong} wrong of {len(asked or KINDS)}; of PEFT {peft.__version__} not described: {not_described()}")
    return int(bool(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="adapters by name; default: all")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    options = parser.parse_args()
    if options.list:
        print("\n".join(KINDS))
        sys.exit(0)
    sys.exit(main(options.names))
