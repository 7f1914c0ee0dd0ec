"""Which model is meant, where it lies, and what its numbers depend on. No torch, no transformers.

    name ──locate──▶ folder ──weights.py: checked, never executed──▶ ModelSource(digest) ──ModelLoader.load──▶ model

Promises: a `ModelSource` is whole (no shard absent, no file cut), free of pickles and of foreign code unless those
were allowed, and its digest changes with any byte of the weights and with any setting that changes numbers, never
with file times, names of folders or the version that wrote it.
Does not: load anything, or decide numerics (dtype and device belong to the scorer's identity, not to the source).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from dpo_score.config.schema import PolicySpec
from dpo_score.errors import HalfWrittenError, ModelError
from dpo_score.models import weights as files
from dpo_score.models.locate import Located, ProgressLine, locate, no_progress, stored_sha256
from dpo_score.tokenization.tokenizer import TOKENIZER_FILES

Sha256: TypeAlias = Callable[[Path], str]
Stamp: TypeAlias = tuple[Path, int, int]
"""A file, its size and its time of change (ns) when its digest was taken."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One set of weights, checked and addressed by content; `digest` covers base, adapter and configuration.

    `state`: the weights are a checkpoint without a configuration (checkpoints.py); `folder` is the base that lends one.
    """

    name: str
    folder: Path
    adapter: Path | None
    commit: str | None
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    digest: str
    base_digest: str
    pickle: bool
    state: bool = False
    adapter_commit: str | None = None
    stamps: tuple[Stamp, ...] = ()

    @property
    def key(self) -> str:
        """What identities and cache namespaces are made of."""
        return self.digest

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.config.get("is_encoder_decoder", False))

    @property
    def tokenizer_folder(self) -> Path:
        """Where this model's own tokenizer is: the adapter's folder when it brings one."""
        if self.adapter and any((self.adapter / name).is_file() for name in TOKENIZER_FILES):
            return self.adapter
        return self.folder

    def refuse_changed(self) -> None:
        """Raise HalfWrittenError when a weight file is no longer the one that the digest was taken of."""
        for path, size, time in self.stamps:
            if _stamp(path) != (path, size, time):
                raise HalfWrittenError(
                    f"{self.name}: {path} changed or vanished after this run began, so its values would be stored "
                    "under the digest of other weights. Run the same command again; to score a folder that training "
                    "still writes to, copy it first",
                    path,
                )

    @property
    def adapter_files(self) -> tuple[Path, ...]:
        return files.adapter_weights(self.adapter, allow_pickle=True).files if self.adapter else ()


@dataclass(frozen=True, slots=True)
class Resolver:
    """What every model of a run is resolved with. `sha256` may answer from a cache of file identities.

    `quantization`: weights that are quantised at load are other weights, so every digest says so.
    """

    cache_dir: Path
    sha256: Sha256
    allow_pickle: bool = False
    trust_remote_code: bool = False
    say: ProgressLine = no_progress
    quantization: str | None = None

    def resolve(self, model: str, *, revision: str | None = None, adapter: str | None = None) -> ModelSource:
        """MODEL (and an adapter over it) → a checked source. A PEFT folder stands on the base that its config names."""
        place = locate(model, revision=revision, allow_pickle=self.allow_pickle)
        if place.path.is_dir() and files.is_adapter(place.path):
            if adapter is not None:
                raise ModelError(f"model {model!r} is an adapter itself: merge it into its base before adding another")
            return self.over(self.named_base(place.path), place, model)
        base = self.full(model, place)
        if adapter is None:
            return base
        return self.over(base, locate(adapter, allow_pickle=self.allow_pickle), f"{model}+{adapter}")

    def full(self, name: str, place: Located) -> ModelSource:
        """A model with all its weights: a folder, or a .gguf file converted once."""
        if place.path.suffix == ".gguf":
            return self._gguf(name, place)
        folder = place.path
        if files.is_state(folder):
            raise HalfWrittenError(
                f"{folder} has no config.json: it is half written, or a checkpoint that can be a policy with a `base:` "
                "but not a reference or a base. Copy it again, or save the model with save_pretrained",
                folder,
            )
        config_path = folder / "config.json"
        if not config_path.is_file():
            gguf = sorted(path.name for path in folder.glob("*.gguf"))
            clue = f"; name one of its files ({', '.join(gguf[:3])}) to read a GGUF model" if gguf else ""
            states = [path.name for path in files.lone_states(folder)]
            clue += f"; to read one of {', '.join(states[:3])} over a base, name that file" if states else ""
            text = f"{folder} has no config.json: it is not a model folder, or is half written{clue}"
            raise ModelError(text) if gguf else HalfWrittenError(text, folder)
        if not self.trust_remote_code:
            files.refuse_code(folder)
        config = files.read_json(config_path)
        found = files.model_weights(folder, config, self.allow_pickle)
        stamps = _stamps(found.files)
        digest = self._as_loaded(model_digest(self._hashes(found.files), config))
        return ModelSource(
            name, folder, None, place.commit, config, found.files, digest, digest, found.pickle, stamps=stamps
        )

    def over(self, base: ModelSource, place: Located, name: str) -> ModelSource:
        """An adapter folder on top of `base`."""
        folder = place.path
        if base.adapter is not None:
            raise ModelError(f"{base.name} already carries an adapter: merge it into its base before adding {folder}")
        if not (folder / files.ADAPTER_CONFIG).is_file():
            text = f"adapter {folder} has no {files.ADAPTER_CONFIG}: name a folder written by PEFT"
            raise HalfWrittenError(text, folder)
        if not self.trust_remote_code:
            files.refuse_code(folder)
        found = files.adapter_weights(folder, self.allow_pickle)
        settings = files.read_json(folder / files.ADAPTER_CONFIG)
        stamps = base.stamps + _stamps((*found.files, folder / files.ADAPTER_CONFIG))
        digest = adapter_digest(base.base_digest, self._hashes(found.files), settings)
        pickle = base.pickle or found.pickle
        worn = replace(base, name=name, adapter=folder, adapter_commit=place.commit, digest=digest)
        return replace(worn, pickle=pickle, stamps=stamps)

    def state_over(self, base: ModelSource, path: Path, name: str) -> ModelSource:
        """A checkpoint without config.json (policy.pt, a state dict, a DCP folder) with `base`'s configuration."""
        found = files.state_weights(path, self.allow_pickle)
        stamps = _stamps(found.files)
        digest = self._as_loaded(model_digest(self._hashes(found.files), base.config))
        return replace(
            without_adapter(base),
            name=name,
            commit=None,
            weights=found.files,
            digest=digest,
            base_digest=digest,
            pickle=found.pickle,
            state=True,
            stamps=stamps,
        )

    def named_base(self, adapter: Path) -> ModelSource:
        """The base that an adapter's config names, when it is a folder or in the hub cache; ModelError otherwise."""
        config = files.read_json(adapter / files.ADAPTER_CONFIG)
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        try:
            if not isinstance(name, str) or not name:
                raise ModelError("its config names no base")
            place = locate(name, revision=revision, allow_pickle=self.allow_pickle, local_only=True)
        except ModelError as error:
            raise ModelError(
                f"adapter {adapter}: the base that its config names, {name!r}, is neither a folder nor in the hub "
                "cache here. ProgressLine which base it stands on: `base:` of the policy, --policy-base reference, or "
                "NAME=MODEL+ADAPTER"
            ) from error
        return self.full(name, place)

    def _gguf(self, name: str, place: Located) -> ModelSource:
        from dpo_score.models.gguf import VERSION, converted

        sha = self._sha(place.path)
        folder = converted(place.path, sha, self.cache_dir, self.say)
        config = files.read_json(folder / "config.json")
        found = files.model_weights(folder, config, allow_pickle=False)
        digest = self._as_loaded(gguf_digest(sha, VERSION))
        return ModelSource(name, folder, None, place.commit, config, found.files, digest, digest, False)

    def _as_loaded(self, digest: str) -> str:
        return digest if self.quantization is None else f"{digest}:{self.quantization}"

    def _sha(self, path: Path) -> str:
        return stored_sha256(path) or self.sha256(path)

    def _hashes(self, paths: Iterable[Path]) -> dict[str, str]:
        return {path.name: self._sha(path) for path in paths}


