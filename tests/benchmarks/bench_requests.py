"""How many requests to an object store a block costs: counted by a server that speaks S3 (tests/storage/s3_server.py).

    python -m tests.benchmarks.bench_requests

A tiny random model, data, cache and OUT on the server, two runs of different length: what they differ by, divided by
the blocks they differ by, is what a block costs. By phase: stage one, stage two for one policy, the end (summary and
card), and a second run that finds everything committed. Once with an empty cache, and once with one that holds more
files of the reference than a listing has on a page. Prints; asserts nothing (tests/benchmarks/test_scale.py does).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from dpo_score.config.load import load_config
from dpo_score.engine import finish as publish
from dpo_score.engine import prepare as preparing
from dpo_score.engine.context import RunContext
from dpo_score.engine.model_logprobs import cache_fields
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import end_run, run_context, run_references, score_policy
from dpo_score.storage.cache.cache import SequenceLogps, open_cache
from tests.run_fixtures import preference_rows, write_rows
from tests.storage.s3_server import Server, serving
from tests.tiny import save_tiny

BLOCK_ROWS = 4
SHORT, LONG = 4, 12
MANY = 1_001
"""Files of the reference in a cache that is not empty; a page of a listing has 1,000."""
PHASES = ("stage one", "stage two", "the end", "a second look")
KINDS = {
    "data": r"[/=]\d+/data/",
    "texts": r"/out/\.work/text",
    "lease": r"/out/\.work/(lease|&|$)",
    "records": r"/out/commits/",
    "parts": r"/out/(reference|scores|rejects)",
    "cache": r"/cache/",
}
Costs = dict[str, Counter[str]]
"""phase → `PUT parts` and the like → requests."""


def kind_of(line: str) -> str:
    """`PUT parts`, from `METHOD path?query`."""
    method, path = unquote(line).split(" ", 1)
    found = next((kind for kind, pattern in KINDS.items() if re.search(pattern, path)), "other")
    return f"{'LIST' if 'list-type' in path else method} {found}"


def counted(server: Server, folder: Path, blocks: int, cached: int) -> Costs:
    """The requests of one run of `blocks` blocks, and of a second run. `cached`: of its reference in the cache."""
    import s3fs

    data = write_rows(folder / f"pairs-{blocks}.parquet", preference_rows(BLOCK_ROWS * blocks))
    s3fs.S3FileSystem().put_file(str(data), f"s3://bucket/{blocks}/data/pairs.parquet")
    config = configuration(folder, f"s3://bucket/{blocks}")
    found: Costs = {}
    for number in range(2):
        with run_context(config, Progress(quiet=True), str(config.out)) as context:
            if number == 0:
                fill(context, config, folder, cached)
            plan, _ = preparing.prepare(config, context)
            server.seen()
            run_references(context, plan)
            one = server.seen()
            score_policy(context, plan, plan.policies[0])
            two = server.seen()
            end_run(context, plan, {})
        phases = [one, two, server.seen()] if number == 0 else [one + two]
        names = PHASES[:3] if number == 0 else PHASES[3:]
        found |= {name: _kinds(lines) for name, lines in zip(names, phases, strict=True)}
    return found


def _kinds(lines: Sequence[str]) -> Counter[str]:
    """How many of each kind, but for the lease: it is renewed by the clock, whatever the number of blocks."""
    return Counter(kind for kind in map(kind_of, lines) if not kind.endswith("lease"))


def fill(context: RunContext, config: Any, folder: Path, files: int) -> None:
    """The cache as other runs of the reference left it: that many files, indexed, of sequences not asked for here."""
    import s3fs

    if not files:
        return
    _, source, numerics = preparing.resolve_plan(config, context).models[0]
    local = folder / "filled"
    space = open_cache(local).namespace(cache_fields(source, numerics))
    first = space.add("other", {bytes(16): SequenceLogps(np.zeros(2, np.float32))})
    for number in range(1, files):  # equal contents do: names are all that a listing sees
        shutil.copy(local / space.folder / str(first), local / space.folder / f"other-{number:032x}.parquet")
    space.compact()
    s3fs.S3FileSystem().put(str(local / "logps") + "/", f"{config.cache_dir}/logps/", recursive=True)
    shutil.rmtree(local)


def configuration(folder: Path, place: str) -> Any:
    options = {
        "data": [f"{place}/data/pairs.parquet"],
        "reference": str(folder / "reference"),
        "policy": [f"policy={folder / 'policy'}"],
        "out": f"{place}/out",
        "cache_dir": f"{place}/cache",
        "threads": 1,
    }
    return load_config(None, options, environment={})


def a_block(cached: int = 0) -> Costs:
    """Requests a block, by phase and kind (zeros left out). `cached`: files of the reference in the cache before."""
    before = preparing.block_rows, publish.REPORT_ROWS
    preparing.block_rows, publish.REPORT_ROWS = (lambda *_: BLOCK_ROWS), 0  # as with many rows: no report unasked
    try:
        with tempfile.TemporaryDirectory() as name, serving() as server:
            for seed, model in enumerate(("reference", "policy")):
                save_tiny(Path(name) / model, seed=seed)
            short, long = (counted(server, Path(name), blocks, cached) for blocks in (SHORT, LONG))
    finally:
        preparing.block_rows, publish.REPORT_ROWS = before
    return {phase: _each(short[phase], long[phase]) for phase in PHASES}


def _each(short: Counter[str], long: Counter[str]) -> Counter[str]:
    found = {kind: (long[kind] - short[kind]) / (LONG - SHORT) for kind in sorted({*short, *long})}
    return Counter({kind: each for kind, each in found.items() if each})  # type: ignore[misc]


def main(caches: Sequence[int] = (0, MANY)) -> None:
    for cached in caches:
        print(f"{cached:,} files of the reference in the cache")
        for phase, costs in a_block(cached).items():
            print(f"{phase:14} {sum(costs.values()):6.2f} requests a block: ", end="")
            print(", ".join(f"{kind} {each:g}" for kind, each in sorted(costs.items())))


if __name__ == "__main__":
    main()
