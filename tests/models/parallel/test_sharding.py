"""Models that two ranks hold between them, over gloo on this machine, against the same models whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_score.errors import ModelError
from dpo_score.logprobs.noise_floor import noise_floor
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.self_check import check_model
from dpo_score.logprobs.types import STATS, SequenceLogps
from dpo_score.models import parts as anatomy
from dpo_score.models.loader import LoadedModel, ModelLoader
from dpo_score.models.numerics import Numerics
from dpo_score.models.parallel.sharding import has_plan, key_value_heads
from dpo_score.models.parts import Head
from dpo_score.models.resolve import ModelSource
from tests.logprobs.engine import numerics_for
from tests.logprobs.sequences import awkward
from tests.models.model_folders import save_adapter, sha256, source
from tests.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.slow
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, an odd vocabulary": {"tie_word_embeddings": True, "vocab_size": 261},
    "qwen3": {},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 16, "final_logit_softcapping": 10.0},
    "phi": {},
    "mixtral": {"num_local_experts": 4},
    "granite": {"logits_scaling": 4.0},
}


@pytest.fixture(scope="module")
def loader() -> Iterator[ModelLoader]:
    """Loads into two ranks, of which this process is one."""
    found = ModelLoader(tensor_parallel=2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: save_tiny(root / str(number), name.split(",")[0], **options)
        for number, (name, options) in enumerate(FAMILIES.items())
    }


def numerics(path: str = "fast", dtype: str = "float32", ways: int = 2) -> Numerics:
    return replace(numerics_for(tiny_model(), path), dtype=dtype, tensor_parallel=ways)


def scored(loaded: LoadedModel, how: Numerics) -> list[Any]:
    return PairScorer(loaded.model, how, STATS).score(awkward())


def refuse_differences(ours: list[Any], theirs: list[Any]) -> None:
    """Per token: log-probabilities to 1e-4, statistics to 2e-4."""
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.token_logps, b.token_logps, atol=1e-4)
        assert a.stats.keys() == b.stats.keys()
        for name in a.stats:
            np.testing.assert_allclose(a.stats[name], b.stats[name], atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["fast", "plain"])
def test_two_ranks_give_what_one_process_gives(
    family: str, path: str, loader: ModelLoader, folders: Mapping[str, Path]
) -> None:
    found = source(folders[family])
    ours = scored(loader.load(found, numerics(path)), numerics(path))
    theirs = scored(ModelLoader().load(found, numerics(path, ways=1)), numerics(path, ways=1))
    refuse_differences(ours, theirs)


def test_a_rank_holds_its_part_and_no_more(loader: ModelLoader, folders: Mapping[str, Path]) -> None:
    model = loader.load(source(folders["llama, tied, an odd vocabulary"]), numerics()).model
    layer = model.model.layers[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tuple(model.lm_head.weight.shape) == (131, 32)
    assert tuple(layer.self_attn.k_proj.weight.shape) == (8, 32)
    assert tuple(layer.mlp.down_proj.weight.shape) == (32, 32)
    assert all(type(parameter.data) is torch.Tensor for parameter in model.parameters())


def test_ids_that_one_rank_forbids_altogether(loader: ModelLoader, tmp_path: Path) -> None:
    """A bias of −inf over the whole part of the second rank: the first has all the mass."""
    model = tiny_model("phi")
    with torch.no_grad():
        model.lm_head.bias[130:] = -torch.inf
    model.save_pretrained(tmp_path / "phi")
    found = source(tmp_path / "phi")
    ours = scored(loader.load(found, numerics()), numerics())
    theirs = scored(ModelLoader().load(found, numerics(ways=1)), numerics(ways=1))
    assert [type(result) for result in ours] == [type(result) for result in theirs]
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, SequenceLogps)]
    assert 0 < len(both) < len(ours)
    refuse_differences([a for a, _ in both], [b for _, b in both])


def test_the_fast_path_is_verified_by_all_ranks(loader: ModelLoader, folders: Mapping[str, Path]) -> None:
    loaded = loader.load(source(folders["gemma2"]), numerics())
    check = check_model(loaded.model, numerics())
    assert check.numerics == numerics(), check.reason
    assert check.max_delta is not None
    assert check.max_delta > 0


def test_a_rank_that_reads_the_wrong_part_of_the_vocabulary_is_found_out(
    loader: ModelLoader, folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = anatomy._shared

    def shifted(head: Head, group: Any) -> Head | None:
        found = true(head, group)
        return replace(found, first=found.first + 1) if found is not None else None

    loaded = loader.load(source(folders["llama"]), numerics())
    monkeypatch.setattr(anatomy, "_shared", shifted)  # in the leader alone
    check = check_model(loaded.model, numerics())
    assert check.numerics.path == "plain"
    assert "linear head" in check.reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_as_noisy_as_on_one_device(
    dtype: str, loader: ModelLoader, folders: Mapping[str, Path]
) -> None:
    """The second pass of the noise floor widens every rank's part to fp32."""
    floors = []
    for ways in (1, 2):
        how = numerics(dtype=dtype, ways=ways)
        loaded = (loader if ways == 2 else ModelLoader()).load(source(folders["qwen3"]), how)
        floors.append(noise_floor(loaded.model, how, awkward(), scored(loaded, how)))
    assert floors[0].logp_mean is not None
    assert floors[1].logp_mean is not None, floors[1].reason
    assert 0 < floors[1].logp_mean < 3 * floors[0].logp_mean


