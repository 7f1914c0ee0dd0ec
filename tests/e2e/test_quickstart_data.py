"""The quickstart data as shipped: it is what its sources build, it is balanced, and its adapters are small and safe."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

DATA = Path(__file__).parents[2] / "data"
ADAPTERS = DATA / "quickstart-adapters"
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
MAX_ADAPTER_BYTES = 1_100_000


def rows_of(split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(DATA / f"quickstart-{split}.parquet").to_pylist()
    return rows


def prompts_of(split: str) -> set[str]:
    return {json.dumps(row["prompt"]) for row in rows_of(split)}


def answer_length(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)


def checkpoints() -> list[Path]:
    return sorted(ADAPTERS.glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))


def tensors_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: an 8-byte length and a JSON object."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return {name: entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"}


def test_the_files_are_what_the_sources_build() -> None:
    done = subprocess.run([sys.executable, DATA / "build.py", "--check"], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_a_changed_file_fails_the_check(tmp_path: Path) -> None:
    (tmp_path / "source").symlink_to(DATA / "source")
    (tmp_path / "build.py").write_text((DATA / "build.py").read_text("utf-8"), "utf-8")
    (tmp_path / "quickstart-train.parquet").write_bytes((DATA / "quickstart-test.parquet").read_bytes())

    done = subprocess.run(
        [sys.executable, tmp_path / "build.py", "--check"], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 1
    assert "quickstart-train.parquet holds other rows" in done.stderr
    assert "quickstart-test.parquet is not there" in done.stderr


def test_there_are_at_least_300_pairs_in_at_least_8_subsets() -> None:
    subsets = Counter(row["subset"] for row in rows_of("train") + rows_of("test"))

    assert subsets.total() >= 300
    assert len(subsets) >= 8


def test_every_subset_is_in_both_splits_in_equal_numbers() -> None:
    for split in ("train", "test"):
        assert len(set(Counter(row["subset"] for row in rows_of(split)).values())) == 1


def test_no_prompt_is_in_both_splits() -> None:
    assert not prompts_of("train") & prompts_of("test")


def test_ids_are_unique() -> None:
    ids = [row["id"] for row in rows_of("train") + rows_of("test")]

    assert len(set(ids)) == len(ids)


def test_chosen_is_not_simply_the_longer_answer() -> None:
    rows = rows_of("train") + rows_of("test")
    share = sum(answer_length(row["chosen"]) > answer_length(row["rejected"]) for row in rows) / len(rows)

    assert 0.35 <= share <= 0.65


def test_there_are_three_checkpoints() -> None:
    assert len(checkpoints()) == 3


@pytest.mark.parametrize("folder", checkpoints(), ids=lambda folder: folder.name)
def test_a_checkpoint_is_a_small_safetensors_adapter_over_the_public_base(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    weights = folder / "adapter_model.safetensors"

    assert {path.name for path in folder.iterdir()} == ADAPTER_FILES
    assert weights.stat().st_size <= MAX_ADAPTER_BYTES
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["peft_type"] == "LORA"
    assert len(tensors_of(weights)) == 2 * 2 * 30  # A and B of two projections in each of 30 layers


def test_the_checkpoints_differ() -> None:
    assert len({(folder / "adapter_model.safetensors").read_bytes() for folder in checkpoints()}) == 3
