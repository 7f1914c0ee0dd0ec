"""Which model is meant, where it lies, and what its numbers depend on. No torch, no transformers.

    name ──locate──▶ folder ──weights.py: checked, never executed──▶ ModelSource(digest) ──ModelLoader.load──▶ model

Promises: a `ModelSource` is whole (no shard absent, no file cut), free of pickles and of foreign code unless those
were allowed, and its digest changes with any byte of the weights, of code that the model runs, and with any setting
that changes numbers, never with file times, names of folders or the version that wrote it. Every file that decides
numbers is stamped before it is read; `refuse_changed` compares the stamps with the files as they are now.
Does not: load anything, or decide numerics (dtype and device belong to the scorer's identity, not to the source).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from dpo_score.config.schema import ModelSpec, PolicySpec, RunConfig
from dpo_score.errors import HalfWrittenError, ModelError, WeightsChangedError
from dpo_score.models import weights as files
from dpo_score.models.adapter_files import adapter_weights, refuse_named
from dpo_score.models.locate import Located, ProgressLine, locate, no_progress, stored_sha256
from dpo_score.storage.cache.location import cache_folder
from dpo_score.storage.file_hashes import FileDigests
from dpo_score.tokenization.tokenizer import TOKENIZER_FILES

Sha256: TypeAlias = Callable[[Path], str]
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
"""Keys of config.json that no number depends on."""
INERT_ADAPTER = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "auto_mapping"}
)
"""Keys of adapter_config.json that no number depends on."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it was when its content was read: any write to it, or another file under its name, shows in one of
    these (`cp` and `rsync --inplace` change the times, a rename changes the inode)."""

    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        """The stamp of a file, None where there is none."""
        try:
            found = path.stat()
        except OSError:
            return None
        return cls(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One set of weights, checked and addressed by content; `digest` covers base, adapter and configuration.

    `state`: transformers cannot read the weights from `folder` by itself, so their tensors are given to it
    (state_dict.py). `folder` holds the configuration: the model's own, or that of the base that lends one.
    `stamps`: every file that `digest` was made of, as it was then.
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

    @property
    def adapter_files(self) -> tuple[Path, ...]:
        return adapter_weights(self.adapter, allow_pickle=True).files if self.adapter else ()

    def refuse_changed(self) -> None:
        """Raise WeightsChangedError when a file is no longer the one that the digest was made of."""
        for stamp in self.stamps:
            if Stamp.of(stamp.path) != stamp:
                raise WeightsChangedError(
                    f"{self.name}: {stamp.path} changed or vanished after this run began, so its values would be "
                    "stored under the digest of other weights. Run the same command again; to score a folder that "
                    "training still writes to, copy it first",
                    stamp.path,
                )


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

    @classmethod
    def of(
        cls,
        config: RunConfig,
        cache_dir: Path | None = None,
        sha256: Sha256 | None = None,
        say: ProgressLine = no_progress,
    ) -> Resolver:
        """What the settings of a run allow. `cache_dir`, `sha256`: its cache's folder and the hashes there, if None."""
        folder = cache_dir or cache_folder(config.cache_dir)
        hashes = sha256 or FileDigests(folder).sha256
        return cls(folder, hashes, config.allow_pickle, config.trust_remote_code, say, config.compute.quantization)

    def resolve_spec(self, spec: ModelSpec) -> ModelSource:
        """As `resolve`, of a reference or base as the settings name it."""
        return self.resolve(spec.model, revision=spec.revision, adapter=spec.adapter)

    def resolve(self, model: str, *, revision: str | None = None, adapter: str | None = None) -> ModelSource:
        """MODEL (and an adapter over it) → a checked source. A PEFT folder needs the base that its config names."""
        place = locate(model, revision=revision, allow_pickle=self.allow_pickle)
        if place.path.is_dir() and files.is_adapter(place.path):
            if adapter is not None:
                raise ModelError(f"model {model!r} is an adapter itself: merge it into its base before adding another")
            return self.with_adapter(self.base_named_by(place.path), place, model)
        base = self.whole_model(model, place)
        if adapter is None:
            return base
        return self.with_adapter(base, locate(adapter, allow_pickle=self.allow_pickle), f"{model}+{adapter}")

    def whole_model(self, name: str, place: Located) -> ModelSource:
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
            raise _no_config(folder)
        if not self.trust_remote_code:
            files.refuse_code(folder)
        settings = _stamps([config_path])
        config = files.read_json(config_path)
        found = files.model_weights(folder, config, self.allow_pickle)
        files.refuse_impossible_size(config_path, config, found)
        code = files.code_files(folder, config) if self.trust_remote_code else ()
        hashes, stamps = self._hashed((*found.files, *code))
        digest = self._as_loaded(model_digest(hashes, config))
        return ModelSource(
            name,
            folder,
            None,
            place.commit,
            config,
            found.files,
            digest,
            digest,
            found.pickle,
            state=found.as_state,
            stamps=settings + stamps,
        )

    def with_adapter(self, base: ModelSource, place: Located, name: str) -> ModelSource:
        """An adapter folder on top of `base`."""
        folder = place.path
        if base.adapter is not None:
            raise ModelError(f"{base.name} already carries an adapter: merge it into its base before adding {folder}")
        refuse_named(folder)
        config_path = folder / files.ADAPTER_CONFIG
        if not config_path.is_file():
            text = f"adapter {folder} has no {files.ADAPTER_CONFIG}: name a folder written by PEFT"
            raise HalfWrittenError(text, folder)
        if not self.trust_remote_code:
            files.refuse_code(folder)
        found = adapter_weights(folder, self.allow_pickle)
        settings = _stamps([config_path])
        config = files.read_json(config_path)
        hashes, stamps = self._hashed(found.files)
        return replace(
            base,
            name=name,
            adapter=folder,
            adapter_commit=place.commit,
            digest=adapter_digest(base.base_digest, hashes, config),
            pickle=base.pickle or found.pickle,
            stamps=base.stamps + settings + stamps,
        )

    def with_state(self, base: ModelSource, path: Path, name: str) -> ModelSource:
        """A checkpoint without config.json (policy.pt, a trainer's folder) over `base`'s configuration."""
        found = files.state_weights(path, self.allow_pickle)
        hashes, stamps = self._hashed(found.files)
        bare = without_adapter(base)
        digest = self._as_loaded(model_digest(hashes, base.config))
        return replace(
            bare,
            name=name,
            commit=None,
            weights=found.files,
            digest=digest,
            base_digest=digest,
            pickle=found.pickle,
            state=True,
            stamps=tuple(stamp for stamp in bare.stamps if stamp.path not in bare.weights) + stamps,
        )

    def base_named_by(self, adapter: Path) -> ModelSource:
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
                "cache here. Say which base it belongs to: MODEL+ADAPTER for a policy or the reference; for a policy "
                "also `base:`, or --policy-base reference"
            ) from error
        return self.whole_model(name, place)

    def _gguf(self, name: str, place: Located) -> ModelSource:
        from dpo_score.models.gguf import VERSION, converted

        hashes, stamps = self._hashed([place.path])
        (sha256,) = hashes.values()
        folder = converted(place.path, sha256, self.cache_dir, self.sha256, self.say)
        config = files.read_json(folder / "config.json")
        found = files.model_weights(folder, config, allow_pickle=False)
        read = _stamps([*found.files, folder / "config.json"])
        digest = self._as_loaded(gguf_digest(sha256, VERSION))
        return ModelSource(
            name, folder, None, place.commit, config, found.files, digest, digest, False, stamps=stamps + read
        )

    def _hashed(self, paths: Iterable[Path]) -> tuple[dict[str, str], tuple[Stamp, ...]]:
        """Name → sha256 of each file's content, and the files' stamps from before they were read."""
        paths = tuple(paths)
        stamps = _stamps(paths)
        return {_name_in_digest(path, paths): self._checked_sha256(path) for path in paths}, stamps

    def _checked_sha256(self, path: Path) -> str:
        """The sha256 of a file's content. The hub cache names large files by it; a file of other content is refused."""
        found, stored = self.sha256(path), stored_sha256(path)
        if stored is not None and stored != found:
            raise ModelError(
                f"{path} is damaged: the hub cache keeps it as {stored[:16]}…, its content is {found[:16]}…. Delete "
                f"{path.resolve()} and run again, and it is downloaded anew"
            )
        return found

    def _as_loaded(self, digest: str) -> str:
        """The digest of weights that are read as they are, or quantised first."""
        return digest if self.quantization is None else f"{digest}:{self.quantization}"


