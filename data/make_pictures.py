"""`python -m data.make_pictures FOLDER`: twelve pictures, pairs about them, and two tiny vision-language models.

Everything is made from chance and a seed, so that the recipe for pictures runs offline; the numbers mean nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else "
    "'<image>\n' }}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200)}


def main(folder: Path) -> None:
    """Write images/, pairs.jsonl, model/ and other/ into `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    rows = []
    for number in range(12):
        right, wrong = names[number % 3], names[(number + 1) % 3]
        size = (48 + 8 * (number % 4), 32 + 8 * (number % 3))
        pixels = np.full((size[1], size[0], 3), COLOURS[right], np.uint8)
        pixels[:: 4 + number % 3] //= 2
        Image.fromarray(pixels).save(folder / "images" / f"{number:02d}.png")
        question = "<image>\nWhich colour has this picture?"
        answers = {"chosen": f"It is {right}.", "rejected": f"It is {wrong}."}
        rows.append({"image": f"{number:02d}.png", "question": question, **answers})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(("model", "other")):
        _model(folder / name, seed)


def _model(folder: Path, seed: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **ends, extra_special_tokens=["<image>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", **settings}))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, pad_token_id=257, **sizes)
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=64, **sizes),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
