"""One tokenizer for all models of a run: whose it is, what it is needed for, and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

import dpo_score
from dpo_score.cli.inspect import inspect
from dpo_score.config.schema import DataSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.types import Pair
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import ModelError
from tests.data.formats.golden import GOLDEN, Golden
from tests.exported import chat_rows, text_rows
from tests.run_fixtures import write_rows
from tests.tiny import byte_tokenizer, tiny_model

ID_ROWS = [{"prompt_ids": [1, 2, 3, i], "chosen_ids": [4, 5], "rejected_ids": [6]} for i in range(6)]


class Heard(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """`base`: a tokenizer without a chat template; `bare`: none at all."""
    root = tmp_path_factory.mktemp("folders")
    for seed, name in enumerate(("base", "bare")):
        tiny_model(seed=5 + seed).save_pretrained(root / name)
    byte_tokenizer(chat_template=None).save_pretrained(root / "base")
    return {name: root / name for name in ("base", "bare")}


def rendered(out: Path) -> str:
    text: str = json.loads((out / "summary.json").read_text())["text"]["render"]
    return text


def digests(out: Path) -> list[str]:
    return pl.read_parquet(f"{out}/reference/*.parquet")["pair_digest"].to_list()


# --- chat templates ------------------------------------------------------------------------------------------------


def test_conversations_take_the_policys_template_where_the_reference_has_none(
    runner: Any, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "chat.parquet", chat_rows(6))
    heard = Heard()
    broken = shutil.copytree(folders["base"], tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    policies = [f"{name}={folder}" for name, folder in (("bare", folders["bare"]), ("broken", broken))]
    policies.append(f"better={runner.models['better']}")
    found = run(runner.config(data, tmp_path / "out", reference=str(folders["base"]), policy=policies), heard)
    assert list(found.failures) == ["broken"]
    assert "the tokenizer of the reference has no chat template: that of better is used" in heard.lines
    runner(data, tmp_path / "other")
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


def test_strings_stay_with_the_reference(runner: Any, folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Its end of text is another one, so taking over a tokenizer unasked would change the ids."""
    heard = Heard()
    data = write_rows(tmp_path / "d.parquet", text_rows(6))
    run(runner.config(data, tmp_path / "out", reference=str(folders["base"])), heard)
    assert not [line for line in heard.lines if "chat template" in line]
    assert rendered(tmp_path / "out") == "strings are scored raw"


def test_without_any_template_the_way_out_is_named(runner: Any, folders: Mapping[str, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "chat.parquet", chat_rows(6))
    base = str(folders["base"])
    with pytest.raises(ModelError, match="--chat-template FILE"):
        runner(data, tmp_path / "out", reference=base, policy=[f"p={base}"])


def test_inspect_and_score_take_the_same_template(
    runner: Any, folders: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "chat.parquet", chat_rows(6))
    models: dict[str, Any] = {"reference": str(folders["base"]), "policy": [f"p={runner.models['better']}"]}
    runner(data, tmp_path / "out", per_token=True, **models)
    inspect(str(data), 0, {**models, "cache_dir": str(tmp_path / "cache")})
    fresh = capsys.readouterr().out
    assert "that of p is used" in fresh
    assert "[<|im_end|>]" in fresh
    inspect(str(tmp_path / "out"), 0, {})
    stored = capsys.readouterr().out
    assert "<|im_end|>" in stored
    found = dpo_score.score(
        chat_rows(6), reference=folders["base"], policy=runner.models["better"], cache_dir=tmp_path / "cache"
    )
    assert found["pair_digest"].to_list() == digests(tmp_path / "out")


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g.format}-{g.dataset}")
def test_every_format_of_messages_is_known_as_one(golden: Golden, tmp_path: Path) -> None:
    pq.write_table(golden.table(), tmp_path / "rows.parquet")
    spec = DataSpec(name="set", path=str(tmp_path / "rows.parquet"), **golden.options)
    [dataset] = open_datasets([spec])
    pairs = [pair for pair in read_pairs([dataset], 0, dataset.rows) if isinstance(pair, Pair)]
    assert {pair.is_conversation for pair in pairs} == {dataset.is_conversational}


# --- token ids -----------------------------------------------------------------------------------------------------


def test_token_ids_need_no_tokenizer(runner: Any, folders: Mapping[str, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "ids.parquet", ID_ROWS)
    bare = runner(data, tmp_path / "out", reference=str(folders["bare"]))
    assert not bare.failures
    assert rendered(tmp_path / "out") == "token ids as they stand in the data"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["identities"]["text"]["text"]["tokenizer_sha256"] is None
    with_one = runner(data, tmp_path / "named", reference=str(folders["bare"]), tokenizer=str(folders["base"]))
    assert with_one.summary["policies"] == bare.summary["policies"]


def test_a_tokenizer_that_is_there_still_guards_what_ids_mean(runner: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "ids.parquet", ID_ROWS)
    runner(data, tmp_path / "out")
    assert rendered(tmp_path / "out") == "token ids as they stand in the data"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["identities"]["text"]["text"]["tokenizer_sha256"] is not None


def test_inspect_and_score_need_none_either(
    runner: Any, folders: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "ids.parquet", ID_ROWS)
    bare = folders["bare"]
    inspect(str(data), 0, {"reference": str(bare), "cache_dir": str(tmp_path / "cache")})
    assert "[4 ][5 ]" in capsys.readouterr().out
    found = dpo_score.score(ID_ROWS, reference=bare, policy=runner.models["better"], cache_dir=tmp_path / "cache")
    assert found["status"].to_list() == ["scored"] * len(ID_ROWS)
    held = tiny_model(seed=6)
    held.config.name_or_path = held.name_or_path = ""
    assert dpo_score.score(ID_ROWS, policy=held, loss="simpo", path="plain").height == len(ID_ROWS)


def test_ids_beside_texts_are_said_apart(runner: Any, folders: Mapping[str, Path], tmp_path: Path) -> None:
    ids, texts = write_rows(tmp_path / "ids.parquet", ID_ROWS), write_rows(tmp_path / "d.parquet", text_rows(6))
    sets = [f"ids={ids}", f"texts={texts}"]
    options: dict[str, Any] = {"reference": str(folders["base"]), "policy": [f"p={folders['base']}"]}
    run(runner.config(ids, tmp_path / "out", **options).model_copy(update={"data": specs(sets)}), Progress(quiet=True))
    assert rendered(tmp_path / "out") == "strings are scored raw; token ids as they stand in the data"
    config = runner.config(ids, tmp_path / "bare", reference=str(folders["bare"]))
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        run(config.model_copy(update={"data": specs(sets)}), Progress(quiet=True))


def specs(sets: list[str]) -> tuple[DataSpec, ...]:
    return tuple(DataSpec(name=name, path=path) for name, _, path in (given.partition("=") for given in sets))
