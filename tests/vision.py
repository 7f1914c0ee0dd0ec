"""Tiny vision-language models with their processors, made from configurations; pictures; pairs about them.

No network and no torchvision: a folder holds config, weights, tokenizer, image processor, and the name of the
processor's class, as folders on the hub do.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMG{% elif p['type'] == 'text' %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
Sizes = Mapping[str, int]
SMALL: Sizes = {"hidden": 64, "layers": 2, "tower": 32, "tower_layers": 2}


def tokenizer(special: Any, place: str) -> PreTrainedTokenizerFast:
    """One token a byte, special tokens above, a template that writes `place` for a picture."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **ends, extra_special_tokens=special)
    made.chat_template = TEMPLATE.replace("IMG", place)
    return made


def _text(made: PreTrainedTokenizerFast, sizes: Sizes, **more: Any) -> dict[str, Any]:
    ends = {f"{name}_token_id": getattr(made, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {
        "vocab_size": len(made),
        "hidden_size": sizes["hidden"],
        "intermediate_size": 2 * sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        **ends,
        **more,
    }


def _tower(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": sizes["tower"],
        "intermediate_size": 2 * sizes["tower"],
        "num_hidden_layers": sizes["tower_layers"],
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        **more,
    }


def _llava(folder: Path, sizes: Sizes) -> Any:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    made = tokenizer(["<image>"], "<image>")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    _save_texts(folder, made, "LlavaProcessor", settings)
    return Model(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**_tower(sizes), projection_dim=32),
            text_config=LlamaConfig(**_text(made, sizes)),
            image_token_id=made.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )


def _qwen(folder: Path, sizes: Sizes, version: str) -> Any:
    import transformers

    made = tokenizer(QWEN, "<|vision_start|><|image_pad|><|vision_end|>")
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 1024}
    transformers.Qwen2VLImageProcessorPil(**patches).save_pretrained(folder)
    _save_texts(folder, made, "Qwen2_5_VLProcessor" if version == "2_5" else "Qwen3VLProcessor", {})
    ids = {
        "image_token_id": made.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": made.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": made.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": made.convert_tokens_to_ids("<|vision_end|>"),
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    tower = {
        "depth": sizes["tower_layers"],
        "hidden_size": sizes["tower"],
        "intermediate_size": 2 * sizes["tower"],
        "num_heads": 4,
        "out_hidden_size": sizes["hidden"],
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if version == "2_5":
        text = _text(made, sizes, rope_parameters=rope)
        tower |= {"window_size": 16, "fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids)
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    text = _text(made, {**sizes, "layers": 3}, head_dim=16, rope_parameters={**rope, "mrope_interleaved": True})
    tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **ids)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _gemma3(folder: Path, sizes: Sizes) -> Any:
    from transformers import Gemma3Config, Gemma3ImageProcessorPil
    from transformers import Gemma3ForConditionalGeneration as Model

    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    made = tokenizer(special, "<start_of_image>")
    Gemma3ImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    _save_texts(folder, made, "Gemma3Processor", {"image_seq_length": 4})
    layers = ["sliding_attention", "full_attention"] * (sizes["layers"] // 2)
    soft = made.convert_tokens_to_ids("<image_soft_token>")
    return Model(
        Gemma3Config(
            text_config=_text(made, sizes, head_dim=16, sliding_window=8, layer_types=layers),
            vision_config=_tower(sizes),
            mm_tokens_per_image=4,
            boi_token_index=made.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_index=made.convert_tokens_to_ids("<end_of_image>"),
            image_token_index=soft,
            image_token_id=soft,
        )
    )


def _idefics3(folder: Path, sizes: Sizes) -> Any:
    from transformers import Idefics3Config, Idefics3ImageProcessorPil
    from transformers import Idefics3ForConditionalGeneration as Model

    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    made = tokenizer(special, "<image>")
    sides = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    Idefics3ImageProcessorPil(**sides, do_image_splitting=True).save_pretrained(folder)
    _save_texts(folder, made, "Idefics3Processor", {"image_seq_len": 4})
    return Model(
        Idefics3Config(
            text_config=_text(made, sizes, model_type="llama"),
            vision_config=_tower(sizes),
            image_token_id=made.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            pad_token_id=made.pad_token_id,
        )
    )


def _internvl(folder: Path, sizes: Sizes) -> Any:
    import transformers

    special = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    made = tokenizer(special, "<IMG_CONTEXT>")
    tiles = {"size": {"height": 16, "width": 16}, "min_patches": 1, "max_patches": 2}
    transformers.GotOcr2ImageProcessorPil(**tiles, crop_to_patches=True).save_pretrained(folder)
    _save_texts(folder, made, "InternVLProcessor", {"image_seq_length": 4})
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**_text(made, sizes)),
        vision_config=_tower(sizes, image_size=[16, 16], patch_size=[4, 4]),
        image_token_id=made.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _save_texts(folder: Path, made: PreTrainedTokenizerFast, kind: str, settings: Mapping[str, Any]) -> None:
    made.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind, **settings}))


FAMILIES: Mapping[str, Callable[[Path, Sizes], Any]] = {
    "llava": _llava,
    "qwen2_5_vl": lambda folder, sizes: _qwen(folder, sizes, "2_5"),
    "qwen3_vl": lambda folder, sizes: _qwen(folder, sizes, "3"),
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
}


def save_vision(folder: Path, family: str, seed: int = 0, sizes: Sizes = SMALL, scale: float = 0.15) -> Path:
    """A model folder with its processor; weights drawn with `scale`, so that errors show."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = FAMILIES[family](folder, sizes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


def picture(seed: int = 0, width: int = 32, height: int = 24, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def cell(data: bytes | None) -> dict[str, Any] | None:
    """A picture as the datasets library stores it."""
    return None if data is None else {"bytes": data, "path": None}


def write_pairs(path: Path, pictures: Sequence[Sequence[bytes]], **columns: Sequence[Any]) -> Path:
    """Pairs in the columns images, prompt, chosen and rejected (texts unless given)."""
    rows = range(len(pictures))
    texts = {
        "prompt": [f"What is number {i}?" for i in rows],
        "chosen": [f"It is a cat, number {i}." * (1 + i % 2) for i in rows],
        "rejected": [f"A dog {i}." for i in rows],
    }
    images = pa.array([[cell(data) for data in some] for some in pictures], pa.list_(CELL))
    pq.write_table(pa.table({"images": images, **texts, **columns}), path)
    return path
