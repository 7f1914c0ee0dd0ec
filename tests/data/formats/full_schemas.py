"""The whole Arrow schemas of public data sets, with every column that they carry, where golden.py keeps fewer.

`better` says by hand which side the labels prefer. `rows` fill the columns that matter; the others are null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from tests.data.formats.golden import GOLDEN
from tests.data.formats.golden_rows import (
    ARENA,
    ARGILLA,
    BEST_OF_N,
    DISTILABEL,
    GOOD,
    HELPSTEER2,
    HELPSTEER3,
    INFO,
    MSG,
    NECTAR,
    ONE_HOT,
    OPENAI,
    PKU,
    QUOTES,
    SHAREGPT,
    SHP,
    SUMMARY,
    THREE,
    TIE3,
    TURN,
    ULTRAFEEDBACK,
    WEBGPT,
    WINNERS,
    F,
    N,
    S,
    full,
    relabelled,
    swapped,
    texts,
)

B, I32, L = pa.bool_(), pa.int32(), pa.list_
TEXTS = L(S)


def struct(**fields: pa.DataType) -> pa.DataType:
    return pa.struct(list(fields.items()))


def each(type_: pa.DataType, *names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names, type_)


@dataclass(frozen=True)
class Full:
    dataset: str
    format: str
    better: str
    columns: Mapping[str, pa.DataType]
    rows: Sequence[Mapping[str, Any]]
    expected: Sequence[tuple[str, str] | str]
    options: Mapping[str, Any] = field(default_factory=dict)

    def table(self, flipped: bool = False) -> pa.Table:
        rows = flipped_rows(self) if flipped else self.rows
        return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(dict(self.columns)))


CHOSEN = "chosen is better than rejected"
MESSAGES = {"chosen": MSG, "rejected": MSG}
PARTS = L(struct(type=S, text=S, image=S, mimeType=S))
TYPED = L(struct(role=S, content=PARTS))
ASKED = {"user": struct(role=S, content=PARTS), "model_side_a": struct(role=S, content=S)}
COMPLETION = L(
    pa.struct(
        [
            ("annotations", struct(helpfulness=struct(Rating=S, Rationale=S))),
            *((name, S) for name in ("custom_system_prompt", "model", "principle", "response", "critique")),
            ("fine-grained_score", F),
            ("overall_score", F),
        ]
    )
)
METADATA = {
    **each(S, "category", "correct", "label", "method", "prompt_norm", "subcategory"),
    **each(TEXTS, "instruction_id_list", "models"),
    **each(F, "index", "valid"),
}
TOKENS = struct(prefix=L(N), completion=L(N))


def typed(conversation: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in conversation]


def with_typed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, **{f"conversation_{s}": typed(row[f"conversation_{s}"]) for s in "ab"}} for row in rows]


ARENA_140K = with_typed(ARENA)
TRUTHY = texts(system="Be brief.")
FLIPPED = {
    "lmarena-ai/arena-human-preference-140k": with_typed(relabelled(ARENA, winner=WINNERS)),
    "jondurbin/truthy-dpo-v0.1": swapped(TRUTHY),
    "PKU-Alignment/PKU-SafeRLHF": relabelled(PKU, better_response_id={0: 1, 1: 0}),
}


def flipped_rows(of: Full) -> Sequence[Mapping[str, Any]]:
    """With their label turned round by hand: here, or where golden.py has the same rows."""
    same = (golden.flipped for golden in GOLDEN if (golden.rows, golden.expected) == (of.rows, of.expected))
    return FLIPPED.get(of.dataset) or next(same)


FULL = [
    Full("HuggingFaceH4/orca_dpo_pairs", "messages-full", CHOSEN, {**MESSAGES, "prompt": S}, full(), THREE),
    Full("argilla/distilabel-intel-orca-dpo-pairs", "pair-text", CHOSEN, {
        **each(S, "system", "input", "chosen", "rejected"), "generations": TEXTS, "order": TEXTS, "labelling_model": S,
        "labelling_prompt": MSG, "raw_labelling_response": S, "rating": L(F), "rationale": S, "status": S,
        "original_chosen": S, "original_rejected": S, "chosen_score": F, "in_gsm8k_train": B,
    }, DISTILABEL, THREE),
    Full("argilla/ultrafeedback-binarized-preferences", "pair-text", CHOSEN, {
        **each(S, "source", "instruction", "chosen_response", "rejected_response"),
        **each(F, "chosen_avg_rating", "rejected_avg_rating"), "chosen_model": S,
    }, ARGILLA, THREE),
    Full("allenai/reward-bench-2", "best-of-n", "every answer in chosen is better than every answer in rejected", {
        "id": S, "prompt": S, "chosen": TEXTS, "rejected": TEXTS, "num_correct": N, "num_incorrect": N,
        "total_completions": N, "models": TEXTS, "subset": S, "additional_metadata": struct(**METADATA),
    }, BEST_OF_N, [(GOOD, "London."), (GOOD, "Rome."), ("4", "5"), ("Blue.", "Green."), ("Azure.", "Green.")]),
    Full("allenai/llama-3.1-tulu-3-8b-preference-mixture", "messages-full", CHOSEN,
         {**each(S, "id", "source", "prompt"), **MESSAGES}, full(), THREE),
    Full("nvidia/HelpSteer2 preference", "signed-preference/helpsteer2",
         "a negative preference_strength means response_1 is better, a positive one response_2; 0 is a tie", {
        **each(S, "split", "prompt", "response_1", "response_2"), "preference_strength": N,
        **each(S, "preference_statement", "preference_elaboration"),
    }, HELPSTEER2, [*TIE3, ("Blue.", "Green.")]),
    Full("nvidia/HelpSteer3 preference", "signed-preference/helpsteer3",
         "a negative overall_preference means response1 is better, a positive one response2; 0 is a tie", {
        "domain": S, "language": S, "context": MSG, "response1": S, "response2": S, "overall_preference": N,
        "individual_preference": L(struct(score=N, reasoning=S, feedback1=S, feedback2=S)),
    }, HELPSTEER3, TIE3),
    Full("PKU-Alignment/PKU-SafeRLHF", "better-id",
         "the response that better_response_id (or, as --preference says, safer_response_id) numbers is better", {
        **each(S, "prompt", "response_0", "response_1", "prompt_source", "response_0_source", "response_1_source"),
        **each(B, "is_response_0_safe", "is_response_1_safe"),
        **each(struct(Cybercrime=B, Violence=B), "response_0_harm_category", "response_1_harm_category"),
        **each(N, "response_0_severity_level", "response_1_severity_level", "better_response_id", "safer_response_id"),
        **each(S, "response_0_sha256", "response_1_sha256"),
    }, PKU, THREE, {"preference": "better"}),
    Full("stanfordnlp/SHP", "ab-label/shp", "labels 1 means human_ref_A is better, 0 means human_ref_B is", {
        "post_id": S, "domain": S, "upvote_ratio": F, "history": S, **each(S, "c_root_id_A", "c_root_id_B"),
        **each(N, "created_at_utc_A", "created_at_utc_B", "score_A", "score_B"),
        **each(S, "human_ref_A", "human_ref_B"), "labels": N, "seconds_difference": F, "score_ratio": F,
    }, SHP, THREE),
    Full("openai/webgpt_comparisons", "ab-label/webgpt",
         "the answer with the higher score is better, equal scores are a tie; quotes are not part of the prompt", {
        "question": struct(dataset=S, id=S, full_text=S), "quotes_0": QUOTES, "answer_0": S, "tokens_0": TOKENS,
        "score_0": F, "quotes_1": QUOTES, "answer_1": S, "tokens_1": TOKENS, "score_1": F,
    }, WEBGPT, TIE3),
    Full("openai/summarize_from_feedback", "summary", "choice numbers the better of the two summaries", {
        "info": INFO, "summaries": L(struct(text=S, policy=S, note=S)), "choice": I32,
        **each(S, "worker", "batch", "split"), "extra": struct(confidence=I32),
    }, SUMMARY, [("short and true", "short and false"), ("right", "wrong"), ("rain came", "sun came")]),
    Full("lmarena-ai/arena-human-preference-55k", "ab-label/one-hot",
         "the winner column that is 1 names the better response", {
        "id": N, **each(S, "model_a", "model_b", "prompt", "response_a", "response_b"),
        **each(N, "winner_model_a", "winner_model_b", "winner_tie"),
    }, ONE_HOT, [*TIE3, "context_mismatch"]),
    Full("lmarena-ai/arena-human-preference-100k", "ab-label/winner", "winner names the better conversation", {
        **each(S, "question_id", "model_a", "model_b", "winner"), **each(MSG, "conversation_a", "conversation_b"),
        "turn": N, "anony": B, "language": S,
    }, ARENA, [*TIE3, "context_mismatch"]),
    Full("lmarena-ai/arena-human-preference-140k", "ab-label/winner", "winner names the better conversation", {
        **each(S, "id", "model_a", "model_b", "winner", "evaluation_session_id"), "evaluation_order": N,
        **each(TYPED, "conversation_a", "conversation_b"),
        "full_conversation": L(struct(**ASKED, model_side_b=struct(role=S, content=S))), "language": S, "is_code": B,
    }, ARENA_140K, [*TIE3, "context_mismatch"]),
    Full("openbmb/UltraFeedback", "ranked/completions",
         "the completion with the higher fine-grained_score (else overall_score, score, rating) is better", {
        "source": S, "instruction": S, "models": TEXTS, "completions": COMPLETION,
        **each(TEXTS, "correct_answers", "incorrect_answers"),
    }, ULTRAFEEDBACK, TIE3),
    Full("berkeley-nest/Nectar", "ranked/answers", "the answer with the lower rank is better: rank 1 is the best", {
        "prompt": S, "answers": L(struct(answer=S, model=S, rank=F)), "turns": N, "num_responses": N, "source": TEXTS,
        "good_natured": B,
    }, NECTAR, TIE3),
    Full("mlabonne/orpo-dpo-mix-40k", "messages-full", CHOSEN,
         {"source": S, **MESSAGES, "prompt": S, "question": S}, full(question="?"), THREE),
    Full("argilla/dpo-mix-7k", "messages-full", CHOSEN,
         {"dataset": S, "chosen": MSG, "chosen_rating": F, "rejected": MSG, "rejected_rating": F}, full(), THREE),
    Full("argilla/distilabel-capybara-dpo-7k-binarized", "messages-full", CHOSEN, {
        "source": S, "conversation": L(struct(input=S, output=S)), "original_response": S,
        **each(TEXTS, "generation_prompt", "raw_generation_responses", "new_generations"), "prompt": S, **MESSAGES,
        **each(N, "rating_chosen", "rating_rejected"), **each(S, "chosen_model", "rejected_model"),
    }, full(), THREE),
    Full("jondurbin/truthy-dpo-v0.1", "pair-text", CHOSEN,
         each(S, "id", "source", "system", "prompt", "chosen", "rejected"), TRUTHY, THREE),
    Full("snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset", "messages-full", CHOSEN,
         {"prompt_id": S, "prompt": S, **MESSAGES, "all_generated_responses": TEXTS, "all_rm_scores": L(F)},
         full(), THREE),
    Full("llamafactory/DPO-En-Zh-20k", "sharegpt", CHOSEN,
         {"conversations": L(TURN), "chosen": TURN, "rejected": TURN}, SHAREGPT, THREE),
    Full("OpenAI preference file", "openai", "preferred_output is better than non_preferred_output", {
        "input": struct(messages=MSG, tools=L(struct(type=S)), parallel_tool_calls=B),
        "preferred_output": MSG, "non_preferred_output": MSG,
    }, OPENAI, THREE),
]  # fmt: skip