def resolve(
    model: str,
    *,
    cache_dir: Path,
    sha256: Sha256,
    revision: str | None = None,
    adapter: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    say: ProgressLine = no_progress,
) -> ModelSource:
    """Find, check and digest MODEL and, on top of it, an adapter.

    `sha256` gives a file's digest (hexadecimal). Nothing of the model is executed or unpickled. Raises ModelError
    with one paragraph that names the folder and the way out.
    """
    resolver = Resolver(cache_dir, sha256, allow_pickle, trust_remote_code, say)
    return resolver.resolve(model, revision=revision, adapter=adapter)


def without_adapter(source: ModelSource) -> ModelSource:
    """The base weights alone."""
    if source.adapter is None:
        return source
    stamps = tuple(stamp for stamp in source.stamps if not stamp.path.is_relative_to(source.adapter))
    bare = replace(source, name=source.folder.name, digest=source.base_digest, stamps=stamps)
    return replace(bare, adapter=None, adapter_commit=None)


def _no_config(folder: Path) -> ModelError:
    """Why a folder without config.json is no model: what lies there instead, and what to name."""
    refuse_named(folder)
    files.refuse_outer(folder)
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    clue = f"; name one of its files ({', '.join(gguf[:3])}) to read a GGUF model" if gguf else ""
    states = [path.name for path in files.lone_states(folder)]
    clue += f"; to read one of {', '.join(states[:3])} over a base, name that file" if states else ""
    text = f"{folder} has no config.json: it is not a model folder, or is half written{clue}"
    return ModelError(text) if gguf or states else HalfWrittenError(text, folder)