def resolve(
    model: str,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    cache_dir: Path,
    sha256: Sha256,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    say: ProgressLine = no_progress,
) -> ModelSource:
    """Find and check MODEL: a folder, a hub id, `package:NAME/FILE`, a .gguf file, or a PEFT folder.

    `sha256` gives a file's digest (hexadecimal). Nothing of the model is executed or unpickled. Raises ModelError
    with one paragraph that names the folder and the way out.
    """
    resolver = Resolver(cache_dir, sha256, allow_pickle, trust_remote_code, say)
    return resolver.resolve(model, revision=revision, adapter=adapter)


def without_adapter(source: ModelSource) -> ModelSource:
    """The base weights alone."""
    if source.adapter is None:
        return source
    stamps = tuple(stamp for stamp in source.stamps if stamp[0] in source.weights)
    bare = replace(source, name=source.folder.name, digest=source.base_digest, stamps=stamps)
    return replace(bare, adapter=None, adapter_commit=None)


def _stamps(paths: Iterable[Path]) -> tuple[Stamp, ...]:
    return tuple(stamp for path in paths if (stamp := _stamp(path)) is not None)


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return path, found.st_size, found.st_mtime_ns


def resolve_policy(
    policy: PolicySpec, reference: ModelSource | None, policy_base: str | None, resolver: Resolver
) -> ModelSource:
    """The source of one policy. An adapter's base is, in this order: the policy's own model or `base:`,
    `policy_base`, and what the adapter's config names; `reference` stands for the reference's base weights.

    Raises ModelError when the base cannot be told.
    """
    if policy.model is not None and policy.adapter is None:
        place = locate(policy.model, revision=policy.revision, allow_pickle=resolver.allow_pickle)
        if files.is_state(place.path):
            return _state(policy, place.path, policy_base, reference, resolver)
        if not (place.path.is_dir() and files.is_adapter(place.path)):
            return resolver.full(policy.model, place)
        model = None
    else:
        revision = policy.revision if policy.model is None else None
        place = locate(str(policy.adapter), revision=revision, allow_pickle=resolver.allow_pickle)
        model = policy.model
    base = _base(place.path, model or policy.base or policy_base, policy, reference, resolver)
    return resolver.over(base, place, f"{base.name}+{policy.adapter or policy.model}")


