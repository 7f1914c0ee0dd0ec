"""Sets as people have them, read by hand: context beside a prompt, repeated prompts, labels, and other tools' forms.

Each case is a few rows, the format they must be found to have, and what is scored: prompt, better and worse answer, in
one line a message. Each was made after a public report of rows that another program read wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_score.config.schema import DataSpec, TextSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.types import Pair, Problem, Rejected
from dpo_score.errors import DataError
from dpo_score.tokenization.prompt import arranged
from tests.data.formats.golden_rows import MSG, bot, chat, columnar, user
from tests.data.formats.test_registry import read

S = pa.string()
SYSTEM = {"role": "system", "content": "Be kind"}
Told = tuple[str, str, str] | str


def told(item: Pair | Rejected) -> Told:
    """What is scored: prompt, better answer, worse answer; or the code of a rejected row."""
    if isinstance(item, Rejected):
        return item.code
    found = arranged(item, TextSpec())
    assert not isinstance(found, Problem), found

    def line(side: Any) -> str:
        return side if isinstance(side, str) else "|".join(f"{m['role']} {m.get('content')}" for m in side)

    return line(found.prompt), line(found.chosen), line(found.rejected)


@dataclass(frozen=True)
class Case:
    name: str
    format: str
    rows: Sequence[dict[str, Any]]
    expected: Sequence[Told]
    options: dict[str, Any] = field(default_factory=dict)


def opened_and_read(case: Case, folder: Path) -> tuple[str, list[Told]]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, case.rows)))
    datasets = open_datasets([DataSpec(name="set", path=str(folder / "rows.jsonl"), **case.options)])
    items = read_pairs(datasets, 0, datasets[0].rows)
    return datasets[0].format.full_name, [told(item) for item in items]


YES, NO = "assistant yes", "assistant no"
SIDES = {"chosen": "yes", "rejected": "no"}
MESSAGES = {"chosen": [bot("yes")], "rejected": [bot("no")]}

CONTEXT = [
    Case("messages in a column called context", "pair-text",
         [{"prompt": "And twice?", **SIDES, "context": chat("4", "2 + 2?")}],
         [("user 2 + 2?|assistant 4|user And twice?", YES, NO)]),
    Case("question and answer lists in history", "pair-text/alpaca",
         [{"instruction": "Now", "input": "cat", **SIDES, "history": [["Hi", "Hello"], ["You?", "Me."]]},
          {"instruction": "Now", "input": "", **SIDES, "history": []},
          {"instruction": "Now", "input": None, **SIDES, "history": None}],
         [("user Hi|assistant Hello|user You?|assistant Me.|user Now\ncat", YES, NO), ("user Now", YES, NO),
          ("user Now", YES, NO)]),
    Case("a history that is empty in every row", "pair-text", [{"question": "q", **SIDES, "history": []}],
         [("user q", YES, NO)]),
    Case("earlier turns under another name, by --map", "pair-text",
         [{"prompt": "q2", **SIDES, "earlier": chat("a1", "q1")}], [("user q1|assistant a1|user q2", YES, NO)],
         {"map": {"history": "earlier"}}),
    Case("a system text and a history", "pair-text",
         [{"system": "Be kind", "prompt": "q2", **SIDES, "history": [["q1", "a1"]]}],
         [("system Be kind|user q1|assistant a1|user q2", YES, NO)]),
    Case("question and answer lists as JSON text", "pair-text",
         [{"prompt": "q2", **SIDES, "history": json.dumps(turns)} for turns in ([["q1", "a1"]], [])],
         [("user q1|assistant a1|user q2", YES, NO), ("user q2", YES, NO)]),
    Case("steps before the judged step", "pair-text/steps",
         [{"prompt": "1 + 1?", "initial_reason_steps": "Step 1: add.\nStep 2:", **SIDES},
          {"prompt": "1 + 1?", "initial_reason_steps": "", **SIDES}],
         [("1 + 1?\nStep 1: add.\nStep 2:", "yes", "no"), ("1 + 1?", "yes", "no")]),
    Case("steps with a system text: they begin the assistant's turn", "pair-text/steps",
         [{"system": "Be kind", "prompt": "1 + 1?", "initial_reason_steps": "Step 1: add. ", **SIDES}],
         [("system Be kind|user 1 + 1?", "assistant Step 1: add. yes", "assistant Step 1: add. no")]),
    Case("an arena vote after other votes of its session", "ab-label/winner",
         [{"winner": "model_a", "conversation_a": chat("yes", "q"), "conversation_b": chat("no", "q"),
           "full_conversation": [{"user": user("q"), "model_side_a": bot("yes"), "model_side_b": bot("no")}]},
          {"winner": "model_a", "conversation_a": chat("yes", "q2"), "conversation_b": chat("no", "q2"),
           "full_conversation": [{"user": user(q), "model_side_a": bot("x"), "model_side_b": bot("y")}
                                 for q in ("q1", "q2")]}],
         [("user q", YES, NO), "context_mismatch"]),
]  # fmt: skip

NOTE = {"num_tokens": 7, "id": 1}
REPEATED = [
    Case("both strings begin with the prompt", "pair-text/repeated",
         [{"prompt": "Q: hi A:", "chosen": "Q: hi A: yes", "rejected": "Q: hi A: no"}] * 2,
         [("Q: hi A:", " yes", " no")] * 2),
    Case("a few answers begin like their prompt", "pair-text",
         [{"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}, *[{"prompt": "q", **SIDES}] * 5],
         [("Hi", "Hi there", "Hi you"), *[("q", "yes", "no")] * 5]),
    Case("one row in ten repeats a prompt of several words", "pair-text/repeated",
         [{"prompt": "Is it so? A:", "chosen": "Is it so? A: yes", "rejected": "Is it so? A: no"},
          *[{"prompt": "Is it so? A:", **SIDES}] * 9],
         [("Is it so? A:", " yes", " no"), *[("Is it so? A:", "yes", "no")] * 9]),
    Case("transcripts beside the prompt that begins them", "pair-text/repeated",
         [{"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "\n\nHuman: q\n\nAssistant: yes",
           "rejected": "\n\nHuman: q\n\nAssistant: no"}],
         [("\n\nHuman: q\n\nAssistant:", " yes", " no")]),
    Case("the repeated prompt stays if the format says so", "pair-text",
         [{"prompt": "q ", "chosen": "q yes", "rejected": "q no"}], [("q ", "q yes", "q no")],
         {"format": "pair-text"}),
    Case("sides with the system turn that the prompt lacks", "messages-explicit",
         [{"prompt": [user("q")], "chosen": [SYSTEM, *chat("yes", "q")], "rejected": [SYSTEM, *chat("no", "q")]}],
         [("system Be kind|user q", YES, NO)]),
    Case("sides without the system turn of the prompt", "messages-explicit",
         [{"prompt": [SYSTEM, user("q")], "chosen": chat("yes", "q"), "rejected": chat("no", "q")}],
         [("system Be kind|user q", YES, NO)]),
    Case("sides with another system turn each", "messages-explicit",
         [{"prompt": [user("q")], "chosen": [SYSTEM, *chat("yes", "q")],
           "rejected": [{**SYSTEM, "content": "Be rude"}, *chat("no", "q")]}], ["context_mismatch"]),
    Case("a repeated prompt whose messages carry notes", "messages-explicit",
         [{"prompt": [user("q")], "chosen": [{**user("q"), "name": None, **NOTE}, bot("yes")],
           "rejected": [{**user("q"), "id": 2}, bot("no")]}], [("user q", YES, NO)]),
    Case("the repeated prompt of ShareGPT", "sharegpt",
         [{"conversations": [user("q")], "chosen": chat("yes", "q"), "rejected": chat("no", "q")}],
         [("user q", YES, NO)]),
    Case("whole conversations that differ in notes alone", "messages-full",
         [{"chosen": [{**user("q"), **NOTE}, {**bot("yes"), **NOTE}], "rejected": [{**user("q"), "id": 9}, bot("no")]}],
         [("user q", YES, NO)]),
    Case("arena conversations of which one counts tokens", "ab-label/winner",
         [{"winner": "model_b", "conversation_a": chat("no", "q"),
           "conversation_b": [{**turn, "num_tokens": 5} for turn in chat("yes", "q")]}], [("user q", YES, NO)]),
    Case("names, which templates do show, are no notes", "ab-label/winner",
         [{"winner": "model_a", "conversation_a": [{**user("q"), "name": "Ann"}, bot("yes")],
           "conversation_b": [{**user("q"), "name": "Bob"}, bot("no")]}], ["context_mismatch"]),
]  # fmt: skip

AB = {"prompt": "q", "response_a": "a", "response_b": "b"}
A, B = ("q", "a", "b"), ("q", "b", "a")
WORDS = {
    "A": A, "B": B, "model_a": A, "Model B": B, "response_b": B, "A>B": A, "B>A": B, "[[B]]": B, "A>>B": A,
    "A-is-clearly-better": A, "B-is-slightly-better": B,
    "tie": "tie", "tie (bothbad)": "tie", "both_good": "tie", "both bad": "tie", "both": "tie", "neither": "tie",
    "Draw": "tie", "A=B": "tie", "1": "invalid_label", "response_1": "invalid_label", "maybe": "invalid_label",
}  # fmt: skip


def two_turns(first: str, second: str) -> list[dict[str, str]]:
    return [*chat(first, "q1"), *chat(second, "q2")]


LABELS = [
    Case("the fine-grained score before the overall one", "ranked/completions",
         [{"instruction": "q", "completions": [
             {"response": "yes", "overall_score": 8.0, "fine-grained_score": 4.75},
             {"response": "no", "overall_score": 10.0, "fine-grained_score": 1.25}]}], [("q", "yes", "no")]),
    Case("the overall score where an answer has no other", "ranked/completions",
         [{"instruction": "q", "completions": [
             {"response": "no", "overall_score": 2.0, "fine-grained_score": None},
             {"response": "yes", "overall_score": 6.0, "fine-grained_score": 1.0}]}], [("q", "yes", "no")]),
    Case("a label for the first of two turns", "ab-label/winner",
         [{"winner": "model_b", "turn": 1, "conversation_a": two_turns("no", "x"),
           "conversation_b": two_turns("yes", "y")}], [("user q1", YES, NO)]),
    Case("a label for the second turn", "ab-label/winner",
         [{"winner": "model_a", "turn": 2, "conversation_a": two_turns("x", "yes"),
           "conversation_b": two_turns("x", "no")},
          {"winner": "model_a", "turn": 2, "conversation_a": two_turns("x", "yes"),
           "conversation_b": two_turns("y", "no")},
          {"winner": "model_a", "turn": 3, "conversation_a": two_turns("x", "yes"),
           "conversation_b": two_turns("x", "no")}],
         [("user q1|assistant x|user q2", YES, NO), "context_mismatch", "invalid_label"]),
    Case("a turn that the row does not hold", "ab-label/text", [{**AB, "winner": "A", "turn": 2}],
         ["context_mismatch"]),
    Case("words for the winner", "ab-label/text", [{**AB, "winner": word} for word in WORDS], list(WORDS.values())),
    Case("a bad row among those of one prompt", "ranked/two-rows",
         [{"prompt": "a", "response": f"a{score}", "helpfulness": score} for score in (4, None, 0)]
         + [{"prompt": "b", "response": "b", "helpfulness": score} for score in (None, 1)],
         [("user a", "assistant a4", "assistant a0"), "null_field", "null_field"]),
    Case("rows of one prompt with another system text each", "ranked/two-rows",
         [{"prompt": "a", "response": "x", "helpfulness": 1, "system": "Be kind"},
          {"prompt": "a", "response": "y", "helpfulness": 2, "system": "Be rude"},
          {"prompt": "b", "response": "x", "helpfulness": 1, "system": "Be kind"},
          {"prompt": "b", "response": "y", "helpfulness": 2, "system": "Be kind"}],
         ["context_mismatch", ("system Be kind|user b", "assistant y", "assistant x")]),
    Case("as many rows as a prompt has answers", "ranked/two-rows",
         [{"prompt": prompt, "response": f"{prompt}{score}", "helpfulness": score}
          for prompt, scores in (("a", (4, 1, 0)), ("b", (1, 3)), ("c", (2,)), ("d", (0, 3, 2, 4)))
          for score in scores],
         [("user a", "assistant a4", "assistant a0"), ("user b", "assistant b3", "assistant b1"), "context_mismatch",
          ("user d", "assistant d4", "assistant d0")]),
    Case("rows of one prompt that do not stand together", "ranked/two-rows",
         [{"prompt": prompt, "response": f"{prompt}{score}", "helpfulness": score}
          for score in (2, 0, 4) for prompt in ("a", "b")] + [{"prompt": "c", "response": "c", "helpfulness": 1}],
         [("user a", "assistant a4", "assistant a0"), ("user b", "assistant b4", "assistant b0"), "context_mismatch"]),
    *(Case(f"the roles {human} and {answerer}", "messages-full",
           [{side: [{"role": human, "content": "q"}, {"role": answerer, "content": text}]
             for side, text in SIDES.items()}], [("user q", YES, NO)])
      for human, answerer in (("human", "gpt"), ("Human", "Assistant"), ("user", "model"), ("user", "ai"),
                              ("prompter", "assistant"), ("USER", "Chatbot"))),
    Case("roles with blanks, and without a word", "messages-full",
         [{side: [{**user("q"), "role": role}, bot(text)] for side, text in SIDES.items()} for role in (" User", " ")],
         [("user q", YES, NO), "null_field"]),
    Case("other roles stay as they are", "messages-full",
         [{side: [user("q"), {"role": "critic", "content": "c"}, bot(text)] for side, text in SIDES.items()}],
         [("user q|critic c", YES, NO)]),
    *(Case(f"an index of the better answer as {type(zero).__name__}", "better-id",
           [{"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": label}
            for label in (zero, one)], [A, B])
      for zero, one in ((False, True), ("0", "1"))),
    *(Case(f"SHP with labels as {type(true).__name__} {true}", "ab-label/shp",
           [{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": label} for label in (true, false)],
           [A, B])
      for true, false in ((True, False), ("1", "0"), ("true", "false"), (1.0, 0.0))),
]  # fmt: skip

FORMS = [
    Case("alpaca without an input in any row", "pair-text/alpaca", [{"instruction": "q", "input": "", **SIDES}],
         [("q", "yes", "no")]),
    Case("alpaca with its system text", "pair-text/alpaca",
         [{"instruction": "Translate", "input": "cat", **SIDES, "system": "Be kind", "history": []}],
         [("system Be kind|user Translate\ncat", YES, NO)]),
    Case("alpaca of which only the instruction is wanted", "pair-text", [{"instruction": "q", "input": "x", **SIDES}],
         [("q", "yes", "no")], {"map": {"prompt": "instruction"}, "ignore_columns": ("input",)}),
    Case("a list of two outputs", "pair-text/output-list",
         [{"instruction": "q", "input": "more", "output": ["yes", "no"]}], [("q\nmore", "yes", "no")]),
    Case("ms-swift: a rejected response", "ms-swift/rejected-response",
         [{"messages": [SYSTEM, *chat("yes", "q")], "rejected_response": "no"}],
         [("system Be kind|user q", YES, NO)]),
    Case("ms-swift: a rejected response as messages", "ms-swift/rejected-response",
         [{"messages": chat("yes", "q"), "rejected_response": [bot("no")], "tools": "[]"}], [("user q", YES, NO)]),
    Case("ms-swift: rejected messages", "ms-swift/rejected-messages",
         [{"messages": chat("yes", "q"), "rejected_messages": chat("no", "q")}], [("user q", YES, NO)]),
    Case("ms-swift: query and response", "pair-text", [{"query": "q", "response": "yes", "rejected_response": "no"}],
         [("q", "yes", "no")]),
    Case("NeMo-RL", "ranked/ranked-completions",
         [{"context": [user("q")], "completions": [{"rank": 1, "completion": [bot("no")]},
                                                   {"rank": 0, "completion": [bot("yes")]}]}],
         [("user q", YES, NO)]),
    Case("NeMo-RL with strings and three ranks", "ranked/ranked-completions",
         [{"prompt": "q", "completions": [{"rank": rank, "completion": text}
                                          for rank, text in ((2, "no"), (1, "hm"), (0, "yes"))]}],
         [("user q", YES, NO)]),
    Case("NeMo-RL as JSON text", "ranked/ranked-completions",
         [{"context": json.dumps([user("q")]),
           "completions": json.dumps([{"rank": rank, "completion": [bot(text)]}
                                      for rank, text in ((1, "no"), (0, "yes"))])}],
         [("user q", YES, NO)]),
    Case("scored answers as JSON text", "ranked/lists",
         [{"question": "q", "responses": json.dumps(["no", "yes"]), "ratings": "[1, 5]"},
          {"question": "q", "responses": "no, yes", "ratings": "[1, 5]"}], [("q", "yes", "no"), "invalid_json"]),
    Case("completions as Python prints them", "ranked/completions",
         [{"instruction": "q", "completions": str([{"response": "no", "score": 1}, {"response": "yes", "score": 2}])}],
         [("q", "yes", "no")]),
    Case("ranked answers as JSON text", "ranked/answers",
         [{"prompt": "q", "answers": json.dumps([{"answer": "no", "rank": 2.0}, {"answer": "yes", "rank": 1.0}])}],
         [("q", "yes", "no")]),
    Case("answers that happen to be JSON", "pair-text",
         [{"prompt": "q", "chosen": "[1, 2]", "rejected": '{"a": "b"}'}], [("q", "[1, 2]", '{"a": "b"}')]),
    Case("names in another spelling", "pair-text",
         [{"Prompt": "q", " chosen": "yes", "REJECTED": "no", "System Prompt": "Be kind"}],
         [("system Be kind|user q", YES, NO)]),
    Case("rows of one prompt with a score, by --map", "ranked/two-rows",
         [{"prompt": "q", "completion": text, "reward": reward} for text, reward in (("no", 0.1), ("yes", 0.3))],
         [("user q", YES, NO)], {"map": {"response": "completion", "helpfulness": "reward"}}),
    Case("two prompt columns, joined by --map", "pair-text/alpaca", [{"prompt": "q", "query": "more", **SIDES}],
         [("q\nmore", "yes", "no")], {"map": {"instruction": "prompt", "input": "query"}}),
    Case("axolotl: messages and single messages", "messages-explicit/other-name",
         [{"messages": [user("q")], "chosen": bot("yes"), "rejected": bot("no")}], [("user q", YES, NO)]),
    Case("axolotl: messages and strings", "messages-explicit/other-name",
         [{"messages": [SYSTEM, user("q")], **SIDES}], [("system Be kind|user q", YES, NO)]),
    Case("messages that repeat the better conversation", "messages-full",
         [{"messages": chat("yes", "q"), "chosen": chat("yes", "q"), "rejected": chat("no", "q")}],
         [("user q", YES, NO)]),
    Case("messages before lists of answers alone", "messages-explicit/other-name",
         [{"messages": [user("q")], **MESSAGES}], [("user q", YES, NO)]),
    Case("torchtune", "messages-full",
         [{f"{side}_conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]
           for side, text in SIDES.items()}], [("user q", YES, NO)]),
    Case("JudgeBench", "ab-label/text",
         [{"pair_id": "p", "question": "q", "response_A": "a", "response_B": "b", "label": label}
          for label in ("A>B", "B>A")], [A, B]),
    Case("PPE", "ab-label/text",
         [{"prompt": "q", "response_1": "a", "response_2": "b", "winner": word} for word in ("model_a", "model_b")],
         [A, B]),
    Case("search arena", "ab-label/winner",
         [{"messages_a": chat("yes", "q"), "messages_b": chat("no", "q"), "winner": "model_a"}], [("user q", YES, NO)]),
    Case("compar:IA", "ab-label/chosen-model",
         [{"model_a_name": "x", "model_b_name": "y", "conversation_a": chat("no", "q"),
           "conversation_b": chat("yes", "q"), "chosen_model_name": name, "both_equal": equal}
          for name, equal in (("y", False), ("z", False), (None, True))],
         [("user q", YES, NO), "invalid_label", "tie"]),
    Case("an object with messages and tools for each side, as JSON text", "messages-full/objects",
         [{side: json.dumps({"messages": chat(text, "q"), "tools": []}) for side, text in SIDES.items()}] * 2,
         [("user q", YES, NO)] * 2),
    Case("messages as Python prints them", "messages-explicit",
         [{"prompt": str([user("it's q")]), **{side: str([bot(text)]) for side, text in SIDES.items()}}] * 2,
         [("user it's q", YES, NO)] * 2),
    Case("arena conversations as JSON text", "ab-label/winner",
         [{"winner": "model_a", "conversation_a": json.dumps(chat("yes", "q")),
           "conversation_b": json.dumps(chat("no", "q")),
           "full_conversation": json.dumps([{"user": user("q")}] * votes)} for votes in (1, 2)],
         [("user q", YES, NO), "context_mismatch"]),
    Case("compar:IA with system prompts", "ab-label/chosen-model",
         [{"model_a_name": "x", "model_b_name": "y", "conversation_a": chat("yes", "q"), "chosen_model_name": "x",
           "conversation_b": chat("no", "q"), "system_prompt_a": "Be kind", "system_prompt_b": text}
          for text in ("Be kind", "Be rude")], [("system Be kind|user q", YES, NO), "context_mismatch"]),
    Case("ms-swift alpaca with a rejected response", "pair-text/alpaca",
         [{"instruction": "q", "input": "", "output": "yes", "rejected_response": "no"}], [("q", "yes", "no")]),
    Case("OpenAI's form with strings", "openai",
         [{"input": {"messages": [user("q")]}, "preferred_output": "yes", "non_preferred_output": "no"}],
         [("user q", YES, NO)]),
    Case("a prompt string and single messages", "messages-full",
         [{"prompt": "q", "chosen": bot("yes"), "rejected": bot("no")}], [("user q", YES, NO)]),
    Case("RMB", "messages-explicit/answer-structs",
         [{"conversation_input": [user("q")], "chosen": {"answer": "yes"}, "reject": {"answer": "no"}}],
         [("user q", YES, NO)]),
    Case("UltraInteract", "messages-explicit/other-name",
         [{"trajectory": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"},
                          {"from": "user", "value": "go on"}], **SIDES}],
         [("user q|assistant a|user go on", YES, NO)]),
    Case("ShareGPT with string answers", "sharegpt",
         [{"conversations": [{"from": "human", "value": "q"}], **SIDES}], [("user q", YES, NO)]),
    Case("a prompt of one message", "messages-explicit", [{"prompt": user("q"), **SIDES}], [("user q", YES, NO)]),
    Case("stack exchange", "pair-text", [{"qid": 1, "question": "q", "response_j": "yes", "response_k": "no"}],
         [("q", "yes", "no")]),
    Case("accepted and rejected", "pair-text", [{"input": "q", "accepted": "yes", "rejected": "no"}],
         [("q", "yes", "no")]),
    Case("calls in a key of their own, without content", "messages-full",
         [{"chosen": [user("q"), {"role": "assistant", "content": None, "function_calls": "now()"}],
           "rejected": chat("no", "q")}], [("user q", "assistant None", NO)]),
    Case("two answers and an index, by --map", "better-id", [{**AB, "label": label} for label in (0, 1)], [A, B],
         {"map": {"response_0": "response_a", "response_1": "response_b", "better_response_id": "label"}}),
    Case("two answers and a 1 for the first, by --map", "ab-label/shp", [{**AB, "label": label} for label in (1, 0)],
         [A, B], {"map": {"history": "prompt", "human_ref_A": "response_a", "human_ref_B": "response_b",
                          "labels": "label"}}),
    Case("two answers, and sides that copy them", "pair-text",
         [{"prompt": "q", "response_1": "a", "response_2": "b", "chosen": "b", "rejected": "a"}], [B]),
    Case("two answers, and sides that name them, by --map", "ab-label/text",
         [{**AB, "chosen": word, "rejected": "-"} for word in ("A", "B")], [A, B], {"map": {"winner": "chosen"}}),
    Case("two answers and a winner in words, by --map", "ab-label/text",
         [{"ask": "q", "left": "a", "right": "b", "best": word} for word in ("A", "B")], [A, B],
         {"map": {"prompt": "ask", "response_a": "left", "response_b": "right", "winner": "best"}}),
    Case("system with whole conversations", "messages-full",
         [{"system": "Be kind", "chosen": chat("yes", "q"), "rejected": chat("no", "q")}],
         [("system Be kind|user q", YES, NO)]),
    Case("system as messages", "messages-explicit",
         [{"system": [{"role": "user", "content": "Be kind"}], "prompt": [user("q")], **MESSAGES}],
         [("system Be kind|user q", YES, NO)]),
    Case("system with scored lists", "ranked/lists",
         [{"system_prompt": "Be kind", "instruction": "q", "generations": ["no", "yes"], "ratings": [1, 5]}],
         [("system Be kind|user q", YES, NO)]),
    Case("system with best of n", "best-of-n",
         [{"system": "Be kind", "prompt": "q", "chosen": ["yes"], "rejected": ["no"]}],
         [("system Be kind|user q", YES, NO)]),
    Case("system with a winner, empty in one row", "ab-label/text",
         [{**AB, "winner": "A", "system": text} for text in ("Be kind", "")],
         [("system Be kind|user q", "assistant a", "assistant b"), ("user q", "assistant a", "assistant b")]),
    Case("system with transcripts", "hh-transcript",
         [{"system": "Be kind", **{side: f"\n\nHuman: q\n\nAssistant: {text}" for side, text in SIDES.items()}}],
         [("system Be kind|user q", YES, NO)]),
    Case("a system column that contradicts the conversation", "messages-full",
         [{"system": "Be rude", **{side: [SYSTEM, *chat(text, "q")] for side, text in SIDES.items()}},
          {"system": "Be kind", **{side: [SYSTEM, *chat(text, "q")] for side, text in SIDES.items()}}],
         ["context_mismatch", ("system Be kind|user q", YES, NO)]),
]  # fmt: skip

CASES = [*CONTEXT, *REPEATED, *LABELS, *FORMS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_set_is_read_as_it_was_meant(case: Case, tmp_path: Path) -> None:
    assert opened_and_read(case, tmp_path) == (case.format, list(case.expected))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "a prompt that is a list of strings": ({"prompt": ["q"], **SIDES}, {}, r"'prompt' looks like .* is list<text>"),
    "a prompt that is a number": ({"prompt": 5, **SIDES}, {}, "'prompt' looks like the prompt, but it is int"),
    "a text under a name that may be the prompt": ({"context": "q", **SIDES}, {}, "say --map prompt=context"),
    "two answers with nothing before them": (SIDES, {}, "there would be no prompt"),
    "a number that says which is better": (
        {**AB, "label": 1}, {}, "--map prompt=prompt,response_0=response_a,response_1=response_b,better_response_id=",
    ),
    "a map of a name that nothing reads": (
        {"prompt": "q", "better": "yes", **SIDES}, {"winner": "better"}, "--map winner=… is not read by pair-text",
    ),
    "a system text for token ids": (
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "system": "Be kind"}, {"system": "system"},
        "--map system=… is not read by ids",
    ),
    "sides that are no answers": (
        {"prompt": "q", "chosen": {"a": 1}, "rejected": {"a": 2}}, {}, "should be strings or messages"),
    "a side that names the better model": (
        {"prompt": "q", "completion_a": "x", "completion_b": "y", "chosen": "m", "rejected": "n"}, {},
        "holds neither of them"),
    "a side that names the better answer": (
        {**AB, "chosen": "A", "rejected": "B"}, {}, "holds neither of them.*winner=chosen"),
    "one column for both sides": (
        {"prompt": "q", **SIDES}, {"chosen": "chosen", "rejected": "chosen"}, "chosen is both chosen and rejected"),
    "messages under a name of their own": (
        {"context_messages": [user("q")], **SIDES}, {}, "'context_messages' looks like the prompt: say --map prompt="),
    "rows of one prompt with a score": (
        {"prompt": "q", "completion": "a", "reward": 1.5}, {}, "response=completion,helpfulness=reward"),
    "two prompts": ({"prompt": "q", "query": "more", **SIDES}, {}, "--map instruction=prompt,input=query to join them"),
    "KTO": ({"prompt": "q", "completion": "a", "label": True}, {}, "DPO needs pairs"),
    "KTO in LLaMA-Factory's words": (
        {"instruction": "q", "input": "", "output": "a", "kto_tag": True}, {}, "DPO needs pairs"),
    "KTO in ms-swift's words": ({"messages": chat("a", "q"), "label": False}, {}, "DPO needs pairs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_a_way_out(name: str, tmp_path: Path) -> None:
    row, map_, message = REFUSED[name]
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    with pytest.raises(DataError, match=message) as refused:
        open_datasets([DataSpec(name="set", path=str(tmp_path / "rows.jsonl"), map=map_)])
    assert not any(f"did you mean '{key}'" in str(refused.value) for key in map_)


def test_messages_stored_as_structs_of_lists_and_text_stored_as_bytes(tmp_path: Path) -> None:
    """`datasets.Sequence` of a struct, and what Spark and Hive write."""
    lists = pa.struct([("role", pa.list_(S)), ("content", pa.list_(S))])
    rows = [{"prompt": columnar([SYSTEM, user("q")]), "chosen": columnar([bot("yes")]), "rejected": "no"}]
    table = pa.Table.from_pylist(rows, schema=pa.schema([("prompt", lists), ("chosen", lists), ("rejected", S)]))
    assert [told(item) for item in read(tmp_path, table)] == [("system Be kind|user q", YES, NO)]
    scored = pa.struct([("response", pa.list_(S)), ("score", pa.list_(pa.float64()))])
    answers = [{"prompt": "q", "completions": {"response": ["no", "yes"], "score": [0.0, 1.0]}}]
    table = pa.Table.from_pylist(answers, schema=pa.schema([("prompt", S), ("completions", scored)]))
    assert [told(item) for item in read(tmp_path, table)] == [("q", "yes", "no")]
    binary = pa.table({n: pa.array([b"q\xc3\xa9", b"\xff"], pa.binary()) for n in ("prompt", "chosen", "rejected")})
    assert [told(item) for item in read(tmp_path, binary)] == [("qé", "qé", "qé"), "invalid_utf8"]
    message = pa.list_(pa.struct([("role", pa.binary()), ("content", pa.binary())]))
    bytes_ = [{side: [{k: v.encode() for k, v in turn.items()} for turn in chat(text, "q")]
               for side, text in SIDES.items()}]  # fmt: skip
    table = pa.Table.from_pylist(bytes_, schema=pa.schema([("chosen", message), ("rejected", message)]))
    assert [told(item) for item in read(tmp_path, table)] == [("user q", YES, NO)]


def test_scores_as_decimals(tmp_path: Path) -> None:
    amounts = pa.array([Decimal("1.00"), Decimal("2.00")], pa.decimal128(10, 2))
    table = pa.table({"question": ["q", "q"], "answer_0": ["a", "a"], "answer_1": ["b", "b"],
                      "score_0": amounts, "score_1": amounts.take(pa.array([1, 0]))})  # fmt: skip
    assert [told(item) for item in read(tmp_path, table)] == [B, A]


def test_null_types_do_not_hide_what_messages_hold(tmp_path: Path) -> None:
    """A key that is null in every row of one side has no type there."""
    typed = pa.list_(pa.struct([("role", S), ("content", S), ("num_tokens", pa.int32())]))
    rows = [{"winner": "model_a", "conversation_a": chat("yes", "q"), "conversation_b": [
        {**turn, "num_tokens": None} for turn in chat("no", "q")]}]  # fmt: skip
    schema = pa.schema([("winner", S), ("conversation_a", MSG), ("conversation_b", typed)])
    assert [told(item) for item in read(tmp_path, pa.Table.from_pylist(rows, schema=schema))] == [("user q", YES, NO)]
