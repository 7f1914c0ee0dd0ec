"""File + environment + options → one configuration."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from dpo_score.config.load import dump_config, load_config
from dpo_score.config.schema import OPTIONS, Option
from dpo_score.errors import ConfigError

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
        ("data: x\npolicies: {p: null}", "policies.p: expected a path, or a mapping of its keys; got None"),
        ("data: x\npolicies: [5]", "policies.0: expected a path"),
        ("data: 5", "data: expected a path, a list or a mapping of names; got 5"),
        ("data: x\npolicies: 5", "policies: expected a path, a list or a mapping of names; got 5"),
        ("data: x\npolicies: {p: {_target: 5}}", "unknown key 'policies.0._target'"),
        ("data: x\n_data_defaults: 5", "unknown key '_data_defaults'"),
        ("data: x\nloss_param: 5", "--loss-param takes KEY=VALUE, or a list of such; got 5"),
        ("data: x\nloss_param: [5]", "--loss-param takes KEY=VALUE; got 5"),
        ("data: 2024-13-45", "not a YAML file: month must be in"),
        ("data: " + "[" * 2000, "not a YAML file"),
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


WRONG = ("3", "[1]", "[[a, b]]", "true", "2024-07-26", "!!binary aGk=")
SECTIONS = ("reference", "loss", "text", "compute")
VALUES = {int: 3, float: 0.5, bool: True, str: "x", list[str]: ["a=1"]}


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("option", [o for o in OPTIONS if o.path[0] in SECTIONS], ids=lambda o: o.name)
def test_a_section_that_is_no_mapping_is_named_whatever_is_laid_over_it(
    option: Option, value: str, tmp_path: Path
) -> None:
    section = option.path[0]
    (tmp_path / "bad.yaml").write_text(f"data: x\n{section}: {value}\n")
    for options in ({}, {option.name: VALUES[option.type]}):
        with pytest.raises(ConfigError, match=rf"bad.yaml: {section}: a section is a mapping .*; got ") as error:
            load_config(str(tmp_path / "bad.yaml"), options, {})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [*WRONG, "{a: {b: c}}", "{1: 2}", "[{a: b}]", '"a\\0*"', "{}", "''"])
@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.name)
def test_a_value_of_a_wrong_type_is_no_traceback(option: Option, value: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(f"{'' if option.name == 'data' else 'data: x'}\n{option.name}: {value}\n")
    with suppress(ConfigError):
        load_config(str(tmp_path / "odd.yaml"), {}, {})
    given = yaml.safe_load(value)
    with suppress(ConfigError):
        load_config(None, {"data": ["x"], option.name: given}, {})


@pytest.mark.parametrize("section", SECTIONS)
def test_an_empty_section_is_as_if_left_out(section: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"data: x\n{section}:\n")
    assert load_config(str(tmp_path / "job.yaml"), {}, {}) == load_config(None, {"data": ["x"]}, {})


def test_a_short_section_keeps_its_word_under_an_option(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("data: x\nreference: some/model\nloss: ipo\n")
    config = load_config(str(tmp_path / "job.yaml"), {"reference_revision": "v1", "beta": 0.2}, {})
    assert config.reference is not None
    assert (config.reference.model, config.reference.revision) == ("some/model", "v1")
    assert (config.loss.name, config.loss.beta) == ("ipo", 0.2)


@pytest.mark.parametrize("policy", ["p=m", "[p=m]", "{p: m}", "{p: {model: m}}"])
def test_a_policy_is_one_string_a_list_or_a_mapping(policy: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"data: x\npolicy: {policy}\n")
    config = load_config(str(tmp_path / "job.yaml"), {}, {})
    assert [(p.name, p.model) for p in config.policies] == [("p", "m")]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text("data: x\n")

    def refused(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(ConfigError, match=r"job\.yaml' cannot be read: Permission denied"):
        load_config(str(tmp_path / "job.yaml"), {}, {})


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
    assert load_config(None, {"data": ["a"], "loss_param": "ld_alpha=0.5"}, {}).loss.params == {"ld_alpha": 0.5}
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load_config(None, {"data": ["a"], "loss_param": ["ld_alpha"]}, {})


@pytest.mark.parametrize(
    "value", ["[1", "[1]", "{a: 1}", "", "2024-07-26", "2024-13-45", "!!python/name:os.system", "["]
)
def test_a_loss_parameter_that_is_no_scalar_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--loss-param lambda takes a number, .*; got '") as error:
        load_config(None, {"data": ["a"], "loss_param": [f"lambda={value}"]}, {})
    assert "\n" not in str(error.value)
