"""`python -m tests.benchmarks.bench_pictures [PAIRS]`: pairs about pictures, beside TRL's collator and forward.

A LLaVA of about 55 M parameters with random weights (tower and decoder), generated pictures, fp32 on a CPU. Both ways
are measured in one process, in turns over the same pairs, in CPU seconds of this process, so that other work on the
machine counts for neither. TRL's way: its vision collator (every picture once an answer), the whole forward, and the
log-softmax over all logits, without gradients; ours: reading, processor, tower once a prompt, packs.
"""

from __future__ import annotations

import copy
import io
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Model
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from dpo_score.config.schema import ComputeSpec, DataSpec, TextSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.types import EncodedPair, Pair
from dpo_score.logprobs.numerics import resolve_numerics
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.types import SequenceLogps
from dpo_score.tokenization.pictures import PictureInputs, load_processor
from dpo_score.tokenization.render import Renderer
from tests import vision

SIDE, PATCH = 224, 16
BATCH = 4


def model_folder(folder: Path) -> Path:
    """Tower and decoder of about 55 M parameters, with processor."""
    made = vision.tokenizer(["<image>"], "<image>")
    sizes = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=sizes[0], crop_size=sizes[1]).save_pretrained(folder)
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    vision._save_texts(folder, made, "LlavaProcessor", settings)
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    text = LlamaConfig(vocab_size=len(made), num_hidden_layers=8, max_position_embeddings=2048, **shape, **ends)
    tower = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=512, num_hidden_layers=8, **shape)
    torch.manual_seed(0)
    token = made.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=token, vision_feature_layer=-2)
    Model(config).save_pretrained(folder)
    return folder


def make_pairs(path: Path, count: int) -> list[bytes]:
    random = np.random.default_rng(0)
    files = [vision.encoded(vision.picture(i, 320 + 16 * (i % 5), 240), "JPEG", quality=90) for i in range(count)]
    words = ["cat", "mat", "red", "two", "left", "small", "house", "near"]
    texts = {
        side: [" ".join(random.choice(words, int(random.integers(3, 14)))) + "." for _ in range(count)]
        for side in ("chosen", "rejected")
    }
    vision.write_pairs(path, [[data] for data in files], **texts)
    return files


def ours(path: Path, model: Any, processor: Any, inputs: PictureInputs) -> list[float]:
    """Sums in the order chosen, rejected of every pair."""
    pairs = list(read_pairs(open_datasets([DataSpec(name="s", path=str(path))]), 0, 10**9))
    renderer = Renderer(processor.tokenizer, TextSpec(prompt_split="trl"), None, processor)
    encoded = renderer.encode([pair for pair in pairs if isinstance(pair, Pair)])
    both: tuple[Any, ...] = ("chosen", "rejected")
    sequences = [pair.sequence(side) for pair in encoded if isinstance(pair, EncodedPair) for side in both]
    asked = ComputeSpec(device="cpu", dtype="float32", compile="off")
    scorer = PairScorer(model, resolve_numerics(asked, model.config.to_dict(), 55_000_000), pictures=inputs)
    found = scorer.score(sequences)
    return [float(r.token_logps.sum(dtype=np.float64)) for r in found if isinstance(r, SequenceLogps)]


def of_trl(path: Path, files: list[bytes], model: Any, processor: Any) -> list[float]:
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["prompt", "chosen", "rejected"]).to_pylist()
    collator, sums = DataCollatorForVisionPreference(processor.processor), []
    for start in range(0, len(rows), BATCH):
        examples = []
        for row, data in zip(rows[start : start + BATCH], files[start : start + BATCH], strict=True):
            turns = {n: [{"role": "user" if n == "prompt" else "assistant", "content": t}] for n, t in row.items()}
            examples.append({"images": [Image.open(io.BytesIO(data))], **turns})
        batch = dict(collator(copy.deepcopy(examples)))
        answers = batch.pop("completion_mask").bool()
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
            own = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
            both = (own.double() * answers[:, 1:]).sum(1)
        sums += [float(both[i + side * len(examples)]) for i in range(len(examples)) for side in (0, 1)]
    return sums


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name))
        path = folder / "pairs.parquet"
        files = make_pairs(path, count)
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        processor = load_processor(str(folder))
        inputs = PictureInputs(processor)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{parameters:.0f} M parameters, {count} pairs, {torch.get_num_threads()} thread(s)")
        seconds: dict[str, float] = {}
        peak: dict[str, int] = {}
        values: dict[str, list[float]] = {}
        for who, call in (
            ("dpo-score", lambda: ours(path, model, processor, inputs)),
            ("TRL", lambda: of_trl(path, files, model, processor)),
        ):
            before = time.process_time()
            values[who] = call()
            seconds[who] = time.process_time() - before
            peak[who] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{who:10} {count / seconds[who]:6.2f} pairs a CPU second, {peak[who]:,} MiB at most so far")
        largest = max(abs(a - b) for a, b in zip(values["dpo-score"], values["TRL"], strict=True))
        print(
            f"{seconds['TRL'] / seconds['dpo-score']:.2f} times as fast; largest difference of a sum {largest:.1e} nats"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
