"""Which change of a request refuses to go on in OUT, and which does not: one real run, asked again in many ways.

`Done` is run once. Each row of `REFUSED` changes one thing that numbers depend on; each of `RESUMED` one that they
do not depend on, and then nothing is computed and no committed file is touched. `ELSEWHERE` names every other option.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.load import load_config
from dpo_score.config.schema import OPTIONS
from dpo_score.engine import prepare as preparing
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import IdentityError
from dpo_score.results.status import status
from tests.engine.test_run import refuse_loading
from tests.engine.whole_runs.test_policies import save_adapter
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import byte_tokenizer, tiny_model

DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
ROWS = 70


@dataclass
class Done:
    """A finished run in `folder`; `again(**changes)` asks for it once more with other options."""

    folder: Path

    def options(self, **changes: Any) -> dict[str, Any]:
        here = self.folder
        given = {
            "data": [f"pairs={here}/data/train.parquet"],
            "reference": str(here / "reference"),
            "policy": [f"better={here}/better", f"tuned={here}/reference+{here}/adapter"],
            "out": str(here / "out"),
            "cache_dir": str(here / "cache"),
            "path": "plain",
            "threads": 1,
            "chat_template": DATED,
            "date": "2024-07-26",
            "max_length": 200,
            **changes,
        }
        return {name: value for name, value in given.items() if value is not None}

    def again(self, **changes: Any) -> Progress:
        progress = Progress(quiet=True)
        run(load_config(None, self.options(**changes), environment={}), progress)
        return progress

    def copy(self, name: str) -> Path:
        """A copy of a folder under another name, beside the original."""
        there = self.folder / f"other-{name}"
        shutil.rmtree(there, ignore_errors=True)
        return Path(shutil.copytree(self.folder / name, there))

    def flipped(self, name: str, file: str) -> Path:
        """A copy of a folder with one bit of one file flipped, somewhere in its last tensor."""
        there = self.copy(name)
        content = bytearray((there / file).read_bytes())
        content[-3] ^= 1
        (there / file).write_bytes(content)
        return there

    def files(self) -> dict[str, tuple[int, int]]:
        names = [p for top in ("scores", "reference", "commits/scores", "commits/reference") for p in self._below(top)]
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in names}

    def _below(self, top: str) -> list[Path]:
        return [path for path in sorted((self.folder / "out" / top).rglob("*")) if path.is_file()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, models: Mapping[str, Path]) -> Done:
    pytest.importorskip("peft")
    here = tmp_path_factory.mktemp("identity")
    for name in ("reference", "better"):
        shutil.copytree(models[name], here / name)
    save_adapter(here / "adapter", here / "reference", 1)
    (here / "data").mkdir()
    write_rows(here / "data" / "train.parquet", preference_rows(ROWS))
    found = Done(here)
    found.again()
    return found


def other_data(done: Done) -> list[str]:
    rows = preference_rows(ROWS)
    rows[3]["chosen"] = rows[3]["chosen"].replace("e", "a")
    (done.folder / "changed").mkdir(exist_ok=True)
    return [f"pairs={write_rows(done.folder / 'changed/train.parquet', rows)}"]


def renamed_data(done: Done) -> list[str]:
    return [f"pairs={shutil.copy(done.folder / 'data/train.parquet', done.folder / 'data/test.parquet')}"]


def other_tokenizer(done: Done) -> str:
    byte_tokenizer(bos=True).save_pretrained(done.folder / "bos")
    return str(done.folder / "bos")


def mine(done: Done) -> str:
    code = done.folder / "mine.py"
    code.write_text("def linear(columns, beta):\n    return -beta * columns['policy_chosen_logps']\n")
    return f"{code}:linear"


def one_policy(name: str, where: str) -> Callable[[Done], list[str]]:
    def policy(done: Done) -> list[str]:
        spec = where.format(
            here=done.folder,
            better=done.flipped("better", "model.safetensors"),
            adapter=done.flipped("adapter", "adapter_model.safetensors"),
        )
        return [f"{name}={spec}"]

    return policy


def option(value: Any) -> Callable[[Done], Any]:
    return lambda _: value


REFUSED = {
    "data bytes": ("data", other_data, "text.data.pairs.files[0].sha256"),
    "data file name": ("data", renamed_data, 'files[0].name: "train.parquet" → "test.parquet"'),
    "data name": ("data", lambda d: [f"duo={d.folder}/data/train.parquet"], "text.data.duo: (absent) → {"),
    "map": ("map", option("prompt=prompt,chosen=rejected,rejected=chosen"), "text.data.pairs.map"),
    "split": ("split", option("train"), 'text.data.pairs.split[0]: (absent) → "train"'),
    "pairing": ("pairing", option("all"), 'pairing: "best-worst" → "all"'),
    "ties": ("keep_ties", option(True), "keep_ties: false → true"),
    "which label": ("preference", option("safer"), 'pairs.preference: null → "safer"'),
    "sample": ("sample", option(20), "text.sample: null → 20"),
    "carried columns": ("keep_columns", option("subset"), 'keep_columns[0]: (absent) → "subset"'),
    "ignored columns": ("ignore_columns", option("subset"), "pairs.ignore_columns: (absent) → ["),
    "render": ("render", option("raw"), 'text.render: "auto" → "raw"'),
    "prompt split": ("prompt_split", option("trl"), 'text.prompt_split: "auto" → "trl"'),
    "chat template": ("chat_template", option(DATED + " "), "text.template_sha256"),
    "template values": ("chat_template_kwargs", option('{"tone": 1}'), "chat_template_kwargs.tone: (absent) → 1"),
    "system text": ("system", option("Be brief"), 'text.system: null → "Be brief"'),
    "system mode": ("system_mode", option("drop"), 'text.system_mode: "fill" → "drop"'),
    "truncation": ("truncation", option("keep_end"), 'truncation: "keep_start" → "keep_end"'),
    "length": ("max_length", option(100), "text.max_length: 200 → 100"),
    "keys that are null": ("keep_nulls", option(True), "pairs.keep_nulls: false → true"),
    "benchmark": ("rewardbench", option("corrected"), 'text.render: "auto" → "chat"'),
    "date": ("date", option("2024-07-27"), 'text.date: "2024-07-26" → "2024-07-27"'),
    "tokenizer": ("tokenizer", other_tokenizer, "text.tokenizer_sha256"),
    "scored tokens": ("score", option("last"), 'text.score: "completion" → "last"'),
    "reference": ("reference", lambda d: str(d.flipped("reference", "model.safetensors")), "reference.weights"),
    "quantization": ("quantization", option("int8"), "reference.weights"),
    "policy": ("policy", one_policy("better", "{better}"), "policies.better.weights"),
    "adapter": ("policy", one_policy("tuned", "{here}/reference+{adapter}"), "policies.tuned.weights"),
    "kind of device": ("device", option("cuda"), 'numerics.device_kind: "cpu" → "cuda"'),
    "devices that a model is sharded over": (
        "tensor_parallel",
        option(2),
        "reference.numerics.tensor_parallel: (absent) → 2",
    ),
    "dtype": ("dtype", option("bfloat16"), 'reference.numerics.dtype: "float32" → "bfloat16"'),
    "path": ("path", option("fast"), 'numerics.path: "plain" → "fast"'),
    "compilation": ("compile", option("on"), "numerics.compile: false → true"),
    "token budget": ("batch_tokens", option("512"), "reference.numerics.batch_tokens: 4096 → 512"),
    "threads": ("threads", option(2), "reference.numerics.threads: 1 → 2"),
    "statistics": ("stats", option("entropy"), 'reference.stats[0]: (absent) → "entropy"'),
    "token values": ("per_token", option(True), "reference.per_token: false → true"),
    "loss": ("loss", option("ipo"), 'loss.name: "sigmoid" → "ipo"'),
    "loss of one's own": ("loss", mine, "loss.custom"),
    "beta": ("beta", option(0.5), "policies.better.loss.beta: 0.1 → 0.5"),
    "smoothing": ("label_smoothing", option(0.2), "label_smoothing: 0.0 → 0.2"),
    "loss parameter": ("loss_param", option(["reference_free=true"]), "modifiers.reference_free: false → true"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_numbers_depend_on_is_refused_and_named(done: Done, what: str) -> None:
    name, change, expected = REFUSED[what]
    before = done.files()
    with pytest.raises(IdentityError) as refusal:
        done.again(**{name: change(done)})
    text = str(refusal.value)
    assert expected in text, text
    assert " → " in next(line for line in text.splitlines() if expected in line)
    assert "--restart" in text or "dpo-score rescore" in text
    assert done.files() == before


def test_the_seed_is_part_of_what_is_drawn(tmp_path: Path, done: Done) -> None:
    for changes in ({"sample": 20}, {"pairing": "random"}):
        out = str(tmp_path / next(iter(changes)))
        done.again(out=out, **changes)
        with pytest.raises(IdentityError, match=r"seed: 0 → 7"):
            done.again(out=out, seed=7, **changes)


def moved(name: str) -> Callable[[Done], Any]:
    return lambda done: str(done.copy(name))


RESUMED: dict[str, tuple[str, Callable[[Done], Any]]] = {
    "nothing": ("strict_env", option(False)),
    "strict about an environment that is the same": ("strict_env", option(True)),
    "fewer policies": ("policy", lambda d: d.options()["policy"][1:]),
    "another order": (
        "policy",
        lambda d: [f"tuned={d.folder}/reference+{d.folder}/adapter", f"better={d.folder}/better"],
    ),
    "another cache": ("cache_dir", lambda d: str(d.folder / "cache2")),
    "bad rows allowed": ("max_bad_rows", option(3)),
    "fewer rows": ("limit", option(10)),
    "reference moved": ("reference", moved("reference")),
    "data moved": ("data", lambda d: [f"pairs={d.copy('data')}/train.parquet"]),
    "pickles allowed": ("allow_pickle", option(True)),
    "the seed where nothing is drawn": ("seed", option(9)),
    "the loss's own beta by name": ("beta", option(0.1)),
    "the format by name": ("format", option("pair-text")),
    "the date left out": ("date", option(None)),
    "numerics left out": ("path", option(None)),
    "the device by name": ("device", option("cpu")),
    "layers on several devices": ("device_map", option("auto")),
    "the engine by name": ("engine", option("local")),
    "a cluster": ("ray_address", option("auto")),
    "workers": ("workers", option(3)),
    "the base of adapters by name": ("policy_base", option("reference")),
    "another slice": ("slice", option(["length"])),
    "ids beside the values": ("emit_ids", option(True)),
    "code of models allowed": ("trust_remote_code", option(True)),
}

ELSEWHERE = {
    "out": "the folder itself",
    "blocks": "a share computes what is due: tests/engine/executors/test_job_array.py",
    "data_revision": "the commit that it names is part of the data, on the hub alone: tests/data/test_hub.py",
    "reference_revision": "a commit of the hub gives other weights or the same: tests/engine/test_revisions.py",
    "log_to": "writes to trackers, after the run: tests/report/test_trackers.py",
    "media_root": "where pictures are looked for; their bytes are the data: tests/data/test_pictures.py",
    "text_processes": "the same token ids: tests/engine/test_text_processes.py",
}


def test_every_option_is_in_a_table_or_tested_elsewhere() -> None:
    tables = {name for name, *_ in REFUSED.values()} | {name for name, *_ in RESUMED.values()}
    assert tables | ELSEWHERE.keys() == {option.name for option in OPTIONS}
    assert not tables & ELSEWHERE.keys()


@pytest.mark.parametrize("what", RESUMED)
def test_what_numbers_do_not_depend_on_computes_nothing(done: Done, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_loading(monkeypatch)
    name, change = RESUMED[what]
    before = done.files()
    done.again(**{name: change(done)})
    assert done.files() == before


def test_the_block_size_is_decided_once(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_loading(monkeypatch)
    monkeypatch.setattr(preparing, "block_rows", lambda *_: 7)
    before = done.files()
    done.again()
    assert done.files() == before


def test_a_run_begun_on_a_large_device_goes_on_alike_on_a_small_one(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_score.models import memory

    def on(size: float, out: str, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(memory, "total_memory", lambda _: int(size))
        done.again(out=str(tmp_path / out), cache_dir=str(tmp_path / f"cache-{out}"), **options)
        return dict(json.loads((tmp_path / out / "manifest.json").read_text())["numerics"]["run"])

    large, small = 80e6, 24e6
    monkeypatch.setattr(memory, "CPU_TOKENS", 1 << 20)
    begun = on(large, "begun", limit=64)
    assert on(small, "fresh", limit=64)["batch_tokens"] < begun["batch_tokens"]
    assert on(small, "begun") == begun == on(large, "whole")
    for path in sorted((tmp_path / "whole/scores").rglob("*.parquet")):
        assert (tmp_path / "begun" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_a_run_that_goes_on_is_running_until_it_is_done(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limited run is complete; the full one that follows it and dies is not."""
    from dpo_score.engine import run as local

    out = str(tmp_path / "out")
    done.again(out=out, limit=64)
    assert status(out)["state"] == "complete"

    def dies(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local, "reference_block", dies)
        with pytest.raises(KeyboardInterrupt):
            done.again(out=out)
    found = status(out)
    assert (found["state"], found["finished"]) == ("running", None)
    done.again(out=out)
    assert status(out)["state"] == "complete"


def test_a_model_with_another_shape_of_the_same_name_is_another_model(done: Done, tmp_path: Path) -> None:
    """The configuration counts, not the bytes of the weights alone."""
    other = Path(shutil.copytree(done.folder / "better", tmp_path / "better"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(IdentityError, match=r"policies\.better\.weights"):
        done.again(policy=[f"better={other}"])
    assert tiny_model(seed=1).config.rms_norm_eps != 0.5
