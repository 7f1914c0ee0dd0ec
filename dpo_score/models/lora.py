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

from torch import Tensor, nn

from dpo_score.errors import ModelError
from dpo_score.models.quantized import refuse_packed
from dpo_score.models.resolve import ModelSource
from dpo_score.models.weights import brief

PREFIX = "base_model.model."
INPUT_DEPENDENT = frozenset({"XLORA", "POLY", "ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING"})
PLAIN_INITS = (True, False, "gaussian", "orthogonal")
CONFIG_FIELDS = ("vocab_size", "tie_word_embeddings", "pretraining_tp")


@dataclass(frozen=True, slots=True, eq=False)
class _Structure:
    """Which module and which parameter stood where before an adapter was put on."""

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
    """A base model and the adapter it wears at the moment, if any."""

    model: Any
    merge: bool
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
        self._structure = _Structure.of(self.model)
        try:
            self._put_on(source)
        except BaseException:
            self._take_off()
            raise
        self._worn = source.digest

    def _take_off(self) -> None:
        """The base as it was read: modules and parameters where they stood, changed weights from their clones."""
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
        self._structure, self._worn, self._changed = None, None, []

    def _put_on(self, source: ModelSource) -> None:
        config = read_config(source)
        weights = read_weights(source)
        self._keep(_touched(self.model, weights, every=self.merge or starts_from_base(config)))
        _resize(self.model, weights, source)
        wrapped = _inject(self.model, config, weights, source)
        if self.merge:
            _untie_targets(wrapped)
            with warnings.catch_warnings():
                # peft tells that embeddings are untied now: they are, on purpose, until the adapter is taken off.
                warnings.simplefilter("ignore", UserWarning)
                wrapped.base_model.merge_and_unload()
        self.model.eval().requires_grad_(False)

    def _keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Clone, once per base and in host memory, what an adapter may change."""
        for parameter in parameters:
            self._changed.append(parameter)
            if id(parameter) not in self._pristine:
                self._pristine[id(parameter)] = parameter.detach().to("cpu", copy=True)


def read_config(source: ModelSource) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f'{source.name} needs peft to read its adapter: `pip install "dpo-score[adapters]"`')
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where it is: notes of kernels not used
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(source.adapter))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{source.adapter}: peft does not read its adapter_config.json ({brief(error)})") from error
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if config.is_prompt_learning or kind in INPUT_DEPENDENT or getattr(config, "alora_invocation_tokens", None):
        raise ModelError(
            f"{source.adapter} is a {kind} adapter, which changes or depends on the input tokens rather than the "
            "weights alone: it cannot be scored here"
        )
    config.inference_mode = True
    return config


def read_weights(source: ModelSource) -> dict[str, Tensor]:
    """The adapter's tensors; a pickle (allowed when the source was resolved) is read with weights_only."""
    (path,) = source.adapter_files
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    import torch

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
        path = key.removeprefix(PREFIX)
        while path and path not in modules:
            path = path.rpartition(".")[0]
        rest = key.removeprefix(f"{PREFIX}{path}.").removeprefix("base_layer.")
        if path and (every or rest in modules[path]._parameters):
            found.update((id(p), p) for p in modules[path].parameters())
    return list(found.values())


def _resize(model: Any, weights: Mapping[str, Tensor], source: ModelSource) -> None:
    """Bring the embeddings to the adapter's number of rows, when the adapter carries whole embeddings."""
    names = {id(module): name for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    rows = _saved_rows(weights, names[id(inputs)])
    tied = outputs is None or outputs.weight is inputs.weight
    head_rows = rows if tied else _saved_rows(weights, names[id(outputs)])
    wanted = rows or head_rows
    if wanted is None or wanted == inputs.weight.shape[0]:
        return
    if rows != head_rows:
        raise ModelError(
            f"{source.name}: the adapter adds tokens ({inputs.weight.shape[0]} rows in the base, {wanted} in the "
            "adapter) but saves only one of the two embeddings; save it with save_embedding_layers=True"
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _saved_rows(weights: Mapping[str, Tensor], module: str) -> int | None:
    """Rows of a whole embedding that the adapter saves for `module`, in any of peft's spellings."""
    for middle in ("", ".base_layer", ".modules_to_save", ".original_module"):
        tensor = weights.get(f"{PREFIX}{module}{middle}.weight")
        if tensor is not None:
            return int(tensor.shape[0])
    return None


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
    for what, keys in (
        ("lacks", _absent(wrapped, result.missing_keys)),
        ("has, without a place in the base,", result.unexpected_keys),
    ):
        if keys:
            raise ModelError(
                f"{source.name}: the adapter {source.adapter} {what} {len(keys)} tensors ({', '.join(keys[:5])}): "
                "it belongs to another base, or its folder is damaged"
            )
    return wrapped


def _absent(wrapped: nn.Module, missing: Iterable[str]) -> list[str]:
    """Adapter tensors that were not in the file; one that is tied to a tensor of the file is there."""
    absent = {key for key in missing if ".default." in f"{key}."}
    named = dict(wrapped.named_parameters(remove_duplicate=False))
    present = {id(parameter) for name, parameter in named.items() if name not in absent}
    return sorted(key for key in absent if id(named.get(key)) not in present)


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
