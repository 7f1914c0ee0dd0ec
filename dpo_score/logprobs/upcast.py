"""Run a 16-bit model in fp32 without a second copy of it: weights are widened while the layer that owns them runs.

16-bit weights are exact in fp32, so this is the same function with fp32 arithmetic. Memory: one decoder layer (and at
most one other module) wider than before. Not possible for quantised weights: `CannotWiden`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

NARROW = (torch.float16, torch.bfloat16)


_now_wide: WeakSet[nn.Module] = WeakSet()


def is_wide(model: nn.Module) -> bool:
    """Whether `model` computes in fp32 by `widened` at the moment."""
    return model in _now_wide


class CannotWiden(Exception):
    """Weights that are not plain floating-point tensors have no exact fp32 form here."""


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` computes in fp32. Compiled layers run as written. Raises CannotWiden at the door."""
    refuse_quantized(model)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in _owners(model):
            if type(module) is nn.Embedding:
                handle = module.register_forward_hook(_widen_output)
                stack.callback(handle.remove)
                continue
            widening = _Widening(module)
            for handle in widening.attach():
                stack.callback(handle.remove)
            stack.callback(widening.narrow)
        _now_wide.add(model)
        stack.callback(_now_wide.discard, model)
        yield


def refuse_quantized(model: nn.Module) -> None:
    """Raises CannotWiden for weights that are no plain floating-point tensors."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2 or type(parameter.data) is not Tensor:
            raise CannotWiden(f"{name} is held as {parameter.dtype}: quantised weights cannot be widened exactly")


def _owners(model: nn.Module) -> list[nn.Module]:
    """Decoder layers whole, and every module outside them that owns parameters or narrow buffers itself."""
    layers = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    inside = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    whole = [layer for layer in layers if id(layer) not in inside]
    covered = {id(part) for layer in whole for part in layer.modules()}
    rest = [m for m in model.modules() if id(m) not in covered and any(True for _ in _narrow(m, recurse=False))]
    return [*whole, *rest]


def _narrow(module: nn.Module, recurse: bool) -> Iterator[Tensor]:
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        if tensor.dtype in NARROW:
            yield tensor


class _Widening:
    """The narrow tensors of one module, set aside while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.recurse = isinstance(module, nn.Module) and any(True for _ in module.children())
        self.aside: list[tuple[Tensor, Tensor]] = []

    def attach(self) -> tuple[Any, Any]:
        return (
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after),
        )

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        with torch.inference_mode(False), torch.no_grad():
            for tensor in _narrow(module, self.recurse):
                self.aside.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        return tuple(_wide(a) for a in args), {name: _wide(a) for name, a in kwargs.items()}

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.narrow()

    def narrow(self) -> None:
        """Give the module its own tensors back; also after an error in its forward."""
        while self.aside:
            tensor, data = self.aside.pop()
            tensor.data = data


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value


def _widen_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()
