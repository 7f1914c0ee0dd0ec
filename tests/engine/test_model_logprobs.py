"""Where the values of one model come from and where they go: which device computes them, which namespace keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_score.config.schema import ComputeSpec
from dpo_score.engine import model_logprobs
from dpo_score.engine.context import RunContext
from dpo_score.engine.model_logprobs import CachedLogprobs, checked_numerics, continued_numerics, on_device
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, ModelError
from dpo_score.logprobs import matmul as gemm
from dpo_score.models.loader import ModelLoader
from dpo_score.models.numerics import Kernel, Numerics
from dpo_score.models.resolve import Resolver
from dpo_score.storage.cache.cache import open_cache
from dpo_score.storage.manifest import read_manifest
from dpo_score.storage.open import open_store
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import byte_tokenizer, tiny_model

ON_GPU = Numerics("cuda:0", "cuda", "float16", "plain", "model", False, 4096, 1)


def test_which_of_several_gpus_computes_is_no_other_identity_but_it_does_compute() -> None:
    assert continued_numerics(ON_GPU, ComputeSpec(device="cuda:1")) == ON_GPU
    assert on_device(ON_GPU, "cuda:1").device == "cuda:1"
    for asked in ("auto", "cuda", "cpu"):
        assert on_device(ON_GPU, asked) == ON_GPU
    on_cpu = replace(ON_GPU, device="cpu", device_kind="cpu")
    assert on_device(on_cpu, "cuda:1") == on_cpu


def hot_model(folder: Path, factor: float) -> Path:
    """A model with weights that are `factor` times as large in one place: beyond float16, or so that a row is."""
    model = tiny_model(seed=0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(factor)
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("factor", "why"), [(1e6, "weights beyond what float16 holds"), (3e4, "overflow float16")])
def test_float16_that_nobody_asked_for_gives_way_to_bfloat16(tmp_path: Path, factor: float, why: str) -> None:
    context = RunContext(open_store(tmp_path / "out"), tmp_path / "cache", Progress(quiet=True))
    model = hot_model(tmp_path / "hot", factor)
    source = Resolver(context.cache_dir, context.file_hashes.sha256).resolve(str(model))
    half = Numerics("cpu", "cpu", "float16", "fast", Kernel.SDPA, False, 4096, 1)
    for _ in range(2):  # found out, then remembered
        assert checked_numerics(context, source, half, any_dtype=True).dtype == "bfloat16"
    [said] = context.progress.warnings
    assert said.startswith(f"{source.name}: computed in bfloat16")
    assert why in said


def test_weights_that_float16_cannot_hold_are_refused_with_the_way_out(tmp_path: Path) -> None:
    context = RunContext(open_store(tmp_path / "out"), tmp_path / "cache", Progress(quiet=True))
    source = Resolver(context.cache_dir, context.file_hashes.sha256).resolve(str(hot_model(tmp_path / "hot", 1e6)))
    half = Numerics("cpu", "cpu", "float16", "fast", Kernel.SDPA, False, 4096, 1)
    with pytest.raises(ModelError, match=r"down_proj\.weight became infinite\. Say --dtype bfloat16"):
        checked_numerics(context, source, half)


class Loaded(Exception):
    """A model was asked for."""


def scorer_of(runner: Any, tmp_path: Path, device: str) -> None:
    context = RunContext(
        open_store(tmp_path / "out"), tmp_path / "cache", Progress(quiet=True), ComputeSpec(device=device)
    )
    source = Resolver(context.cache_dir, context.file_hashes.sha256).resolve(str(runner.models["reference"]))
    CachedLogprobs(context, source, ON_GPU).scorer()


def test_the_model_is_loaded_on_the_gpu_that_is_asked_for(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Any, source: Any, numerics: Numerics) -> None:
        raise Loaded(numerics.device)

    monkeypatch.setattr(ModelLoader, "load", load)
    monkeypatch.setattr(model_logprobs, "present", lambda _: True)
    with pytest.raises(Loaded, match="cuda:1"):
        scorer_of(runner, tmp_path, "cuda:1")
    with pytest.raises(Loaded, match="cuda:0"):
        scorer_of(runner, tmp_path, "auto")


def test_a_device_that_is_not_here_is_refused_when_a_model_is_needed(runner: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cuda:99, and torch sees no such device here.*choose another --out"):
        scorer_of(runner, tmp_path, "cuda:99")


@contextmanager
def fast_products(monkeypatch: pytest.MonkeyPatch, there: bool) -> Iterator[list[int]]:
    """A processor whose oneDNN products are true fp32, or not; counts how often they are switched on."""
    used: list[int] = []

    @contextmanager
    def switched() -> Iterator[None]:
        used.append(1)
        yield

    with monkeypatch.context() as patch:
        patch.setattr(gemm, "onednn_is_true_fp32", lambda: there)
        patch.setattr(gemm, "_switched", switched)
        yield used


def test_values_of_another_kernel_are_kept_apart(runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entries() -> dict[str, int]:
        found: dict[str, int] = {}
        for row in open_cache(tmp_path / "cache").ls():
            found[row["fields"]["kernel"]] = found.get(row["fields"]["kernel"], 0) + row["entries"]
        return found

    data, out = write_rows(tmp_path / "pairs.parquet", preference_rows(70)), tmp_path / "out"
    with fast_products(monkeypatch, there=True) as used:
        runner(data, out, limit=64, path="plain")
    assert used
    assert entries() == {"model+onednn": 2 * 2 * 64}
    with fast_products(monkeypatch, there=False) as used:
        runner(data, out)
    assert not used
    assert entries() == {"model+onednn": 2 * 2 * 64, "model": 2 * 2 * 6}
    found = read_manifest(open_store(out))
    assert found is not None
    assert found.numerics["run"]["kernel"] == "model+onednn"
