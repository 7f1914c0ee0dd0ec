"""Every command that reads a folder, at size: seconds of one core and peak memory.

    python -m tests.benchmarks.bench_results                     1,000,000 rows, three policies
    python -m tests.benchmarks.bench_results 100000 [FOLDER]     fewer; FOLDER is kept and used again

The folder is synthetic: parts, records and summary as a run writes them, values drawn at random, every prompt another
one, two subsets. Each command runs as a user runs it, in a process of its own. Prints; asserts nothing but exit codes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_score.config.schema import LossSpec
from dpo_score.losses.columns import derive_table
from dpo_score.losses.parse import parse_loss
from dpo_score.metrics.summary import summarise
from dpo_score.results.noise import of_policy
from dpo_score.results.schemas import COUNT_FIELDS, TEXT_FIELDS
from dpo_score.storage.base import FileRecord, Store
from dpo_score.storage.commits import CommitRecord, commit
from dpo_score.storage.fingerprint import Identities, digest
from dpo_score.storage.manifest import Manifest, save_manifest
from dpo_score.storage.open import open_store

POLICIES = ("a", "b", "c")
LOSS = LossSpec(name="sigmoid")
COMMANDS = (
    "verify OUT",
    "rescore OUT --loss sigmoid,ipo,hinge,simpo,orpo,kto_pair",
    "compare OUT --baseline a --slice length",
    "report OUT --no-text",
    "audit OUT --no-text",
    "select OUT --rule margin:high --keep 10%",
    "select OUT --rule all --keep 10%",
    "cache verify --cache-dir CACHE",
)


def make(folder: Path, rows: int) -> None:
    """A finished run of `rows` rows, and a cache of as many sequences a policy."""
    store = open_store(folder / "out")
    size = max(min(rows // 50, 32_768), 64)
    identities = _identities()
    blocks = -(-rows // size)
    kept: dict[str, list[str]] = {name: [] for name in POLICIES}
    for block in range(blocks):
        start, stop = block * size, min((block + 1) * size, rows)
        reference = _reference(start, stop)
        record = {"block": block, "blocks": blocks, "start": start, "stop": stop}
        ids = digest(reference["row_id"].to_pylist())
        counts = {"rows": stop - start, "scored": stop - start}
        _commit(store, "reference", reference, {}, identities.reference_digest, counts, ids, record)
        for number, name in enumerate(POLICIES):
            told = {
                "dpo_score.loss_spec": LOSS.model_dump_json(),
                "dpo_score.identity": identities.policy_digest(name),
            }
            scores = derive_table(_policy(reference, number), parse_loss(LOSS), has_reference=True)
            file = _commit(
                store,
                f"scores/{name}",
                scores,
                told,
                identities.policy_digest(name),
                {"scored": stop - start},
                ids,
                record,
            )
            kept[name].append(file.name)
    policies = {}
    for name in POLICIES:
        found = summarise(store.read_table(part) for part in kept[name])
        policies[name] = {"loss": parse_loss(LOSS).identity(), **found, "noise": of_policy(None, None, np.empty(0))}
    data = {"rows": rows, "files": 1, "datasets": {}, "scored_by_reference": rows, "rejected": {}}
    summary = {
        "schema_version": 1,
        "data": data,
        "text": {"marks": {}},
        "policies": policies,
        "skipped": {},
        "failed": {},
    }
    store.write_json("summary.json", summary)
    stat = store.stat("summary.json")
    assert stat is not None
    outputs = (FileRecord("summary.json", stat.size, 0, store.sha256("summary.json")),)
    save_manifest(store, Manifest(identities, {}, size, rows, state="complete", outputs=outputs))
    _cache(folder / "cache", rows)


def _identities() -> Identities:
    loss = parse_loss(LOSS).identity()
    fields = {name: {"weights": name, "numerics": {}, "loss": loss} for name in POLICIES}
    return Identities({"data": {}, "text": {}}, {"weights": "r", "columns": None, "numerics": {}}, fields)


def _commit(
    store: Store,
    stage: str,
    table: pa.Table,
    told: dict[str, str],
    identity: str,
    counts: dict[str, int],
    ids: str,
    at: Any,
) -> FileRecord:
    part = f"{stage}/part-{at['block']:05d}-of-{at['blocks']:05d}.parquet"
    file = store.write_table(part, table, told)
    commit(store, CommitRecord(stage=stage, identity=identity, files=(file,), counts=counts, row_ids_digest=ids, **at))
    return file


def _reference(start: int, stop: int) -> pa.Table:
    draw, rows = np.random.default_rng(start), range(start, stop)
    size = stop - start
    text = {
        "row_id": [f"0:{row}" for row in rows],
        "dataset": ["pairs"] * size,
        "source_file": ["data/pairs.parquet"] * size,
        "source_row": list(rows),
        **{name: [f"{row:032x}" for row in rows] for name in ("pair_id", "pair_digest", "prompt_digest")},
        "subset": [f"s{row % 2}" for row in rows],
        "status": ["scored"] * size,
        **{f"{part}_tokens": draw.integers(1, 200, size) for part in ("prompt", "chosen", "rejected")},
        **{f"{side}_truncated": np.zeros(size, bool) for side in ("chosen", "rejected")},
        "marks": [[]] * size,
    }
    schema = pa.schema([*TEXT_FIELDS, pa.field("subset", pa.string()), *COUNT_FIELDS])
    table = pa.table(text, schema=schema)
    for side in ("chosen", "rejected"):
        for name in (f"ref_{side}_logps", f"ref_{side}_logps_shared"):
            table = table.append_column(name, pa.array(draw.normal(-100.0, 30.0, size)))
    return table.append_column("compute_dtype", pa.nulls(size, pa.string()))


def _policy(reference: pa.Table, number: int) -> pa.Table:
    draw = np.random.default_rng(number)
    for name in [name for name in reference.column_names if name.startswith("ref_")]:
        moved = reference[name].to_numpy() + draw.normal(0.3 * ("chosen" in name), 3.0, reference.num_rows)
        reference = reference.append_column("policy_" + name.removeprefix("ref_"), pa.array(moved))
    return reference


def _cache(folder: Path, rows: int) -> None:
    from dpo_score.storage.cache.cache import open_cache
    from tests.benchmarks.bench_cache import fill

    fill(open_cache(folder).namespace({"weights": "synthetic"}), 2 * rows * (1 + len(POLICIES)))


def timed(command: str, folder: Path) -> tuple[float, float, float, int]:
    """Seconds of the processor and by the clock, MiB resident at most, exit code."""
    words = command.replace("OUT", str(folder / "out")).replace("CACHE", str(folder / "cache")).split()
    code = f"import sys; from dpo_score.cli.main import main; main({words!r})"
    begun = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, time.perf_counter() - begun, used.ru_maxrss / 1024, child.returncode


def main(rows: int, folder: Path) -> None:
    if not (folder / "out/manifest.json").exists():
        make(folder, rows)
    print(f"{rows:,} rows, {len(POLICIES)} policies")
    print(f"{'command':<80}{'CPU s':>8}{'wall s':>8}{'MiB':>8}{'exit':>6}")
    for command in COMMANDS:
        cpu, wall, memory, status = timed(command, folder)
        print(f"{command:<80}{cpu:>8.1f}{wall:>8.1f}{memory:>8.0f}{status:>6}", flush=True)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    if len(sys.argv) > 2:
        main(count, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(count, Path(temporary))
