"""What a first run on a GPU must show, in one table: right numbers, no waiting, speed against the machine's own.

    python -m tests.gpu.check                 all steps; on a CPU those for CUDA are skipped by name
    python -m tests.gpu.check varlen noise    some steps
    python -m tests.gpu.check --json FILE     the table as JSON as well

Every step runs in a process of its own with a time limit, so that a crash or a hang of one is a line of the table.
Models have random weights: nothing is downloaded. Exit 1 if a step fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = "cuda:0" if torch.cuda.is_available() else "cpu"
MODEL_STEPS_DTYPE = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Line:
    """`result`: PASS, FAIL or SKIP; `number` and `bound` in the unit that `what` names."""

    step: str
    result: str
    what: str
    number: str
    bound: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """`run` gives lines of (passed, what, number, bound); `gpus`: how many it needs."""

    run: Callable[[], list[tuple[bool, str, str, str]]]
    seconds: int
    gpus: int = 1


def environment() -> list[tuple[bool, str, str, str]]:
    """What is here; the flash operator and a compiled kernel, really called."""
    from dpo_score.logprobs.attention.flash_flex import kernel

    lines = [(True, "torch, device", f"{torch.__version__}, {_device_name()}", "")]
    lines.append((kernel() in ("varlen", "flex"), "kernel that is chosen", str(kernel()), "varlen or flex"))
    compiled = torch.compile(lambda x: (x * 2 + 1).sum())
    x = torch.arange(64.0, device=HERE)
    lines.append((float(compiled(x)) == float((x * 2 + 1).sum()), "a kernel compiled here", "called", "right"))
    return lines


def varlen() -> list[tuple[bool, str, str, str]]:
    """The flash kernel on packs against a dense mask in float32, by head size, grouping, window and sinks."""
    return [
        _kernel_line("varlen", head, groups, window, sinks, 0.0, head)
        for head in (64, 96, 128, 192, 256)
        for groups in (1, 4)
        for window, sinks in ((0, False), (33, False), (0, True))
    ] + [_kernel_line("varlen", head, groups, 0, False, 0.0, head, dtype=torch.float32) for head in (64, 128)
         for groups in (1, 4)]  # fmt: skip


def flex() -> list[tuple[bool, str, str, str]]:
    """FlexAttention likewise, with soft caps and values of another size than keys; shorter and longer than a block."""
    lines = []
    for longest in (40, 700):
        lines.append(_kernel_line("flex", 64, 4, 0, False, 30.0, 64, longest))
        lines.append(_kernel_line("flex", 128, 1, 33, True, 0.0, 64, longest))
    return lines


def products() -> list[tuple[bool, str, str, str]]:
    """The batched products that run anywhere, on this device."""
    dtype = torch.bfloat16 if HERE != "cpu" else torch.float32
    return [_kernel_line("bmm", 64, 4, window, True, 0.0, 64, dtype=dtype) for window in (0, 33)]


def head() -> list[tuple[bool, str, str, str]]:
    """Log-probabilities of the tiled head against float64, eager and compiled, with a ragged last tile."""
    from dpo_score.logprobs.lm_head import compiled_fold_is_right, token_values
    from dpo_score.models.parts import Head

    lines = []
    torch.manual_seed(0)
    for vocabulary in (128_256, 50_257):
        linear = torch.nn.Linear(256, vocabulary, bias=False, dtype=torch.bfloat16, device=HERE)
        hidden = torch.randn(300, 256, device=HERE).to(torch.bfloat16)
        targets = torch.randint(0, vocabulary, (300,), device=HERE)
        exact = torch.log_softmax(hidden.double() @ linear.weight.double().T, 1).gather(1, targets[:, None])[:, 0]
        for compiled in (False, True):
            if compiled and HERE == "cpu":
                continue
            with torch.inference_mode():
                found = token_values(
                    Head(linear, linear.weight, None), hidden, np.arange(300), targets, compiled=compiled
                )
            worst = float((found["logp"].double() - exact).abs().max())
            bound = 1e-5 if HERE != "cpu" else 0.1  # a CPU rounds products to 16 bits
            name = f"head, V = {vocabulary}, {'compiled' if compiled else 'eager'} (nats)"
            lines.append((worst <= bound, name, f"{worst:.1e}", f"{bound:.0e}"))
    right = compiled_fold_is_right(1.0, None, torch.float32, torch.device(HERE))
    lines.append((right, "compiled fold against float64", str(right), "True"))
    return lines


def check() -> list[tuple[bool, str, str, str]]:
    """The check at load of a small Llama, in each dtype, eager and compiled: the fast path must hold."""
    from dataclasses import replace

    from dpo_score.logprobs.self_check import check_model

    lines = []
    for dtype in MODEL_STEPS_DTYPE:
        model = _llama(dtype)
        asked = _numerics(model, dtype)
        for compiled in (False, True):
            wanted = replace(asked, compile=compiled)
            found = check_model(model, wanted)
            lines.append(
                (
                    found.numerics == wanted,
                    f"check at load, {dtype}, {'compiled' if compiled else 'eager'}",
                    found.numerics.kernel if found.numerics.path == "fast" else f"plain: {found.reason}",
                    str(wanted.kernel),
                )
            )
    return lines


def noise() -> list[tuple[bool, str, str, str]]:
    """A sequence's log-probability against fp32, and a policy that is the reference: exactly ln 2."""
    from dpo_score.logprobs.noise_floor import noise_floor
    from dpo_score.logprobs.scorer import PairScorer

    lines = []
    for dtype, bound in (("float16", 0.05), ("bfloat16", 0.5), ("float32", 1e-3)):
        model = _llama(dtype)
        numerics = _numerics(model, dtype)
        rows = _rows(64)
        scored = PairScorer(model, numerics).score(rows)
        found = noise_floor(model, numerics, rows, scored)
        worst = found.logp_max if found.logp_max is not None else float("inf")
        lines.append((worst <= bound, f"largest error of a sequence, {dtype} (nats)", f"{worst:.1e}", f"{bound}"))
        again = PairScorer(model, numerics).score(rows)
        same = all(np.array_equal(a.token_logps, b.token_logps) for a, b in zip(scored, again, strict=True))
        lines.append((same, f"scored twice, {dtype}", "equal bits" if same else "other bits", "equal bits"))
    return lines


