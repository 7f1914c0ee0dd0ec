"""Mutation testing with mutmut: changes one operator, constant or argument at a time, and asks whether a test notices.

    pip install mutmut
    python -m tests.mutants storage|resume|verify|losses [--sample 100] [--seed 0] [--keep FOLDER]

Works in a copy of the tracked files, with the module's quick tests, one mutant at a time, each in a forked process.
Prints how many were found and the survivors with their changes. A sample is drawn at random; 0 means all of them.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = """

[tool.mutmut]
source_paths = ["dpo_score"]
only_mutate = {files}
also_copy = ["dpo_score", "data", "pipelines", "README.md", "CHANGELOG.md"]
pytest_add_cli_args = ["-m", "not slow", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=ci",
    "-k", "{left_in}"]
pytest_add_cli_args_test_selection = {tests}
"""


@dataclass(frozen=True, slots=True)
class Target:
    """What is changed, and which tests must notice. `left_in`: without those that start processes, whose code is not
    the changed one."""

    files: list[str]
    tests: list[str]
    left_in: str = "not subprocess and not without_importing and not child"


TARGETS = {
    "losses": Target(
        ["dpo_score/losses/formulas.py", "dpo_score/losses/ops.py", "dpo_score/losses/columns.py"],
        [f"tests/losses/test_{name}.py" for name in ("formulas", "columns", "ops", "parse", "evaluate")],
    ),
    "resume": Target(
        ["dpo_score/storage/resume.py", "dpo_score/storage/manifest.py", "dpo_score/storage/fingerprint.py"],
        [f"tests/storage/test_{name}.py" for name in ("resume", "manifest", "fingerprint")],
    ),
    "storage": Target(
        ["dpo_score/storage/commits.py", "dpo_score/storage/local.py", "dpo_score/storage/locks.py"],
        [f"tests/storage/test_{name}.py" for name in ("commits", "local", "locks", "shares", "resume")],
    ),
    "verify": Target(
        ["dpo_score/results/verify/blocks.py", "dpo_score/results/verify/verify.py"],
        ["tests/results/verify/test_verify.py"],
    ),
}


def mutmut(folder: Path, *words: str, fails_with: str | None = None) -> str:
    """Its standard output; ends this program where it fails, unless with the words that are expected."""
    run = subprocess.run([sys.executable, "-m", "mutmut", *words], cwd=folder, capture_output=True, text=True)
    if run.returncode and (fails_with is None or fails_with not in run.stdout + run.stderr):
        raise SystemExit(run.stdout[-3000:] + run.stderr[-3000:])
    return run.stdout


def copied(folder: Path, target: Target) -> None:
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    with (folder / "pyproject.toml").open("a") as settings:
        settings.write(SETTINGS.format(files=target.files, tests=target.tests, left_in=target.left_in))


def searched(folder: Path, sample: int, seed: int) -> None:
    """Run a sample of the mutants. The first call makes them all and tests none: their names are asked for then."""
    mutmut(folder, "run", "--max-children", "1", "no mutant has this name", fails_with="nothing matches")
    everything = re.findall(r"^\s*(\S+): ", mutmut(folder, "results", "--all", "true"), re.MULTILINE)
    names = random.Random(seed).sample(everything, min(sample, len(everything))) if sample else everything
    print(f"{len(names)} of {len(everything)} mutants", flush=True)
    mutmut(folder, "run", "--max-children", "1", *names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="an empty folder for the copy, to look at survivors afterwards")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dpo-score-mutants-") as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        copied(folder, TARGETS[asked.target])
        searched(folder, asked.sample, asked.seed)
        found = re.findall(r"^\s*(\S+): (\w+)", mutmut(folder, "results", "--all", "true"), re.MULTILINE)
        counts = {kind: sum(kind == other for _, other in found) for kind in sorted({kind for _, kind in found})}
        print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
        for name, kind in found:
            if kind in ("survived", "timeout", "suspicious"):
                print(f"\n{kind}: {mutmut(folder, 'show', name)}")


if __name__ == "__main__":
    main()
