"""A run's scores as the JSON files that RewardBench's own scripts write, for programs that read those.

    DIR/eval-set/<policy>.json          accuracy by subset (RewardBench 2: score by subset), and what was scored
    DIR/eval-set-scores/<policy>.json   a list by column: id, subset, results, and the scores of chosen and rejected;
                                        RewardBench 2: id, subset, num_correct, results, scores (right answers first)

Promises: numbers are those of summary.json. Texts are not in the files: `id` says which row a score is of. A policy
whose run was not a RewardBench run is refused: it scored other tokens than the benchmark names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_score.errors import ConfigError, UsageError
from dpo_score.metrics.rewardbench import Prompt
from dpo_score.results.rewardbench import Answers, Setting, answers, prompts
from dpo_score.results.run_folder import open_out, parts, read_summary
from dpo_score.results.source_text import stored_config
from dpo_score.storage.base import Store
from dpo_score.storage.manifest import Manifest
from dpo_score.storage.open import open_store

RESULTS, SCORES = "eval-set", "eval-set-scores"


@dataclass(frozen=True, slots=True)
class Source:
    """A folder that a RewardBench run wrote. `policies`: name → what summary.json says of it."""

    out: str
    store: Store
    manifest: Manifest
    mode: str
    policies: Mapping[str, Mapping[str, Any]]


def source(out: str) -> Source:
    """Raises UsageError for a folder without a finished run, ConfigError for a run that is no RewardBench run."""
    store, manifest = open_out(out)
    mode = stored_config(store).rewardbench
    if mode is None:
        raise ConfigError(
            f"--to rewardbench: {out} was scored by this project's own rules, so its accuracies are not the "
            "benchmark's. Run it again with --rewardbench exact or --rewardbench corrected, into another folder"
        )
    summary = read_summary(store, manifest, out)
    found = {name: policy["rewardbench"] for name, policy in summary["policies"].items() if "rewardbench" in policy}
    if not found:
        raise UsageError(f"{out}: no policy is scored yet: let `dpo-score run` finish one")
    return Source(out, store, manifest, mode, found)


def export(out: str, folder: str | None = None) -> list[str]:
    """Write the files of every policy below `folder` (default OUT/rewardbench); returns their paths."""
    run = source(out)
    target = open_store(folder or f"{out.rstrip('/')}/rewardbench")
    written = []
    for policy, summary in run.policies.items():
        about = _about(run, policy)
        found = answers(Setting.of(run.manifest, run.mode, policy), map(run.store.read_table, parts(run.store, policy)))
        for kind, content in ((RESULTS, _results(summary)), (SCORES, _scores(found, run, policy))):
            name = f"{kind}/{policy}.json"
            target.write_bytes(name, json.dumps({**about, **content}, indent=4, sort_keys=True).encode())
            written.append(target.url(name))
    return written


def differences(out: str, other: str) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(policy, its table here, its table there) for policies of both folders. Raises UsageError when there is none."""
    ours, theirs = source(out), source(other)
    shared = [name for name in ours.policies if name in theirs.policies]
    pairs = [(name, ours.policies[name], theirs.policies[name]) for name in shared]
    found = [pair for pair in pairs if all("sections" in table for table in pair[1:])]
    if not found:
        raise UsageError(f"{out} and {other} have no policy in common whose pairs RewardBench names")
    return found


def _about(run: Source, policy: str) -> dict[str, Any]:
    names = run.manifest.notes.get("names", {})
    reference = run.policies[policy]["score"] == "log-ratio"
    return {
        "model": _public(str(names.get(policy, policy))),
        "ref_model": _public(str(names["reference"])) if reference and "reference" in names else None,
        "model_type": "DPO" if reference else "DPO Ref. Free",
        "chat_template": "tokenizer",
        "scored_by": f"dpo-score, rewardbench: {run.mode}, score: {run.policies[policy]['score']}",
    }


def _public(name: str) -> str:
    """A model's name without the folders of this machine."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _results(summary: Mapping[str, Any]) -> dict[str, Any]:
    pairs = {name: cell["accuracy"] for name, cell in summary.get("subsets", {}).items()}
    lists = {name: cell["score"] for name, cell in summary.get("best_of_n", {}).get("subsets", {}).items()}
    return {**pairs, **lists}


def _scores(found: Answers, run: Source, policy: str) -> dict[str, Any]:
    """Pairs, or the prompts of RewardBench 2; a run of both gives the pairs."""
    if found.best_of_n.all():
        return _lists(prompts(found, _rejected(run, policy))[0])
    rows = [i for i, is_list in enumerate(found.best_of_n.tolist()) if not is_list]
    chosen, rejected = (side[rows].tolist() for side in found.scores[found.rule])
    return {
        "id": [found.ids[i] or found.row_ids[i] for i in rows],
        "subset": [found.subsets[i] for i in rows],
        "results": [int(c > r) for c, r in zip(chosen, rejected, strict=True)],
        "scores_chosen": chosen,
        "scores_rejected": rejected,
    }


def _lists(found: Sequence[Prompt]) -> dict[str, Any]:
    tied = [prompt.subset.lower() == "ties" for prompt in found]
    return {
        "id": [prompt.name for prompt in found],
        "subset": [prompt.subset for prompt in found],
        "num_correct": [len(prompt.right) for prompt in found],
        "scores": [[*prompt.right, *prompt.wrong] for prompt in found],
        "results": [None if tie else prompt.result for prompt, tie in zip(found, tied, strict=True)],
    }


def _rejected(run: Source, policy: str) -> list[str]:
    folders = ("rejects/data", "rejects/reference", f"rejects/{policy}")
    names = [name for folder in folders for name in run.store.list(folder)]
    return [row for name in names for row in run.store.read_table(name, ["row_id"])["row_id"].to_pylist()]
