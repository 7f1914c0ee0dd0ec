"""From a checked `ModelSource` to a model ready to score, with at most one base in memory.

Promises: safetensors only (unless the source was allowed pickles), every weight from the checkpoint, none left at
random and none a live map of a file; the files of the source unchanged from before their digest until after they were
read; evaluation mode, no gradients, embeddings tied as configured. Equal base digests load once; adapters are swapped
over the loaded base (lora.py). The source is never written to.
Does not: choose dtype or device (the caller's numerics do), or keep two bases: a `LoadedModel` is valid until the
next `load` or `clear` of its loader.
"""

from __future__ import annotations

import gc
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.utils import logging as notices

from dpo_score.errors import ModelError
from dpo_score.models import memory
from dpo_score.models.lora import AdapterSlot
from dpo_score.models.parallel import rank_zero
from dpo_score.models.parallel.process_group import own_group
from dpo_score.models.parallel.sharded_lora import ShardedSlot
from dpo_score.models.parallel.sharding import load_options, localized, refuse_undealt
from dpo_score.models.quantized import keep_four_bits_unpacked, quantization_config
from dpo_score.models.resolve import ModelSource
from dpo_score.models.state_dict import are_renamed, read_state
from dpo_score.models.weights import EMBEDDINGS, brief

if TYPE_CHECKING:
    from dpo_score.models.parallel.rank_zero import RankZero

FIRST_KEYS = 5
BESIDE_THE_LOGITS = re.compile(r"(^|\.)(position_ids|masked_bias|rotary_emb\.inv_freq)$|^v_head\.")
"""Tensors that tools save and no logit depends on: buffers that a model computes itself, TRL's value head."""

UNLOADABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, OSError, ImportError, UnpicklingError),
)
"""What a configuration with impossible values, or a file that is not what it says, raises in the libraries."""


