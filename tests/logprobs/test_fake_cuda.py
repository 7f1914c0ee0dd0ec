"""The pass of a pack on a CUDA device that does not exist: shapes, devices and operators are those of the real one.

torch's fake tensors run every operator's own rules for shapes and devices without computing. An operator whose result
depends on values (`item`, `nonzero`) has no rule: it raises, as it would make the host wait for the device. Copies to
the host are watched for here. Kernels are called, not replaced: their arguments are checked by the operator.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_score.logprobs import transfer
from dpo_score.logprobs.attention import flash_flex, interface
from dpo_score.logprobs.packed import PackedPath
from dpo_score.logprobs.padded import PaddedPath
from dpo_score.models.numerics import Kernel, Numerics
from dpo_score.models.parts import model_parts
from tests.families import family
from tests.logprobs.sequences import awkward

CUDA = torch.device("cuda:0")


def indexed(tensor, index):
    """`tensor[index]` by operators. torch's own indexing asks for the device's runtime, which a CPU build has not."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is ... for i in index):
        at = next(n for n, i in enumerate(index) if i is ...)
        used = sum(i is not None for i in index) - 1
        index = (*index[:at], *[slice(None)] * (tensor.ndim - used), *index[at + 1 :])
    axis, tensors = 0, []
    for i in index:
        if i is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(i, slice):
            if i != slice(None):
                tensor = torch.ops.aten.slice.Tensor(tensor, axis, i.start, i.stop, i.step or 1)
        elif isinstance(i, int):
            tensor = tensor.select(axis, i)
            continue
        else:
            tensors += [None] * (axis - len(tensors)) + [i if isinstance(i, torch.Tensor) else torch.as_tensor(i)]
        axis += 1
    return torch.ops.aten.index.Tensor(tensor, tensors) if tensors else tensor


def assigned(tensor, index, value):
    """`tensor[index] = value` by operators."""
    if isinstance(index, torch.Tensor):
        torch.ops.aten.index_put_.default(tensor, [index], torch.as_tensor(value, device=tensor.device))
    else:
        place = indexed(tensor, index)
        place.copy_(value) if isinstance(value, torch.Tensor) else place.fill_(value)


def contiguous(tensor, **_):
    whole = torch.contiguous_format
    return tensor if tensor.is_contiguous() else torch.ops.aten.clone.default(tensor, memory_format=whole)


def copied(tensor, source, non_blocking=False):
    return torch.ops.aten.copy_.default(tensor, source, non_blocking)


