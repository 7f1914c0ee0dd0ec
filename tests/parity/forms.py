"""Every row of `dpo-score formats` as a form to write pairs in: converter, container, options, what it must equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.parity import conversions as of
from tests.parity.conversions import MIDDLING, Row, Written, listed, strings

CHAT = {"render": "chat"}


@dataclass(frozen=True)
class Form:
    """`format`: its full name in `dpo-score formats`. `twin`: the form whose numbers it must give."""

    name: str
    format: str
    convert: Callable[[Row, int], Written]
    options: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Sequence[Row], Path], Path] = lambda rows, folder: parquet(rows, folder)
    twin: str = "messages-explicit"


@dataclass(frozen=True)
class Conversion:
    """A form's file, and the numbers of the pairs that are in it, in order."""

    form: Form
    path: Path
    carried: tuple[int, ...]


def conversion(form: Form, pairs: Sequence[Row], folder: Path) -> Conversion:
    written = [(number, form.convert(pair, number)) for number, pair in enumerate(pairs)]
    carried = tuple(number for number, rows in written if rows is not None)
    folder.mkdir(parents=True, exist_ok=True)
    return Conversion(form, form.write([row for _, rows in written for row in rows or ()], folder), carried)


# --- containers -------------------------------------------------------------------------------------------------------


