"""Which model is meant and what its numbers depend on: what is found, the digest, policies and their bases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.schema import PolicySpec
from dpo_score.errors import ModelError, WeightsChangedError
from dpo_score.models.limits import context_limit, embedding_rows, side_limits
from dpo_score.models.resolve import ModelSource, Resolver, resolve, resolve_policy
from dpo_score.tokenization.truncation import SideLimits
from tests.models.model_folders import edit, sha256, source
from tests.tiny import VOCAB, tiny_model

# What is found


def test_a_folder_gives_its_files_configuration_and_a_digest(folder: Path) -> None:
    found = source(folder)
    assert found.weights == (folder / "model.safetensors",)
    assert found.config["model_type"] == "llama"
    assert found.digest == found.base_digest == found.key
    assert len(found.digest) == 64
    assert not found.pickle
    assert found.commit is None
    assert embedding_rows(found) == VOCAB
    assert context_limit(found.config) == 4096
    assert not found.is_encoder_decoder


def test_shards_are_all_listed(sharded: Path) -> None:
    found = source(sharded)
    assert len(found.weights) > 2
    assert found.weights == tuple(sorted(sharded.glob("*.safetensors")))
    assert embedding_rows(found) == VOCAB


def test_resolving_needs_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys, hashlib, pathlib\nfrom dpo_score.models.resolve import resolve\n"
        "hash = lambda p: hashlib.sha256(p.read_bytes()).hexdigest()\n"
        f"resolve({str(folder)!r}, cache_dir=pathlib.Path('cache'), sha256=hash)\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys(), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


ROPE = {"max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 131072}}, 131072),
        (ROPE | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        (ROPE | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        (  # DeepSeek: stated after scaling
            {"max_position_embeddings": 163840}
            | {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}},
            163840,
        ),
        (ROPE | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 65536),
        (ROPE | {"rope_scaling": {"type": "dynamic", "factor": 2}}, 65536),
        (
            ROPE | {"rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 8192}},
            32768,
        ),
        (ROPE | {"rope_scaling": {"type": "longrope", "long_factor": [4.0], "short_factor": [1.0]}}, 32768),
        (ROPE | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8}}, 32768),
        (ROPE | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8}}}, 32768),
        ({"model_type": "t5", "n_positions": 512}, None),
        ({"model_type": "mamba"}, None),
    ],
)
def test_the_context_limit_is_that_of_the_text_positions(config: dict[str, Any], limit: int | None) -> None:
    assert context_limit(config) == limit


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({"model_type": "t5", "n_positions": 512}, SideLimits()),
        ({"max_position_embeddings": 64}, SideLimits(64, 64)),
        ({"max_encoder_position_embeddings": 16384, "max_decoder_position_embeddings": 1024}, SideLimits(16384, 1024)),
        ({"encoder": {"max_position_embeddings": 9}, "decoder": {"text_config": {"n_ctx": 8}}}, SideLimits(9, 8)),
    ],
)
def test_an_encoder_and_its_decoder_have_limits_of_their_own(config: dict[str, Any], limits: SideLimits) -> None:
    assert side_limits(config) == limits


def test_padded_embeddings_count_by_their_rows_not_by_the_vocabulary(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB + 60)
    model.save_pretrained(tmp_path / "padded")
    edit(tmp_path / "padded" / "config.json", vocab_size=VOCAB)
    assert embedding_rows(source(tmp_path / "padded")) == VOCAB + 60


# The digest


def flip(path: Path, byte: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_one_flipped_weight_byte_changes_the_digest(folder: Path) -> None:
    before = source(folder).digest
    flip(folder / "model.safetensors")
    assert source(folder).digest != before


def test_times_names_of_folders_and_writers_do_not_change_the_digest(folder: Path, tmp_path: Path) -> None:
    before = source(folder).digest
    os.utime(folder / "model.safetensors", (1, 1))
    edit(folder / "config.json", transformers_version="0.0", _name_or_path="elsewhere", dtype="bfloat16")
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    (moved / "README.md").write_text("more")
    assert source(folder).digest == source(moved).digest == before


@pytest.mark.parametrize("change", [{"rope_theta": 1.0}, {"sliding_window": None}, {"text_config": {"eps": 1}}])
def test_a_setting_that_changes_numbers_changes_the_digest(folder: Path, change: dict[str, Any]) -> None:
    before = source(folder).digest
    edit(folder / "config.json", **change)
    assert source(folder).digest != before


def test_the_digest_of_an_adapter_covers_base_weights_and_settings(saved: Path, folder: Path, adapter: Path) -> None:
    base, over = source(saved), source(saved, adapter)
    assert over.base_digest == base.digest != over.digest
    edit(adapter / "adapter_config.json", base_model_name_or_path="elsewhere", inference_mode=False)
    assert source(saved, adapter).digest == over.digest
    edit(adapter / "adapter_config.json", lora_alpha=16)
    assert source(saved, adapter).digest != over.digest
    edit(adapter / "adapter_config.json", lora_alpha=8)
    flip(adapter / "adapter_model.safetensors")
    assert source(saved, adapter).digest != over.digest
    flip(adapter / "adapter_model.safetensors")
    flip(folder / "model.safetensors")
    assert source(folder, adapter).digest != over.digest


def test_code_that_a_model_runs_is_part_of_what_it_is(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "mine.Model"})
    (folder / "inner").mkdir()
    code = [folder / "mine.py", folder / "inner" / "mine.py"]
    for path in code:
        path.write_text("SCALE = 1\n")
    found = source(folder, trust_remote_code=True)
    for path in code:
        path.write_text("SCALE = 3\n")
        with pytest.raises(WeightsChangedError, match=r"mine\.py changed"):
            found.refuse_changed()
        changed = source(folder, trust_remote_code=True)
        assert changed.digest != found.digest
        found = changed
    (folder / "notes.txt").write_text("not code")
    assert source(folder, trust_remote_code=True).digest == found.digest


def test_an_adapter_may_bring_its_own_tokenizer(saved: Path, adapter: Path) -> None:
    assert source(saved, adapter).tokenizer_folder == saved
    shutil.copy(saved / "tokenizer.json", adapter)
    assert source(saved, adapter).tokenizer_folder == adapter


# Policies and their bases


@pytest.fixture
def resolver(tmp_path: Path) -> Resolver:
    return Resolver(tmp_path / "cache", sha256)


def policy(**fields: Any) -> PolicySpec:
    return PolicySpec(name="p", **{key: str(value) for key, value in fields.items()})


def test_a_peft_folder_given_as_model_stands_on_the_base_that_it_names(
    saved: Path, adapter: Path, resolver: Resolver
) -> None:
    reference = source(saved)
    found = resolve_policy(policy(model=adapter), reference, None, resolver)
    assert found.adapter == adapter
    assert found.base_digest == reference.digest
    assert found == resolve_policy(policy(adapter=adapter), reference, None, resolver)
    assert resolve(str(adapter), cache_dir=resolver.cache_dir, sha256=sha256).digest == found.digest


def test_equal_bases_in_two_places_are_one(folder: Path, saved: Path, adapter: Path, resolver: Resolver) -> None:
    found = resolve_policy(policy(adapter=adapter, base=folder), source(saved), None, resolver)
    assert found.base_digest == source(saved).digest


@pytest.mark.parametrize("said", ["base", "policy_base"])
def test_a_base_that_does_not_resolve_must_be_said(
    said: str, saved: Path, adapter: Path, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(resolver.cache_dir))
    edit(adapter / "adapter_config.json", base_model_name_or_path="org/not-here")
    reference = source(saved)
    with pytest.raises(ModelError, match=r"'org/not-here', is neither a folder nor in the hub cache.*--policy-base"):
        resolve_policy(policy(adapter=adapter), reference, None, resolver)
    named = policy(adapter=adapter, base="reference") if said == "base" else policy(adapter=adapter)
    found = resolve_policy(named, reference, "reference" if said == "policy_base" else None, resolver)
    assert (found.folder, found.adapter) == (reference.folder, adapter)


def test_an_adapter_that_names_the_reference_by_its_name_stands_on_it(
    saved: Path, adapter: Path, resolver: Resolver
) -> None:
    edit(adapter / "adapter_config.json", base_model_name_or_path="org/base")
    reference = renamed(source(saved), "org/base")
    assert resolve_policy(policy(adapter=adapter), reference, None, resolver).folder == saved


def renamed(found: ModelSource, name: str) -> ModelSource:
    from dataclasses import replace

    return replace(found, name=name)


def test_base_reference_means_the_weights_under_the_references_own_adapter(
    saved: Path, adapter: Path, resolver: Resolver
) -> None:
    reference = source(saved, adapter)
    found = resolve_policy(policy(adapter=adapter, base="reference"), reference, None, resolver)
    assert found.digest == reference.digest


def test_base_reference_without_a_reference(adapter: Path, resolver: Resolver) -> None:
    with pytest.raises(ModelError, match="the run has no reference model"):
        resolve_policy(policy(adapter=adapter, base="reference"), None, None, resolver)


def test_model_and_adapter_name_both(saved: Path, adapter: Path, resolver: Resolver) -> None:
    found = resolve_policy(policy(model=saved, adapter=adapter), None, None, resolver)
    assert (found.folder, found.adapter) == (saved, adapter)


def test_a_policy_with_full_weights_needs_no_base(folder: Path, resolver: Resolver) -> None:
    assert resolve_policy(policy(model=folder), None, "reference", resolver).folder == folder


def test_adapters_are_not_stacked(adapter: Path, resolver: Resolver) -> None:
    with pytest.raises(ModelError, match="is an adapter itself"):
        resolver.resolve(str(adapter), adapter=str(adapter))
    with pytest.raises(ModelError, match="already carries an adapter"):
        resolve_policy(policy(adapter=adapter, base=adapter), None, None, resolver)