class Placement(Protocol):
    """What loading needs of the resolved numerics."""

    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A transformers model holding exactly the weights of `source` (an unmerged adapter's layers included).

    `notes`: what a user should know of it, such as an adapter that changes nothing.
    """

    model: Any
    source: ModelSource
    notes: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class _Base:
    key: tuple[str, str, str]
    slot: AdapterSlot | ShardedSlot


@dataclass(slots=True, eq=False)
class ModelLoader:
    """Holds one base and at most one adapter on it; `bases_read` counts how often weights were read from disk.

    `device_map` and `quantization` go to transformers as they are (accelerate and bitsandbytes must be installed).
    `tensor_parallel` ranks hold the model between them: this process, and others that it starts at the first load and
    leads until `close`; or (`is_worker`) it is one of those others.
    """

    trust_remote_code: bool = False
    device_map: str | None = None
    quantization: Literal["int8", "nf4"] | None = None
    tensor_parallel: int = 1
    is_worker: bool = False
    bases_read: int = 0
    _rank_zero: RankZero | None = field(default=None, repr=False)
    _base: _Base | None = field(default=None, repr=False)
    _ahead: Prefetch | None = field(default=None, repr=False)

    def load(self, source: ModelSource, numerics: Placement, attn_implementation: str | None = None) -> LoadedModel:
        """The model of `source` in `numerics.dtype` on `numerics.device`, in evaluation mode, without gradients.

        Invalidates the `LoadedModel` handed out before. Raises ModelError when the checkpoint does not fit the
        architecture key by key, when an adapter does not fit its base, when a file changed since it was resolved, when
        the device has no room for it, or when an optional package is absent.
        """
        with (
            self._together(source, numerics, attn_implementation),
            memory.room_for(source.name, numerics.device, numerics.dtype),
        ):
            return self._load(source, numerics, attn_implementation)

    def _together(self, source: ModelSource, numerics: Placement, attn: str | None) -> AbstractContextManager[None]:
        """All ranks load, where this process leads a group; it is started at the first load."""
        if self.tensor_parallel == 1 or self.is_worker:
            return nullcontext()
        if self._rank_zero is None:
            settings = {"tensor_parallel": self.tensor_parallel, "trust_remote_code": self.trust_remote_code}
            kind = numerics.device.split(":")[0]
            self._rank_zero = rank_zero.RankZero(self.tensor_parallel, kind, {**settings, "is_worker": True})
        return self._rank_zero.step("load", source, numerics, attn, seconds=rank_zero.LOAD_SECONDS)

    def _load(self, source: ModelSource, numerics: Placement, attn_implementation: str | None) -> LoadedModel:
        source.refuse_changed()
        key = (source.base_digest, numerics.dtype, numerics.device)
        if self._base is None or self._base.key != key:
            self.clear()
            model = self._read(source, numerics, attn_implementation)
            source.refuse_changed()
            merge = numerics.dtype == "float32" and getattr(model, "hf_quantizer", None) is None
            self._base = _Base(key, AdapterSlot(model, merge) if self.tensor_parallel == 1 else ShardedSlot(model))
            self.bases_read += 1
        slot = self._base.slot
        slot.put(source)
        source.refuse_changed()
        if attn_implementation is not None and slot.model.config._attn_implementation != attn_implementation:
            slot.model.set_attn_implementation(attn_implementation)
        return LoadedModel(slot.model, source, slot.notes)

    def prefetch(self, source: ModelSource) -> None:
        """Start reading what `load(source, …)` will need and is not loaded yet; returns at once."""
        held = self._base is not None and self._base.key[0] == source.base_digest
        self._end_prefetch()
        self._ahead = Prefetch((*(() if held else source.weights), *source.adapter_files))

    def clear(self) -> None:
        """Drop the base and its adapter, and give their memory back."""
        self._end_prefetch()
        if self._base is None:
            return
        self._base = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """As `clear`, and the end of the ranks that this process leads."""
        self.clear()
        if self._rank_zero is not None:
            self._rank_zero.close()
            self._rank_zero = None

    def _end_prefetch(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def _read(self, source: ModelSource, numerics: Placement, attn_implementation: str | None) -> Any:
        options: dict[str, Any] = {"dtype": getattr(torch, numerics.dtype), "attn_implementation": attn_implementation}
        if self.device_map is not None:
            options["device_map"] = self.device_map
        if self.tensor_parallel > 1:
            return self._read_part(source, options)
        if self.quantization is not None:
            options["quantization_config"] = quantization_config(self.quantization, numerics.dtype)
        if self.quantization is not None or "quantization_config" in source.config:
            options.setdefault("device_map", {"": numerics.device})  # quantised weights are placed, not moved
        if numerics.device.startswith("cuda") and find_spec("accelerate") is not None:
            options.setdefault("device_map", {"": numerics.device})  # each tensor at once, without a copy on the host
        model = read_model(source, options, self.trust_remote_code)
        if "device_map" not in options and getattr(model, "hf_quantizer", None) is None:
            model = model.to(numerics.device)
        keep_four_bits_unpacked(model)
        detach_from_files(model)
        return model.eval().requires_grad_(False)

    def _read_part(self, source: ModelSource, options: dict[str, Any]) -> Any:
        """This rank's part of the model."""
        refuse_undealt(source, self.tensor_parallel)
        with own_group().reading(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about random numbers: no weight is left at random
            model = read_model(source, options | load_options(self.tensor_parallel), self.trust_remote_code)
        model = localized(model.eval().requires_grad_(False))
        detach_from_files(model)
        return model


def detach_from_files(model: Any) -> None:
    """Give tensors on the CPU memory of their own. What safetensors hands out there is a map of the file: a later write
    to the file, by `cp` say, would change the weights of a model that is being scored."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        plain = type(tensor) in (torch.nn.Parameter, torch.Tensor)  # what a quantiser made is no map of a file
        if plain and id(tensor) not in seen and tensor.device.type == "cpu":
            seen.add(id(tensor))
            tensor.data = tensor.data.clone()


def read_model(source: ModelSource, options: dict[str, Any], trust_remote_code: bool = False) -> Any:
    """The base of `source` through transformers; ModelError naming the first keys that are missing or left over."""
    code = {"trust_remote_code": trust_remote_code}
    with _quiet(notices):
        config = _configuration(source, code)
        options = {**options, "config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            auto = _auto_class(config, source)
            if source.state:
                model, info = _from_state(auto, source, options, code)
            else:
                safe = all(path.suffix == ".safetensors" for path in source.weights)
                asked = {**options, "use_safetensors": safe, "local_files_only": True, **code}
                model, info = auto.from_pretrained(source.folder, **asked)
                if are_renamed(info["missing_keys"], info["unexpected_keys"]):
                    model, info = _from_state(auto, source, options, code)
        except UNLOADABLE as error:
            if memory.is_out_of_memory(error):
                raise
            raise ModelError(f"{source.name} ({source.folder}) could not be loaded: {brief(error)}") from error
    _refuse_misfit(source, type(model).__name__, info)
    return model


def _configuration(source: ModelSource, code: dict[str, bool]) -> Any:
    """config.json as transformers takes it; its classes compute with what it says."""
    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True, **code)
    except (*UNLOADABLE, StrictDataclassError) as error:
        path = source.folder / "config.json"
        raise ModelError(f"{source.name} ({path}) could not be loaded: {brief(error)}") from error


def _from_state(auto: Any, source: ModelSource, options: dict[str, Any], code: dict[str, bool]) -> tuple[Any, Any]:
    """A model of the base's configuration with the tensors of a checkpoint; loaded and reported on by transformers."""
    with torch.device("meta"):
        shape = auto.from_config(options["config"], **code)
    state = read_state(source.weights, shape.state_dict().keys())
    return cast("tuple[Any, Any]", type(shape).from_pretrained(None, state_dict=state, **options))


def _auto_class(config: Any, source: ModelSource) -> Any:
    """The class that gives next-token logits for text: causal, encoder-decoder, or a vision-language wrapper."""
    names = config.architectures or []
    for ending, what in (("ForSequenceClassification", "a classifier"), ("ForMaskedLM", "a masked language model")):
        if any(name.endswith(ending) for name in names):
            raise ModelError(f"{source.name} is {what} ({names[0]}): it gives no next-token log-probabilities")
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    pictures = type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if pictures and any(name.endswith("ForConditionalGeneration") for name in names):
        return transformers.AutoModelForImageTextToText
    if pictures and type(config) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _refuse_misfit(source: ModelSource, kind: str, info: dict[str, Any]) -> None:
    """A weight that the checkpoint lacks would be random, one that the model lacks would be ignored, one of another
    shape would be both: none of these passes.

    Keys that the model itself declares ignorable, and a head equal to tied embeddings, are not reported to begin with.
    """
    if info["mismatched_keys"]:
        raise ModelError(_misshapen(source, kind, sorted(info["mismatched_keys"])))
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not BESIDE_THE_LOGITS.search(key))
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:FIRST_KEYS])}{', …' if len(keys) > FIRST_KEYS else ''})"
        for what, keys in (("missing from the checkpoint", missing), ("unknown to the model", unexpected))
        if keys
    ]
    if parts:
        raise ModelError(
            f"{source.name}: the weights in {source.weights[0].parent} do not fit {kind}: {'; '.join(parts)}. Its "
            "config.json and its weights belong to different models, or it was saved without its language-model head"
        )


