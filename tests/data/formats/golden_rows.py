"""The rows of the golden tables, in plain Python: what is right stands first unless a label says otherwise."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

S, N, F = pa.string(), pa.int64(), pa.float64()
MSG = pa.list_(pa.struct([("content", S), ("role", S)]))
GOOD, BAD = "Paris.", "London."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat(answer: str, question: str = "Capital of France?") -> list[dict[str, str]]:
    return [user(question), bot(answer)]


def swapped(rows: list[dict[str, Any]], a: str = "chosen", b: str = "rejected") -> list[dict[str, Any]]:
    """For formats whose label is the name of the column."""
    return [{**row, a: row[b], b: row[a]} for row in rows]


def relabelled(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    return [
        {**row, **{k: (v[row[k]] if isinstance(v, dict) else v(row[k])) for k, v in values.items()}} for row in rows
    ]


THREE = [("Paris.", "London."), ("4", "5"), ("Blue.", "Green.")]
QUESTIONS = ["Capital of France?", "2 + 2?", "Colour of the sky?"]


def texts(
    prompt: str = "prompt", chosen: str = "chosen", rejected: str = "rejected", **more: Any
) -> list[dict[str, Any]]:
    return [{prompt: q, chosen: a, rejected: b, **more} for q, (a, b) in zip(QUESTIONS, THREE, strict=True)]


def full(**more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": q, "chosen": chat(a, q), "rejected": chat(b, q), **more}
        for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
    ]


HH = [
    {"chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}"}
    for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]
ORCA = texts(prompt="question", system="Be brief.")
REWARD_BENCH = texts(chosen_model="x", rejected_model="y", subset="alpacaeval-easy", id=1)
ARGILLA = texts(prompt="instruction", chosen="chosen_response", rejected="rejected_response")
DISTILABEL = texts(prompt="input", system="", generations=["a", "b"], rating=[1.0, 2.0], status="ok")
ULTRA = full(prompt_id="p", score_chosen=8.0, score_rejected=2.0, messages=chat("x"))
EXPLICIT = [
    {"prompt": [user(q)], "chosen": [bot(a)], "rejected": [bot(b)], "subset": "facts"}
    for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]
OPENAI = [
    {"input": {"messages": [user(q)], "tools": None}, "preferred_output": [bot(a)], "non_preferred_output": [bot(b)]}
    for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]
# response_1 is right in the first row, response_2 in the second; the third is a tie
HELPSTEER2 = [
    {"split": "train", "prompt": "Capital?", "response_1": GOOD, "response_2": BAD, "preference_strength": -3},
    {"split": "train", "prompt": "2 + 2?", "response_1": "5", "response_2": "4", "preference_strength": 1},
    {"split": "train", "prompt": "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nSky?", "response_1": "Blue.",
     "response_2": "Azure.", "preference_strength": 0},
    {"split": "train", "prompt": "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nSky?", "response_1": "Blue.",
     "response_2": "Green.", "preference_strength": -1},
]  # fmt: skip
HELPSTEER3 = [
    {"context": [user("Capital?")], "response1": GOOD, "response2": BAD, "overall_preference": -3},
    {"context": [user("2 + 2?")], "response1": "5", "response2": "4", "overall_preference": 2},
    {"context": [user("Sky?")], "response1": "Blue.", "response2": "Azure.", "overall_preference": 0},
]
PKU = [
    {"prompt": "Capital?", "response_0": GOOD, "response_1": BAD, "better_response_id": 0, "safer_response_id": 1},
    {"prompt": "2 + 2?", "response_0": "5", "response_1": "4", "better_response_id": 1, "safer_response_id": 0},
    {"prompt": "Sky?", "response_0": "Blue.", "response_1": "Green.", "better_response_id": 0, "safer_response_id": 1},
]
PKU_SINGLE = [{k: v for k, v in row.items() if k != "safer_response_id"} for row in PKU]
# labels 1: A is better
SHP = [
    {"post_id": "a", "history": "Capital?", "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1, "score_ratio": 2.0},
    {"post_id": "b", "history": "2 + 2?", "human_ref_A": "5", "human_ref_B": "4", "labels": 0, "score_ratio": 3.0},
    {
        "post_id": "c",
        "history": "Sky?",
        "human_ref_A": "Blue.",
        "human_ref_B": "Green.",
        "labels": 1,
        "score_ratio": 2.5,
    },
]
QUOTES = pa.struct([("title", pa.list_(S)), ("extract", pa.list_(S))])
WEBGPT = [
    {
        "question": {"full_text": "Capital?", "id": "1"},
        "answer_0": GOOD,
        "answer_1": BAD,
        "score_0": 1.0,
        "score_1": -1.0,
    },
    {"question": {"full_text": "2 + 2?", "id": "2"}, "answer_0": "5", "answer_1": "4", "score_0": -0.5, "score_1": 0.5},
    {
        "question": {"full_text": "Sky?", "id": "3"},
        "answer_0": "Blue.",
        "answer_1": "Azure.",
        "score_0": 0.0,
        "score_1": 0.0,
    },
]
ONE_HOT = [
    {"id": 1, "prompt": '["Capital?"]', "response_a": '["Paris."]', "response_b": '["London."]',
     "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
    {"id": 2, "prompt": '["2 + 2?"]', "response_a": '["5"]', "response_b": '["4"]',
     "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
    {"id": 3, "prompt": '["Sky?"]', "response_a": '["Blue."]', "response_b": '["Azure."]',
     "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
    {"id": 4, "prompt": '["Hi", "Sky?"]', "response_a": '["Yes?", "Blue."]', "response_b": '["What?", "Green."]',
     "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
]  # fmt: skip
ARENA = [
    {"question_id": "1", "winner": "model_a", "conversation_a": chat(GOOD), "conversation_b": chat(BAD)},
    {"question_id": "2", "winner": "model_b", "conversation_a": chat("5"), "conversation_b": chat("4")},
    {"question_id": "3", "winner": "tie (bothbad)", "conversation_a": chat("x"), "conversation_b": chat("y")},
    {"question_id": "4", "winner": "model_a", "conversation_a": chat("x", "one"), "conversation_b": chat("y", "two")},
]
AB_TEXT = [
    {"prompt": "Capital?", "response_a": GOOD, "response_b": BAD, "winner": "model_a"},
    {"prompt": "2 + 2?", "response_a": "5", "response_b": "4", "winner": "B"},
    {"prompt": "Sky?", "response_a": "Blue.", "response_b": "Azure.", "winner": "tie"},
]


def nectar(*ranked: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"answer": text, "model": "m", "rank": rank} for text, rank in ranked]


# rank 1 is the best
NECTAR = [
    {"prompt": "\n\nHuman: Capital?\n\nAssistant: ", "answers": nectar(("Lyon.", 2), (GOOD, 1), (BAD, 3))},
    {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant: ", "answers": nectar(("4", 1), ("5", 2), ("3", 1.5))},
    {"prompt": "\n\nHuman: Sky?\n\nAssistant: ", "answers": nectar(("Blue.", 1), ("Azure.", 1))},
]


def completions(*scored: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"model": "m", "response": text, "overall_score": score, "critique": "…"} for text, score in scored]


ULTRAFEEDBACK = [
    {"source": "s", "instruction": "Capital?", "completions": completions(("Lyon.", 5.0), (GOOD, 9.0), (BAD, 1.0))},
    {"source": "s", "instruction": "2 + 2?", "completions": completions(("4", 10.0), ("5", 2.0))},
    {"source": "s", "instruction": "Sky?", "completions": completions(("Blue.", 7.0), ("Azure.", 7.0))},
]
LISTS = [
    {"prompt": "Capital?", "responses": ["Lyon.", GOOD, BAD], "scores": [0.5, 0.9, 0.1]},
    {"prompt": "2 + 2?", "responses": ["5", "4"], "scores": [0.0, 1.0]},
    {"prompt": "Sky?", "responses": ["Blue.", "Azure."], "scores": [1.0, 1.0]},
]
ATTRIBUTES = {"correctness": 1, "coherence": 4, "complexity": 1, "verbosity": 1}
TWO_ROWS = [
    {"prompt": "Capital?", "response": GOOD, "helpfulness": 4, **ATTRIBUTES},
    {"prompt": "Capital?", "response": BAD, "helpfulness": 0, **ATTRIBUTES},
    {"prompt": "2 + 2?", "response": "5", "helpfulness": 1, **ATTRIBUTES},
    {"prompt": "2 + 2?", "response": "4", "helpfulness": 3, **ATTRIBUTES},
    {"prompt": "Sky?", "response": "Blue.", "helpfulness": 3, **ATTRIBUTES},
    {"prompt": "Sky?", "response": "Azure.", "helpfulness": 3, **ATTRIBUTES},
]
BEST_OF_N = [
    {"id": "1", "prompt": "Capital?", "chosen": [GOOD], "rejected": [BAD, "Rome."], "subset": "Factuality"},
    {"id": "2", "prompt": "2 + 2?", "chosen": ["4"], "rejected": ["5"], "subset": "Math"},
    {"id": "3", "prompt": "Sky?", "chosen": ["Blue.", "Azure."], "rejected": ["Green."], "subset": "Ties"},
]
TURN = pa.struct([("from", S), ("value", S)])
SHAREGPT = [
    {"conversations": [{"from": "human", "value": q}], "chosen": {"from": "gpt", "value": a},
     "rejected": {"from": "gpt", "value": b}}
    for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]  # fmt: skip


def summary(post: str | None, article: str | None, first: str, second: str, choice: int) -> dict[str, Any]:
    info = {"id": "i", "post": post, "title": "T", "subreddit": "r", "site": None, "article": article}
    return {
        "info": info,
        "summaries": [{"text": first, "policy": "p"}, {"text": second, "policy": "q"}],
        "choice": choice,
    }


SUMMARY = [
    summary("long post", None, "short and true", "short and false", 0),
    summary("long post", None, "wrong", "right", 1),
    summary(None, "an article", "rain came", "sun came", 0),
]
INFO = pa.struct([(n, S) for n in ("id", "post", "title", "subreddit", "site", "article")])
IDS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
    {"prompt_ids": [1], "chosen_ids": [7], "rejected_ids": [8, 9]},
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [6]},
]
LABELLED = [
    {"chosen_input_ids": [1, 2, 3, 4], "chosen_labels": [-100, -100, 3, 4],
     "rejected_input_ids": [1, 2, 5], "rejected_labels": [-100, -100, 5]},
    {"chosen_input_ids": [1, 7], "chosen_labels": [-100, 7],
     "rejected_input_ids": [1, 8, 9], "rejected_labels": [-100, 8, 9]},
    {"chosen_input_ids": [1, 2, 3, 4], "chosen_labels": [-100, -100, -100, 4],
     "rejected_input_ids": [1, 2, 3, 6], "rejected_labels": [-100, -100, -100, 6]},
]  # fmt: skip
ID_LISTS = pa.list_(pa.int32())
ID_PAIRS: list[tuple[str, str] | str] = [("3 4", "5"), ("7", "8 9"), ("4", "6")]
TEXT3 = [("prompt", S), ("chosen", S), ("rejected", S)]
NEGATED = {-3: 3, -2: 2, -1: 1, 0: 0, 1: -1, 2: -2, 3: -3}
PRESENT = pa.list_(pa.struct([("answer", S), ("model", S), ("rank", F)]))
COMPLETION = pa.list_(pa.struct([("model", S), ("response", S), ("overall_score", F), ("critique", S)]))


def ranks_turned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**r, "answers": [{**a, "rank": 10 - a["rank"]} for a in r["answers"]]} for r in rows]


def scores_turned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**r, "completions": [{**c, "overall_score": 10 - c["overall_score"]} for c in r["completions"]]} for r in rows
    ]


def winners_turned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**r, "winner_model_a": r["winner_model_b"], "winner_model_b": r["winner_model_a"]} for r in rows]


WINNERS = {"model_a": "model_b", "model_b": "model_a", "B": "A", "tie": "tie", "tie (bothbad)": "tie (bothbad)"}
TIE3: list[tuple[str, str] | str] = [(GOOD, BAD), ("4", "5"), "tie"]

ASKED_TURN = pa.struct([("role", S), ("content", S)])
REPEATED = [
    {"prompt": q, "chosen": f"{q} {a}", "rejected": f"{q} {b}"} for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]
REPEATED_PAIRS: list[tuple[str, str] | str] = [(f" {a}", f" {b}") for a, b in THREE]
ALPACA = texts(prompt="instruction", input="In one word.", system="Be brief.", history=[["Hi", "Hello."]])
OUTPUTS = [
    {"instruction": q, "input": "", "output": [a, b]} for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]  # fmt: skip
OUTPUTS_TURNED = [{**row, "output": row["output"][::-1]} for row in OUTPUTS]
STEPS = texts(dataset="MATH", initial_reason_steps="Step 1: think.\nStep 2:", full_chosen="…", full_rejected="…")
TRAJECTORY = [
    {"id": "1", "task": "Coding", "chosen": a, "rejected": b,
     "trajectory": [{"from": "user", "value": q}, {"from": "assistant", "value": "Let me see."},
                    {"from": "user", "value": "Go on."}]}
    for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]  # fmt: skip
AXOLOTL = [
    {"messages": [user(q)], "chosen": bot(a), "rejected": bot(b)} for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]
RMB = [
    {"conversation_input": [user(q)], "chosen": {"answer": a, "llm_name": "x"},
     "reject": {"answer": b, "llm_name": "y"}, "category_path": "Closed QA"}
    for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]  # fmt: skip
RMB_LOSERS = [
    {"conversation_input": [user(q)], "bon_best": {"answer": a, "llm_name": "x"},
     "loser_list": [{"answer": b, "llm_name": "y"}, {"answer": f"{b} {b}", "llm_name": "z"}]}
    for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]  # fmt: skip
LOSERS: list[tuple[str, str] | str] = [(a, lost) for a, b in THREE for lost in (b, f"{b} {b}")]
LOSERS_TURNED = [
    {**row, "bon_best": lost, "loser_list": [row["bon_best"]]} for row in RMB_LOSERS for lost in row["loser_list"]
]
RMB_ANSWER = pa.struct([("answer", S), ("llm_name", S)])
SWIFT = [{"messages": chat(a, q), "rejected_response": b} for q, (a, b) in zip(QUESTIONS, THREE, strict=True)]
SWIFT_TURNED = [{"messages": chat(b, q), "rejected_response": a} for q, (a, b) in zip(QUESTIONS, THREE, strict=True)]
SWIFT_LISTS = [
    {"messages": chat(a, q), "rejected_messages": chat(b, q)} for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]
OBJECTS = [
    {"chosen": {"messages": chat(a, q)}, "rejected": {"messages": chat(b, q)}}
    for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]
TORCHTUNE = [
    {"chosen_conversations": chat(a, q), "rejected_conversations": chat(b, q)}
    for q, (a, b) in zip(QUESTIONS, THREE, strict=True)
]
# "A>B": response_A is better
JUDGEBENCH = [
    {"pair_id": "p", "question": "Capital?", "response_A": GOOD, "response_B": BAD, "label": "A>B"},
    {"pair_id": "p", "question": "2 + 2?", "response_A": "5", "response_B": "4", "label": "B>A"},
    {"pair_id": "p", "question": "Sky?", "response_A": "Blue.", "response_B": "Azure.", "label": "A=B"},
]
SIGNS = {"A>B": "B>A", "B>A": "A>B", "A=B": "A=B"}
PPE = [
    {"question_id": "q", "prompt": "Capital?", "response_1": GOOD, "response_2": BAD, "winner": "model_a"},
    {"question_id": "q", "prompt": "2 + 2?", "response_1": "5", "response_2": "4", "winner": "model_b"},
    {"question_id": "q", "prompt": "Sky?", "response_1": "Blue.", "response_2": "Azure.", "winner": "tie"},
]
SEARCH_ARENA = [
    {"winner": row["winner"], "messages_a": row["conversation_a"], "messages_b": row["conversation_b"]} for row in ARENA
]
COMPARIA = [
    {"model_a_name": "m", "model_b_name": "n", "conversation_a": chat(GOOD), "conversation_b": chat(BAD),
     "chosen_model_name": "m", "both_equal": False},
    {"model_a_name": "n", "model_b_name": "m", "conversation_a": chat("5"), "conversation_b": chat("4"),
     "chosen_model_name": "m", "both_equal": False},
    {"model_a_name": "m", "model_b_name": "n", "conversation_a": chat("Blue."), "conversation_b": chat("Azure."),
     "chosen_model_name": None, "both_equal": True},
]  # fmt: skip
MODELS: dict[str | None, str | None] = {"m": "n", "n": "m", None: None}


def judged(winner: str, turn: int, first: tuple[str, str], second: tuple[str, str]) -> dict[str, Any]:
    """A conversation of two turns for each model, of which `turn` is judged."""
    a, b = (chat(one, "Capital?") + chat(two, "Sure?") for one, two in (first, second))
    return {"winner": winner, "turn": turn, "conversation_a": a, "conversation_b": b}


MT_BENCH = [
    judged("model_a", 1, (GOOD, "Yes."), (BAD, "No.")),
    judged("model_b", 2, (GOOD, "No."), (GOOD, "Yes.")),
    judged("tie", 1, (GOOD, "Yes."), ("Lyon.", "No.")),
    judged("model_a", 2, (GOOD, "Yes."), (BAD, "No.")),
]
ALPACA_FARM = [
    {"instruction": "Capital?", "input": "", "output_1": GOOD, "output_2": BAD, "preference": 1},
    {"instruction": "2 + 2?", "input": "As a digit.", "output_1": "5", "output_2": "4", "preference": 2},
    {"instruction": "Sky?", "input": "", "output_1": "Blue.", "output_2": "Green.", "preference": 1},
]
# rank 0 is better than rank 1
NEMO = [
    {"context": [user("Capital?")], "completions": [{"rank": 1, "completion": [bot(BAD)]},
                                                    {"rank": 0, "completion": [bot(GOOD)]}]},
    {"context": [user("2 + 2?")], "completions": [{"rank": 0, "completion": [bot("4")]},
                                                  {"rank": 1, "completion": [bot("5")]}]},
    {"context": [user("Sky?")], "completions": [{"rank": 0, "completion": [bot("Blue.")]},
                                                {"rank": 0, "completion": [bot("Azure.")]}]},
]  # fmt: skip
NEMO_TURNED = [
    {**row, "completions": [{**item, "rank": 1 - item["rank"]} for item in row["completions"]]} for row in NEMO
]
FINE_GRAINED = [
    {"instruction": row["instruction"],
     "completions": [{**item, "fine-grained_score": item["overall_score"] / 2, "overall_score": 10.0}
                     for item in row["completions"]]}
    for row in ULTRAFEEDBACK
]  # fmt: skip
FINE_GRAINED_TURNED = [
    {**row, "completions": [{**c, "fine-grained_score": 5 - c["fine-grained_score"]} for c in row["completions"]]}
    for row in FINE_GRAINED
]
FINE_COMPLETION = pa.list_(pa.struct([("response", S), ("overall_score", F), ("fine-grained_score", F)]))
HELPSTEER1 = [
    {"prompt": prompt, "response": response, "helpfulness": score, **ATTRIBUTES}
    for prompt, answers in (("Capital?", ((GOOD, 4), ("Lyon.", 1), (BAD, 0))), ("2 + 2?", (("5", 1), ("4", 3))),
                            ("Sky?", (("Blue.", 3), ("Azure.", 3))), ("Alone?", (("Yes.", 3),)))
    for response, score in answers
]  # fmt: skip


def columnar(turns: list[dict[str, str]]) -> dict[str, list[str]]:
    """What `datasets.Sequence` makes of a list of messages."""
    return {"role": [turn["role"] for turn in turns], "content": [turn["content"] for turn in turns]}


COLUMNAR = [{side: columnar(row[side]) for side in ("chosen", "rejected")} for row in full()]
"""Whole conversations, each a struct of lists."""


def _aspects(helpful: object, faithful: object) -> dict[str, Any]:
    given = {"Helpfulness": helpful, "Visual Faithfulness": faithful}
    return {name: {"Rating": value, "Rationale": "why"} for name, value in given.items()}


def vl_feedback(*rated: tuple[str, object, object]) -> list[dict[str, Any]]:
    return [{"response": text, "model": "m", "annotations": _aspects(a, b)} for text, a, b in rated]


ASPECTS = pa.struct(
    [(name, pa.struct([("Rating", S), ("Rationale", S)])) for name in ("Helpfulness", "Visual Faithfulness")]
)
VL_FEEDBACK = [
    {"prompt": QUESTIONS[0], "completions": vl_feedback((BAD, "5", "1"), (GOOD, "3", "4"))},
    {"prompt": QUESTIONS[1], "completions": vl_feedback(("4", "5", "4"), ("5", "1", "2"))},
    {"prompt": QUESTIONS[2], "completions": vl_feedback(("Red.", "4", "2"), ("Blue.", "2", "4"))},
]
VL_FEEDBACK_TURNED = [
    {"prompt": QUESTIONS[0], "completions": vl_feedback((BAD, "3", "4"), (GOOD, "5", "1"))},
    {"prompt": QUESTIONS[1], "completions": vl_feedback(("4", "1", "2"), ("5", "5", "4"))},
    {"prompt": QUESTIONS[2], "completions": vl_feedback(("Red.", "4", "2"), ("Blue.", "2", "4"))},
]
VL_REWARD_BENCH = [
    {"id": "RLAIF-V-1", "query": QUESTIONS[0], "response": [BAD, GOOD], "human_ranking": [1, 0], "rationale": "r"},
    {"id": "mathverse_2", "query": QUESTIONS[1], "response": ["4", "5"], "human_ranking": [0, 1], "rationale": "r"},
    {"id": "x", "query": QUESTIONS[2], "response": ["Red.", "Blue."], "human_ranking": [1, 1], "rationale": "r"},
]
MULTIMODAL = [
    {"ID": "a", "Text": q, "Output1": one, "Output2": two, "Better": better, "Category": "vqa"}
    for q, one, two, better in (
        (QUESTIONS[0], BAD, GOOD, "Output2"),
        (QUESTIONS[1], "4", "5", "Output1"),
        (QUESTIONS[2], "Green.", "Blue.", "Output2"),
    )
]
OUTPUTS_NAMED = {"Output1": "Output2", "Output2": "Output1"}
