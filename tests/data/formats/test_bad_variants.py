"""Bad variants of every format: a side gone, another type, a label gone, impossible or equal; each with its code.

Rows come as JSON lines, where any row may hold anything, after enough good ones for the schema to be settled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.schema import DataSpec, TextSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.formats.registry import FORMATS
from dpo_score.data.types import EncodedPair, Pair, Rejected
from dpo_score.tokenization.render import Renderer
from tests.data.formats import golden_rows as rows
from tests.data.formats.golden_rows import bot, chat, completions, nectar, user, vl_feedback
from tests.tiny import byte_tokenizer

Row = dict[str, Any]
Change = tuple[Row, str]
SETTLED = 20
ONE_HOT_NONE = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0}

GOOD: Mapping[str, Row] = {
    "ids": rows.IDS[0], "ids/labels": rows.LABELLED[0], "pair-text": rows.ORCA[0],
    "pair-text-implicit": {"chosen": "Sky? Blue.", "rejected": "Sky? Green."}, "hh-transcript": rows.HH[0],
    "messages-full": rows.full()[0], "messages-explicit": rows.EXPLICIT[0], "openai": rows.OPENAI[0],
    "signed-preference/helpsteer2": rows.HELPSTEER2[0], "signed-preference/helpsteer3": rows.HELPSTEER3[0],
    "better-id": rows.PKU_SINGLE[0], "ab-label/shp": rows.SHP[0], "ab-label/webgpt": rows.WEBGPT[0],
    "ab-label/one-hot": rows.ONE_HOT[0], "ab-label/winner": rows.ARENA[0], "ab-label/text": rows.AB_TEXT[0],
    "ranked/answers": rows.NECTAR[0], "ranked/completions": rows.ULTRAFEEDBACK[0], "ranked/lists": rows.LISTS[0],
    "best-of-n": rows.BEST_OF_N[0], "sharegpt": rows.SHAREGPT[0], "summary": rows.SUMMARY[0],
    "pair-text/repeated": rows.REPEATED[0], "pair-text/alpaca": rows.ALPACA[0], "pair-text/output-list":
    rows.OUTPUTS[0], "pair-text/steps": rows.STEPS[0], "messages-explicit/other-name": rows.TRAJECTORY[0],
    "messages-explicit/answer-structs": rows.RMB[0], "ms-swift/rejected-response": rows.SWIFT[0],
    "ms-swift/rejected-messages": rows.SWIFT_LISTS[0], "ab-label/chosen-model": rows.COMPARIA[0],
    "ranked/aspects": rows.VL_FEEDBACK[0], "ranked/human-ranking": rows.VL_REWARD_BENCH[0],
    "ab-label/multimodal-rewardbench": rows.MULTIMODAL[0],
    "ranked/ranked-completions": rows.NEMO[0], "best-of-n/losers": rows.RMB_LOSERS[0],
    "messages-full/objects": rows.OBJECTS[0],
    "ab-label/alpaca-farm": rows.ALPACA_FARM[0],
}  # fmt: skip

BAD: Mapping[str, list[Change]] = {
    "ids": [({"chosen_ids": None}, "null_field"), ({"chosen_ids": "3 4"}, "wrong_type"),
            ({"rejected_ids": [-5]}, "invalid_ids"), ({"rejected_ids": []}, "no_completion_tokens")],
    "ids/labels": [({"chosen_labels": None}, "null_field"), ({"chosen_labels": [-100] * 4}, "no_completion_tokens"),
                   ({"rejected_labels": [-100, -100, 6]}, "invalid_ids"), ({"chosen_input_ids": 3}, "wrong_type")],
    "pair-text": [({"rejected": None}, "null_field"), ({"chosen": 7}, "wrong_type"),
                  ({"question": [user("q")]}, "wrong_type"), ({"chosen": ""}, "empty_answer"),
                  ({"chosen": "same", "rejected": "same"}, "identical_pair")],
    "pair-text-implicit": [({"chosen": None}, "null_field"), ({"rejected": {"a": 1}}, "wrong_type")],
    "hh-transcript": [({"chosen": None}, "null_field"), ({"rejected": "no markers"}, "not_hh_transcript"),
                      ({"rejected": 5}, "wrong_type"),
                      ({"chosen": "\n\nHuman: other?\n\nAssistant: x"}, "context_mismatch")],
    "messages-full": [({"chosen": None}, "null_field"), ({"rejected": [user("q")]}, "not_assistant_last"),
                      ({"chosen": chat("Paris.", "another question")}, "context_mismatch"),
                      ({"chosen": [bot("a")], "rejected": [bot("b")], "prompt": None}, "bad_role_order"),
                      ({"rejected": 5}, "wrong_type")],
    "messages-explicit": [({"prompt": []}, "null_field"), ({"prompt": [user("q"), bot("a")]}, "bad_role_order"),
                          ({"chosen": [bot("a"), user("b")]}, "not_assistant_last"), ({"rejected": 5}, "wrong_type")],
    "openai": [({"input": None}, "null_field"), ({"preferred_output": []}, "null_field"),
               ({"non_preferred_output": [user("x")]}, "not_assistant_last"), ({"input": "text"}, "wrong_type")],
    "signed-preference/helpsteer2": [
        ({"preference_strength": None}, "null_field"), ({"preference_strength": 4}, "invalid_label"),
        ({"preference_strength": "much"}, "invalid_label"), ({"preference_strength": 0}, "tie"),
        ({"response_2": 7}, "wrong_type")],
    "signed-preference/helpsteer3": [
        ({"overall_preference": None}, "null_field"), ({"overall_preference": -4}, "invalid_label"),
        ({"overall_preference": 0}, "tie"), ({"context": []}, "null_field"), ({"response1": ["a"]}, "wrong_type")],
    "better-id": [({"better_response_id": None}, "null_field"), ({"better_response_id": 2}, "invalid_label"),
                  ({"response_0": None}, "null_field"), ({"response_1": 3}, "wrong_type")],
    "ab-label/shp": [({"labels": None}, "null_field"), ({"labels": 0.5}, "invalid_label"),
                     ({"history": 1}, "wrong_type")],
    "ab-label/webgpt": [({"score_0": None}, "null_field"), ({"score_1": "N/A"}, "invalid_label"),
                        ({"score_0": 0.5, "score_1": 0.5}, "tie"), ({"question": {}}, "null_field"),
                        ({"answer_1": 2}, "wrong_type")],
    "ab-label/one-hot": [({"winner_model_a": None}, "null_field"), (ONE_HOT_NONE, "invalid_label"),
                         ({"winner_model_a": 1, "winner_model_b": 1}, "invalid_label"),
                         ({"winner_model_a": 0, "winner_tie": 1}, "tie"), ({"response_a": "[1"}, "invalid_json"),
                         ({"response_a": '["a", "b"]'}, "context_mismatch"), ({"prompt": 5}, "wrong_type")],
    "ab-label/winner": [({"winner": None}, "null_field"), ({"winner": "model_c"}, "invalid_label"),
                        ({"winner": "tie"}, "tie"), ({"conversation_a": chat("x", "other")}, "context_mismatch"),
                        ({"conversation_b": [user("q")]}, "not_assistant_last"), ({"winner": 1}, "wrong_type")],
    "ab-label/text": [({"winner": None}, "null_field"), ({"winner": ""}, "invalid_label"), ({"winner": "tie"}, "tie"),
                      ({"response_a": {}}, "wrong_type")],
    "ranked/answers": [({"answers": None}, "null_field"), ({"answers": nectar(("one", 1))}, "null_field"),
                       ({"answers": [{"answer": "a", "rank": None}, {"answer": "b", "rank": 1}]}, "null_field"),
                       ({"answers": [{"answer": "a", "rank": "x"}, {"answer": "b", "rank": 1}]}, "invalid_label"),
                       ({"answers": nectar(("a", 1), ("b", 1))}, "tie"), ({"answers": "text"}, "wrong_type")],
    "ranked/completions": [({"completions": []}, "null_field"), ({"completions": completions(("a", 1))}, "null_field"),
                           ({"completions": [{"response": "a"}, {"response": "b"}]}, "null_field"),
                           ({"completions": completions(("a", 2), ("b", 2))}, "tie"),
                           ({"completions": completions((5, 2), ("b", 1))}, "wrong_type")],  # type: ignore[arg-type]
    "ranked/aspects": [({"completions": []}, "null_field"), ({"completions": "text"}, "wrong_type"),
                       ({"completions": vl_feedback(("a", 1, 2), ("b", None, 3))}, "null_field"),
                       ({"completions": vl_feedback(("a", 1, 2), ("b", "N/A", 3))}, "invalid_label"),
                       ({"completions": vl_feedback(("a", 1, 2), ("b", 2, 1))}, "tie")],
    "ranked/human-ranking": [({"human_ranking": [1]}, "invalid_label"), ({"human_ranking": None}, "null_field"),
                             ({"human_ranking": [1, 1]}, "tie"), ({"response": ["a", 2]}, "wrong_type")],
    "ab-label/multimodal-rewardbench": [({"Better": None}, "null_field"), ({"Better": "both"}, "invalid_label"),
                                        ({"Output1": 5}, "wrong_type")],
    "ranked/lists": [({"scores": [1.0]}, "invalid_label"), ({"scores": None}, "null_field"),
                     ({"scores": [1.0, None, 2.0]}, "null_field"), ({"scores": [1.0, "x", 2.0]}, "invalid_label"),
                     ({"scores": [1.0, 1.0, 1.0]}, "tie"), ({"responses": ["a", 2, "c"]}, "wrong_type")],
    "best-of-n": [({"chosen": []}, "null_field"), ({"rejected": None}, "null_field"), ({"chosen": [1]}, "wrong_type")],
    "sharegpt": [({"conversations": []}, "null_field"), ({"chosen": None}, "null_field"),
                 ({"rejected": {"from": "human", "value": "x"}}, "not_assistant_last"),
                 ({"conversations": "text"}, "wrong_type")],
    "summary": [({"choice": None}, "null_field"), ({"choice": 2}, "invalid_label"),
                ({"info": {"id": "i"}}, "null_field"), ({"summaries": [{"text": "one"}]}, "wrong_type")],
    "pair-text/repeated": [({"prompt": None}, "null_field"), ({"chosen": ["a"]}, "wrong_type")],
    "pair-text/alpaca": [({"instruction": None}, "null_field"), ({"input": 5}, "wrong_type"),
                         ({"history": [["one"]]}, "wrong_type"), ({"history": [["q", None]]}, "null_field")],
    "pair-text/output-list": [({"output": None}, "null_field"), ({"output": ["one"]}, "wrong_type"),
                              ({"output": ["a", "b", "c"]}, "wrong_type"), ({"output": ["a", 2]}, "wrong_type")],
    "pair-text/steps": [({"chosen": None}, "null_field"), ({"initial_reason_steps": 1}, "wrong_type")],
    "messages-explicit/other-name": [({"trajectory": []}, "null_field"), ({"chosen": None}, "null_field"),
                                     ({"trajectory": "text"}, "wrong_type")],
    "messages-explicit/answer-structs": [({"chosen": {"answer": None}}, "null_field"),
                                         ({"reject": {"answer": 3}}, "wrong_type")],
    "ms-swift/rejected-response": [({"rejected_response": None}, "null_field"),
                                   ({"messages": [user("q")]}, "not_assistant_last"), ({"messages": 1}, "wrong_type")],
    "ms-swift/rejected-messages": [({"rejected_messages": None}, "null_field"),
                                   ({"rejected_messages": chat("b", "other")}, "context_mismatch"),
                                   ({"messages": 7}, "wrong_type")],
    "ab-label/chosen-model": [({"chosen_model_name": None}, "null_field"),
                              ({"chosen_model_name": "z"}, "invalid_label"),
                              ({"model_b_name": "m"}, "invalid_label"), ({"both_equal": True}, "tie"),
                              ({"conversation_b": [user("q")]}, "not_assistant_last"),
                              ({"conversation_a": 1}, "wrong_type")],
    "ab-label/alpaca-farm": [({"preference": None}, "null_field"), ({"preference": 0}, "invalid_label"),
                             ({"preference": 1.5}, "invalid_label"), ({"output_1": 3}, "wrong_type")],
    "messages-full/objects": [({"chosen": None}, "null_field"), ({"rejected": 5}, "wrong_type"),
                              ({"chosen": {"messages": [user("q")]}}, "not_assistant_last")],
    "best-of-n/losers": [({"loser_list": []}, "null_field"), ({"bon_best": {"answer": None}}, "null_field"),
                         ({"loser_list": [{"answer": 3}]}, "wrong_type")],
    "ranked/ranked-completions": [({"completions": None}, "null_field"), ({"completions": rows.NEMO[2]["completions"]},
                                   "tie"), ({"context": []}, "null_field"), ({"completions": [
                                      {"rank": "x", "completion": [bot("a")]}, {"rank": 1, "completion": [bot("b")]},
                                  ]}, "invalid_label"),
                                  ({"completions": "x"}, "wrong_type")],
}  # fmt: skip
VARIANTS = [(name, change, code) for name, changes in BAD.items() for change, code in changes]
MARKS = ("empty_answer", "identical_pair")
"""Found on rows that are scored all the same."""
UNLABELLED = {"pair-text", "pair-text-implicit", "hh-transcript", "messages-full", "messages-explicit", "openai", "ids"}
UNLABELLED |= {
    "ids/labels",
    "best-of-n",
    "best-of-n/losers",
    "sharegpt",
    "ms-swift/rejected-response",
    "ms-swift/rejected-messages",
}
UNLABELLED |= {name for name in BAD if name.startswith(("pair-text/", "messages-explicit/", "messages-full/"))}


def found(folder: Path, good: Row, bad: Row, name: str) -> str:
    """The reject code of the bad row, or a mark of MARKS; "scored" where it has neither."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*[good] * SETTLED, bad])))
    datasets = open_datasets([DataSpec(name="set", path=str(path), format=name)])
    items = list(read_pairs(datasets, 0, datasets[0].rows))
    return [outcome(item) for item in items][-1]


