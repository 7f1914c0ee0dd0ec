"""How many requests to an object store a block costs: counted by a server that speaks S3 (tests/store/s3_server.py).

    python -m tests.benchmarks.bench_requests

A tiny random model, data, cache and OUT on the server, two runs of different length: what they differ by, divided by
the blocks they differ by, is what a block costs. By phase: stage one, stage two for one policy, the end (summary and
card), and a second run that finds everything committed. Prints; asserts nothing (tests/benchmarks/test_scale.py does).
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dpo_score.pipeline import load_config
from dpo_score.run import prepare as preparing
from dpo_score.run import publish
from dpo_score.run.local import at_desk, ended, run_policy, run_references
from dpo_score.run.progress import Progress
from tests.run.conftest import preference_rows, write_rows
from tests.store.s3_server import Server, serving
from tests.tiny import save_tiny

BLOCK_ROWS = 4
SHORT, LONG = 4, 12
PHASES = ("stage one", "stage two", "the end", "a second look")
KINDS = {
    "data": r"[/=]\d+/data/",
    "texts": r"/out/\.work/text",
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


def counted(server: Server, folder: Path, blocks: int) -> Costs:
    """The requests of one run of `blocks` blocks, and of a second run."""
    import s3fs

    data = write_rows(folder / f"pairs-{blocks}.parquet", preference_rows(BLOCK_ROWS * blocks))
    s3fs.S3FileSystem().put_file(str(data), f"s3://bucket/{blocks}/data/pairs.parquet")
    config = configuration(folder, f"s3://bucket/{blocks}")
    found: Costs = {}
    for number in range(2):
        with at_desk(config, Progress(quiet=True), str(config.out)) as desk:
            job, _ = preparing.prepare(config, desk)
            server.seen()
            run_references(desk, job)
            one = server.seen()
            run_policy(desk, job, job.policies[0])
            two = server.seen()
            ended(desk, job, {})
        phases = [one, two, server.seen()] if number == 0 else [one + two]
        names = PHASES[:3] if number == 0 else PHASES[3:]
        found |= {name: Counter(map(kind_of, lines)) for name, lines in zip(names, phases, strict=True)}
    return found


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


def a_block() -> Costs:
    """Requests a block, by phase and kind (zeros left out)."""
    before = preparing.block_rows, publish.REPORT_ROWS
    preparing.block_rows, publish.REPORT_ROWS = (lambda *_: BLOCK_ROWS), 0  # as with many rows: no report unasked
    try:
        with tempfile.TemporaryDirectory() as name, serving() as server:
            for seed, model in enumerate(("reference", "policy")):
                save_tiny(Path(name) / model, seed=seed)
            short, long = (counted(server, Path(name), blocks) for blocks in (SHORT, LONG))
    finally:
        preparing.block_rows, publish.REPORT_ROWS = before
    return {phase: _each(short[phase], long[phase]) for phase in PHASES}


def _each(short: Counter[str], long: Counter[str]) -> Counter[str]:
    found = {kind: (long[kind] - short[kind]) / (LONG - SHORT) for kind in sorted({*short, *long})}
    return Counter({kind: each for kind, each in found.items() if each})  # type: ignore[misc]


def main() -> None:
    for phase, costs in a_block().items():
        print(f"{phase:14} {sum(costs.values()):6.2f} requests a block: ", end="")
        print(", ".join(f"{kind} {each:g}" for kind, each in sorted(costs.items())))


if __name__ == "__main__":
    main()
