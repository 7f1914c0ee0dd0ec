"""A pair in every format of `dpo-score formats`: how it is written in each, and which pairs each can hold.

A pair comes as messages (`prompt`, `chosen`, `rejected`). A form gives the rows of a file for it, or None where the
format has no place for it: a string has none for earlier turns, a transcript none for a system text. Answers stand in
either order where a label says which is better, so that a label that is not read would show.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Written = list[Row] | None
"""The rows of the file that one pair becomes; None: the format cannot hold it."""

MIDDLING = "An answer between the two."


# --- parts of a pair --------------------------------------------------------------------------------------------------


def said(pair: Row) -> tuple[str, str]:
    """The better answer and the worse one."""
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


def alone(pair: Row) -> str | None:
    """The question of a pair without system text or earlier turns."""
    return pair["prompt"][0]["content"] if [m["role"] for m in pair["prompt"]] == ["user"] else None


def no_system(pair: Row) -> bool:
    return all(message["role"] != "system" for message in pair["prompt"])


def turned(number: int, better: Any, worse: Any) -> tuple[Any, Any, bool]:
    """The two answers in the order of every other row, and whether the better one stands first."""
    return (better, worse, True) if number % 2 == 0 else (worse, better, False)


def strings(names: tuple[str, str], label: Callable[[bool], Row], prompt: str = "prompt") -> Any:
    """A prompt string, two answers in neutral columns, and a label."""

    def convert(pair: Row, number: int) -> Written:
        question = alone(pair)
        first, second, better_first = turned(number, *said(pair))
        row = {prompt: question, names[0]: first, names[1]: second, **label(better_first)}
        return None if question is None else [row]

    return convert


# --- sides by name ----------------------------------------------------------------------------------------------------


def explicit(pair: Row, number: int) -> Written:
    return [{name: pair[name] for name in ("prompt", "chosen", "rejected")}]


def one_message(pair: Row, number: int) -> Written:
    return [{"prompt": pair["prompt"], "chosen": pair["chosen"][0], "rejected": pair["rejected"][0]}]


def answer_strings(pair: Row, number: int) -> Written:
    better, worse = said(pair)
    return [{"prompt": pair["prompt"], "chosen": better, "rejected": worse}]


def full(pair: Row, number: int) -> Written:
    return [{side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")}]


def ultrafeedback(pair: Row, number: int) -> Written:
    (row,) = full(pair, number) or [{}]
    question = pair["prompt"][-1]["content"]
    return [
        {"prompt": question, "prompt_id": f"{number:064x}", **row, "messages": row["chosen"],
         "score_chosen": 8.0, "score_rejected": 3.5}
    ]  # fmt: skip


def openai(pair: Row, number: int) -> Written:
    return [
        {"input": {"messages": pair["prompt"], "parallel_tool_calls": True},
         "preferred_output": pair["chosen"], "non_preferred_output": pair["rejected"]}
    ]  # fmt: skip


def pair_text(pair: Row, number: int) -> Written:
    question, (better, worse) = alone(pair), said(pair)
    return None if question is None else [{"prompt": question, "chosen": better, "rejected": worse}]


def with_system(pair: Row, number: int) -> Written:
    roles = [message["role"] for message in pair["prompt"]]
    if roles not in (["user"], ["system", "user"]):
        return None
    system = pair["prompt"][0]["content"] if roles[0] == "system" else ""
    better, worse = said(pair)
    return [{"system": system, "question": pair["prompt"][-1]["content"], "chosen": better, "rejected": worse}]


def two_texts(pair: Row, number: int) -> Written:
    """Nothing says where the prompt ends but the first character that differs, so answers must differ in theirs."""
    question, (better, worse) = alone(pair), said(pair)
    if question is None or better[:1] == worse[:1]:
        return None
    return [{"chosen": question + better, "rejected": question + worse}]


def transcript(pair: Row, number: int) -> Written:
    if not no_system(pair):
        return None
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [
        "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in pair["prompt"] + pair[side])
        for side in ("chosen", "rejected")
    ]
    return [{"chosen": turns[0], "rejected": turns[1]}]


def sharegpt(pair: Row, number: int) -> Written:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in pair["prompt"]]
    sides = {side: {"from": "gpt", "value": pair[side][0]["content"]} for side in ("chosen", "rejected")}
    return [{"conversations": turns, **sides}]


def objects(pair: Row, number: int) -> Written:
    return [{side: {"messages": pair["prompt"] + pair[side], "tools": None} for side in ("chosen", "rejected")}]


def repeated(pair: Row, number: int) -> Written:
    question, (better, worse) = alone(pair), said(pair)
    row = {"prompt": question, "chosen": f"{question}{better}", "rejected": f"{question}{worse}"}
    return None if question is None else [row]


def alpaca(pair: Row, number: int) -> Written:
    """One question and its earlier turns; a system text has a column of its own."""
    system = [m["content"] for m in pair["prompt"] if m["role"] == "system"]
    texts = [m["content"] for m in pair["prompt"] if m["role"] != "system"]
    better, worse = said(pair)
    return [
        {"instruction": texts[-1], "input": "", "chosen": better, "rejected": worse, "system": "".join(system),
         "history": [list(two) for two in zip(texts[:-1:2], texts[1::2], strict=True)]}
    ]  # fmt: skip


def output_list(pair: Row, number: int) -> Written:
    question = alone(pair)
    return None if question is None else [{"instruction": question, "input": None, "output": list(said(pair))}]


def steps(pair: Row, number: int) -> Written:
    """No step is taken yet: where the steps stand is asked in tests/tokenization/test_render.py."""
    better, worse = said(pair)
    row = {"prompt": alone(pair), "initial_reason_steps": "", "chosen": better, "rejected": worse}
    return None if alone(pair) is None else [row]


def other_name(pair: Row, number: int) -> Written:
    return [{"messages": pair["prompt"], "chosen": pair["chosen"][0], "rejected": pair["rejected"][0]}]


def answer_structs(pair: Row, number: int) -> Written:
    better, worse = ({"answer": text, "llm_name": "m"} for text in said(pair))
    return [{"conversation_input": pair["prompt"], "chosen": better, "reject": worse}]


def swift_response(pair: Row, number: int) -> Written:
    return [{"messages": pair["prompt"] + pair["chosen"], "rejected_response": said(pair)[1]}]


def swift_messages(pair: Row, number: int) -> Written:
    sides = {"messages": pair["chosen"], "rejected_messages": pair["rejected"]}
    return [{name: pair["prompt"] + side for name, side in sides.items()}]


# --- a label says which -----------------------------------------------------------------------------------------------


def helpsteer2(pair: Row, number: int) -> Written:
    if not no_system(pair):
        return None
    first, second, better_first = turned(number, *said(pair))
    strength = (1 + number % 3) * (-1 if better_first else 1)
    return [
        {"split": "train", "prompt": marked(pair), "response_1": first, "response_2": second,
         "preference_strength": strength}
    ]  # fmt: skip


def marked(pair: Row) -> str:
    """The turns of a conversation between NeMo's markers."""
    names = {"user": "User", "assistant": "Assistant"}
    first, *rest = pair["prompt"]
    return first["content"] + "".join(f"\n<extra_id_1>{names[m['role']]}\n{m['content']}" for m in rest)


