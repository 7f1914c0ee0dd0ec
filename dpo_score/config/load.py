"""Pipeline file + environment variables + options → one `RunConfig`.

A later source overrides an earlier one key by key, whatever the value (`false` and 0 override, too); an unknown key is
an error with the nearest known one; errors name the file. Data and models are not opened here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dpo_score.config.checkpoint_glob import expanded, policy_stem
from dpo_score.config.hints import meant_by
from dpo_score.config.schema import BY_NAME, OPTIONS, RunConfig, Spec, section_of
from dpo_score.errors import ConfigError
from dpo_score.escape import without_secrets

Tree = dict[Any, Any]
"""A pipeline file as it was read: nested mappings, lists and scalars."""
ENV_PREFIX = "DPO_SCORE_"
SHORT = {"reference": "model", "loss": "name"}
"""Sections that may be one string, and the key that it is the value of."""
SECTIONS = (*SHORT, "text", "compute")
_TARGET, _EVERY_SET = ("target",), ("data", "*")  # tuples: no key of a file is one


def load_config(
    file: str | None, options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> RunConfig:
    """One configuration. `options`: by name of `schema.OPTIONS`, only those that were set. Raises ConfigError."""
    tree: Tree = _read_file(file) if file else {}
    environment = os.environ if environment is None else environment
    for option in OPTIONS:
        value = environment.get(ENV_PREFIX + option.name.upper())
        if value is not None and option.name != "cache_dir":
            _set_option(tree, option.name, value.split(";") if option.type == list[str] else value)
    for name, value in options.items():
        _set_option(tree, name, value)
    source = file or "the command line"
    try:
        return RunConfig.model_validate(_without_short_forms(tree))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explained(item) for item in error.errors())) from None


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to the same configuration, but for secrets in URLs, which are `***` there."""
    tree = json.loads(config.model_dump_json(exclude_defaults=True))
    for key in ("data", "policies"):
        if key in tree:
            tree[key] = {item.pop("name"): item for item in tree[key]}
    return without_secrets(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def with_secrets_again(config: RunConfig, file: str, environment: Mapping[str, str] | None = None) -> RunConfig:
    """A configuration that `dump_config` wrote, with the URLs of its data as they were given.

    The file has `***` for a password or a token. Whoever reads the data again gives the same URLs once more, in the
    environment variable of --data: the one is taken that is the stored one where its secrets are left out. ConfigError
    where there is none.
    """
    named = ENV_PREFIX + "DATA"
    given = (os.environ if environment is None else environment).get(named, "").split(";")
    whole = {without_secrets(url): url for text in given for url in (text, text.partition("=")[2])}
    sets = []
    for spec in config.data:
        known = whole.get(spec.path, spec.path)
        if "***" in known and "://" in known:
            raise ConfigError(
                f"{file} holds {known} without its password or token: set {named} to the URL that the run was given "
                "(several with ; between them), then run this command again"
            )
        sets.append(spec.model_copy(update={"path": known}))
    return config.model_copy(update={"data": tuple(sets)})


def default_cache_dir() -> Path:
    """DPO_SCORE_CACHE_DIR, else dpo-score under the user's cache folder (XDG_CACHE_HOME)."""
    root = os.environ.get("DPO_SCORE_CACHE_DIR")
    if root and "://" not in root:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-score"


PIPELINE_BYTES, PIPELINE_NODES = 1 << 23, 1_000_000
"""The largest pipeline file that is read, and the most values in it."""


# --- the file ---------------------------------------------------------------------------------------------------------


def _read_file(file: str) -> Tree:
    """A pipeline file. Keys at the top that are options are put into their sections; every section is a mapping."""
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"pipeline file {file!r} does not exist (looked at {path.absolute()})")
    try:
        tree = _bounded_yaml(path)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a YAML file: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"pipeline file {file!r} cannot be read: {error.strerror or error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a pipeline file is a mapping of keys; this one holds a {type(tree).__name__}")
    try:
        flat = {key: tree.pop(key) for key in list(tree) if key in BY_NAME and key not in RunConfig.model_fields}
        tree |= {name: _section(name, tree[name]) for name in SECTIONS if tree.get(name) is not None}
        for key, value in flat.items():
            _set_option(tree, key, value)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return tree


def _bounded_yaml(path: Path) -> Any:
    """The value in a YAML file, which may come from anywhere. ValueError when it is larger than PIPELINE_BYTES, or
    grows beyond PIPELINE_NODES values once its aliases are written out."""
    if path.stat().st_size > PIPELINE_BYTES:
        raise ValueError(f"{path.stat().st_size:,} bytes, more than the {PIPELINE_BYTES:,} that are read")
    loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        sizes: dict[int, int] = {}
        if _written_out(root, sizes) > PIPELINE_NODES:
            raise ValueError(f"its aliases stand for more than {PIPELINE_NODES:,} values")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values below a node with every alias written out; one that holds itself has no end."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = PIPELINE_NODES + 1  # until it is known: met again inside itself
    below = node.value if isinstance(node, yaml.CollectionNode) else ()
    children = [child for item in below for child in (item if isinstance(item, tuple) else (item,))]
    sizes[id(node)] = 1 + sum(_written_out(child, sizes) for child in children)
    return sizes[id(node)]


def _section(name: str, value: Any) -> Tree:
    """One section as a mapping of its own: null is empty, and a string is the key that SHORT names."""
    if isinstance(value, str) and name in SHORT:
        return {SHORT[name]: value}
    if value is not None and not isinstance(value, Mapping):
        key = next(option.path[1] for option in OPTIONS if option.path[0] == name)
        raise ConfigError(f"{name}: a section is a mapping of keys, {name}: {{{key}: …}}; got {value!r:.200}")
    return dict(value or {})


