"""What is refused before a model that is larger than a device is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_score.errors import ConfigError
from dpo_score.run.placement import key_value_heads
from tests.run.conftest import preference_rows, write_rows
from tests.run.test_local import refuse_loading


@pytest.mark.parametrize(
    ("ways", "said"), [(3, "2 key-value heads.*; 1, 2 would do"), (2, "--device-map auto spreads")]
)
def test_tensor_parallelism_is_refused_before_loading(
    ways: int, said: str, runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_loading(monkeypatch)
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(3))
    with pytest.raises(ConfigError, match=said):
        runner(data, tmp_path / "out", tensor_parallel=ways)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, 8),
        ({"num_attention_heads": 32}, 32),
        ({"n_head": 12}, 12),
        ({"text_config": {"num_attention_heads": 16, "num_key_value_heads": 4}}, 4),
    ],
)
def test_key_value_heads(config: dict[str, Any], heads: int) -> None:
    assert key_value_heads(config) == heads
