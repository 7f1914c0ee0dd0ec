"""`auto` becomes a concrete value once, and the record reads back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from dpo_score.config.schema import ComputeSpec
from dpo_score.errors import ConfigError, DamageError
from dpo_score.logprobs import compilation
from dpo_score.logprobs import matmul as gemm
from dpo_score.logprobs import numerics as numerics_module
from dpo_score.logprobs.attention import flash_flex as attention_gpu
from dpo_score.logprobs.numerics import in_effect, may_share, present, resolve_numerics
from dpo_score.models import memory
from dpo_score.models.numerics import _VALUES, Kernel, Numerics
from tests.tiny import tiny_config

LLAMA = tiny_config("llama").to_dict()


def test_on_a_cpu_the_default_is_fp32_on_the_fast_path():
    numerics = resolve_numerics(ComputeSpec(device="cpu"), LLAMA, 10**6, 100)
    assert (numerics.device_kind, numerics.dtype, numerics.path) == ("cpu", "float32", "fast")
    assert numerics.kernel == ("bmm+onednn" if gemm.onednn_is_true_fp32() else "sdpa")
    assert numerics.batch_tokens == 4096
    assert not numerics.compile


def test_what_is_asked_for_is_kept():
    asked = ComputeSpec(device="cpu", dtype="bfloat16", path="plain", batch_tokens=512, threads=3, compile="on")
    numerics = resolve_numerics(asked, LLAMA, 10**9, 10**9)
    assert numerics == Numerics("cpu", "cpu", "bfloat16", "plain", "model", False, 512, 3)


def test_the_record_reads_back():
    numerics = resolve_numerics(ComputeSpec(device="cpu"), LLAMA, None)
    assert Numerics.from_json({**numerics.to_json(), "added_later": 1}) == numerics
    assert set(_VALUES) == {field.name for field in fields(Numerics)}
    for name in _VALUES:
        for odd in ([], "?", 0, 1.5, 10**30, None) if name not in ("device", "device_kind") else (3, None):
            with pytest.raises(DamageError, match=f"stored numerics hold {name}: "):
                Numerics.from_json({**numerics.to_json(), name: odd})


@pytest.mark.parametrize(("rows", "compiled"), [(100, False), (10**7, True)])
def test_compilation_pays_for_long_jobs_only(monkeypatch, rows, compiled):
    monkeypatch.setattr("dpo_score.logprobs.numerics._can_compile", lambda kind: True)
    assert resolve_numerics(ComputeSpec(device="cpu"), LLAMA, 10**8, rows).compile is compiled


def test_a_device_that_is_not_here_is_said():
    with pytest.raises(ConfigError, match="not one of"):
        resolve_numerics(ComputeSpec(device="tpu"), LLAMA, None)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "t5", "is_encoder_decoder": True},
        {"model_type": "bloom"},
        {"model_type": "falcon", "alibi": True},
        {"model_type": "qwen3_next", "layer_types": ["linear_attention"]},
        {"model_type": "llama", "attention_chunk_size": 128},
        {"model_type": "never_heard_of"},
    ],
)
def test_what_cannot_share_a_prompt_takes_the_plain_path(config):
    assert not may_share(config)


def test_memory_limits_the_budget(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: 2**26)
    small = memory.batch_tokens("cpu", "float32", {"hidden_size": 2048, "intermediate_size": 8192}, None)
    assert small == 256
    monkeypatch.setattr(memory, "total_memory", lambda device: 141 * 2**30)
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "head_dim": 128}
    assert memory.batch_tokens("cuda:0", "float16", config, 8 * 10**9) == 16384
    assert memory.batch_tokens("cuda:0", "float16", {"hidden_size": 576}, 135 * 10**6) == 65536


def test_the_records_import_without_torch():
    code = "import sys, dpo_score.logprobs.numerics, dpo_score.logprobs.types; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NUMERICS = Numerics("cpu", "cpu", "float32", "fast", "bmm+onednn", False, 4096, 1)


@pytest.mark.parametrize(("true_fp32", "kernel"), [(True, "bmm+onednn"), (False, "bmm")])
def test_products_run_through_onednn_only_where_they_are_true_fp32(
    true_fp32: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "onednn_is_true_fp32", lambda: true_fp32)
    assert in_effect(NUMERICS) == replace(NUMERICS, kernel=kernel)


@pytest.mark.parametrize("kernel", ["sdpa", "model", "model+own-softmax", "flex"])
def test_what_runs_anywhere_stays(kernel: str) -> None:
    assert in_effect(replace(NUMERICS, kernel=kernel)).kernel == kernel


@pytest.mark.parametrize(("here", "kernel"), [(True, "flex"), (False, "varlen")])
def test_a_gpu_without_the_flash_kernel_takes_what_it_has(
    here: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics_module, "present", lambda _: here)
    monkeypatch.setattr(attention_gpu, "kernel", lambda: "flex")
    on_gpu = replace(NUMERICS, device="cuda:0", device_kind="cuda", dtype="float16", kernel="varlen")
    assert in_effect(on_gpu).kernel == kernel


def test_which_devices_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [present(name) for name in ("cpu", "cuda", "cuda:1", "cuda:2", "mps")] == [True, True, True, False, False]


@pytest.mark.parametrize(("shape", "rows"), [((32, 4096), 18_500), ((30, 576), 140_300)], ids=["8B", "135M"])
def test_on_a_gpu_layers_are_compiled_where_they_save_more_than_compiling_takes(shape, rows, monkeypatch):
    config = {"num_hidden_layers": shape[0], "hidden_size": shape[1]}
    monkeypatch.setattr(numerics_module, "_can_compile", lambda kind: True)
    decide = numerics_module._compile
    assert not decide("auto", "fast", "cuda", config, 10**9, int(rows * 0.9))
    assert decide("auto", "fast", "cuda", config, 10**9, int(rows * 1.1))


def test_a_gpu_that_cannot_compile_is_said_in_one_line(monkeypatch):
    found = {"cuda": "RuntimeError: Failed to find C compiler"}
    monkeypatch.setattr(compilation, "_found", found)
    shape = {"num_hidden_layers": 32, "hidden_size": 4096}
    assert not numerics_module._compile("auto", "fast", "cuda", shape, 1, 10**9)
    numerics = Numerics("cuda:0", "cuda", "float16", "fast", Kernel.VARLEN, False, 16384, 1)
    [line] = numerics_module.remarks(ComputeSpec(), numerics)
    assert line == f"layers are not compiled, which costs speed and no correctness: {found['cuda']}"
    assert numerics_module.remarks(ComputeSpec(compile="off"), numerics) == []


def test_packs_know_how_weights_are_held(monkeypatch):
    """A model of 70B on a GPU of 80 GB: nothing fits in 16 bits, packs do in 4 bits or over eight GPUs."""
    monkeypatch.setattr(memory, "total_memory", lambda device: 80 * 10**9)
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "head_dim": 128}
    assert memory.batch_tokens("cuda:0", "float16", shape, 70 * 10**9) == 256
    assert memory.batch_tokens("cuda:0", "float16", shape, 70 * 10**9, "nf4") > 4096
    assert memory.batch_tokens("cuda:0", "float16", shape, 70 * 10**9, None, 8) > 4096
    small = Numerics("cuda:0", "cuda", "float16", "plain", Kernel.MODEL, False, 256, 1)
    [line] = numerics_module.remarks(ComputeSpec(), small)
    assert line.startswith("packs hold 256 tokens: the weights leave little room on cuda:0")
