"""`dpo-score doctor`: what this machine can do for a run, found out by doing it, in about a minute.

In: optionally a model. Out: findings, each with what was seen and, where something is missing or slow, the way out.
Nothing is changed and nothing is written but generated code in torch's own cache. A check that could take the process
down with it (a compiler, two NCCL ranks) runs in a process of its own under a deadline. The cheap half of the CUDA
checks (`cuda_settings`) also runs before each CUDA run.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dpo_score.config.schema import ComputeSpec
from dpo_score.errors import DpoScoreError
from dpo_score.logprobs.attention.flash_flex import kernel
from dpo_score.logprobs.compilation import compile_failure, run_apart
from dpo_score.logprobs.matmul import onednn, onednn_is_true_fp32
from dpo_score.logprobs.numerics import may_share, resolve_numerics
from dpo_score.models.memory import peak_bytes, total_memory
from dpo_score.models.resolve import Resolver
from dpo_score.storage.cache.location import cache_folder
from dpo_score.storage.file_hashes import FileDigests
from dpo_score.storage.manifest import installed_version

NCCL_TIMEOUT = 60.0
"""Seconds that a real compilation, and two ranks up and down, may take."""
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "triton", "ray", "pyarrow", "polars")
GIB = 2**30


class Status(StrEnum):
    """`ok`; `note`: works, but something is slower or smaller than it could be; `problem`: a run would fail."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `way_out` is empty where there is nothing to do."""

    what: str
    seen: str
    status: Status = Status.OK
    way_out: str = ""


def examine(reference: str | None = None, device: str = "auto", cache_dir: str | None = None) -> list[Finding]:
    """All checks, in order. `reference`: a model, for what `auto` picks for it and how fast its tokenizer is."""
    checks: list[Callable[[], Iterator[Finding]]] = [software, host, lambda: cache_folder_of(cache_dir)]
    if torch.cuda.is_available():
        checks += [cuda_devices, cuda_settings, flash_kernel, nccl]
    else:
        checks += [no_cuda, product_rates]
    checks.append(compilation)
    if reference is not None:
        checks.append(lambda: model(reference, device, cache_dir))
    found: list[Finding] = []
    for check in checks:
        found += check()
    return found


# --- software and host ------------------------------------------------------------------------------------------------


def software() -> Iterator[Finding]:
    """Versions that decide numbers or speed."""
    versions = [f"{name} {version}" for name in PACKAGES if (version := installed_version(name)) is not None]
    yield Finding("software", f"Python {platform.python_version()}, {', '.join(versions)}")


def host() -> Iterator[Finding]:
    """Processor, threads and memory, and what of it this process may use."""
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    name, flags = _processor()
    seen = f"{name}, {cores} cores" + (f", {usable} for this process" if usable and usable != cores else "")
    yield Finding("processor", seen)
    threads = torch.get_num_threads()
    fits = threads <= (usable or cores)
    yield Finding(
        "threads",
        f"torch computes with {threads}",
        Status.OK if fits else Status.NOTE,
        "" if fits else f"more threads than cores slow each other down: --threads {usable or cores}",
    )
    if flags:
        sixteen = [flag for flag in ("amx_bf16", "avx512_bf16", "amx_fp16", "avx512_fp16") if flag in flags]
        yield Finding(
            "16-bit products",
            ", ".join(sixteen) or "none on this processor",
            Status.OK if sixteen else Status.NOTE,
            "" if sixteen else "--dtype float32, the default on a CPU, is the fast choice here",
        )
    total = total_memory("cpu") / GIB
    yield Finding("memory", f"{total:.1f} GiB", *_small(total))


def _small(gib: float) -> tuple[Status, str]:
    if gib >= 4:
        return Status.OK, ""
    return Status.NOTE, "enough for small models only: about 4 bytes a parameter in float32, and as much again to load"