def _state(
    policy: PolicySpec, path: Path, policy_base: str | None, reference: ModelSource | None, resolver: Resolver
) -> ModelSource:
    said = policy.base or policy_base
    if said is None:
        text = (
            f"policy {policy.name!r}: {path} is a checkpoint without config.json, so its architecture and tokenizer "
            "must come from a base: say `base: reference` in the policy (or --policy-base reference), or another MODEL"
        )
        # a folder of transformers' own file names may be one whose config.json is still to come
        raise ModelError(text) if path.is_file() or files.lone_states(path) else HalfWrittenError(text, path)
    return resolver.state_over(_base(path, said, policy, reference, resolver), path, str(policy.model))


def _base(
    folder: Path, said: str | None, policy: PolicySpec, reference: ModelSource | None, resolver: Resolver
) -> ModelSource:
    if said == "reference":
        if reference is None:
            raise ModelError(f"policy {policy.name!r} stands on `reference`, but the run has no reference model")
        return without_adapter(reference)
    if said is not None:
        return resolver.resolve(said, revision=policy.revision if said == policy.model else None)
    config = folder / files.ADAPTER_CONFIG
    named = files.read_json(config).get("base_model_name_or_path") if config.is_file() else None
    if reference is not None and reference.adapter is None and named == reference.name:
        return reference
    return resolver.named_base(folder)


INERT_CONFIG = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "_commit_hash",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
    }
    | {"output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id"}
)
INERT_ADAPTER = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "auto_mapping"}
)


def model_digest(files: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """`files`: name → sha256 of each weight file; `config`: config.json."""
    return _digest("model", files, _live(config, INERT_CONFIG))


def adapter_digest(base: str, files: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """An adapter over the base whose digest is `base`; `config`: adapter_config.json."""
    return _digest(f"adapter over {base}", files, _live(config, INERT_ADAPTER))


def gguf_digest(file: str, converter: int) -> str:
    """A .gguf file by its sha256, read by this version of the converter."""
    return _digest("gguf", {"file": file, "converter": str(converter)}, {})


def _live(config: Mapping[str, Any], inert: frozenset[str]) -> dict[str, Any]:
    """A configuration without the keys that no number depends on, nested configurations included."""
    return {k: _live(v, inert) if isinstance(v, dict) else v for k, v in config.items() if k not in inert}


def _digest(kind: str, files: Mapping[str, str], config: Mapping[str, Any]) -> str:
    text = json.dumps([kind, dict(files), config], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
