"""What one policy entry may carry of its own, and which models are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_score.config.schema import LossSpec, ModelSpec, PolicySpec
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import ModelError, PolicyFailedError
from dpo_score.logprobs import numerics
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import byte_tokenizer, tiny_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", preference_rows(70))


def run_with(runner: Any, data: Path, out: Path, *policies: PolicySpec, **options: Any) -> Any:
    config = runner.config(data, out, **options).model_copy(update={"policies": policies})
    return run(config, Progress(quiet=True))


def scores(out: Path, policy: str) -> pl.DataFrame:
    return pl.read_parquet(f"{out}/scores/{policy}/*.parquet")


def test_a_policy_may_bring_its_own_loss_beta_and_reference(runner: Any, data: Path, tmp_path: Path) -> None:
    better, worse = str(runner.models["better"]), str(runner.models["worse"])
    run_with(
        runner,
        data,
        tmp_path / "out",
        PolicySpec(name="plain", model=better),
        PolicySpec(name="hot", model=better, beta=2.0),
        PolicySpec(name="ipo", model=better, loss=LossSpec(name="ipo", beta=0.5)),
        PolicySpec(name="other", model=better, reference=ModelSpec(model=worse)),
    )
    plain, hot, ipo, other = (scores(tmp_path / "out", name) for name in ("plain", "hot", "ipo", "other"))
    assert (hot["chosen_rewards"] - 20 * plain["chosen_rewards"]).abs().max() < 1e-12
    per_token = plain["margins_nats"].len()
    assert per_token == 70
    expected = (
        (ipo["policy_chosen_logps"] - ipo["ref_chosen_logps"]) / ipo["chosen_tokens"]
        - (ipo["policy_rejected_logps"] - ipo["ref_rejected_logps"]) / ipo["rejected_tokens"]
        - 1.0
    ) ** 2
    assert (ipo["loss"] - expected).abs().max() < 1e-9
    assert other["policy_chosen_logps"].equals(plain["policy_chosen_logps"])
    assert not other["ref_chosen_logps"].equals(plain["ref_chosen_logps"])
    assert len(list((tmp_path / "out/reference/other").glob("*.parquet"))) == 2


def save_adapter(folder: Path, base: Path, seed: int, zero: bool = False) -> Path:
    """A LoRA over a tiny model; peft's own initialisation makes B zero."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True if zero else "gaussian")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if not zero:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def test_adapters_share_one_base_and_a_zero_adapter_is_the_reference(
    runner: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_score.models.loader import ModelLoader

    loaders: list[Any] = []
    made = ModelLoader.__init__
    monkeypatch.setattr(ModelLoader, "__init__", lambda self, *a, **k: (loaders.append(self), made(self, *a, **k))[1])
    base = runner.models["reference"]
    zero = save_adapter(tmp_path / "zero", base, 0, zero=True)
    moved = save_adapter(tmp_path / "moved", base, 1)
    policies = [PolicySpec(name=path.name, adapter=str(path), base="reference") for path in (zero, moved)]
    run_with(runner, data, tmp_path / "out", *policies)
    assert sum(loader.bases_read for loader in loaders) == 1
    assert scores(tmp_path / "out", "zero")["margins_nats"].abs().max() < 1e-4
    assert scores(tmp_path / "out", "moved")["margins_nats"].abs().max() > 1e-2


def test_an_adapter_whose_base_does_not_resolve_names_the_way_out(runner: Any, data: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lost", runner.models["reference"], 0)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/no/such/base"}))
    found = run_with(runner, data, tmp_path / "out", PolicySpec(name="lost", adapter=str(adapter)))
    with pytest.raises(PolicyFailedError, match=r"base: reference|--policy-base"):
        found.raise_failures()


def test_another_tokenizer_is_refused_with_the_first_three_ids(runner: Any, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model(seed=4).save_pretrained(other)
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: (255 - i if i < 256 else i) for token, i in vocabulary.items()}
    tokenizer.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(state))
    found = run_with(runner, data, tmp_path / "out", PolicySpec(name="other", model=str(other)))
    assert len(re.findall(r"id \d+: '.*?' here, '.*?' there", found.failures["other"])) == 3


def test_a_padded_embedding_is_no_difference(runner: Any, data: Path, tmp_path: Path) -> None:
    padded = tmp_path / "padded"
    tiny_model(seed=5, vocab_size=320).save_pretrained(padded)
    byte_tokenizer().save_pretrained(padded)
    assert not run_with(runner, data, tmp_path / "out", PolicySpec(name="padded", model=str(padded))).failures


def test_a_model_without_a_tokenizer_is_a_clear_error(runner: Any, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    tiny_model(seed=6).save_pretrained(bare)
    with pytest.raises(ModelError, match="--tokenizer"):
        runner(data, tmp_path / "out", reference=str(bare))


def test_a_policy_that_needs_the_plain_path_is_scored_on_it_and_resumes(
    runner: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_score.engine.model_logprobs import CachedLogprobs, FastPathRefusedError

    verify = CachedLogprobs._verify

    def refuse_policies(self: CachedLogprobs, model: Any) -> None:
        if self._numerics.path == "fast" and self._source.folder == runner.models["better"]:
            raise FastPathRefusedError("made up for this test", numerics.on_plain_path(self._begun))
        verify(self, model)

    monkeypatch.setattr(CachedLogprobs, "_verify", refuse_policies)
    first = runner(data, tmp_path / "out")
    before = scores(tmp_path / "out", "better")
    again = runner(data, tmp_path / "out")
    assert not first.failures
    assert again.summary == first.summary
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["identities"]["policies"]["better"]["numerics"]["path"] == "plain"
    assert manifest["identities"]["reference"]["numerics"]["path"] == "fast"
    assert scores(tmp_path / "out", "better").equals(before)
