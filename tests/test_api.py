"""The package as a library: its public names, and `score` on what a program holds in memory."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import polars as pl
import pyarrow as pa
import pytest
import torch
from polars.testing import assert_frame_equal
from transformers import AutoModelForCausalLM

import dpo_score
from dpo_score.api import OF_RUNS, RunSettings, ScoreSettings
from dpo_score.errors import ConfigError, DataError, ModelError, UsageError
from tests.exported import chat_rows, text_rows, write_rows
from tests.families import family
from tests.tiny import byte_tokenizer, save_tiny

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "DPOLoss",
    "__version__",
    "dpo_gradients",
    "dpo_loss",
    "evaluate_pairs",
    "get_batch_logps",
    "precompute",
    "rescore",
    "run",
    "score",
    "select",
    "sequence_logps",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_tiny(folder / f"m{seed}", seed=seed)
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def score(pairs: Any, folder: Path, **options: Any) -> pl.DataFrame:
    found: pl.DataFrame = dpo_score.score(pairs, **{"path": "plain", "cache_dir": folder / "cache", **options})
    return found


# --- names ---------------------------------------------------------------------------------------------------------


def test_exported_members() -> None:
    assert set(dpo_score.__all__) == PUBLIC
    assert all(hasattr(dpo_score, name) for name in PUBLIC)
    assert set(dir(dpo_score)) == PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'scores_of'"):
        _ = dpo_score.scores_of


def test_the_version_is_the_project_s() -> None:
    assert dpo_score.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize("statement", ["import dpo_score", "from dpo_score import score, run, precompute, rescore"])
def test_nothing_heavy_is_imported_before_it_is_used(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'pyarrow', 'polars'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", f"import sys; {statement}; assert not {heavy}"], cwd=ROOT, check=True)


def test_run_is_a_function_whatever_was_imported_before(models: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(3))
    options = {"policy": f"p={models / 'm1'}", "out": tmp_path / "out", "path": "plain", "cache_dir": tmp_path / "c"}
    found = dpo_score.run(data=str(data), reference=models / "m0", **options)
    assert found.summary["policies"]["p"]["overall"]["scored"] == 3
    grid = dpo_score.rescore(tmp_path / "out", ["ipo", "sigmoid"], [0.1, 0.5])
    assert [(row["loss_name"], row["beta"]) for row in grid["rows"]] == [
        ("ipo", 0.1), ("ipo", 0.5), ("sigmoid", 0.1), ("sigmoid", 0.5),
    ]  # fmt: skip


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown option 'max_lenght': did you mean 'max_length'"):
        dpo_score.precompute(data="x", max_lenght=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="unknown option 'batch_size': use --batch-tokens"):
        dpo_score.precompute(data="x", batch_size=8)  # type: ignore[call-arg]


def test_every_setting_is_an_argument_with_its_type() -> None:
    """Editors complete from the types, notebooks from the signature; both name every option of the command line."""
    from dpo_score.config.schema import BY_NAME

    own = {"data", "reference", "policy", "out"}
    assert {*RunSettings.__annotations__, *own} == set(BY_NAME)
    assert {*ScoreSettings.__annotations__, "tokenizer", "reference", "policy"} | OF_RUNS == set(BY_NAME)
    for function in (dpo_score.run, dpo_score.precompute):
        assert set(RunSettings.__annotations__) <= set(inspect.signature(function).parameters)
    assert "max_length" in inspect.signature(dpo_score.score).parameters
    for name, kind in get_type_hints(RunSettings).items():
        choices = tuple(get_args(kind)) if get_origin(kind) is Literal else ()
        assert choices == BY_NAME[name].choices, name


EXAMPLES = {
    "dpo_score.api": 20, "dpo_score.losses.evaluate": 2, "dpo_score.losses.torch": 4, "dpo_score.losses.compat": 5,
    # where something new is plugged in: a loss, an exporter, an attention kernel, a setting (a format: test_registry)
    "dpo_score.losses.formulas": 5, "dpo_score.export.layout": 2, "dpo_score.logprobs.attention.interface": 3,
    "dpo_score.config.schema": 1,
}  # fmt: skip


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_of_the_docstrings_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert (found.failed, found.attempted >= EXAMPLES[module]) == (0, True)


def test_every_public_function_has_an_example() -> None:
    functions = [getattr(dpo_score, name) for name in PUBLIC - {"__version__"}]
    assert [function.__name__ for function in functions if ">>>" not in (function.__doc__ or "")] == []


def test_a_run_of_a_table_shows_itself(models: Path, tmp_path: Path) -> None:
    options = {"reference": models / "m0", "path": "plain", "cache_dir": tmp_path / "c", "out": tmp_path / "out"}
    table = pl.DataFrame(text_rows(4))
    found = dpo_score.run(data=table, policy={"a": models / "m1", "b": models / "m0"}, **options)
    assert (found.policies, found.scores("a").height, found.failures) == (["a", "b"], 4, {})
    assert found.report == tmp_path / "out/report.html"
    assert repr(found).startswith("RunResult(")
    assert len(repr(found)) < 300
    shown = found._repr_html_()
    assert "<table>" in shown
    assert "<iframe sandbox" in shown
    assert "<script" not in shown
    with pytest.raises(UsageError, match="no such policy was scored; known: a, b"):
        found.scores()
    before = (tmp_path / "out/scores").rglob("*.parquet")
    times = {path: path.stat().st_mtime_ns for path in before}
    dpo_score.run(data=table, policy={"a": models / "m1", "b": models / "m0"}, **options)
    assert {path: path.stat().st_mtime_ns for path in times} == times


# --- pairs ---------------------------------------------------------------------------------------------------------


def test_any_table_gives_the_same_scores(models: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = text_rows(6)
    table = pa.Table.from_pylist(rows)
    path = write_rows(tmp_path / "pairs.parquet", rows)
    given = [rows, iter(rows), table, pl.DataFrame(table), datasets.Dataset.from_list(rows), table.to_pandas(), path]
    found = [score(pairs, tmp_path, reference=models / "m0", policy=models / "m1") for pairs in given]
    for frame in found[1:]:
        assert_frame_equal(frame.drop("source_file"), found[0].drop("source_file"))
    assert found[0]["subset"].to_list() == [row["subset"] for row in rows]


def test_scores_are_those_of_a_run(models: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.parquet", text_rows(6))
    options = {"path": "plain", "cache_dir": tmp_path / "other", "beta": 0.3}
    dpo_score.run(
        data=f"pairs={data}", reference=models / "m0", policy=f"p={models / 'm1'}", out=tmp_path / "out", **options
    )
    table = pa.Table.from_pylist(text_rows(6))
    found = score(table, tmp_path, reference=models / "m0", policy=models / "m1", beta=0.3)
    assert_frame_equal(found, pl.read_parquet(tmp_path / "out/scores/p/*.parquet", glob=True))


def test_a_row_that_cannot_be_scored_keeps_its_place(models: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = text_rows(4)
    rows[1]["chosen"] = None
    found = score(rows, tmp_path, reference=models / "m0", policy=models / "m1")
    assert found["status"].to_list() == ["scored", "null_field", "scored", "scored"]
    assert found["loss"].is_null().to_list() == [False, True, False, False]


def test_several_policies_stand_one_after_the_other(models: Path, tmp_path: Path) -> None:
    policies = {"same": models / "m0", "other": models / "m1"}
    found = score(text_rows(3), tmp_path, reference=models / "m0", policy=policies)
    assert found["policy"].to_list() == ["same"] * 3 + ["other"] * 3
    assert found["margins"].to_list()[:3] == [0.0] * 3
    assert found["loss"].to_list()[:3] == [math.log(2)] * 3


@pytest.mark.parametrize("pairs", [3, {"prompt": "a"}, [3], [{"prompt": {1, 2}}]])
def test_what_is_no_table_of_pairs(pairs: Any, models: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pairs "):
        score(pairs, tmp_path, policy=models / "m0", loss="simpo")


@pytest.mark.parametrize("option", [{"limit": 2}, {"rewardbench": "exact"}, {"out": "x"}])
def test_an_option_that_would_be_ignored_is_refused(option: dict[str, Any], models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"takes no '{next(iter(option))}'"):
        score(text_rows(3), tmp_path, reference=models / "m0", policy=models / "m1", **option)


# --- loaded models -------------------------------------------------------------------------------------------------


def test_a_loaded_model_scores_as_its_folder_does(models: Path, tmp_path: Path) -> None:
    by_name = score(chat_rows(5), tmp_path, reference=models / "m0", policy=models / "m1")
    held = score(chat_rows(5), tmp_path, reference=loaded(models / "m0"), policy=loaded(models / "m1"))
    mixed = score(chat_rows(5), tmp_path, reference=models / "m0", policy=loaded(models / "m1"))
    assert_frame_equal(held, by_name, abs_tol=1e-4)
    assert_frame_equal(mixed, by_name, abs_tol=1e-4)


def test_a_loaded_model_is_left_as_it_was_found(models: Path, tmp_path: Path) -> None:
    model = loaded(models / "m0").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    embedding = model.model.embed_tokens.weight
    embedding.grad = torch.ones_like(embedding)
    before = state_of(model)
    score(text_rows(3), tmp_path, reference=models / "m0", policy=model, path="auto")
    assert state_of(model) == before
    assert torch.equal(embedding.grad, torch.ones_like(embedding))
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def state_of(model: Any) -> Any:
    attention = model.config._attn_implementation
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        attention,
    )


def test_a_policy_that_needs_the_plain_path_is_scored_on_it(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family("bloom", 1).save_pretrained(tmp_path / "bloom")
    byte_tokenizer().save_pretrained(tmp_path / "bloom")
    how: dict[str, Any] = {"reference": models / "m0", "policy": tmp_path / "bloom"}
    found = score(text_rows(4), tmp_path, path="fast", **how)
    assert capsys.readouterr().err.count("scored on the plain path, which is slower") == 1
    assert_frame_equal(found, score(text_rows(4), tmp_path, **how), abs_tol=1e-4)


def test_the_base_of_an_adapter_is_its_reference(models: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    policy = peft.get_peft_model(loaded(models / "m0"), settings, adapter_name="one")
    policy.add_adapter("two", settings)
    policy.set_adapter("two")
    before = state_of(policy)
    found = score(text_rows(4), tmp_path, reference="base", policy=policy, tokenizer=models / "m0")
    assert policy.active_adapter == "two"
    assert state_of(policy) == before
    apart = score(text_rows(4), tmp_path, reference=models / "m0", policy=policy, tokenizer=str(models / "m0"))
    assert_frame_equal(found, apart, abs_tol=1e-4)
    assert found["margins"].abs().max() > 1e-3


def test_one_model_against_itself_is_a_tie(models: Path, tmp_path: Path) -> None:
    model = loaded(models / "m0")
    assert set(score(text_rows(3), tmp_path, reference=model, policy=model)["margins"]) == {0.0}


def test_what_a_loaded_model_lacks(models: Path, tmp_path: Path) -> None:
    model = loaded(models / "m0")
    with pytest.raises(ConfigError, match="give reference"):
        score(text_rows(2), tmp_path, policy=model)
    with pytest.raises(ModelError, match="no PEFT model"):
        score(text_rows(2), tmp_path, policy=model, reference="base")
    with pytest.raises(ConfigError, match="one loaded PEFT model"):
        score(text_rows(2), tmp_path, policy=models / "m0", reference="base")
    model.config.name_or_path = model.name_or_path = ""
    with pytest.raises(ModelError, match="where its tokenizer is"):
        score(text_rows(2), tmp_path, policy=model, loss="simpo")
