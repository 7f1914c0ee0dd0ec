"""Rows are cut to the reference's limit; a policy with fewer positions fails alone, and before it is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import AutoModelForCausalLM

import dpo_score
from dpo_score.errors import ConfigError, ModelError, PolicyFailedError
from tests.families import family
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import byte_tokenizer, save_tiny

SHORT = 32


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Learned positions and rotary ones, both up to SHORT."""
    root = tmp_path_factory.mktemp("short")
    family("gpt2", 3, n_positions=SHORT, max_position_embeddings=SHORT).save_pretrained(root / "gpt2")
    byte_tokenizer().save_pretrained(root / "gpt2")
    return {"gpt2": root / "gpt2", "llama": save_tiny(root / "llama", seed=4, max_position_embeddings=SHORT)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", preference_rows(70))


def scores(out: Path, policy: str) -> pl.DataFrame:
    return pl.read_parquet(f"{out}/scores/{policy}/*.parquet")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_policy_with_fewer_positions_fails_alone(
    kind: str, runner: Any, short: dict[str, Path], data: Path, tmp_path: Path, forwards: list[int]
) -> None:
    better = f"better={runner.models['better']}"
    alone = runner(data, tmp_path / "alone", policy=[better])
    forwards.clear()
    found = runner(data, tmp_path / "out", policy=[f"short={short[kind]}", better])
    assert forwards == []
    with pytest.raises(PolicyFailedError, match=rf"takes 32 tokens of .*row 0:\d+ has 1\d\d: say --max-length {SHORT}"):
        found.raise_failures()
    assert list(found.failures) == ["short"]
    assert found.summary["policies"]["better"] == alone.summary["policies"]["better"]
    assert scores(tmp_path / "out", "better").equals(scores(tmp_path / "alone", "better"))
    assert not (tmp_path / "out/scores/short").exists()


def test_the_length_that_is_named_lets_it_be_scored(
    runner: Any, short: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    policies = [f"short={short['gpt2']}"]
    assert not runner(data, tmp_path / "out", policy=policies, max_length=SHORT).failures
    assert scores(tmp_path / "out", "short")["chosen_truncated"].any()


def test_rows_that_fit_are_scored(runner: Any, short: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b" * (SHORT - 2), "rejected": "c"}] * 3
    data = write_rows(tmp_path / "pairs.parquet", rows)
    assert not runner(data, tmp_path / "out", policy=[f"short={short['gpt2']}"]).failures
    assert scores(tmp_path / "out", "short").height == 3


def test_masked_rows_count_with_all_their_tokens(runner: Any, short: dict[str, Path], tmp_path: Path) -> None:
    """Stage one keeps the number of scored tokens alone, so these are found out at their block."""
    sides = {side: [1, 2, *range(3, 40)] for side in ("chosen_input_ids", "rejected_input_ids")}
    labels = {side.replace("input_ids", "labels"): [-100] * 38 + ids[38:] for side, ids in sides.items()}
    data = write_rows(tmp_path / "ids.parquet", [{**sides, **labels}] * 2)
    found = runner(data, tmp_path / "out", policy=[f"short={short['gpt2']}"])
    assert "row 0:0 has 39" in found.failures["short"]


def test_a_reference_of_a_policys_own_is_held_to_it(
    runner: Any, short: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    from dpo_score.config.schema import ModelSpec, PolicySpec
    from dpo_score.engine.progress import Progress
    from dpo_score.engine.run import run

    policy = PolicySpec(name="p", model=str(runner.models["better"]), reference=ModelSpec(model=str(short["gpt2"])))
    config = runner.config(data, tmp_path / "out").model_copy(update={"policies": (policy,)})
    with pytest.raises(ModelError, match="takes 32 tokens"):
        run(config, Progress(quiet=True))


def test_score_refuses_before_it_computes(
    runner: Any, short: dict[str, Path], tmp_path: Path, forwards: list[int]
) -> None:
    how: dict[str, Any] = {"reference": runner.models["reference"], "cache_dir": tmp_path / "cache", "path": "plain"}
    for policy in (short["gpt2"], AutoModelForCausalLM.from_pretrained(short["gpt2"])):
        with pytest.raises(ModelError, match="takes 32 tokens of prompt and answer at most"):
            dpo_score.score(preference_rows(20), policy=policy, **how)
    assert forwards == []


def test_a_longer_length_by_name_is_computed_and_its_meaning_said(
    runner: Any, short: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotary positions go on beyond what config.json states; a table of positions has an end."""
    asked = {"reference": None, "loss": "orpo", "max_length": 200}
    assert not runner(data, tmp_path / "rotary", policy=[f"short={short['llama']}"], **asked).failures
    said = " ".join(capsys.readouterr().err.split())
    assert "--max-length 200 is more than the 32 tokens" in said
    assert "was not trained on" in said
    found = scores(tmp_path / "rotary", "short")
    assert not found["chosen_truncated"].any()
    longest = found.filter(pl.col("prompt_tokens") + pl.col("chosen_tokens") > 4 * SHORT)
    assert len(longest) > 0
    with pytest.raises(ConfigError, match="more than the model's own limit of 32"):
        runner(data, tmp_path / "table", policy=[f"short={short['gpt2']}"], **asked)
