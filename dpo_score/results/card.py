"""README.md of an output folder: a data-set card, so that `load_dataset(OUT, "<configuration>")` finds what is there.

A run's scores are one configuration a policy; a data set with reference values, which `precompute` writes, is one of
its own. A folder may hold both: the card is made from what the folder holds, whichever command wrote it last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dpo_score.escape import safe
from dpo_score.storage.base import FileRecord, Store
from dpo_score.storage.commits import CommitRecord, read_records

README, SUMMARY, CONTRACT, LOADER = "README.md", "summary.json", "dpo_score.json", "load_ref_logps.py"
Config = Mapping[str, Any]


def card(store: Store) -> str:
    """The card of a folder with summary.json (scores), dpo_score.json (a data set), or both."""
    summary = store.read_json(SUMMARY) if store.exists(SUMMARY) else None
    data = data_set(store)
    configs = [*(data.configs if data else ()), *(_policy_configs(summary) if summary else ())]
    head = yaml.safe_dump({"tags": ["dpo", "preference"], "configs": configs}, sort_keys=False)
    parts = [*([_scores_text(summary)] if summary else ()), *([data.text] if data else ())]
    return f"---\n{head}---\n{chr(10).join(parts)}"


# --- scores ------------------------------------------------------------------------------------------------------


def _policy_configs(summary: Mapping[str, Any]) -> Iterator[Config]:
    for name in summary["policies"]:
        yield {"config_name": name, "data_files": [{"split": "train", "path": f"scores/{name}/*.parquet"}]}


def _scores_text(summary: Mapping[str, Any]) -> str:
    """A line of numbers a policy, and what the columns are."""
    lines = [_policy_line(name, policy["overall"]) for name, policy in summary["policies"].items()]
    return _SCORES.format(data=_data_line(summary), table="\n".join(lines))


_SCORES = """# Preference scores
{data}

| policy | scored | rejected | mean loss | accuracy | mean margin |
|---|---|---|---|---|---|
{table}

One row per preference pair: log-probabilities of reference and policy, rewards, margin and loss. `load_dataset(FOLDER,
"POLICY")` and `polars.scan_parquet("FOLDER/scores/POLICY/*.parquet")` read them; rows that could not be scored are in
`rejects/` with a code and a reason; `summary.json` holds intervals, subsets and rankings.
"""


def _data_line(summary: Mapping[str, Any]) -> str:
    sets = summary["data"]["datasets"]
    named = ", ".join(f"{safe(name)} ({found['rows']:,} rows, {found['format']})" for name, found in sets.items())
    return f"Pairs of {named}; {summary['data']['rows']:,} rows read."


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


# --- a data set with reference values ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DataSet:
    """What `precompute` left in a folder. `files`: its Parquet files, the contract and the program beside them."""

    configs: Sequence[Config]
    text: str
    files: tuple[FileRecord, ...]


def data_set(store: Store) -> DataSet | None:
    """The data set in a folder; None where there is none."""
    if not store.exists(CONTRACT):
        return None
    contract = store.read_json(CONTRACT)
    parts = tuple(_parts(store))
    extra = (described(store, name) for name in (CONTRACT, LOADER) if store.exists(name))
    splits = list(contract["rows"]["splits"])
    return DataSet(list(_split_configs(store, splits, parts)), _data_text(contract), (*parts, *extra))


def described(store: Store, name: str) -> FileRecord:
    """The record of a file that holds no rows."""
    stat = store.stat(name)
    return FileRecord(name, stat.size if stat else 0, 0, store.sha256(name))


def _parts(store: Store) -> Iterator[FileRecord]:
    for split in dict.fromkeys(name.split("/")[2] for name in store.list("commits/data")):
        for record in read_records(store, f"data/{split}").values():
            yield from record.files if isinstance(record, CommitRecord) else ()


def _split_configs(store: Store, splits: Sequence[str], parts: Sequence[FileRecord]) -> Iterator[Config]:
    """Splits of one schema are one configuration; each other split is one of its own."""
    schemas = [_schema(store, split, parts) for split in splits]
    alike = all(schema == schemas[0] for schema in schemas)
    for name, together in {"default": splits}.items() if alike else {split: [split] for split in splits}.items():
        files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in together]
        yield {"config_name": name, "data_files": files}


def _schema(store: Store, split: str, parts: Sequence[FileRecord]) -> Any:
    name = next((part.name for part in parts if part.name.startswith(f"data/{split}-")), None)
    if name is None:
        return None
    with store.open_table(name) as opened:
        return opened.schema_arrow.remove_metadata()


def _data_text(contract: Mapping[str, Any]) -> str:
    rows = contract["rows"]
    return _DATA.format(
        weights=str(contract["reference"]["weights"])[:16],
        rows=rows["rows"],
        scored=rows["scored"],
        rejected=sum(rows["rejected"].values()),
        contract=CONTRACT,
        loader=LOADER,
    )


_DATA = """# Preference data with reference log-probabilities

`ref_chosen_logps` and `ref_rejected_logps` are the summed log-probabilities (nats) of the two answers under the \
reference model, weights digest `{weights}`.

{rows:,} rows; {scored:,} pairs scored, {rejected:,} not: their values are null, `status` holds a code and `rejects/` \
the reason. `prompt`, `chosen` and `rejected` are what was scored; where that differs from the input, the input is in \
`original_*`.

Training with TRL: `python {loader} --model_name_or_path MODEL --output_dir DIR` is `trl dpo` with these values; in \
Python, `from load_ref_logps import DPOTrainerWithRefLogps, load`. TRL's own DPOTrainer ignores the two columns, or \
fails on them; after `load()` it takes them where `precompute_ref_log_probs=True`. `{contract}` says what the values \
belong to (tokenizer, template, lengths); `{loader}` checks every row against the trainer before the first step.
"""
