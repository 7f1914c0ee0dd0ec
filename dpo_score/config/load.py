"""File + environment + options → one `RunConfig`.

Promises: an unknown key is an error with the nearest known one; a later source overrides an earlier one key
by key, whatever the value; errors name the file. Does not look at data or models.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dpo_score.config.checkpoint_glob import expanded, stem
from dpo_score.config.options import BY_NAME, OPTIONS
from dpo_score.config.schema import DataSpec, ModelSpec, PolicySpec, RunConfig
from dpo_score.errors import ConfigError, nearest

Tree = dict[Any, Any]
ENV_PREFIX = "DPO_SCORE_"
SHORT = {"reference": "model", "loss": "name"}
"""Sections that may be one string, and the key that it stands for."""
SECTIONS = (*SHORT, "text", "compute")
_TARGET, _ALL_SETS = ("target",), ("data", "*")  # tuples: no key of a file is one


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
    try:
        return RunConfig.model_validate(_written_out(tree))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _written_out(tree: Tree) -> Tree:
    """`tree` without short spellings: sections are mappings, sets and policies are lists, globs are looked up."""
    found = {name: value for name, value in tree.items() if name not in SECTIONS or value is not None}
    defaults = found.pop(_ALL_SETS, {})
    found |= {name: _section(name, found[name]) for name in SECTIONS if name in found}
    found["data"] = [_with_defaults(item, defaults) for item in _named_list(tree.get("data"), "path", "data")]
    policies = _named_list(tree.get("policies"), "model", "policies")
    found["policies"] = [policy for entry in policies for policy in expanded(entry)]
    return found


def _section(name: str, value: Any) -> Tree:
    """One section as a mapping of its own: null is empty, and a string is the key that SHORT names."""
    if isinstance(value, str) and name in SHORT:
        return {SHORT[name]: value}
    if value is not None and not isinstance(value, Mapping):
        key = next(option.path[1] for option in OPTIONS if option.path[0] == name)
        raise ConfigError(f"{name}: a section is a mapping of keys, {name}: {{{key}: …}}; got {value!r:.200}")
    return dict(value or {})


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a YAML file: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"pipeline file {file!r} cannot be read: {error.strerror or error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a pipeline file is a mapping of keys; this one holds a {type(tree).__name__}")
    try:
        return _with_flat_keys(tree)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _with_flat_keys(tree: Tree) -> Tree:
    """`tree` with its flat keys put into sections, and every section a mapping, so that options can be laid over it."""
    flat = {key: tree.pop(key) for key in list(tree) if _is_flat(key)}
    tree |= {name: _section(name, tree[name]) for name in SECTIONS if tree.get(name) is not None}
    for key, value in flat.items():
        _place(tree, key, value)
    return tree


def _is_flat(key: Any) -> bool:
    option = BY_NAME.get(key)
    return option is not None and key not in RunConfig.model_fields


def _place(tree: Tree, name: str, value: Any) -> None:
    """Put one option's value where it belongs, keeping what stands beside it."""
    path = BY_NAME[name].path
    if name in ("data", "policy"):
        tree[path[0]] = _assignments(value)
        return
    if path[:2] == _ALL_SETS:
        tree.setdefault(_ALL_SETS, {})[path[2]] = _split_names(path[2], value)
        return
    section = tree
    for step in path[:-1]:
        section[step] = _section(step, section.get(step))
        section = section[step]
    section[path[-1]] = _typed(name, value)


def _typed(name: str, value: Any) -> Any:
    if name == "loss_param":
        return loss_params(value)
    if name == "chat_template_kwargs" and isinstance(value, str):
        return _json_object(value)
    if name == "batch_tokens" and isinstance(value, str) and value.isdecimal():
        return int(value)
    return value


def loss_params(items: Any) -> Tree:
    """`KEY=VALUE` strings, or one; values read as YAML scalars."""
    items = [items] if isinstance(items, str) else items
    if not isinstance(items, list | tuple):
        raise ConfigError(f"--loss-param takes KEY=VALUE, or a list of such; got {items!r:.200}")
    return dict(_loss_param(item) for item in items)


def _loss_param(item: Any) -> tuple[str, float | int | bool | str]:
    key, equals, text = item.partition("=") if isinstance(item, str) else ("", "", "")
    if not equals:
        raise ConfigError(f"--loss-param takes KEY=VALUE; got {item!r:.200}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if not isinstance(value, float | int | str):
        raise ConfigError(f"--loss-param {key} takes a number, true, false or a name; got {text!r:.200}")
    return key, value


def _json_object(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--chat-template-kwargs takes a JSON object; {value!r:.200} is not JSON: {error}") from None


def _split_names(key: str, value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if key == "split" and isinstance(value, str) else value


def _assignments(values: Any) -> Any:
    """`NAME=PATH` or `PATH` strings, one or a list, as mappings; anything else unchanged."""
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list | tuple):
        return values
    return [_assignment(value) if isinstance(value, str) else value for value in values]


def _assignment(text: str) -> Tree:
    match = re.match(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,79})=(.+)", text, re.DOTALL)
    return {"name": match[1], _TARGET: match[2]} if match else {_TARGET: text}


def _named_list(value: Any, target: str, kind: str) -> list[Tree]:
    """A mapping name → entry, a list of entries, or one path; every entry ends with a name."""
    if value is None:
        return []
    if isinstance(value, str):
        value = [_assignment(value)]
    if isinstance(value, Mapping):
        entries = [{"name": str(name), **_entry(item, f"{kind}.{name}")} for name, item in value.items()]
    elif isinstance(value, list | tuple):
        pairs = enumerate(_assignments(value))
        entries = [_entry(item, f"{kind}.{index}") for index, item in pairs]
    else:
        raise ConfigError(f"{kind}: expected a path, a list or a mapping of names; got {value!r:.200}")
    return [_named(entry, target, kind) for entry in entries]


def _entry(item: Any, where: str) -> Tree:
    if isinstance(item, str | os.PathLike):
        return {_TARGET: os.fspath(item)}
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where}: expected a path, or a mapping of its keys; got {item!r:.200}")
    return dict(item)


def _named(entry: Tree, target: str, kind: str) -> Tree:
    value = entry.pop(_TARGET, None)
    if value is not None:
        model, plus, adapter = value.partition("+") if kind == "policies" else (value, "", "")
        if plus and adapter and not os.path.exists(value):  # noqa: PTH110  False where pathlib raises: a name too long
            entry["adapter"], value = adapter, model
        entry[target] = value
    path = str(entry.get("adapter") or entry.get(target) or "")
    entry.setdefault("name", stem(path))
    return entry


def _with_defaults(entry: Tree, defaults: Tree) -> Tree:
    return {**{k: v for k, v in defaults.items() if k not in entry or entry[k] is None}, **_not_none(entry, defaults)}


def _not_none(entry: Tree, defaults: Tree) -> Tree:
    return {k: v for k, v in entry.items() if not (v is None and k in defaults)}


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
