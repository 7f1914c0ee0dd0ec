"""Hostile models and data through the real command line: nothing of theirs runs, nothing raw reaches a terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from dpo_score.cli.main import main
from dpo_score.tokenization import chat_template as deadline
from tests.engine.whole_runs.test_policies import save_adapter
from tests.run_fixtures import preference_rows, write_rows

Run = Callable[..., tuple[int, str]]
BUILD = """
from pathlib import Path
Path({canary!r}).touch()
class Anything:
    def __init__(self, *args, **kwargs): Path({canary!r}).touch()
    from_pretrained = classmethod(lambda cls, *args, **kwargs: cls())
"""


class Touch:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def hostile(tmp_path: Path, models: Mapping[str, Path]) -> Path:
    """A copy of a sound model folder, to be spoilt."""
    return Path(shutil.copytree(models["better"], tmp_path / "hostile"))


@pytest.fixture
def command(tmp_path: Path, models: Mapping[str, Path], cache: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`command(policy or reference=…, data=…)` → exit code and everything that was printed."""

    def run(
        policy: str | None = None, *more: str, reference: Path | None = None, data: Path | None = None
    ) -> tuple[int, str]:
        data = data or write_rows(tmp_path / "pairs.parquet", preference_rows(4))
        arguments = ["run", f"--data={data}", f"--out={tmp_path / 'out'}", f"--cache-dir={cache}", "--path=plain"]
        arguments += [f"--reference={reference or models['reference']}", f"--policy={policy or models['worse']}"]
        try:
            main([*arguments, "--threads=1", *more])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out + captured.err

    return run


def poisoned(path: Path, canary: Path) -> None:
    torch.save({"weights": Touch(canary)}, path)


def test_the_pickle_would_touch_the_canary(tmp_path: Path, canary: Path) -> None:
    poisoned(tmp_path / "p.bin", canary)
    torch.load(tmp_path / "p.bin", weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("role", ["policy", "reference"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"])
def test_a_pickle_beside_safetensors_is_not_opened(
    command: Run, hostile: Path, canary: Path, name: str, role: str
) -> None:
    poisoned(hostile / name, canary)
    code, said = command(str(hostile)) if role == "policy" else command(reference=hostile)
    assert code == 0, said
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.pt", "weights.pkl", "consolidated.00.pth"])
def test_pickles_alone_are_refused(command: Run, hostile: Path, canary: Path, name: str) -> None:
    (hostile / "model.safetensors").unlink()
    poisoned(hostile / name, canary)
    code, said = command(str(hostile))
    assert (code, "--allow-pickle" in said) == (6, True), said
    code, said = command(reference=hostile)
    assert (code, "--allow-pickle" in said) == (2, True), said
    assert not canary.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation_internal", "trust_remote_code"])
def test_code_in_a_model_folder_is_not_run(command: Run, hostile: Path, canary: Path, file: str, key: str) -> None:
    (hostile / "payload.py").write_text(BUILD.format(canary=str(canary)))
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    value = dict.fromkeys(names, "payload.Anything") if key == "auto_map" else "payload/kernels"
    path = hostile / file
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, key: value}))
    code, said = command(str(hostile))
    assert (code, key in said, "--trust-remote-code" in said) == (6, True, True), said
    code, said = command(reference=hostile)
    assert (code, key in said) == (2, True), said
    assert not canary.exists()


def test_an_adapter_pickle_is_refused(command: Run, tmp_path: Path, models: Mapping[str, Path], canary: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", models["reference"], 1)
    poisoned(adapter / "adapter_model.bin", canary)
    code, said = command(f"tuned={models['reference']}+{adapter}")
    assert code == 0, said
    (adapter / "adapter_model.safetensors").unlink()
    code, said = command(f"other={models['reference']}+{adapter}")
    assert (code, "--allow-pickle" in said) == (6, True), said
    assert not canary.exists()


TEMPLATES = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by name": "{{ messages|attr('__class__')|attr('__base__') }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "globals": "{{ cycler.__init__.__globals__.os.open('CANARY', 64) }}",
    "import": "{% import '/etc/passwd' as x %}{{ x }}",
    "include": "{% include '/etc/passwd' %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "output": "{{ 'x' * 10**8 }}",
    "memory": "{{ 'x' * 10**15 }}",
    "change": "{{ messages.clear() }}",
}
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"hi {i}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for i in range(2)
]