class Indexing(TorchFunctionMode):
    """`tensor[index]` and its assignment on the device, by operators.

    A mode and not other methods of torch.Tensor: a class that once had a `__getitem__` of Python's counts as a sequence
    from then on, and `torch.tensor([torch.tensor(1)])` fails in every later test of the process.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        ours = {torch.Tensor.__getitem__: indexed, torch.Tensor.__setitem__: assigned}.get(func)
        on_device = ours is not None and args[0].device.type == "cuda"
        return (ours if on_device else func)(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_runtime_is_asked_for(monkeypatch):
    """What a CPU build does through the device's runtime before it reaches an operator, by operators alone."""
    if torch.cuda.is_available():
        yield
        return
    by_operators = {"contiguous": contiguous, "copy_": copied, "__invert__": torch.ops.aten.bitwise_not.default}
    for name, ours in by_operators.items():
        own = getattr(torch.Tensor, name)

        def chosen(tensor, *args, own=own, ours=ours, **given):
            return (ours if tensor.device.type == "cuda" else own)(tensor, *args, **given)

        monkeypatch.setattr(torch.Tensor, name, chosen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with Indexing():
        yield
    assert torch.tensor([torch.tensor(1)]).shape == (1,)


class Watch(TorchDispatchMode):
    """Notes each operator that brings values of the device to the host, and what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[str] = []
        self.called: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.called.add(func.name())
        given = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
        results = out if isinstance(out, tuple | list) else [out]
        home = [r for r in results if isinstance(r, torch.Tensor) and r.device.type == "cpu"]
        if any(g.device.type == "cuda" for g in given) and home and func.name() != "aten::_flash_attention_forward":
            self.to_host.append(func.name())
        return out


def on_fake_cuda(model, mode):
    """The model with fake parameters and buffers on a device that does not exist."""
    parts = model_parts(model)
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = _moved(parameter.detach(), mode)
                module._parameters[name] = moved.setdefault(id(parameter), nn.Parameter(fake, requires_grad=False))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _moved(buffer, mode)
    head = parts.head
    if head is not None and head.weight is not None:
        head = replace(head, weight=head.module.weight, bias=head.module.bias)
    return replace(parts, head=head)


def _moved(tensor, mode):
    with mode:
        return mode.from_tensor(tensor).to(CUDA)


@pytest.fixture
def kernels_are_called(monkeypatch):
    """The operator of a layer is opaque to fake tensors, so the layer calls its kernel instead. FlexAttention, which
    only runs compiled, is left out; its mask is made."""

    def attend(query, key, value, sinks, scale, window, softcap):
        return interface._in_use[-1].attend(query, key, value, sinks, scale, window, softcap)

    def flex(query, key, value, block_mask, **_):
        assert block_mask.kv_indices.device == CUDA
        return query.new_empty((*query.shape[:-1], value.shape[-1])), query.new_empty(query.shape[:-1]).float()

    monkeypatch.setattr(interface, "shared_attention", attend)
    monkeypatch.setattr(flash_flex, "flex", lambda: flex)


CASES = [
    ("llama", Kernel.VARLEN, "float16"),
    ("llama", Kernel.VARLEN, "bfloat16"),
    ("llama", Kernel.BMM, "float32"),
    ("llama", Kernel.VARLEN, "float32"),
    ("mistral", Kernel.VARLEN, "float32"),
    ("mistral", Kernel.VARLEN, "bfloat16"),
    ("gemma2", Kernel.VARLEN, "bfloat16"),
    ("gpt_oss", Kernel.VARLEN, "bfloat16"),
    ("qwen3_moe", Kernel.VARLEN, "bfloat16"),
    ("deepseek_v3", Kernel.VARLEN, "bfloat16"),
    ("llama", Kernel.FLEX, "bfloat16"),
]


@pytest.mark.usefixtures("kernels_are_called")
@pytest.mark.parametrize(("name", "kernel", "dtype"), CASES)
def test_a_pack_runs_without_the_host_waiting(name, kernel, dtype):
    model = family(name, dtype=getattr(torch, dtype))
    numerics = Numerics("cuda:0", "cuda", dtype, "fast", kernel, False, 512, 1)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parts = on_fake_cuda(model, mode)
    path = PackedPath(parts, numerics, ("entropy",))
    with torch.inference_mode(), path.session(), mode, Watch() as watch:
        pack = path.lay_out(awkward())
        values = path.device_values(pack)
    assert {tuple(v.shape) for v in values.values()} == {tuple(pack.targets.shape)}
    assert {v.device for v in values.values()} == {CUDA}
    assert not watch.to_host
    odd = name in ("gemma2", "deepseek_v3")  # soft caps, unequal head sizes
    takes_flash = kernel == Kernel.VARLEN and dtype != "float32" and not odd
    assert ("aten::_flash_attention_forward" in watch.called) == takes_flash
    takes_efficient = (name, kernel, dtype) == ("llama", Kernel.VARLEN, "float32")
    assert ("aten::_efficient_attention_forward" in watch.called) == takes_efficient


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_padded_batch_runs_without_the_host_waiting(name, monkeypatch):
    """Also of a hybrid, whose layers keep a state. Values are brought to the host at the end, and nowhere else."""
    model = family(name, dtype=torch.bfloat16)
    numerics = Numerics("cuda:0", "cuda", "bfloat16", "plain", Kernel.MODEL, False, 512, 1)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    path = PaddedPath(on_fake_cuda(model, mode), numerics)
    monkeypatch.setattr("dpo_score.logprobs.padded.split", lambda values, counts: values)
    with mode, Watch() as watch:
        values = path.compute(awkward()[:4])
    assert values["logp"].device == CUDA
    assert not watch.to_host


def test_a_wait_is_seen():
    mode = FakeTensorMode()
    with mode, Watch() as watch:
        there = transfer.to_device(np.arange(3), CUDA)
        there.cpu()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            there.sum().item()
    assert watch.to_host
