"""README.md of an output folder: a data-set card, so that `load_dataset(OUT, "<policy>")` finds each policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dpo_score.escape import safe
from dpo_score.run.job import Job


def score_card(job: Job, summary: Mapping[str, Any]) -> str:
    """One configuration a policy, a line of numbers each, what the columns are."""
    names = list(summary["policies"])
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"scores/{name}/*.parquet"}]} for name in names
    ]
    head = yaml.safe_dump({"tags": ["dpo", "preference"], "configs": configs}, sort_keys=False)
    lines = [_policy_line(name, summary["policies"][name]["overall"]) for name in names]
    return f"---\n{head}---\n{_BODY.format(data=_data_line(job, summary), table=chr(10).join(lines))}"


_BODY = """# Preference scores
{data}

| policy | scored | rejected | mean loss | accuracy | mean margin |
|---|---|---|---|---|---|
{table}

One row per preference pair: log-probabilities of reference and policy, rewards, margin and loss. `load_dataset(FOLDER,
"POLICY")` and `polars.scan_parquet("FOLDER/scores/POLICY/*.parquet")` read them; rows that could not be scored are in
`rejects/` with a code and a reason; `summary.json` holds intervals, subsets and rankings.
"""


def _data_line(job: Job, summary: Mapping[str, Any]) -> str:
    sets = ", ".join(f"{safe(d.spec.name)} ({d.rows:,} rows, {d.format.full_name})" for d in job.datasets)
    return f"Pairs of {sets}; {summary['data']['rows']:,} rows read."


def _policy_line(name: str, overall: Mapping[str, Any]) -> str:
    cells = [
        name,
        str(overall["scored"]),
        str(overall["n"] - overall["scored"]),
        _number(overall["loss"]["mean"]),
        _number(overall["accuracy"]["value"]),
        _number(overall["margins"]["mean"]),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def data_card(configs: Mapping[str, Sequence[str]], lines: Sequence[str]) -> str:
    """Card of a data set with reference log-probabilities. `configs`: configuration → its splits."""
    entries = [
        {"config_name": name, "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]}
        for name, splits in configs.items()
    ]
    head = yaml.safe_dump({"tags": ["dpo", "preference"], "configs": entries}, sort_keys=False)
    return f"---\n{head}---\n# Preference data with reference log-probabilities\n\n" + "\n".join(lines) + "\n"
