"""What the summary counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.run_fixtures import preference_rows, write_rows


def test_a_policy_whose_last_block_is_short_is_not_complete(runner: Any, tmp_path: Path) -> None:
    """Blocks of 64 rows: 129 of 130 rows make as many blocks as all of them."""
    data, out = write_rows(tmp_path / "pairs.parquet", preference_rows(130)), tmp_path / "out"
    both = [f"{name}={runner.models[name]}" for name in ("better", "worse")]
    assert list(runner(data, out, limit=129, policy=both).summary["policies"]) == ["better", "worse"]
    assert list(runner(data, out).summary["policies"]) == ["better"]
    found = runner(data, out, policy=both).summary["policies"]
    assert {name: policy["overall"]["n"] for name, policy in found.items()} == {"better": 130, "worse": 130}
