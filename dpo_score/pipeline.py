"""File + environment + options → one `RunConfig`.

Promises: an unknown key is an error with the nearest known one; a later source overrides an earlier one key
by key, whatever the value; errors name the file. Does not look at data or models.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dpo_score.config import DataSpec, ModelSpec, PolicySpec, RunConfig
from dpo_score.errors import ConfigError, nearest
from dpo_score.options import BY_NAME, OPTIONS

Tree = dict[str, Any]
ENV_PREFIX = "DPO_SCORE_"
DATA_DEFAULTS = tuple(option.path[2] for option in OPTIONS if option.path[:2] == ("data", "*"))


def load_config(
    file: str | None, options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> RunConfig:
    """One configuration. `options`: by name of `options.OPTIONS`, only those that were set."""
    tree: Tree = _read_file(file) if file else {}
    environment = os.environ if environment is None else environment
    for option in OPTIONS:
        value = environment.get(ENV_PREFIX + option.name.upper())
        if value is not None and option.name != "cache_dir":
            _place(tree, option.name, value.split(";") if option.type == list[str] else value)
    for name, value in options.items():
        _place(tree, name, value)
    return validated(tree, source=file or "the command line")


def validated(tree: Tree, source: str) -> RunConfig:
    """Normalise the short spellings and check; raises ConfigError naming key, value and the nearest known key."""
    tree = dict(tree)
    defaults = tree.pop("_data_defaults", {})
    tree["data"] = [_with_defaults(item, defaults) for item in _named_list(tree.get("data"), "path", "data")]
    tree["policies"] = _expand(_named_list(tree.get("policies"), "model", "policy"))
    for section, key in (("reference", "model"), ("loss", "name")):
        if isinstance(tree.get(section), str):
            tree[section] = {key: tree[section]}
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(item) for item in error.errors())) from None


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to the same configuration."""
    tree = json.loads(config.model_dump_json(exclude_defaults=True))
    for key in ("data", "policies"):
        if key in tree:
            tree[key] = {item.pop("name"): item for item in tree[key]}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _read_file(file: str) -> Tree:
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"pipeline file {file!r} does not exist (looked at {path.absolute()})")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a pipeline file is a mapping of keys; this one holds a {type(tree).__name__}")
    flat = {key: tree.pop(key) for key in list(tree) if _is_flat(key)}
    for key, value in flat.items():
        _place(tree, key, value)
    return tree


def _is_flat(key: str) -> bool:
    option = BY_NAME.get(key)
    return option is not None and key not in RunConfig.model_fields


def _place(tree: Tree, name: str, value: Any) -> None:
    """Put one option's value where it belongs, keeping what stands beside it."""
    path = BY_NAME[name].path
    if name in ("data", "policy"):
        tree[path[0]] = _assignments(value)
        return
    if path[:2] == ("data", "*"):
        tree.setdefault("_data_defaults", {})[path[2]] = _split_names(path[2], value)
        return
    section = tree
    for step in path[:-1]:
        if isinstance(section.get(step), str):
            section[step] = {"model" if step == "reference" else "name": section[step]}
        section[step] = dict(section.get(step) or {})
        section = section[step]
    section[path[-1]] = _typed(name, value)


def _typed(name: str, value: Any) -> Any:
    if name == "loss_param":
        return loss_params(value)
    if name == "chat_template_kwargs" and isinstance(value, str):
        return _json_object(value)
    if name == "batch_tokens" and isinstance(value, str) and value.isdigit():
        return int(value)
    return value


def loss_params(items: Iterable[str]) -> Tree:
    """`KEY=VALUE` strings, values read as YAML scalars."""
    return {key: yaml.safe_load(value) for key, value in (_key_value(item, "--loss-param") for item in items)}


