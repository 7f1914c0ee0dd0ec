"""PEFT adapters over one loaded base: put on, taken off, the base restored bit for bit.

Promises: in float32 an adapter is merged into the weights (the model keeps its plain architecture and speed), and
taking it off copies back clones made before, never subtracts. In 16-bit dtypes and on quantised bases it stays
unmerged: a delta of one thousandth of a weight is below half a unit of a 16-bit mantissa, so merging would round most
of it away. A zero adapter gives the base's exact weights. Saved modules, saved embeddings with added tokens (the
embedding is resized first), DoRA and rsLoRA go through peft's own classes; a target that shares its weight with
another module (tied embeddings) is given its own copy before merging, so only the target changes.
Does not: run adapters that change the input or depend on it (prompt tuning, activated or mixed adapters).
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dpo_score.errors import ModelError
from dpo_score.models.adapter_files import PREFIX, module_of, whole_rows
from dpo_score.models.memory import is_out_of_memory
from dpo_score.models.quantized import refuse_packed
from dpo_score.models.resolve import ModelSource
from dpo_score.models.weights import brief

LEARNED_TOKENS = "puts learned tokens before the input"
LEARNED_KEYS = "has attention read learned keys and values beside those of the input"
NOT_OF_WEIGHTS = {
    "PROMPT_TUNING": LEARNED_TOKENS,
    "P_TUNING": LEARNED_TOKENS,
    "CPT": LEARNED_TOKENS,
    "PREFIX_TUNING": LEARNED_KEYS,
    "CARTRIDGE": LEARNED_KEYS,
    "ADAPTION_PROMPT": LEARNED_KEYS,
    "MULTITASK_PROMPT_TUNING": "chooses its prompt by a task number that each input must bring",
    "POLY": "mixes its parts by a task number that each input must bring",
    "XLORA": "mixes other adapters anew for each token, by a forward of its own (name one of these instead)",
    "SHADOW": "runs a second model beside the base",
}
"""Kinds of adapters that do more than change weights, and what it is that they do."""
KEPT_APART = frozenset({"RANDLORA", "DELORA"})
"""Kinds whose merged weights round more of the adapter away than float32 log-probs may lose."""
WITHOUT_EFFECT = (
    "the adapter {adapter} changes nothing: every lora_B in it is zero, as before any training step. Its scores are "
    "those of its base"
)
PLAIN_INITS = (True, False, "gaussian", "orthogonal")
CONFIG_FIELDS = ("vocab_size", "tie_word_embeddings", "pretraining_tp")


@dataclass(frozen=True, slots=True, eq=False)
class _Structure:
    """Which module and which parameter was where before an adapter was put on."""

    modules: tuple[tuple[nn.Module, dict[str, nn.Module | None], dict[str, nn.Parameter | None]], ...]
    configs: tuple[tuple[Any, dict[str, Any]], ...]

    @classmethod
    def of(cls, model: nn.Module) -> _Structure:
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        return cls(
            tuple((m, dict(m._modules), dict(m._parameters)) for m in model.modules()),
            tuple((c, {k: getattr(c, k) for k in CONFIG_FIELDS if hasattr(c, k)}) for c in configs.values()),
        )

    def restore(self) -> None:
        for module, children, parameters in self.modules:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
        for config, values in self.configs:
            for name, value in values.items():
                setattr(config, name, value)


@dataclass(slots=True, eq=False)
class AdapterSlot:
    """A base model and the adapter it wears at the moment, if any; `notes`: what a user should know of that one."""

    model: Any
    merge: bool
    notes: tuple[str, ...] = ()
    _worn: str | None = None
    _structure: _Structure | None = None
    _changed: list[nn.Parameter] = field(default_factory=list)
    _pristine: dict[int, Tensor] = field(default_factory=dict)

    def put(self, source: ModelSource) -> None:
        """Make `model` the model of `source`, whose base it already holds."""
        wanted = source.digest if source.adapter else None
        if wanted == self._worn:
            return
        self._take_off()
        if source.adapter is None:
            return
        refuse_packed(self.model, source.name)
        config, weights = read_config(source), read_weights(source)
        merge = self.merge and config.peft_type.value not in KEPT_APART
        try:
            self._put_on(source, config, weights, merge)
        except _NotMergeableError:
            self._take_off()
            self._put_on(source, config, weights, merge=False)
        self._worn = source.digest
        self.notes = (WITHOUT_EFFECT.format(adapter=source.adapter),) if is_without_effect(weights) else ()

    def _take_off(self) -> None:
        """The base as it was read: modules and parameters where they were, changed weights from their clones."""
        if self._structure is None:
            return
        self._structure.restore()
        for parameter in self._changed:
            clone = self._pristine[id(parameter)]
            if parameter.data.shape == clone.shape and parameter.data.device.type != "meta":
                parameter.data.copy_(clone)
            else:
                parameter.data = clone.to(parameter.device, copy=True)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self._structure, self._worn, self._changed, self.notes = None, None, [], ()

    def _put_on(self, source: ModelSource, config: Any, weights: dict[str, Tensor], merge: bool) -> None:
        """Inject the adapter's layers and, with `merge`, fold them into the weights. The base is as it was after any
        error. Raises _NotMergeableError for a kind of adapter that has no merged form."""
        self._structure = _Structure.of(self.model)
        try:
            self._keep(_touched(self.model, weights, every=merge or starts_from_base(config)))
            _resize(self.model, weights, source)
            wrapped = _inject(self.model, config, weights, source)
            if merge:
                _untie_targets(wrapped)
                _merge(wrapped)
            self.model.eval().requires_grad_(False)
        except BaseException:
            self._take_off()
            raise

    def _keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Clone, once per base and in host memory, what an adapter may change."""
        for parameter in parameters:
            self._changed.append(parameter)
            if id(parameter) not in self._pristine:
                self._pristine[id(parameter)] = parameter.detach().to("cpu", copy=True)


