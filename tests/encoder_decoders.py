"""Tiny T5 and BART models whose tokenizer ends each text, as theirs do; their labels' log-probs by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from tests.tiny import VOCAB, byte_tokenizer

END = 256
POSITIONS = 64
SIZES: dict[str, dict[str, Any]] = {
    "t5": {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "bart": {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": POSITIONS},
}


def ending_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and <|endoftext|> (256) after every text."""
    tokenizer = byte_tokenizer(chat_template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", END)]
    )
    return tokenizer


def save_encoder_decoder(folder: Path, kind: str, seed: int = 0, **overrides: Any) -> Path:
    """A model folder with its tokenizer; returns the folder."""
    torch.manual_seed(seed)
    ids = {"decoder_start_token_id": 259, "eos_token_id": END, "pad_token_id": 259, "bos_token_id": 257}
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, d_model=32, **ids, **{**SIZES[kind], **overrides})
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    ending_tokenizer().save_pretrained(folder)
    return folder


@torch.inference_mode()
def own_logps(folder: Path, prompt: str, answer: str) -> float:
    """Σ log p of `tokenizer(text_target=answer)` given `tokenizer(prompt)`, from the model's own shift of labels."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).double().eval()
    tokenizer = ending_tokenizer()
    return labels_logps(model, tokenizer(prompt).input_ids, tokenizer(text_target=answer).input_ids)


@torch.inference_mode()
def labels_logps(model: Any, prompt: Sequence[int], labels: Sequence[int]) -> float:
    given, asked = torch.tensor([list(prompt)]), torch.tensor([list(labels)])
    logits = model(input_ids=given, labels=asked).logits[0]
    return float(torch.log_softmax(logits, -1).gather(1, asked[0][:, None]).sum())