LORA = {
    "plain": {},
    "on every layer, rsLoRA": {"use_rslora": True, "target_modules": "all-linear", "alpha_pattern": {"q_proj": 16}},
}


@pytest.mark.parametrize("kind", LORA)
def test_a_lora_adapter_beside_a_base_in_parts(
    kind: str, loader: ModelLoader, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    base = folders["llama"]
    both = source(base, save_adapter(tmp_path / "adapter", base, **LORA[kind]))
    bare = scored(loader.load(source(base), numerics()), numerics())
    ours = scored(loader.load(both, numerics()), numerics())
    refuse_differences(ours, scored(ModelLoader().load(both, numerics(ways=1)), numerics(ways=1)))
    reads = loader.bases_read
    again = scored(loader.load(source(base), numerics()), numerics())
    assert loader.bases_read == reads
    assert all(np.array_equal(a.token_logps, b.token_logps) for a, b in zip(bare, again, strict=True))
    assert not all(np.array_equal(a.token_logps, b.token_logps) for a, b in zip(bare, ours, strict=True))


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers")
@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused_with_the_way_out(
    lora: dict[str, Any], said: str, loader: ModelLoader, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    base = folders["llama"]
    adapter = save_adapter(tmp_path / "adapter", base, **lora)
    with pytest.raises(ModelError, match=f"{said}.*[Mm]erge"):
        loader.load(source(base, adapter), numerics())


def test_a_checkpoint_without_config(loader: ModelLoader, folders: Mapping[str, Path], tmp_path: Path) -> None:
    from dpo_score.models.resolve import Resolver

    torch.save({"state": tiny_model(seed=3).state_dict()}, tmp_path / "policy.pt")
    resolver = Resolver(tmp_path / "cache", sha256, allow_pickle=True)
    found: ModelSource = resolver.with_state(source(folders["llama"]), tmp_path / "policy.pt", "policy")
    ours = scored(loader.load(found, numerics()), numerics())
    refuse_differences(ours, scored(ModelLoader().load(found, numerics(ways=1)), numerics(ways=1)))


def test_what_all_ranks_refuse_is_refused_as_one_process_does(
    loader: ModelLoader, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """And the group goes on with the next model."""
    model = tiny_model()
    del model.model.layers[1].mlp.up_proj
    model.save_pretrained(tmp_path / "part")
    with pytest.raises(ModelError, match="missing from the checkpoint"):
        loader.load(source(tmp_path / "part"), numerics())
    assert scored(loader.load(source(folders["llama"]), numerics()), numerics())


@pytest.mark.parametrize(
    ("family", "planned"), [("llama", True), ("gemma3", True), ("llava", False), ("gpt2", False), ("unheard of", False)]
)
def test_which_architectures_can_be_dealt_out(family: str, planned: bool) -> None:
    assert has_plan({"model_type": family}) is planned
    assert has_plan({"model_type": family, "text_config": {"model_type": "llama"}})


def test_the_numerics_of_a_whole_model_are_written_as_before_there_were_others() -> None:
    whole, parts = numerics(ways=1), numerics(ways=2)
    assert "tensor_parallel" not in whole.to_json()
    assert parts.to_json()["tensor_parallel"] == 2
    assert Numerics.from_json(whole.to_json()) == whole
    assert Numerics.from_json(parts.to_json()) == parts


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, 8),
        ({"num_attention_heads": 32}, 32),
        ({"n_head": 12}, 12),
        ({"text_config": {"num_attention_heads": 16, "num_key_value_heads": 4}}, 4),
    ],
)
def test_key_value_heads(config: dict[str, Any], heads: int) -> None:
    assert key_value_heads(config) == heads