def helpsteer3(pair: Row, number: int) -> Written:
    first, second, better_first = turned(number, *said(pair))
    strength = -2 if better_first else 2
    return [{"context": pair["prompt"], "response1": first, "response2": second, "overall_preference": strength}]


def one_hot(pair: Row, number: int) -> Written:
    """Prompts and responses as JSON lists, an item a turn."""
    if not no_system(pair):
        return None
    first, second, better_first = turned(number, *said(pair))
    asked = [m["content"] for m in pair["prompt"] if m["role"] == "user"]
    earlier = [m["content"] for m in pair["prompt"] if m["role"] == "assistant"]
    return [
        {"id": number, "prompt": json.dumps(asked), "response_a": json.dumps([*earlier, first]),
         "response_b": json.dumps([*earlier, second]), "winner_model_a": int(better_first),
         "winner_model_b": int(not better_first), "winner_tie": 0}
    ]  # fmt: skip


def winner(pair: Row, number: int) -> Written:
    first, second, better_first = turned(number, pair["chosen"], pair["rejected"])
    return [
        {"winner": "model_a" if better_first else "model_b", "conversation_a": pair["prompt"] + first,
         "conversation_b": pair["prompt"] + second}
    ]  # fmt: skip


def chosen_model(pair: Row, number: int) -> Written:
    first, second, better_first = turned(number, pair["chosen"], pair["rejected"])
    return [
        {"model_a_name": "m", "model_b_name": "n", "chosen_model_name": "m" if better_first else "n",
         "both_equal": False, "conversation_a": pair["prompt"] + first, "conversation_b": pair["prompt"] + second}
    ]  # fmt: skip


