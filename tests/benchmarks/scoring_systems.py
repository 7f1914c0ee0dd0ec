"""One scoring system in a process of its own: `python scoring_systems.py SYSTEM JOB.json`, driven over stdin.

Prints one JSON line when it is ready, then one per line of input: the seconds of one pass over the job's pairs and the
sum of each sequence. A peer is called the way its own users call it, on the same token ids; loading and tokenising
are not timed. Runs under any interpreter that has the system; dpo_score is imported by our own systems alone.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Sums = list[float]
Pass = Callable[[], Sums]
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
}
"""Models by shape alone, with random weights: `random:8b`."""


def pairs(job: dict[str, Any]) -> list[tuple[list[int], list[int], list[int]]]:
    return [tuple(row) for row in json.loads(Path(job["pairs"]).read_text())]  # type: ignore[misc]


def model(job: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, job["dtype"])
    if job["model"].startswith("random:"):
        config = LlamaConfig(**SHAPES[job["model"].removeprefix("random:")])
        with torch.device(job["device"]):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(job["device"]).eval()


def ours(path: str, shared: bool = True) -> Callable[[dict[str, Any]], Pass]:
    """dpo_score on one of its paths; unshared packs give every sequence a prompt of its own."""

    def prepare(job: dict[str, Any]) -> Pass:
        from dpo_score.config.schema import ComputeSpec
        from dpo_score.data.types import TokenSequence
        from dpo_score.logprobs import packing as plan
        from dpo_score.logprobs.numerics import resolve_numerics
        from dpo_score.logprobs.scorer import PairScorer

        if not shared:
            plan.prompt_groups = lambda sequences: [(i,) for i in range(len(sequences))]
        loaded = model(job)
        spec = ComputeSpec(path=path, **{k: job[k] for k in ("dtype", "device", "threads", "compile", "batch_tokens")})
        numerics = resolve_numerics(spec, loaded.config.to_dict(), loaded.num_parameters(), None)
        scorer = PairScorer(loaded, numerics)
        sequences = [
            TokenSequence(np.array(p, np.int32), np.array(a, np.int32)) for p, *both in pairs(job) for a in both
        ]
        return lambda: [float(r.token_logps.sum(dtype=np.float64)) for r in scorer.score(sequences)]

    return prepare


def trl(job: dict[str, Any]) -> Pass:
    """TRL's reference pass: DPOTrainer's own collator, dataloader order and compute_ref_log_probs, batch size 8."""
    import tempfile

    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs(job)]
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        max_length=2048,
        bf16=job["dtype"] == "bfloat16",
        use_cpu=job["device"] == "cpu",
        report_to=[],
        gradient_checkpointing=False,
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
    trainer = DPOTrainer(
        model=model({**job, "dtype": "float32"}),
        args=args,
        train_dataset=text,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    reference = trainer.ref_model or trainer.model
    reference.eval()

    def one_pass() -> Sums:
        sums: Sums = []
        for start in range(0, len(rows), 8):
            batch = trainer.data_collator(rows[start : start + 8])
            chosen, rejected = trainer.compute_ref_log_probs(
                reference, {k: v.to(job["device"]) for k, v in batch.items()}
            )
            sums += [float(v) for pair in zip(chosen, rejected, strict=True) for v in pair]
        return sums

    return one_pass


def trl_onednn(job: dict[str, Any]) -> Pass:
    """TRL with the process-wide flag that sends its fp32 products through oneDNN, which it does not set itself."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return trl(job)


def lm_eval(job: dict[str, Any]) -> Pass:
    """lm-evaluation-harness: HFLM's loglikelihood on token ids (sorted by length inside), batch size 8."""
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=job["model"], dtype=job["dtype"], device=job["device"], batch_size=8, max_length=2048)
    requests = [(("", ""), list(p), list(a)) for p, *both in pairs(job) for a in both]
    return lambda: [float(s) for s, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]


def products(job: dict[str, Any]) -> Pass:
    """Not a scorer: the matrix-product rate of this machine at the model's own shapes, in FLOP/s (median of 7)."""
    from transformers import AutoConfig, LlamaConfig

    name = job["model"]
    config = LlamaConfig(**SHAPES[name[7:]]) if name.startswith("random:") else AutoConfig.from_pretrained(name)
    dtype, M = getattr(torch, job["dtype"]), 4096 if job["device"] == "cpu" else 16384
    H, middle = config.hidden_size, config.intermediate_size
    x, w = (torch.randn(*size, dtype=dtype, device=job["device"]) for size in ((M, H), (middle, H)))
    onednn = dtype == torch.float32 and job["device"] == "cpu"
    clock = time.process_time if job["clock"] == "cpu" else time.perf_counter

    def one_pass() -> Sums:
        from dpo_score.logprobs import matmul as gemm

        with gemm.onednn(onednn):
            return [float(np.median([_rate(x, w, clock) for _ in range(7)]))]

    return one_pass


def _rate(x: torch.Tensor, w: torch.Tensor, clock: Callable[[], float]) -> float:
    synchronise = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    with torch.inference_mode():
        synchronise()
        begun = clock()
        torch.nn.functional.linear(x, w)
        synchronise()
    return 2 * x.shape[0] * x.shape[1] * w.shape[0] / (clock() - begun)


SYSTEMS: dict[str, Callable[[dict[str, Any]], Pass]] = {
    "fast": ours("fast"),
    "unshared": ours("fast", shared=False),
    "plain": ours("plain"),
    "trl": trl,
    "trl+onednn": trl_onednn,
    "lm-eval": lm_eval,
    "products": products,
}


def peak_bytes(job: dict[str, Any]) -> int:
    if job["device"] != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    system, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    clock = time.process_time if job["clock"] == "cpu" else time.perf_counter
    one_pass = SYSTEMS[system](job)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        begun = clock()
        sums = one_pass()
        seconds = clock() - begun
        print(json.dumps({"seconds": seconds, "sums": sums, "peak": peak_bytes(job)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