def with_template(folder: Path, template: str) -> Path:
    """The model folder with another chat template."""
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_hostile_template_spoils_its_rows_and_nothing_else(
    command: Run, hostile: Path, tmp_path: Path, canary: Path, what: str
) -> None:
    template = TEMPLATES[what].replace("CANARY", str(canary))
    data = write_rows(tmp_path / "chat.parquet", CHAT)
    code, said = command(reference=with_template(hostile, template), data=data)
    assert code in (0, 2, 3), said  # 3: all rows were rejected
    if code == 0:
        rejected = pl.read_parquet(tmp_path / "out/rejects/data/*.parquet")
        assert set(rejected["code"]) <= {"template_error", "too_large", "no_completion_tokens"}
        assert rejected.height == 2
        assert max(len(text) for text in rejected["reason"]) < 1000
    assert "root:" not in said
    assert "<class" not in said
    assert len(said) < 10_000
    assert not canary.exists()


def test_a_template_that_does_not_end_stops_the_run(
    command: Run, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline, "TEMPLATE_SECONDS", 0.5)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    data = write_rows(tmp_path / "chat.parquet", CHAT)
    code, said = command(reference=with_template(hostile, endless), data=data)
    assert (code, "ran for more than" in said) == (2, True), said


EVIL = {
    "colour": "\x1b[31mred",
    "clipboard": "\x1b]52;c;aGk=\x07",
    "link": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "return": "ok\rerror",
    "bell": "\x07\x08\x7f\x9b31m",
    "bidi": "\u202egnp.exe\u2066\u200f",
}


STRICT = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('role ' + m['role']) }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


@pytest.fixture
def dangerous(tmp_path: Path) -> Path:
    """Data where hostile text stands wherever a person may later see it: prompts, answers, roles, subsets, ids."""
    evil = "".join(EVIL.values())
    rows = [
        {
            "id": f"{i}{evil}",
            "prompt": [{"role": "user" if i % 3 else f"role{evil}", "content": f"q{i} {evil}"}],
            "chosen": [{"role": "assistant", "content": f"a{i} {evil}"}],
            "rejected": [{"role": "assistant", "content": f"b {evil}"}] if i != 4 else None,
            "subset": f"set{evil}",
        }
        for i in range(6)
    ]
    return write_rows(tmp_path / f"evil{EVIL['bidi']}.parquet", rows)


def hidden(text: str) -> set[str]:
    """Characters that move a cursor, end a sequence or turn text around."""
    return {
        c for c in text if (ord(c) < 32 and c not in "\n\t") or ord(c) in range(0x7F, 0xA0) or c in "\u202e\u2066\u200f"
    }


def test_control_characters_of_the_data_are_shown_as_escapes(
    command: Run, dangerous: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = command(None, f"--chat-template={STRICT}", data=dangerous)
    assert code == 0, said
    out = tmp_path / "out"
    for arguments in (
        ["status", str(out)],
        ["verify", str(out)],
        ["report", str(out)],
        ["inspect", str(out), "--row", "1"],
    ):
        with suppress(SystemExit):
            main(arguments)
        captured = capsys.readouterr()
        said += captured.out + captured.err
    assert hidden(said) == set()
    rejected = pl.read_parquet(out / "rejects/data/*.parquet")
    assert rejected.height >= 3
    shown = "".join(
        str(row[name]) for row in rejected.iter_rows(named=True) for name in ("value_seen", "reason", "code")
    )
    assert hidden(shown) == set()
    for name in ("summary.json", "README.md", "report.html", "manifest.json"):
        assert hidden((out / name).read_text(encoding="utf-8")) == set(), name


def test_a_mistake_in_hostile_data_is_shown_in_escapes(command: Run, tmp_path: Path) -> None:
    evil = "".join(EVIL.values())
    data = write_rows(tmp_path / "columns.parquet", [{f"prompt{evil}": "a", "chosen": "b", f"worse{evil}": "c"}])
    code, said = command(data=data)
    assert code == 2
    assert hidden(said) == set()
    assert "\\x1b" in said