class _NotMergeableError(Exception):
    """peft cannot fold this kind of adapter into the weights; it can be computed beside them."""


def _merge(wrapped: Any) -> None:
    with warnings.catch_warnings():
        # peft tells that embeddings are untied now: they are, on purpose, until the adapter is taken off.
        warnings.simplefilter("ignore", UserWarning)
        try:
            wrapped.base_model.merge_and_unload()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise _NotMergeableError from error


def is_without_effect(weights: Mapping[str, Tensor]) -> bool:
    """Whether an adapter is plain LoRA whose second factors are all zero."""
    seconds = [tensor for key, tensor in weights.items() if ".lora_B" in key or ".lora_embedding_B" in key]
    firsts = sum(".lora_A" in key or ".lora_embedding_A" in key for key in weights)
    return len(seconds) > 0 and firsts + len(seconds) == len(weights) and not any(bool(b.any()) for b in seconds)


def read_config(source: ModelSource) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f'{source.name} needs peft to read its adapter: `pip install "dpo-score[adapters]"`')
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where it is: notes of kernels not used
    from peft import PeftConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # how a kind of adapter is best saved is its author's affair
            config = PeftConfig.from_pretrained(str(source.adapter))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{source.adapter}: peft does not read its adapter_config.json ({brief(error)})") from error
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    what = NOT_OF_WEIGHTS.get(kind, LEARNED_TOKENS if config.is_prompt_learning else "")
    if getattr(config, "alora_invocation_tokens", None):
        what = "acts only after its invocation tokens (activated LoRA)"
    if what:
        raise ModelError(f"{source.adapter} is a {kind} adapter, which {what}: it cannot be scored here")
    config.inference_mode = True
    return config


def read_weights(source: ModelSource) -> dict[str, Tensor]:
    """The adapter's tensors; a pickle (allowed when the source was resolved) is read with weights_only."""
    (path,) = source.adapter_files
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(f"{path} is not a pickle of tensors alone: {brief(error)}") from error


def starts_from_base(config: Any) -> bool:
    """Whether peft rewrites the base's weights on injection: PiSSA, OLoRA and their like keep a residual there."""
    return getattr(config, "init_lora_weights", True) not in PLAIN_INITS


def _touched(model: nn.Module, weights: Mapping[str, Tensor], every: bool) -> list[nn.Parameter]:
    """The parameters that the adapter's tensors may change: those of the deepest base module that each key names.

    Not `every`: only where a key is a parameter of the base itself, as in an unmerged adapter with saved embeddings.
    """
    modules = dict(model.named_modules())
    found: dict[int, nn.Parameter] = {}
    for key in weights:
        path = module_of(key, modules)
        if not path and every:  # a tensor that all layers share: peft changes more than the names say
            return list(model.parameters())
        rest = key.removeprefix(f"{PREFIX}{path}.").removeprefix("base_layer.")
        if path and (every or rest in modules[path]._parameters):
            found.update((id(p), p) for p in modules[path].parameters())
    return list(found.values())


