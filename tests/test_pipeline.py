"""File + environment + options → one configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_score.errors import ConfigError
from dpo_score.options import OPTIONS
from dpo_score.pipeline import dump_config, load_config

FILE = """
data:
  one: {path: a.parquet, format: auto, split: null}
reference: {model: some/model, revision: null, adapter: null}
policies:
  p: {adapter: adapters/p, base: reference}
loss: {name: ipo, beta: null, label_smoothing: null, params: {}}
text: {max_length: 512, render: auto}
compute: {engine: local, dtype: auto, compile: on}
out: runs/x
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "job.yaml").write_text(FILE)
    return str(tmp_path / "job.yaml")


def test_the_file_alone(file: str) -> None:
    config = load_config(file, {}, {})
    assert (config.data[0].name, config.loss.name, config.text.max_length) == ("one", "ipo", 512)
    assert config.compute.compile == "on"


def test_an_option_overrides_the_environment_which_overrides_the_file(file: str) -> None:
    environment = {"DPO_SCORE_MAX_LENGTH": "256", "DPO_SCORE_BETA": "0.3"}
    assert load_config(file, {}, environment).text.max_length == 256
    config = load_config(file, {"max_length": 128}, environment)
    assert (config.text.max_length, config.loss.beta) == (128, 0.3)


def test_false_and_zero_override(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("data: a.parquet\nstrict_env: true\nseed: 7\n")
    config = load_config(str(tmp_path / "job.yaml"), {"strict_env": False, "seed": 0}, {})
    assert (config.strict_env, config.seed) == (False, 0)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.type in (int, float, bool)], ids=lambda o: o.name)
def test_every_plain_option_is_also_a_key_of_the_file(option: object, tmp_path: Path) -> None:
    name, kind = option.name, option.type  # type: ignore[attr-defined]
    value = {int: 3, float: 0.5, bool: True}[kind]
    (tmp_path / "job.yaml").write_text(f"data: a.parquet\nreference: m\n{name}: {str(value).lower()}\n")
    by_file = load_config(str(tmp_path / "job.yaml"), {}, {})
    by_option = load_config(None, {"data": ["a.parquet"], "reference": "m", name: value}, {})
    assert by_file == by_option


def test_the_dump_reads_back_to_the_same(file: str, tmp_path: Path) -> None:
    config = load_config(file, {"data": ["x=a.parquet", "y=b.jsonl"], "policy": ["q=m+ad"], "split": "train,test"}, {})
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "again.yaml"), {}, {}) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta: a", r"unknown key 'dta': did you mean 'data'\?"),
        ("data: {a: {path: x, formt: y}}", r"unknown key 'data.0.formt': did you mean 'format'\?"),
        ("data: x\ncompute: {dtype: float8}", "compute.dtype: Input should be 'auto'"),
        ("data: x\npolicies: {.p: {model: m}}", "without a leading dot"),
        ("data: x\npolicies: {p: {base: reference}}", "names neither a model nor an adapter"),
        ("[1, 2]", "a pipeline file is a mapping"),
        ("data: [", "not a YAML file"),
        ("out: x", "no data: name at least one set"),
        ("data: [a.parquet, a.parquet]", "data set name used twice: a"),
        ("data: {a: !!python/object/apply:os.system [ls]}", "not a YAML file"),
    ],
)
def test_a_mistake_is_one_paragraph_naming_the_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(tmp_path / "bad.yaml"), {}, {})
    assert "bad.yaml" in str(error.value)


def test_a_glob_becomes_one_policy_a_checkpoint_in_natural_order(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    config = load_config(None, {"data": ["a"], "policy": [f"sft={tmp_path}/checkpoint-*"]}, {})
    assert [policy.name for policy in config.policies] == ["sft-9", "sft-10", "sft-100"]
    with pytest.raises(ConfigError, match="no folder matches"):
        load_config(None, {"data": ["a"], "policy": [f"sft={tmp_path}/nothing-*"]}, {})


def test_loss_parameters_are_typed() -> None:
    config = load_config(None, {"data": ["a"], "loss_param": ["ld_alpha=0.5", "wpo=true"]}, {})
    assert config.loss.params == {"ld_alpha": 0.5, "wpo": True}
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load_config(None, {"data": ["a"], "loss_param": ["ld_alpha"]}, {})
