"""Quantised weights, at load and as checkpoints: scored as transformers computes them, and another identity.

Runs where bitsandbytes is installed (it works on CPUs).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from dpo_score import score
from dpo_score.errors import IdentityError, UsageError
from dpo_score.integrations.trl_check import comparison
from dpo_score.results.run_folder import open_out
from tests.exported import text_rows
from tests.run_fixtures import Runner, write_rows
from tests.tiny import byte_tokenizer, save_tiny

pytest.importorskip("bitsandbytes")

HOW = ["int8", "nf4"]
ROWS = text_rows(5)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
CONFIGS = {"int8": BitsAndBytesConfig(load_in_8bit=True), "nf4": NF4}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose rows are long enough for blocks of 64 weights."""
    root = tmp_path_factory.mktemp("wide")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return {name: save_tiny(root / name, seed=seed, **sizes) for seed, name in enumerate(("reference", "policy"))}


def scores(out: Path, policy: str = "p") -> pl.DataFrame:
    return pl.read_parquet(out / "scores" / policy / "*.parquet")


def run(runner: Runner, wide: dict[str, Path], out: Path, **options: Any) -> pl.DataFrame:
    given = {"reference": str(wide["reference"]), "policy": [f"p={wide['policy']}"], "path": "plain", **options}
    out.parent.mkdir(exist_ok=True)
    runner(write_rows(out.parent / "d.parquet", ROWS), out, **given)
    return scores(out)


def computed(folder: Path, how: str | None) -> list[float]:
    """Sums of the chosen answers by transformers alone, one sequence at a time; four bits as float32 weights."""
    options: dict[str, Any] = {} if how is None else {"quantization_config": CONFIGS[how]}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32, **options).eval()
    model = model.dequantize() if how == "nf4" else model
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for row in ROWS:
        ids = tokenizer(row["prompt"] + row["chosen"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        n = len(tokenizer(row["prompt"])["input_ids"])
        with torch.inference_mode():
            logp = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        found.append(float(logp.gather(1, ids[0, 1:, None])[n - 1 :].double().sum()))
    return found


@pytest.mark.parametrize("how", HOW)
def test_weights_quantised_at_load_score_as_transformers_computes_them(
    how: str, runner: Runner, wide: dict[str, Path], tmp_path: Path
) -> None:
    found = run(runner, wide, tmp_path / "out", quantization=how, batch_tokens=1)
    assert found["ref_chosen_logps"].to_list() == pytest.approx(computed(wide["reference"], how), abs=1e-3)
    assert found["policy_chosen_logps"].to_list() == pytest.approx(computed(wide["policy"], how), abs=1e-3)
    exact = computed(wide["reference"], None)
    assert np.abs(found["ref_chosen_logps"].to_numpy() - exact).max() > 0.05


def test_quantised_values_are_never_taken_for_others(runner: Runner, wide: dict[str, Path], tmp_path: Path) -> None:
    """One cache for all three, and the same folder is refused."""
    plain, int8, nf4 = (
        run(runner, wide, tmp_path / str(how) / "out", quantization=how)["ref_chosen_logps"] for how in (None, *HOW)
    )
    assert not set(plain) & set(int8)
    assert not set(nf4) & (set(plain) | set(int8))
    with pytest.raises(IdentityError, match=r"reference\.weights"):
        run(runner, wide, tmp_path / "int8" / "out", quantization="nf4")


@pytest.mark.parametrize("how", HOW)
def test_an_adapter_over_a_quantised_base(how: str, runner: Runner, wide: dict[str, Path], tmp_path: Path) -> None:
    """A zero adapter moves nothing, though bitsandbytes loses packed 4-bit weights where a state dict is made."""
    pytest.importorskip("peft")
    from tests.models.model_folders import save_adapter

    trained = save_adapter(tmp_path / "trained", wide["reference"])
    still = save_adapter(tmp_path / "still", wide["reference"], weight=0.0)
    policies = [f"trained={trained}", f"still={still}", f"same={wide['reference']}"]
    run(runner, wide, tmp_path / "out", quantization=how, policy=[*policies, f"p={trained}"], policy_base="reference")
    margins = {name: scores(tmp_path / "out", name)["margins"].abs().max() for name in ("trained", "still", "same")}
    assert margins["trained"] > 1e-3  # type: ignore[operator]
    assert margins["still"] < 1e-5  # type: ignore[operator]
    assert margins["same"] == 0.0


@pytest.mark.parametrize("how", HOW)
def test_a_quantised_checkpoint_is_read_as_its_config_says(
    how: str, runner: Runner, wide: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        wide["policy"], quantization_config=CONFIGS[how], device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "saved")
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    found = run(runner, wide, tmp_path / "a/out", policy=[f"p={tmp_path / 'saved'}"], batch_tokens=1)
    twin = run(runner, wide, tmp_path / "b/out", quantization=how, batch_tokens=1)
    assert found["policy_chosen_logps"].to_list() == pytest.approx(twin["policy_chosen_logps"].to_list(), abs=1e-3)
    assert found["ref_chosen_logps"].to_list() == pytest.approx(computed(wide["reference"], None), abs=1e-3)
    weights = [open_out(str(tmp_path / f"{x}/out"))[1].identities.policies["p"]["weights"] for x in "ab"]
    assert weights[0] != weights[1]


def test_the_fast_path_is_judged_anew_for_quantised_weights(
    runner: Runner, wide: dict[str, Path], tmp_path: Path
) -> None:
    """int8 rounds each row of a product by its largest entry, so what shares a pass matters: it is refused."""
    for how, path in ((None, "fast"), ("int8", "plain")):
        run(runner, wide, tmp_path / str(how) / "out", quantization=how, path="auto")
        manifest = open_out(str(tmp_path / str(how) / "out"))[1]
        assert manifest.numerics["run"]["path"] == path


def test_in_memory_scores_are_quantised_too(runner: Runner, wide: dict[str, Path], tmp_path: Path) -> None:
    models = {"reference": wide["reference"], "policy": wide["policy"]}
    found = score(ROWS, **models, quantization="nf4", path="plain", cache_dir=runner.cache)
    assert found["margins"].to_list() == run(runner, wide, tmp_path / "out", quantization="nf4")["margins"].to_list()


def test_trl_is_not_asked_to_quantise(runner: Runner, wide: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    run(runner, wide, tmp_path / "out", quantization="nf4")
    with pytest.raises(UsageError, match="quantised its models at load"):
        comparison(str(tmp_path / "out"), "trl", 2)
