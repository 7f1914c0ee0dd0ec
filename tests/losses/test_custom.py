"""A loss from the user's own file: called with columns, identified by the file's bytes, its failures explained."""

from __future__ import annotations

import os
import py_compile
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_score.config.schema import LossSpec
from dpo_score.errors import ConfigError
from dpo_score.losses.columns import derive_table
from dpo_score.losses.parse import parse_loss

TABLE = pa.table(
    {
        "row_id": ["0:0", "0:1", "0:2"],
        "policy_chosen_logps": [-1.0, -2.0, None],
        "policy_rejected_logps": [-3.0, -1.0, None],
        "ref_chosen_logps": [-1.5, -2.0, None],
        "ref_rejected_logps": [-2.0, -2.0, None],
        "quality": [1, 2, 3],
        "flag": [True, False, None],
    }
)
GAP = "def gap(columns, beta):\n    return beta * columns['quality'] * columns['policy_chosen_logps']\n"


def written(folder: Path, text: str, function: str = "gap") -> str:
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}:{function}"


def test_it_gets_columns_and_beta_and_gives_the_loss(tmp_path: Path) -> None:
    loss = parse_loss(LossSpec(name=written(tmp_path, GAP), beta=0.5))
    table = derive_table(TABLE, loss)
    assert table["loss"].to_pylist() == [-0.5, -2.0, None]
    assert table["loss_code"].to_pylist() == [None, None, None]
    assert table["chosen_rewards"].to_pylist() == [0.25, 0.0, None]
    assert table["dpo_weight"].null_count == 3


def test_it_sees_numbers_as_float64_with_nan_for_null(tmp_path: Path) -> None:
    text = "import numpy as np\ndef gap(c, beta):\n    assert 'row_id' not in c\n    return c['flag']\n"
    assert derive_table(TABLE, parse_loss(LossSpec(name=written(tmp_path, text))))["loss"].to_pylist() == [
        1.0,
        0.0,
        None,
    ]


def test_a_value_that_is_not_finite_is_an_overflow(tmp_path: Path) -> None:
    text = "import numpy as np\ndef gap(c, beta):\n    return np.exp(-1000 * c['policy_chosen_logps'])\n"
    table = derive_table(TABLE, parse_loss(LossSpec(name=written(tmp_path, text))))
    assert table["loss_code"].to_pylist() == ["overflow", "overflow", None]


def test_it_cannot_change_the_stored_columns(tmp_path: Path) -> None:
    text = "def gap(c, beta):\n    c['policy_chosen_logps'][:] = 0\n    return c['policy_chosen_logps']\n"
    table = derive_table(TABLE, parse_loss(LossSpec(name=written(tmp_path, text))))
    assert table["policy_chosen_logps"].to_pylist() == [-1.0, -2.0, None]
    assert table["chosen_rewards"].to_pylist() == [pytest.approx(0.05), 0.0, None]


def test_the_identity_follows_the_bytes_of_the_file(tmp_path: Path) -> None:
    before = parse_loss(LossSpec(name=written(tmp_path, GAP))).identity()
    assert before == parse_loss(LossSpec(name=written(tmp_path, GAP))).identity()
    assert before != parse_loss(LossSpec(name=written(tmp_path, GAP + "\n"))).identity()


def test_what_runs_is_the_bytes_of_the_file_and_no_compiled_copy_beside_it(tmp_path: Path) -> None:
    """A cache of bytecode is trusted by size and time: both may be made to fit."""
    other = GAP.replace("beta * columns['quality']", "7.00 * columns['quality']")
    written(tmp_path, other)
    stat = (tmp_path / "mine.py").stat()
    py_compile.compile(str(tmp_path / "mine.py"), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    name = written(tmp_path, GAP)
    os.utime(tmp_path / "mine.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (tmp_path / "mine.py").stat().st_size == stat.st_size
    assert derive_table(TABLE, parse_loss(LossSpec(name=name, beta=0.5)))["loss"].to_pylist() == [-0.5, -2.0, None]


@pytest.mark.parametrize(
    ("text", "function", "words"),
    [
        (GAP, "missing", "defines no function 'missing'"),
        ("1/0", "gap", "importing the file failed: ZeroDivisionError"),
        ("def gap(c, beta):\n    return c['nope']\n", "gap", "KeyError.*policy_chosen_logps"),
        ("def gap(c, beta):\n    return 1.0\n", "gap", "not one value for each of 3 rows"),
    ],
)
def test_its_failures_are_one_message(tmp_path: Path, text: str, function: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        derive_table(TABLE, parse_loss(LossSpec(name=written(tmp_path, text, function))))


def test_a_missing_file_and_foreign_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        parse_loss(LossSpec(name="nowhere.py:f"))
    for spec in ({"params": {"tau": 1.0}}, {"label_smoothing": 0.1}, {"params": {"wpo": True}}):
        with pytest.raises(ConfigError):
            parse_loss(LossSpec(name=written(tmp_path, GAP), **spec))


def test_without_a_reference_only_when_said(tmp_path: Path) -> None:
    name = written(tmp_path, GAP)
    assert not parse_loss(LossSpec(name=name)).reference_free
    assert parse_loss(LossSpec(name=name, params={"reference_free": True})).reference_free


def test_results_must_be_numbers(tmp_path: Path) -> None:
    text = "def gap(c, beta):\n    return ['a', 'b', 'c']\n"
    with pytest.raises(ConfigError, match="ValueError"):
        derive_table(TABLE, parse_loss(LossSpec(name=written(tmp_path, text))))
