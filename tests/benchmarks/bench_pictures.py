"""`python -m tests.benchmarks.bench_pictures [PAIRS]`: pairs about pictures, beside TRL's collator and forward.

A LLaVA of about 90 M parameters with random weights (tower, decoder, a vocabulary of 32,064 as LLaVA has it), generated
pictures, fp32 on a CPU. Two shapes of data: one pair a picture, where half of the passes of tower and prompt are saved;
and four answers a picture as VLFeedback has them, which make six pairs. Both ways are measured in one process, in turns
over the same pairs, in CPU seconds of this process, so that other work on the machine counts for neither. TRL's way:
its vision collator (every picture once an answer), the whole forward, and the log-softmax over all logits, without
gradients; ours: reading, processor, tower once a prompt, packs.

Then a policy whose tower is the reference's, in the LLaVA and in the shape of SmolVLM-256M, where the tower is most of
the work: the reference, the policy after it, and the policy by itself.
"""

from __future__ import annotations

import copy
import io
import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
)
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
VOCABULARY = 32_064
ANSWERS = {"one pair a picture": 2, "four answers a picture, six pairs": 4}


def model_folder(folder: Path) -> Path:
    """Tower and decoder of about 90 M parameters, with processor."""
    made = vision.tokenizer(["<image>"], "<image>")
    sizes = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=sizes[0], crop_size=sizes[1]).save_pretrained(folder)
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    vision._save_texts(folder, made, "LlavaProcessor", settings)
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    text = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=8, max_position_embeddings=2048, **shape, **ends)
    tower = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=512, num_hidden_layers=8, **shape)
    torch.manual_seed(0)
    token = made.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=token, vision_feature_layer=-2)
    Model(config).save_pretrained(folder)
    return folder


def tiled_folder(folder: Path) -> Path:
    """Tower, decoder and vocabulary of SmolVLM-256M; a picture is one tile of 512 × 512, which becomes 64 tokens."""
    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    made = vision.tokenizer(special, "<image>")
    sides = {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 512}}
    Idefics3ImageProcessorPil(**sides, do_image_splitting=False).save_pretrained(folder)
    vision._save_texts(folder, made, "Idefics3Processor", {"image_seq_len": 64})
    text = {"model_type": "llama", "vocab_size": 49_280, "hidden_size": 576, "intermediate_size": 1536}
    text |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    torch.manual_seed(0)
    config = Idefics3Config(
        text_config={**text, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257},
        vision_config={**tower, "image_size": 512, "patch_size": 16},
        image_token_id=made.convert_tokens_to_ids("<image>"),
        scale_factor=4,
        pad_token_id=made.pad_token_id,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def make_pairs(path: Path, count: int, answers: int) -> list[bytes]:
    """`count` pairs, all that `answers` answers a picture make; the picture of each pair."""
    random = np.random.default_rng(0)
    words = ["cat", "mat", "red", "two", "left", "small", "house", "near"]
    files: list[bytes] = []
    texts: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for number in itertools.count():
        file = vision.encoded(vision.picture(number, 320 + 16 * (number % 5), 240), "JPEG", quality=90)
        said = [" ".join(random.choice(words, int(random.integers(3, 14)))) + "." for _ in range(answers)]
        for better, worse in itertools.combinations(said, 2):
            files.append(file)
            for name, text in (("prompt", f"What is number {number}?"), ("chosen", better), ("rejected", worse)):
                texts[name].append(text)
        if len(files) >= count:
            break
    columns = {name: column[:count] for name, column in texts.items()}
    vision.write_pairs(path, [[data] for data in files[:count]], **columns)
    return files[:count]


def ours(path: Path, model: Any, processor: Any, inputs: PictureInputs) -> list[float]:
    """Sums in the order chosen, rejected of every pair."""
    pairs = list(read_pairs(open_datasets([DataSpec(name="s", path=str(path))]), 0, 10**9))
    renderer = Renderer(processor.tokenizer, TextSpec(prompt_split="trl"), None, processor)
    encoded = renderer.encode([pair for pair in pairs if isinstance(pair, Pair)])
    both: tuple[Any, ...] = ("chosen", "rejected")
    sequences = [pair.sequence(side) for pair in encoded if isinstance(pair, EncodedPair) for side in both]
    asked = ComputeSpec(device="cpu", dtype="float32", compile="off")
    scorer = PairScorer(model, resolve_numerics(asked, model.config.to_dict(), 90_000_000), pictures=inputs)
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
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{parameters:.0f} M parameters, {count} pairs, {torch.get_num_threads()} thread(s)")
        for shape, answers in ANSWERS.items():
            path = folder / "pairs.parquet"
            files = make_pairs(path, count, answers)
            print(f"\n{shape}")
            compared(path, files, model, load_processor(str(folder)))
        print("\na policy with the reference's tower")
        make_pairs(path, count // 4, 2)
        after_a_reference("LLaVA", path, folder, count // 4)
        (folder / "tiled").mkdir()
        after_a_reference("SmolVLM", path, tiled_folder(folder / "tiled"), count // 4)


def after_a_reference(name: str, path: Path, folder: Path, count: int) -> None:
    """CPU seconds a pair of a reference, of a policy after it, and of the policy by itself; the policy's values."""
    reference = AutoModelForImageTextToText.from_pretrained(folder).eval()
    policy, processor = copy.deepcopy(reference), load_processor(str(folder))
    with torch.no_grad():
        policy.get_output_embeddings().weight.add_(0.01)
    kept = PictureInputs(processor, room=2**30)
    seconds: dict[str, float] = {}
    values: dict[str, list[float]] = {}
    for who, model, inputs in (
        ("reference", reference, kept),
        ("policy after it", policy, kept),
        ("policy by itself", policy, PictureInputs(processor)),
    ):
        before = time.process_time()
        values[who] = ours(path, model, processor, inputs)
        seconds[who] = time.process_time() - before
    each = ", ".join(f"{who} {spent / count:.2f}" for who, spent in seconds.items())
    same = "equal values" if values["policy after it"] == values["policy by itself"] else "OTHER VALUES"
    size = f"{kept.kept.used / count / 2**20:.2f} MiB a picture"
    print(f"{name}: CPU seconds a pair: {each} ({size}, {same})", flush=True)


def compared(path: Path, files: list[bytes], model: Any, processor: Any) -> None:
    """Both ways on the same pairs: pairs a CPU second, memory, and how far their sums are apart."""
    inputs = PictureInputs(processor)
    seconds: dict[str, float] = {}
    values: dict[str, list[float]] = {}
    for who, call in (
        ("dpo-score", lambda: ours(path, model, processor, inputs)),
        ("TRL", lambda: of_trl(path, files, model, processor)),
    ):
        before = time.process_time()
        values[who] = call()
        seconds[who] = time.process_time() - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{who:10} {len(files) / seconds[who]:6.2f} pairs a CPU second, {peak:,} MiB at most so far")
    largest = max(abs(a - b) for a, b in zip(values["dpo-score"], values["TRL"], strict=True))
    print(f"{seconds['TRL'] / seconds['dpo-score']:.2f} times as fast; largest difference of a sum {largest:.1e} nats")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