def _resize(model: Any, weights: Mapping[str, Tensor], source: ModelSource) -> None:
    """Bring the embeddings to the adapter's number of rows, when the adapter carries whole embeddings."""
    names = {id(module): name for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    rows = whole_rows(shapes, names[id(inputs)])
    tied = outputs is None or outputs.weight is inputs.weight
    head_rows = rows if tied else whole_rows(shapes, names[id(outputs)])
    wanted = rows or head_rows
    if wanted is None or wanted == inputs.weight.shape[0]:
        return
    if rows != head_rows:
        raise ModelError(
            f"{source.name}: the adapter adds tokens ({inputs.weight.shape[0]} rows in the base, {wanted} in the "
            "adapter) but saves only one of the two embeddings; save it with save_embedding_layers=True"
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _inject(model: Any, config: Any, weights: dict[str, Tensor], source: ModelSource) -> Any:
    """`model` with the adapter's layers in place and its weights in them; ModelError when they do not fit."""
    from peft import PeftModel, set_peft_model_state_dict

    with warnings.catch_warnings():
        # Tied targets are untied before merging, missing keys are errors below, and what peft calls in transformers
        # is its own affair.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            wrapped = PeftModel(model, config)
            result = set_peft_model_state_dict(wrapped, weights)
        except (ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
            raise ModelError(
                f"{source.name}: the adapter does not fit its base {source.folder}: {brief(error)}"
            ) from error
    absent = _absent(wrapped, result.missing_keys)
    surplus = [key for key in result.unexpected_keys if not _is_copy(wrapped, key, weights)]
    if absent or surplus:
        raise ModelError(_misfit(source, model, absent, surplus))
    return wrapped


def _absent(wrapped: Any, missing: Iterable[str]) -> list[str]:
    """Adapter tensors that the file should hold and does not.

    What peft would not write itself (buffers that it derives, projections that layers share) is not missed; nor is a
    tensor that is tied to one of the file.
    """
    from peft import get_peft_model_state_dict

    written = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    absent = {key for key in missing if ".default." in f"{key}."}
    named = dict(wrapped.named_parameters(remove_duplicate=False)) | dict(wrapped.named_buffers(remove_duplicate=False))
    present = {id(tensor) for name, tensor in named.items() if name not in absent}
    return sorted(key for key in absent if key.replace(".default", "") in written and id(named.get(key)) not in present)


def _is_copy(wrapped: nn.Module, key: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a tensor for which peft has no place repeats another one.

    Where the vocabulary was resized, peft writes trained embeddings both as what they are and by the name of its
    wrapper, and tied embeddings by the names of both. Its own loader passes such copies over.
    """
    for middle in (".modules_to_save.", ".original_module.", ".token_adapter.base_layer.", ".base_layer."):
        module, found, leaf = key.partition(middle)
        same = weights.get(f"{module}.{leaf}") if found else None
        if same is not None:
            return middle == ".original_module." or torch.equal(same, weights[key])
    leaf = ".token_adapter." + key.partition(".token_adapter.")[2]
    alike = [same for name, same in weights.items() if name != key and name.endswith(leaf)]
    return leaf != ".token_adapter." and any(torch.equal(same, weights[key]) for same in alike)


def _misfit(source: ModelSource, model: nn.Module, absent: list[str], surplus: list[str]) -> str:
    """What to say of an adapter whose tensors are not those that its settings ask for on this base."""
    parts = [
        f"{what} {len(keys)} tensors ({', '.join(keys[:5])})"
        for what, keys in (("lacks", absent), ("has, without a place in the base,", surplus))
        if keys
    ]
    modules = dict(model.named_modules())
    named = next((module for key in surplus if (module := key.removeprefix(PREFIX).partition(".lora_")[0])), "")
    inner = [name for name in modules if name.endswith(named.removeprefix("model.")) and "language_model" in name]
    if named and named not in modules and inner:
        cause = (
            f"its tensors are named as in the text-only class ({named}), while this base is a multimodal wrapper whose "
            f"text model has them as {inner[0]}. Score it over the text model, or rename its tensors"
        )
    else:
        cause = "it belongs to another base, or its folder is damaged"
    return f"{source.name}: the adapter {source.adapter} {' and '.join(parts)}: {cause}"


def _untie_targets(wrapped: Any) -> None:
    """Give every adapted layer a weight of its own where it shares one, as the unmerged adapter computes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    users: dict[int, int] = {}
    for module in wrapped.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for layer in [m for m in wrapped.modules() if isinstance(m, BaseTunerLayer)]:
        base = layer.get_base_layer()
        for name, parameter in list(base._parameters.items()):
            if parameter is not None and users[id(parameter)] > 1:
                base._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