def packs() -> list[tuple[bool, str, str, str]]:
    """The same sequences in other packs and buckets."""
    from dataclasses import replace

    from dpo_score.logprobs.scorer import PairScorer

    dtype = "bfloat16" if HERE != "cpu" else "float32"
    model = _llama(dtype)
    numerics = _numerics(model, dtype)
    rows = _rows(64)
    order = np.random.default_rng(1).permutation(len(rows))
    one = PairScorer(model, replace(numerics, batch_tokens=4096)).score(rows)
    other = PairScorer(model, replace(numerics, batch_tokens=1024)).score([rows[i] for i in order])
    sums = [float(r.token_logps.sum(dtype=np.float64)) for r in one]
    moved = [float(r.token_logps.sum(dtype=np.float64)) for r in other]
    worst = max(abs(sums[i] - moved[n]) for n, i in enumerate(order))
    bound = 0.5 if dtype == "bfloat16" else 1e-3
    return [(worst <= bound, f"other packs, {dtype} (nats of a sequence)", f"{worst:.1e}", f"{bound}")]


def overflow() -> list[tuple[bool, str, str, str]]:
    """A model that overflows float16: its packs are computed again in fp32, and the check says so."""
    from dpo_score.logprobs.scorer import PairScorer
    from dpo_score.logprobs.self_check import check_model

    model = _llama("float32")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e2)
    model = model.to(torch.float16)
    numerics = _numerics(model, "float16")
    found = check_model(model, numerics)
    results = PairScorer(model, numerics).score(_rows(8))
    redone = {getattr(r, "redone_dtype", "unscored") for r in results}
    return [
        (found.overflows, "the check sees the overflow", str(found.overflows), "True"),
        (redone == {"float32"}, "packs computed again in", str(redone), "{'float32'}"),
    ]


def memory() -> list[tuple[bool, str, str, str]]:
    """Little memory left: packs are split, and values stay what they were."""
    from dpo_score.logprobs.scorer import PairScorer

    model = _llama("bfloat16")
    numerics = _numerics(model, "bfloat16")
    rows = _rows(256)
    whole = PairScorer(model, numerics).score(rows)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(free - 2**28, 0), dtype=torch.uint8, device=HERE)
    scorer = PairScorer(model, numerics)
    split = scorer.score(rows)
    del taken
    worst = max(
        abs(float(a.token_logps.sum(dtype=np.float64)) - float(b.token_logps.sum(dtype=np.float64)))
        for a, b in zip(whole, split, strict=True)
    )
    return [
        (scorer.packs_split > 0, "packs split", str(scorer.packs_split), "> 0"),
        (worst <= 0.5, "values of split packs, bfloat16 (nats of a sequence)", f"{worst:.1e}", "0.5"),
    ]


def ahead() -> list[tuple[bool, str, str, str]]:
    """Packs that are laid out by a thread and queued before the last values are back: the bits of one by one."""
    from dataclasses import replace

    from dpo_score.logprobs.scorer import PairScorer

    dtype = "bfloat16" if HERE != "cpu" else "float32"
    model = _llama(dtype)
    numerics, rows = replace(_numerics(model, dtype), batch_tokens=1024), _rows(64)
    found = []
    for runs_ahead in (False, True):
        scorer = PairScorer(model, numerics)
        scorer.runs_ahead = runs_ahead
        found.append([result.token_logps.tobytes() for result in scorer.score(rows)])
    same = sum(a == b for a, b in zip(*found, strict=True))
    return [(same == len(rows), "rows with equal bits, queued ahead and one by one", f"{same} of {len(rows)}", "all")]