def _processor() -> tuple[str, frozenset[str]]:
    """Name and feature flags, as Linux tells them; the name alone elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = dict(reversed([[part.strip() for part in line.partition(":")[::2]] for line in lines if ":" in line]))
    return fields.get("model name", platform.machine()), frozenset(fields.get("flags", "").split())


def cache_folder_of(cache_dir: str | None) -> Iterator[Finding]:
    """Where log-probs are kept, whether they can be, and how much room there is."""
    folder = Path(cache_folder(cache_dir))
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        yield Finding("cache", str(folder), Status.PROBLEM, "not writable: name another place with --cache-dir")
        return
    free = shutil.disk_usage(nearest).free / GIB
    note = "" if free > 5 else "little room: --cache-dir names another disk; `dpo-score cache gc` frees old entries"
    yield Finding("cache", f"{folder}, {free:.0f} GiB free", Status.OK if free > 5 else Status.NOTE, note)


def product_rates() -> Iterator[Finding]:
    """Matrix products a second on this CPU, measured for half a second each: nothing that is computed is faster."""
    exact = onednn_is_true_fp32()
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        with onednn(exact and dtype == torch.float32):
            rates[dtype] = _rate(dtype)
    kernel = "oneDNN" if exact else "torch's default"
    yield Finding(
        "products", f"float32 {rates[torch.float32]:.0f} GFLOP/s ({kernel}), bfloat16 {rates[torch.bfloat16]:.0f}"
    )
    if rates[torch.bfloat16] < rates[torch.float32]:
        yield Finding("bfloat16", "slower than float32 here", Status.NOTE, "stay with --dtype float32 on this machine")


def _rate(dtype: Any) -> float:
    """GFLOP/s of a product of the shape of a feed-forward layer."""
    a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.5:
        torch.mm(a, b)
        done += 1
    return 2.0 * 512 * 576 * 1536 * done / (time.perf_counter() - begin) / 1e9


def compilation() -> Iterator[Finding]:
    """A three-line function really compiled for this machine's device, in a process that may fail."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    failed = compile_failure(where)
    if failed is None:
        yield Finding("compilation", f"works on {where} ({time.perf_counter() - begin:.0f} s for the first function)")
        return
    needs = "a C++ compiler (g++)" if where == "cpu" else "a C compiler, Python's headers and triton"
    yield Finding(
        "compilation", f"does not work: {failed}", Status.NOTE, f"runs go on without it, slower; it needs {needs}"
    )


# --- CUDA -------------------------------------------------------------------------------------------------------------


def no_cuda() -> Iterator[Finding]:
    """Why no GPU is used: none, a CPU build of torch beside one, or another kind of device."""
    if torch.backends.mps.is_available():
        yield Finding("device", "Apple GPU (mps)")
        return
    card = shutil.which("nvidia-smi") is not None
    if card and torch.version.cuda is None:
        yield Finding(
            "device", "a CPU build of torch on a machine with an NVIDIA driver", Status.PROBLEM,
            "install a CUDA build of torch (pytorch.org names the command), or say --device cpu",
        )  # fmt: skip
        return
    if card:
        yield Finding(
            "device", f"torch is built for CUDA {torch.version.cuda} and sees no GPU", Status.PROBLEM,
            "look at nvidia-smi: the driver may be too old for this build, or CUDA_VISIBLE_DEVICES may hide the GPUs",
        )  # fmt: skip
        return
    yield Finding("device", "cpu: no GPU here")


def cuda_devices() -> Iterator[Finding]:
    """Each GPU with its capability and free memory, and how many of them a run would use."""
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        room = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"
        seen = f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}, {room}"
        busy = free < 0.5 * total
        way_out = "another program holds most of its memory; --device cuda:N names another GPU" if busy else ""
        yield Finding(f"cuda:{index}", seen, Status.NOTE if busy else Status.OK, way_out)
    build = f"torch built for CUDA {torch.version.cuda}"
    yield Finding("CUDA", build)
    several = torch.cuda.device_count() > 1
    if several and importlib.util.find_spec("ray") is None:
        yield Finding(
            "several GPUs", f"{torch.cuda.device_count()}, of which a run uses one", Status.NOTE,
            "pip install 'dpo-score[ray]': the same command then uses all of them",
        )  # fmt: skip