def outcome(item: Pair | Rejected) -> str:
    result = Renderer(byte_tokenizer(), TextSpec()).encode([item])[0] if isinstance(item, Pair) else item
    if isinstance(result, EncodedPair):
        return next((mark for mark in MARKS if mark in result.marks), "scored")
    return result.code


@pytest.mark.parametrize(("name", "change", "code"), VARIANTS, ids=lambda value: str(value)[:40])
def test_a_bad_variant_has_its_code(name: str, change: Row, code: str, tmp_path: Path) -> None:
    assert found(tmp_path, GOOD[name], {**GOOD[name], **change}, name) == code


@pytest.mark.parametrize("name", GOOD)
def test_the_rows_they_are_made_from_are_good(name: str, tmp_path: Path) -> None:
    assert found(tmp_path, GOOD[name], GOOD[name], name) == "scored"


TWO: list[tuple[Row, Row, str]] = [
    ({}, {"helpfulness": None}, "null_field"),
    ({}, {"helpfulness": "x"}, "invalid_label"),
    ({}, {"helpfulness": 4}, "tie"),
    ({}, {"prompt": "another"}, "context_mismatch"),
    ({"response": 7}, {}, "wrong_type"),
]


@pytest.mark.parametrize(("first", "second", "code"), TWO)
def test_two_rows_for_one_prompt(first: Row, second: Row, code: str, tmp_path: Path) -> None:
    good = rows.TWO_ROWS[:2]
    settled = [{**row, "prompt": f"q{number}"} for number in range(SETTLED) for row in good]
    lines = [*settled, {**good[0], **first}, {**good[1], **second}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    datasets = open_datasets([DataSpec(name="set", path=str(tmp_path / "rows.jsonl"), format="ranked/two-rows")])
    assert outcome(list(read_pairs(datasets, 0, datasets[0].rows))[-1]) == code


def test_every_format_has_its_bad_variants_and_every_label_one_that_is_gone() -> None:
    assert GOOD.keys() == BAD.keys() == {row.full_name for row in FORMATS} - {"ranked/two-rows"}
    for name in BAD.keys() - UNLABELLED:
        codes = [code for _, code in BAD[name]]
        assert "null_field" in codes
        assert {"invalid_label", "tie"} & set(codes)
    for name, changes in BAD.items():
        assert {code for _, code in changes} & {"wrong_type", "invalid_ids"}, name