def _json_object(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--chat-template-kwargs takes a JSON object; {value!r} is not JSON: {error}") from None


def _key_value(item: str, flag: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(f"{flag} takes KEY=VALUE; got {item!r}")
    return key, value


def _split_names(key: str, value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if key == "split" and isinstance(value, str) else value


def _assignments(values: Any) -> list[Any]:
    """`NAME=PATH` or `PATH` strings as mappings; anything else unchanged."""
    return [_assignment(value) if isinstance(value, str) else value for value in values]


def _assignment(text: str) -> Tree:
    match = re.match(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,79})=(.+)", text, re.DOTALL)
    return {"name": match[1], "_target": match[2]} if match else {"_target": text}


def _named_list(value: Any, target: str, kind: str) -> list[Tree]:
    """A mapping name → entry, a list of entries, or one path; every entry ends with a name."""
    if value is None:
        return []
    if isinstance(value, str):
        value = [_assignment(value)]
    if not isinstance(value, Mapping | list | tuple):
        raise ConfigError(f"{kind}: expected a path, a list or a mapping of names, got {value!r}")
    if isinstance(value, Mapping):
        value = [{"name": str(name), **_entry(item)} for name, item in value.items()]
    entries = [_entry(_assignment(item) if isinstance(item, str) else item) for item in value]
    return [_named(entry, target, kind) for entry in entries]


def _entry(item: Any) -> Tree:
    if isinstance(item, str):
        return {"_target": item}
    if not isinstance(item, Mapping):
        raise ConfigError(f"expected a path or a mapping, got {item!r}")
    return dict(item)


def _named(entry: Tree, target: str, kind: str) -> Tree:
    value = entry.pop("_target", None)
    if value is not None:
        model, plus, adapter = value.partition("+") if kind == "policy" else (value, "", "")
        if plus and adapter and not Path(value).exists():
            entry["adapter"], value = adapter, model
        entry[target] = value
    path = str(entry.get("adapter") or entry.get(target) or "")
    entry.setdefault("name", _stem(path))
    return entry


def _stem(path: str) -> str:
    name = Path(path.rstrip("/")).name.split(".parquet")[0].split(".json")[0] or "data"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "data"


def _with_defaults(entry: Tree, defaults: Tree) -> Tree:
    return {**{k: v for k, v in defaults.items() if k not in entry or entry[k] is None}, **_not_none(entry, defaults)}


def _not_none(entry: Tree, defaults: Tree) -> Tree:
    return {k: v for k, v in entry.items() if not (v is None and k in defaults)}


def _expand(policies: list[Tree]) -> list[Tree]:
    """Globs become one policy a checkpoint, in natural order (checkpoint-9 before checkpoint-10)."""
    return [policy for entry in policies for policy in _expand_one(entry)]


def _expand_one(entry: Tree) -> list[Tree]:
    key = "adapter" if any(c in str(entry.get("adapter") or "") for c in "*?[") else "model"
    pattern = str(entry.get(key) or "")
    if not any(c in pattern for c in "*?["):
        return [entry]
    # pathlib cannot glob an absolute pattern
    found = sorted((p for p in glob.glob(pattern) if Path(p).is_dir()), key=_natural)  # noqa: PTH207
    if not found:
        raise ConfigError(f"policy {entry['name']!r}: no folder matches {pattern!r}")
    return [{**entry, key: path, "name": f"{entry['name']}-{_suffix(path)}", "glob": pattern} for path in found]


def _suffix(path: str) -> str:
    number = re.search(r"(\d+)$", Path(path).name)
    return number[1] if number else _stem(path)


def _natural(text: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _explain(error: Any) -> str:
    """One validation error: the key, the value seen, and the nearest known key for an unknown one."""
    where = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        return f"unknown key {where!r}: {nearest(str(key), _known_keys(parents))}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {error['input']!r:.200})" if where else message


def _known_keys(parents: list[Any]) -> list[str]:
    model: type[BaseModel] = RunConfig
    nested: dict[str, type[BaseModel]] = {"data": DataSpec, "policies": PolicySpec, "reference": ModelSpec}
    for step in parents:
        if isinstance(step, int):
            continue
        model = nested.get(step) or _field_model(model, step)
    flat = [option.name for option in OPTIONS] if model is RunConfig else []
    return [*model.model_fields, *flat]


def _field_model(model: type[BaseModel], step: str) -> type[BaseModel]:
    annotation = model.model_fields[step].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