# --- lists of answers -------------------------------------------------------------------------------------------------


def listed(answers: Callable[[str, str], Row], prompt: str = "prompt") -> Any:
    def convert(pair: Row, number: int) -> Written:
        question = alone(pair)
        return None if question is None else [{prompt: question, **answers(*said(pair))}]

    return convert


def nectar(better: str, worse: str) -> Row:
    ranks = {MIDDLING: 2.0, worse: 3.0, better: 1.0}
    return {"answers": [{"answer": text, "model": "m", "rank": rank} for text, rank in ranks.items()]}


def completions(better: str, worse: str) -> Row:
    scores = {worse: 1.0, MIDDLING: 5.0, better: 9.0}
    return {"completions": [{"model": "m", "response": t, "overall_score": score} for t, score in scores.items()]}


def rated_aspects(better: str, worse: str) -> Row:
    ratings = {worse: (5, 1), MIDDLING: (3, 4), better: (4, 4)}
    aspects = {
        text: {"Helpfulness": {"Rating": str(a)}, "Ethics": {"Rating": str(b)}} for text, (a, b) in ratings.items()
    }
    return {"completions": [{"response": text, "annotations": given} for text, given in aspects.items()]}


def ranked_completions(pair: Row, number: int) -> Written:
    first, second, better_first = turned(number, pair["chosen"], pair["rejected"])
    ranks = (0, 1) if better_first else (1, 0)
    items = [{"rank": rank, "completion": side} for rank, side in zip(ranks, (first, second), strict=True)]
    return [{"context": pair["prompt"], "completions": items}]


def losers(pair: Row, number: int) -> Written:
    better, worse = ({"answer": text, "llm_name": "m"} for text in said(pair))
    return [{"conversation_input": pair["prompt"], "bon_best": better, "loser_list": [worse]}]


def two_rows(pair: Row, number: int) -> Written:
    if not no_system(pair):
        return None
    first, second, better_first = turned(number, *said(pair))
    scores = (4, 1) if better_first else (0, 3)
    return [
        {"prompt": marked(pair), "response": text, "helpfulness": score, "verbosity": 2}
        for text, score in zip((first, second), scores, strict=True)
    ]


# --- a prompt of the format's own words -------------------------------------------------------------------------------


def summary(pair: Row, number: int) -> Written:
    question = alone(pair)
    first, second, better_first = turned(number, *said(pair))
    info = {"id": str(number), "post": None, "title": None, "subreddit": None, "article": question}
    summaries = [{"text": text, "policy": "p"} for text in (first, second)]
    return None if question is None else [{"info": info, "summaries": summaries, "choice": 0 if better_first else 1}]


def summary_text(pair: Row, number: int) -> Written:
    question, (better, worse) = alone(pair), said(pair)
    row = {"prompt": f"Article: {question}\n\nTL;DR:", "chosen": better, "rejected": worse}
    return None if question is None else [row]


def unpaired(pair: Row, number: int) -> Written:
    """KTO's form, which holds no pairs and is refused."""
    question, (better, worse) = alone(pair), said(pair)
    sides = ({"completion": better, "label": True}, {"completion": worse, "label": False})
    return None if question is None else [{"prompt": question, **side} for side in sides]