def _without_short_forms(tree: Tree) -> Tree:
    """`tree` with sections as mappings, data sets and policies as lists, BASE+ADAPTER split, globs looked up."""
    found = {name: value for name, value in tree.items() if name not in SECTIONS or value is not None}
    for_every_set = found.pop(_EVERY_SET, {})
    found |= {name: _section(name, found[name]) for name in SECTIONS if name in found}
    reference = found.get("reference")
    if reference and isinstance(reference.get("model"), str) and reference.get("adapter") is None:
        found["reference"] = {**reference, **_base_and_adapter(reference["model"])}
    found["data"] = []
    for entry in _entries(tree.get("data"), "path", "data"):
        given = {key: value for key, value in entry.items() if value is not None or key not in for_every_set}
        found["data"].append({**for_every_set, **given})
    policies = _entries(tree.get("policies"), "model", "policies")
    found["policies"] = [policy for entry in policies for policy in expanded(entry)]
    return found


def _entries(value: Any, target: str, kind: str) -> list[Tree]:
    """Data sets or policies: a mapping name → entry, a list of entries, or one path; each gets a name."""
    if value is None:
        return []
    if isinstance(value, str):
        value = [_assignment(value)]
    if isinstance(value, Mapping):
        entries = [{"name": str(name), **_entry(item, f"{kind}.{name}")} for name, item in value.items()]
    elif isinstance(value, list | tuple):
        entries = [_entry(item, f"{kind}.{index}") for index, item in enumerate(_assignments(value))]
    else:
        raise ConfigError(f"{kind}: expected a path, a list or a mapping of names; got {value!r:.200}")
    for entry in entries:
        path = entry.pop(_TARGET, None)
        if path is not None:
            entry |= _base_and_adapter(path) if kind == "policies" else {target: path}
        entry.setdefault("name", policy_stem(str(entry.get("adapter") or entry.get(target) or "")))
    return entries


def _entry(item: Any, where: str) -> Tree:
    if isinstance(item, str | os.PathLike):
        return {_TARGET: os.fspath(item)}
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where}: expected a path, or a mapping of its keys; got {item!r:.200}")
    return dict(item)


def _base_and_adapter(text: str) -> Tree:
    """MODEL or BASE+ADAPTER; a path that exists with a plus sign in it is one model."""
    model, plus, adapter = text.partition("+")
    both = plus and model and adapter and not text.startswith("columns:")
    if both and not os.path.exists(text):  # noqa: PTH110  False where pathlib raises: a name too long
        return {"model": model, "adapter": adapter}
    return {"model": text}


# --- options and environment variables --------------------------------------------------------------------------------


def _set_option(tree: Tree, name: str, value: Any) -> None:
    """Put one option's value where it belongs in `tree`, keeping what is beside it."""
    path = BY_NAME[name].path
    if name in ("data", "policy"):
        tree[path[0]] = _assignments(value)
        return
    if path[:2] == _EVERY_SET:
        if name == "split" and isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        tree.setdefault(_EVERY_SET, {})[path[2]] = value
        return
    section = tree
    for step in path[:-1]:
        section[step] = _section(step, section.get(step))
        section = section[step]
    if name == "reference":
        section.pop("adapter", None)
    if name == "loss_param":
        value = loss_params(value)
    elif name == "chat_template_kwargs" and isinstance(value, str):
        value = _json_object(value)
    elif name == "batch_tokens" and isinstance(value, str) and value.isdecimal():
        value = int(value)
    section[path[-1]] = value


def _assignments(values: Any) -> Any:
    """`NAME=PATH` or `PATH` strings, one or a list, as mappings; anything else unchanged."""
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list | tuple):
        return values
    return [_assignment(value) if isinstance(value, str) else value for value in values]


def _assignment(text: str) -> Tree:
    match = re.match(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,79})=(.+)", text, re.DOTALL)
    return {"name": match[1], _TARGET: match[2]} if match else {_TARGET: text}


def loss_params(items: Any) -> Tree:
    """`KEY=VALUE` strings, or one; values read as YAML scalars."""
    items = [items] if isinstance(items, str) else items
    if not isinstance(items, list | tuple):
        raise ConfigError(f"--loss-param takes KEY=VALUE, or a list of such; got {items!r:.200}")
    found: Tree = {}
    for item in items:
        key, equals, text = item.partition("=") if isinstance(item, str) else ("", "", "")
        if not equals:
            raise ConfigError(f"--loss-param takes KEY=VALUE; got {item!r:.200}")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = None
        if not isinstance(value, float | int | str):
            raise ConfigError(f"--loss-param {key} takes a number, true, false or a name; got {text!r:.200}")
        found[key] = value
    return found


def _json_object(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--chat-template-kwargs takes a JSON object; {value!r:.200} is not JSON: {error}") from None


# --- errors -----------------------------------------------------------------------------------------------------------


def _explained(error: Any) -> str:
    """One validation error: the key, the value seen, and the nearest known key for an unknown one."""
    where = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        return f"unknown key {where!r}: {meant_by(str(key), _known_keys(parents))}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {error['input']!r:.200})" if where else message


def _known_keys(parents: list[Any]) -> list[str]:
    """The keys that may be written below `parents`; at the top, every option may."""
    model: type[Spec] = RunConfig
    for step in parents:
        field = model.model_fields.get(step) if isinstance(step, str) else None
        model = (section_of(field.annotation) if field else None) or model
    return [*model.model_fields, *(BY_NAME if model is RunConfig else ())]