def parquet(rows: Sequence[Row], folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def json_lines(rows: Sequence[Row], folder: Path) -> Path:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "pairs.jsonl"


def json_strings(rows: Sequence[Row], folder: Path) -> Path:
    return parquet([{name: json.dumps(value) for name, value in row.items()} for row in rows], folder)


def json_columns(rows: Sequence[Row], folder: Path) -> Path:
    """As `datasets.Json()` columns are stored: Arrow's JSON extension type."""
    texts = {name: [json.dumps(row[name]) for row in rows] for name in rows[0]}
    pq.write_table(
        pa.table({name: pa.array(text, pa.json_()) for name, text in texts.items()}), folder / "pairs.parquet"
    )
    return folder / "pairs.parquet"


def wide_types(rows: Sequence[Row], folder: Path) -> Path:
    """Lists and strings with 64-bit offsets, as polars writes them."""
    text = pa.large_string()
    messages = pa.large_list(pa.struct([("role", text), ("content", text)]))
    schema = pa.schema([(name, messages if isinstance(rows[0][name], list) else text) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), folder / "pairs.parquet")
    return folder / "pairs.parquet"


FORMS = (
    Form("messages-explicit", "messages-explicit", of.explicit),
    Form("an answer as one message", "messages-explicit", of.one_message),
    Form("an answer as a string", "messages-explicit", of.answer_strings),
    Form("JSON lines", "messages-explicit", of.explicit, write=json_lines),
    Form("JSON strings", "messages-explicit", of.explicit, write=json_strings),
    Form("Json() columns", "messages-explicit", of.explicit, write=json_columns),
    Form("large lists and strings", "messages-explicit", of.explicit, write=wide_types),
    Form("messages-full", "messages-full", of.full),
    Form("messages-full in Json() columns", "messages-full", of.full, write=json_columns),
    Form("UltraFeedback, binarized", "messages-full", of.ultrafeedback),
    Form("objects", "messages-full/objects", of.objects),
    Form("openai", "openai", of.openai),
    Form("sharegpt", "sharegpt", of.sharegpt),
    Form("pair-text", "pair-text", of.pair_text, CHAT),
    Form("pair-text with a system column", "pair-text", of.with_system),
    Form("pair-text-implicit", "pair-text-implicit", of.two_texts, CHAT),
    Form("hh-transcript", "hh-transcript", of.transcript, CHAT),
    Form("both sides repeat the prompt", "pair-text/repeated", of.repeated, CHAT),
    Form("alpaca", "pair-text/alpaca", of.alpaca),
    Form("output list", "pair-text/output-list", of.output_list, CHAT),
    Form("Step-DPO", "pair-text/steps", of.steps, CHAT),
    Form("messages under another name", "messages-explicit/other-name", of.other_name),
    Form("RMB", "messages-explicit/answer-structs", of.answer_structs),
    Form("ms-swift response", "ms-swift/rejected-response", of.swift_response),
    Form("ms-swift messages", "ms-swift/rejected-messages", of.swift_messages),
    Form("RMB, best of n", "best-of-n/losers", of.losers),
    Form("AlpacaFarm", "ab-label/alpaca-farm",
         strings(("output_1", "output_2"), lambda first: {"preference": 1 if first else 2}, "instruction"), CHAT),
    Form("compar:IA", "ab-label/chosen-model", of.chosen_model),
    Form("NeMo-RL", "ranked/ranked-completions", of.ranked_completions),
    Form("HelpSteer2 preference", "signed-preference/helpsteer2", of.helpsteer2),
    Form("HelpSteer3", "signed-preference/helpsteer3", of.helpsteer3),
    Form("PKU-SafeRLHF, better", "better-id",
         strings(("response_0", "response_1"), lambda first: {"better_response_id": int(not first)}), CHAT),
    Form("PKU-SafeRLHF, safer", "better-id",
         strings(("response_0", "response_1"),
                 lambda first: {"better_response_id": int(first), "safer_response_id": int(not first)}),
         {**CHAT, "preference": "safer"}),
    Form("SHP", "ab-label/shp",
         strings(("human_ref_A", "human_ref_B"), lambda first: {"labels": int(first)}, "history"), CHAT),
    Form("WebGPT", "ab-label/webgpt",
         strings(("answer_0", "answer_1"), lambda first: dict(zip(("score_0", "score_1"), (0.5, -0.5) if first
                                                                  else (-1.0, 1.0), strict=True)), "question"), CHAT),
    Form("Arena, one-hot", "ab-label/one-hot", of.one_hot),
    Form("Arena, winner", "ab-label/winner", of.winner),
    Form("two answers and a winner", "ab-label/text",
         strings(("response_a", "response_b"), lambda first: {"winner": "model_a" if first else "model_b"}), CHAT),
    Form("Nectar", "ranked/answers", listed(of.nectar), CHAT),
    Form("UltraFeedback", "ranked/completions", listed(of.completions, "instruction"), CHAT),
    Form("scored lists", "ranked/lists",
         listed(lambda c, r: {"responses": [MIDDLING, c, r], "scores": [0.5, 0.9, 0.1]}), CHAT),
    Form("VL-RewardBench, no picture", "ranked/human-ranking",
         listed(lambda c, r: {"response": [MIDDLING, c, r], "human_ranking": [1, 0, 2]}, "query"), CHAT),
    Form("VLFeedback, no picture", "ranked/aspects", listed(of.rated_aspects), CHAT),
    Form("Multimodal RewardBench, no picture", "ab-label/multimodal-rewardbench",
         strings(("Output1", "Output2"), lambda first: {"Better": "Output1" if first else "Output2"}, "Text"), CHAT),
    Form("HelpSteer2", "ranked/two-rows", of.two_rows),
    Form("best-of-n", "best-of-n", listed(lambda c, r: {"chosen": [c], "rejected": [r]}), CHAT),
    Form("pair-text of summaries", "pair-text", of.summary_text, CHAT, twin="pair-text of summaries"),
    Form("summarize_from_feedback", "summary", of.summary, CHAT, twin="pair-text of summaries"),
)  # fmt: skip
"""The first is what all others are held against, but for summaries, whose prompt the format words itself."""


def token_forms(ids: Sequence[Row]) -> tuple[Form, Form]:
    """The two forms of token ids. `ids`: prompt_ids, chosen_ids and rejected_ids of every pair, as `precompute
    --emit-ids` writes them."""

    def lists(pair: Row, number: int) -> Written:
        return [dict(ids[number])]

    def labelled(pair: Row, number: int) -> Written:
        prompt, row = ids[number]["prompt_ids"], {}
        for side in ("chosen", "rejected"):
            answer = ids[number][f"{side}_ids"]
            row |= {f"{side}_input_ids": prompt + answer, f"{side}_labels": [-100] * len(prompt) + answer}
        return [row]

    return Form("token ids", "ids", lists), Form("token ids with labels", "ids/labels", labelled)