def _stamps(paths: Iterable[Path]) -> tuple[Stamp, ...]:
    return tuple(stamp for path in paths if (stamp := Stamp.of(path)) is not None)


def _name_in_digest(path: Path, paths: tuple[Path, ...]) -> str:
    """A file's name, or where two files of the set share it, the path from the folder that holds them all."""
    if sum(other.name == path.name for other in paths) == 1:
        return path.name
    return path.relative_to(os.path.commonpath([other.parent for other in paths])).as_posix()


# --- policies ---------------------------------------------------------------------------------------------------


def resolve_policy(
    policy: PolicySpec, reference: ModelSource | None, policy_base: str | None, resolver: Resolver
) -> ModelSource:
    """The source of one policy: full weights, an adapter over a base, or a checkpoint that borrows a base's config.

    An adapter's base is, in this order: the policy's own model or `base:`, `policy_base`, and what the adapter's
    config names; `reference` means the reference's base weights. Raises ModelError when the base is not known.
    """
    if policy.model is not None and policy.adapter is None:
        place = locate(policy.model, revision=policy.revision, allow_pickle=resolver.allow_pickle)
        if files.is_state(place.path):
            return _state_policy(policy, place.path, policy_base, reference, resolver)
        if not (place.path.is_dir() and files.is_adapter(place.path)):
            return resolver.whole_model(policy.model, place)
        model = None
    else:
        revision = policy.revision if policy.model is None else None
        place = locate(str(policy.adapter), revision=revision, allow_pickle=resolver.allow_pickle)
        model = policy.model
    if place.path.is_dir():
        refuse_named(place.path)
    base = _base(place.path, model or policy.base or policy_base, policy, reference, resolver)
    return resolver.with_adapter(base, place, f"{base.name}+{policy.adapter or policy.model}")


def _state_policy(
    policy: PolicySpec, path: Path, policy_base: str | None, reference: ModelSource | None, resolver: Resolver
) -> ModelSource:
    base = policy.base or policy_base
    if base is None:
        beside = path.is_file() and (path.parent / "config.json").is_file()
        what = "weights alone (the config.json beside it is not read)" if beside else "a checkpoint without config.json"
        text = (
            f"policy {policy.name!r}: {path} is {what}, so its architecture and tokenizer must come from a base: say "
            "`base: reference` in the policy (or --policy-base reference), or another MODEL"
        )
        # a folder of transformers' own file names may be one whose config.json is still to come
        known = path.is_file() or files.lone_states(path) or files.trainer_layout(path) is not None
        raise ModelError(text) if known else HalfWrittenError(text, path)
    return resolver.with_state(_base(path, base, policy, reference, resolver), path, str(policy.model))


def _base(
    folder: Path, named: str | None, policy: PolicySpec, reference: ModelSource | None, resolver: Resolver
) -> ModelSource:
    """The base that a policy is built on; `named`: what the policy or the command names, if anything."""
    if named == "reference":
        if reference is None:
            raise ModelError(f"policy {policy.name!r} has the base `reference`, but the run has no reference model")
        return without_adapter(reference)
    if named is not None:
        return resolver.resolve(named, revision=policy.revision if named == policy.model else None)
    config = folder / files.ADAPTER_CONFIG
    own = files.read_json(config).get("base_model_name_or_path") if config.is_file() else None
    if reference is not None and reference.adapter is None and own == reference.name:
        return reference
    return resolver.base_named_by(folder)


# --- digests ----------------------------------------------------------------------------------------------------
# Canonical JSON, so the same content gives the same digest on every machine. A key that is null counts, because null
# and absent may differ.


def model_digest(hashes: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """`hashes`: name → sha256 of each file of weights or code; `config`: config.json."""
    return _digest("model", hashes, _without(config, INERT_CONFIG))


def adapter_digest(base: str, hashes: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """An adapter over the base whose digest is `base`; `config`: adapter_config.json."""
    return _digest(f"adapter over {base}", hashes, _without(config, INERT_ADAPTER))


def gguf_digest(file: str, converter: int) -> str:
    """A .gguf file by its sha256, read by this version of the converter."""
    return _digest("gguf", {"file": file, "converter": str(converter)}, {})


def _without(config: Mapping[str, Any], inert: frozenset[str]) -> dict[str, Any]:
    """A configuration without the keys that no number depends on, nested configurations included."""
    return {k: _without(v, inert) if isinstance(v, dict) else v for k, v in config.items() if k not in inert}


def _digest(kind: str, hashes: Mapping[str, str], config: Mapping[str, Any]) -> str:
    text = json.dumps([kind, dict(hashes), config], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