def waits() -> list[tuple[bool, str, str, str]]:
    """A pass of a pack under torch's own watch: anything that waits for the device is an error."""
    from dpo_score.logprobs.packed import PackedPath
    from dpo_score.models.parts import model_parts

    model = _llama("bfloat16")
    path = PackedPath(model_parts(model), _numerics(model, "bfloat16"))
    pack = path.lay_out(_rows(32))
    with torch.inference_mode(), path.session():
        path.start(pack).arrived()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            path.start(path.lay_out(_rows(32)))
            said, passed = "none", True
        except RuntimeError as error:
            said, passed = str(error)[:100], False
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [(passed, "operations that wait for the device in a pass", said, "none")]


def speed() -> list[tuple[bool, str, str, str]]:
    """Unique tokens a second and their share of the machine's own product rate: four layers of 8B, and 135M."""
    from dataclasses import replace

    from dpo_score.logprobs.packing import lay_out
    from dpo_score.logprobs.scorer import PairScorer, token_costs

    lines = []
    dtype = "bfloat16" if HERE != "cpu" else "float32"
    rate = _product_rate(getattr(torch, dtype))
    lines.append((True, f"products of the machine, {dtype} (TFLOP/s)", f"{rate / 1e12:.1f}", ""))
    shapes = {
        "8B shape, 4 layers": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
                               "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                               "vocab_size": 128_256},
        "135M shape": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                       "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152},
    }  # fmt: skip
    if HERE == "cpu":
        shapes = {"tiny shape": {}}
    for name, shape in shapes.items():
        model = _llama(dtype, **shape)
        numerics = _numerics(model, dtype)
        rows = _rows(1200 if HERE != "cpu" else 40, longest=100)
        began = time.perf_counter()
        lay_out(rows[:200])
        host = (time.perf_counter() - began) / 200 * 1e6
        lines.append((host <= 40, f"{name}: host time to lay out a sequence (us)", f"{host:.1f}", "40"))
        body = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
        for compiled in (False, True) if HERE != "cpu" else (False,):
            scorer = PairScorer(model, replace(numerics, compile=compiled))
            scorer.score(rows[:200])
            began = time.perf_counter()
            scorer.score(rows)
            seconds = time.perf_counter() - began
            tokens = sum(token_costs(rows))
            share = 2 * body * tokens / seconds / rate
            what = f"{name}, {'compiled' if compiled else 'eager'}: tokens/s, share of products"
            lines.append((True, what, f"{tokens / seconds:,.0f}, {share:.0%}", ""))
    return lines


def ranks() -> list[tuple[bool, str, str, str]]:
    """Two ranks of NCCL up and down within 30 seconds."""
    code = (
        "import torch, torch.distributed as d, os, sys\n"
        "r = int(sys.argv[1]); torch.cuda.set_device(r)\n"
        "d.init_process_group('nccl', init_method='tcp://127.0.0.1:29555', rank=r, world_size=2)\n"
        "x = torch.ones(4, device='cuda'); d.all_reduce(x); assert x[0] == 2\n"
        "d.destroy_process_group()\n"
    )
    began = time.perf_counter()
    both = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in (0, 1)]
    passed = all(process.wait(30) == 0 for process in both)
    return [(passed, "two ranks up and down (s)", f"{time.perf_counter() - began:.1f}", "30")]


STEPS: dict[str, Step] = {
    "environment": Step(environment, 60),
    "varlen": Step(varlen, 60),
    "flex": Step(flex, 120),
    "products": Step(products, 60, gpus=0),
    "head": Step(head, 90, gpus=0),
    "check": Step(check, 180),
    "noise": Step(noise, 60, gpus=0),
    "packs": Step(packs, 60, gpus=0),
    "ahead": Step(ahead, 60, gpus=0),
    "overflow": Step(overflow, 60, gpus=0),
    "memory": Step(memory, 60),
    "waits": Step(waits, 60),
    "speed": Step(speed, 180, gpus=0),
    "ranks": Step(ranks, 60, gpus=2),
}