def _misshapen(source: ModelSource, kind: str, mismatched: list[tuple[str, Any, Any]]) -> str:
    """What to say of tensors whose shapes are not those of the configuration: the first one, and the likely cause."""
    name, stored, expected = mismatched[0][0], tuple(mismatched[0][1]), tuple(mismatched[0][2])
    of_tokens = name.removesuffix(".weight").rsplit(".", 1)[-1] in (*EMBEDDINGS, "lm_head", "embed_out", "output")
    others = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
    if 0 in stored:
        cause = (
            "the tensor is empty, as DeepSpeed ZeRO-3 writes it when nothing gathers its parts; zero_to_fp32.py does"
        )
    elif len(stored) == 1 and len(expected) > 1:
        cause = "the tensor is flattened, as FSDP keeps it; save with state_dict_type FULL_STATE_DICT"
    elif len(stored) == len(expected) == 2 and stored[1] == expected[1] and of_tokens:
        cause = (
            f"the vocabulary was resized and config.json still says {expected[0]}; set its vocab_size to {stored[0]} "
            "if these weights are the right ones"
        )
    else:
        cause = "config.json belongs to a model of another size or with other heads"
    return (
        f"{source.name}: the weights in {source.weights[0].parent} do not fit {kind}: {name}{others} has the shape "
        f"{list(stored)} in the file and {list(expected)} by config.json. Most likely {cause}"
    )


@contextmanager
def _quiet(notices: Any) -> Iterator[None]:
    """No bars and no loading report of transformers: what it would report is an error here."""
    level, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    try:
        yield
    finally:
        notices.set_verbosity(level)
        if bars:
            notices.enable_progress_bar()


CHUNK = 8 * 2**20


class Prefetch:
    """A running read-ahead over `paths`, in order."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(tuple(paths),), name="prefetch-weights", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def wait(self) -> None:
        """Until everything is read."""
        self._thread.join()

    def _read(self, paths: tuple[Path, ...]) -> None:
        buffer = memoryview(bytearray(CHUNK))
        for path in paths:
            try:
                with path.open("rb", buffering=0) as file:
                    while not self._stop.is_set() and file.readinto(buffer):
                        pass
            except OSError:
                return