def cuda_settings() -> Iterator[Finding]:
    """The cheap half: settings from outside that make products inexact or kernels impossible. No kernel is run."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") not in (None, "0"):
        yield Finding(
            "TF32", "NVIDIA_TF32_OVERRIDE is set: it rounds the factors of every float32 product to 10 bits",
            Status.PROBLEM, "unset NVIDIA_TF32_OVERRIDE: no setting of torch can undo it",
        )  # fmt: skip
    if torch.cuda.get_device_capability() < (8, 0):
        yield Finding("bfloat16", "this GPU computes it slowly (capability under 8.0)", Status.NOTE, "--dtype float16")
    if "expandable_segments" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", "")):
        yield Finding(
            "memory fragments", "packs of many sizes leave gaps in GPU memory", Status.NOTE,
            "PYTORCH_ALLOC_CONF=expandable_segments:True before the command",
        )  # fmt: skip


def flash_kernel() -> Iterator[Finding]:
    """The kernel that a run would take for attention, really called on 64 tokens and compared with plain products."""
    chosen = kernel()
    query = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.float16)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            found = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        scores = (query.float() @ query.float().mT) / 8.0
        masked = scores.masked_fill(torch.ones(64, 64, device="cuda").triu(1).bool(), float("-inf"))
        off = float((found.float() - masked.softmax(-1) @ query.float()).abs().max())
    except RuntimeError as error:
        said = str(error).splitlines()[0][:160]
        yield Finding("attention", f"flash kernel fails ({said}); {chosen} is used", Status.NOTE, "slower, not wrong")
        return
    right = off < 5e-3
    yield Finding(
        "attention",
        f"{chosen}; flash kernel off by {off:.1e} on 64 tokens",
        Status.OK if right else Status.PROBLEM,
        "" if right else "the kernel computes wrong values: update the driver and torch; --path plain does without it",
    )


def nccl() -> Iterator[Finding]:
    """Two ranks up, one sum, and down again, for --tensor-parallel."""
    if torch.cuda.device_count() < 2 or not torch.distributed.is_nccl_available():
        return
    program = (
        "import os, torch, torch.multiprocessing as mp, torch.distributed as dist\n"
        "def rank(i):\n"
        "    torch.cuda.set_device(i)\n"
        "    dist.init_process_group('nccl', init_method='tcp://127.0.0.1:29621', rank=i, world_size=2)\n"
        "    x = torch.ones(1, device='cuda'); dist.all_reduce(x); assert x.item() == 2.0\n"
        "    dist.destroy_process_group()\n"
        "if __name__ == '__main__':\n"
        "    mp.start_processes(rank, nprocs=2, start_method='fork')\n"
    )
    failed = run_apart(program, NCCL_TIMEOUT)
    if failed is None:
        yield Finding("NCCL", "two ranks joined, added and left")
    else:
        yield Finding("NCCL", failed, Status.PROBLEM, "--tensor-parallel will not work; NCCL_DEBUG=INFO says why")


# --- a model ----------------------------------------------------------------------------------------------------------


def model(name: str, device: str, cache_dir: str | None) -> Iterator[Finding]:
    """What `auto` picks for a model and why, and how many pairs a second its tokenizer can feed. Loads no weights."""
    folder = cache_folder(cache_dir)
    try:
        source = Resolver(folder, FileDigests(folder).sha256).resolve(name)
        width = 4 if "32" in str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32") else 2
        parameters = sum(path.stat().st_size for path in source.weights) // width
        numerics = resolve_numerics(ComputeSpec(device=device), source.config, parameters)
    except DpoScoreError as error:
        yield Finding("model", str(error).splitlines()[0], Status.PROBLEM, "mend this before a run")
        return
    shares = may_share(source.config)
    yield Finding(
        "model",
        f"{name}: about {parameters / 1e6:,.0f} M parameters; {numerics.dtype} on {numerics.device}, {numerics.path} "
        f"path, kernel {numerics.kernel}, {numerics.batch_tokens:,} tokens a pack",
        Status.OK if shares else Status.NOTE,
        "" if shares else "prompts are computed again for each answer: the architecture cannot share them",
    )
    need, there = peak_bytes(source.config, numerics, parameters, 2048), total_memory(numerics.device)
    fits = need < 0.9 * there
    yield Finding(
        "its memory",
        f"about {need / GIB:.1f} GiB of {there / GIB:.1f}",
        Status.OK if fits else Status.PROBLEM,
        "" if fits else "--dtype float16, --quantization int8, or --tensor-parallel N over several GPUs",
    )
    yield from _tokenizer_rate(str(source.tokenizer_folder))


def _tokenizer_rate(folder: str) -> Iterator[Finding]:
    """Pairs a second of one core: three texts of about 600 characters each, for half a second."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The quick brown fox jumps over the lazy dog, and seven wizards watch. " * 9
    texts: Sequence[str] = [f"{i} {text}" for i in range(96)]
    begin, pairs = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.5:
        tokenizer(list(texts))
        pairs += len(texts) // 3
    rate = pairs / (time.perf_counter() - begin)
    yield Finding("its tokenizer", f"about {rate:,.0f} pairs a second (texts of 600 characters), without rendering")