def _kernel_line(
    name: str,
    head: int,
    groups: int,
    window: int,
    sinks: bool,
    softcap: float,
    value_head: int,
    longest: int = 200,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[bool, str, str, str]:
    """One kernel on a pack against softmax with a dense mask in float32."""
    from dpo_score.logprobs.packed import prepared_pack
    from dpo_score.logprobs.packing import lay_out
    from dpo_score.models.numerics import Kernel
    from tests.logprobs.attention.test_interface import dense
    from tests.logprobs.sequences import awkward, visible

    device = torch.device(HERE)
    pack = lay_out(awkward(longest=longest))
    generator = torch.Generator().manual_seed(0)
    T, heads = len(pack.ids), 4
    shapes = ((heads, head), (heads // groups, head), (heads // groups, value_head))
    query, key, value = (torch.randn(h, T, d, generator=generator).to(dtype).to(device) for h, d in shapes)
    logits = torch.linspace(-2, 2, heads, device=device) if sinks else None
    prepared = prepared_pack(pack, Kernel(name), device)
    with torch.inference_mode():
        found = prepared.attend(query[None], key[None], value[None], logits, head**-0.5, window, softcap)[0]
    mask = torch.from_numpy(visible(pack, window)).to(device)
    expected = dense(query.float(), key.float(), value.float(), mask, head**-0.5, softcap, logits)
    worst = float((found.double() - expected).abs().max())
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    wide = ", float32" if dtype == torch.float32 else ""
    extras = f"{wide}{', window' if window else ''}{', sinks' if sinks else ''}{', cap' if softcap else ''}"
    what = f"{name}, D = {head}, E = {value_head}, groups of {groups}, T = {T}{extras}"
    return worst <= bound, what, f"{worst:.1e}", f"{bound:.0e}"


def _llama(dtype: str, **shape: Any) -> Any:
    """A Llama with random weights on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    }
    torch.manual_seed(0)
    with torch.device(HERE):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **{**small, **shape}), dtype=getattr(torch, dtype)
        )
    return model.eval().requires_grad_(False)


def _numerics(model: Any, dtype: str) -> Any:
    from dpo_score.config.schema import ComputeSpec
    from dpo_score.logprobs.numerics import resolve_numerics

    size = sum(parameter.numel() for parameter in model.parameters())
    return resolve_numerics(ComputeSpec(device=HERE, dtype=dtype, compile="off"), model.config.to_dict(), size)


def _rows(count: int, longest: int = 200) -> list[Any]:
    """Pairs of one prompt each, of lengths as in chats."""
    from dpo_score.data.types import TokenSequence

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count // 2):
        prompt = rng.integers(1, 2000, rng.integers(20, longest)).astype(np.int32)
        rows += [TokenSequence(prompt, rng.integers(1, 2000, rng.integers(5, 80)).astype(np.int32)) for _ in range(2)]
    return rows


def _product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of large products on this device."""
    n = 8192 if HERE != "cpu" else 1024
    a, b = torch.randn(n, n, device=HERE).to(dtype), torch.randn(n, n, device=HERE).to(dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        if HERE != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2.0 * n**3 / best


def _device_name() -> str:
    return torch.cuda.get_device_name(0) if HERE != "cpu" else "CPU"


def run_step(name: str) -> list[Line]:
    """One step in a process of its own."""
    step = STEPS[name]
    if torch.cuda.device_count() < step.gpus:
        return [Line(name, "SKIP", f"needs {step.gpus} GPU{'s' if step.gpus > 1 else ''}", "", "", 0.0)]
    began = time.perf_counter()
    command = [sys.executable, "-m", "tests.gpu.check", "--in-this-process", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=step.seconds)
    except subprocess.TimeoutExpired:
        return [Line(name, "FAIL", f"not done in {step.seconds} s", "", "", float(step.seconds))]
    seconds = time.perf_counter() - began
    found = [text for text in done.stdout.splitlines() if text.startswith("[")]
    if done.returncode or not found:
        last = (done.stderr.strip() or "no output").splitlines()[-1][:200]
        return [Line(name, "FAIL", f"ended with {done.returncode}: {last}", "", "", seconds)]
    lines = json.loads(found[-1])
    return [
        Line(name, "PASS" if passed else "FAIL", what, number, bound, seconds / len(lines))
        for passed, what, number, bound in lines
    ]


def main(names: Sequence[str], to: Path | None) -> int:
    lines: list[Line] = []
    print("| step | result | what | number | bound | seconds |\n|---|---|---|---|---|---|", flush=True)
    for name in names or STEPS:
        for line in run_step(name):
            lines.append(line)
            print(f"| {line.step} | {line.result} | {line.what} | {line.number} | {line.bound} | {line.seconds:.1f} |")
        sys.stdout.flush()
    if to is not None:
        to.write_text(json.dumps([asdict(line) for line in lines], indent=1))
    failed = sum(line.result == "FAIL" for line in lines)
    print(f"\n{failed} of {len(lines)} failed on {_device_name()}")
    return int(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*STEPS, []], help="steps; default: all")
    parser.add_argument("--json", type=Path, help="write the table there as well")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        found = STEPS[options.names[0]].run()
        print(json.dumps([[bool(passed), *map(str, rest)] for passed, *rest in found]))
        sys.exit(0)
    sys.exit(main(options.names, options.json))
