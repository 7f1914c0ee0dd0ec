"""Train with TRL on reference log-probabilities that were computed before, and only on those that belong.

    from load_ref_logps import DPOTrainerWithRefLogps, load

    data = load()                                       # the splits that lie beside this file
    DPOTrainerWithRefLogps(model, args=DPOConfig(...), train_dataset=data["train"]).train()

Needs trl and datasets alone. Promises: no reference model is loaded; before the first step it is refused to train when
max_length, truncation, ld_alpha, tokenizer or chat template (with its date) are not those of `dpo_score.json`, or when
the token ids that TRL makes of any row, after its own cut, are not the ones that were scored. A model that starts with
the reference's weights must begin with rewards of zero, up to rounding. Does not: check `beta` or the loss, which no
reference value depends on; accept streamed data sets.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).parent
CONTRACT = "dpo_score.json"
VALUES = ("ref_chosen_logps", "ref_rejected_logps")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
NEEDED = ("chosen", "rejected", *VALUES, "pair_digest", "row_id")
HALF_NOISE, FLOAT32_NOISE = 0.05, 1e-4
"""Nats by which 16-bit and float32 arithmetic may move a token's log-probability, on average over an answer."""
log = logging.getLogger("dpo_score")


def load(folder: str | Path = HERE, **options: Any) -> Any:
    """The data set in `folder`, as `datasets.load_dataset` gives it."""
    return load_dataset(str(folder), **options)


def read_contract(where: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """What the values belong to: from a folder, a file, or as it is; None: from beside this file."""
    if isinstance(where, Mapping):
        return dict(where)
    path = Path(where or HERE)
    path = path / CONTRACT if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no {CONTRACT}, which says what the reference log-probs belong to. Give contract=FOLDER, the "
            "folder that `dpo-score precompute` wrote"
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


class DPOTrainerWithRefLogps(DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer on a data set with `ref_chosen_logps` and `ref_rejected_logps`.

    `contract`: folder or file of `dpo_score.json`, or what is in it (default: beside this file). Other arguments are
    DPOTrainer's; `args` is needed, `ref_model` must be left out. Raises `refusal` before the first step.
    """

    refusal: type[Exception] = ValueError

    def __init__(
        self,
        model: Any,
        ref_model: None = None,
        args: DPOConfig | None = None,
        *more: Any,
        contract: Any = None,
        **named: Any,
    ) -> None:
        if ref_model is not None:
            raise self.refusal("ref_model: its log-probs are in the data set already; leave it out")
        if args is None:
            raise self.refusal("args: give a DPOConfig; its max_length must be the one that was scored with")
        self.contract = read_contract(contract)
        self._refuse(setting_differences(self.contract, args), "this trainer")
        args = copy.copy(args)
        args.precompute_ref_log_probs = True  # TRL then takes the values from the data, and loads no reference
        self._unchecked = True
        super().__init__(model, None, args, *more, **named)
        self._is_reference = has_weights(self.model, self.contract["reference"]["fingerprint"])

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        if not isinstance(dataset, Dataset):
            raise self.refusal(f"{dataset_name}: streamed data sets cannot be checked; load it without streaming")
        self._refuse(tokenizer_differences(self.contract, self._tokenizer), "this trainer's tokenizer")
        dataset = self._usable(dataset, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if len(prepared) != len(dataset):
            lost = len(dataset) - len(prepared)
            raise self.refusal(f"{dataset_name}: TRL drops {lost} scored rows: their prompts fill max_length here")
        own_prompt = "prompt" in dataset.column_names
        self._refuse_other_ids(prepared, args, dataset_name, own_prompt)
        return prepared

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The values are there."""
        return dataset

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        result = super()._compute_loss(model, inputs, return_outputs)
        if self._unchecked and self.model.training:
            self._unchecked = False
            if self._is_reference and self.state.global_step == 0:
                self._refuse_moved_start(inputs)
        return result

    def _refuse(self, differences: Sequence[str], who: str) -> None:
        if differences:
            raise self.refusal(
                f"the reference log-probs do not belong to {who}: {'; '.join(differences)}. Change the trainer, or "
                "compute them again with its settings"
            )

    def _usable(self, dataset: Dataset, name: str) -> Dataset:
        """Only rows that have both values, under the names that TRL reads."""
        back = {new: old for old, new in self.contract["columns"].items() if new in dataset.column_names}
        dataset = dataset.rename_columns(back) if back else dataset
        absent = [column for column in NEEDED if column not in dataset.column_names]
        if absent:
            raise self.refusal(f"{name}: no column {absent[0]!r}; it has {', '.join(dataset.column_names)}")
        values = zip(*(dataset[column] for column in VALUES), strict=True)
        kept = [row for row, pair in enumerate(values) if None not in pair]
        if len(kept) < len(dataset) and PartialState().is_main_process:
            log.warning(
                "%s: %d of %d rows have no reference log-probs and are left out",
                name,
                len(dataset) - len(kept),
                len(dataset),
            )
        return dataset.select(kept) if len(kept) < len(dataset) else dataset

    def _refuse_other_ids(self, dataset: Dataset, args: DPOConfig, name: str, own_prompt: bool) -> None:
        for row_id, expected, ids in rows_of(dataset):
            found = pair_digest(cut(ids, args.max_length))
            if found != expected:
                raise self.refusal(
                    f"{name} row {row_id}: the token ids that TRL makes of it are not those that were scored "
                    f"(pair_digest {found} here, {expected} there; {', '.join(str(len(part)) for part in ids)} tokens "
                    f"of prompt, chosen and rejected here). {self._both_sides(args, own_prompt)}"
                )

    def _both_sides(self, args: DPOConfig, own_prompt: bool) -> str:
        text, template = self.contract["text"], _short(template_sha256(self._tokenizer))
        split = "the prompt column" if own_prompt else "no prompt column, so TRL splits the prompt off itself"
        return (
            f"Scored: max_length {text['max_length']}, truncation {text['truncation']}, prompt_split "
            f"{text['prompt_split']}, template {_short(text['template_sha256'])} of {text['template_date']}. Here: "
            f"max_length {args.max_length}, truncation {args.truncation_mode}, {split}, template {template} of "
            f"{date.today()}"
        )

    def _refuse_moved_start(self, inputs: Mapping[str, Any]) -> None:
        """Policy = reference: every reward is zero, or the values are not this model's."""
        metrics = self._metrics["train"]
        found = max(abs(metrics[f"rewards/{side}"][-1]) for side in ("chosen", "rejected"))
        floor = self._noise(inputs)
        if not found <= self.beta * floor:
            raise self.refusal(
                f"the model has the reference's weights, so the first rewards must be 0; they are off by {found:.3g}, "
                f"more than beta × the noise floor = {self.beta} × {floor:.3g} nats. The reference log-probs are not "
                "this model's: compute them again"
            )

    def _noise(self, inputs: Mapping[str, Any]) -> float:
        """Nats that the mean of a batch's log-ratios may be off, in this trainer's arithmetic."""
        tokens = float(inputs["completion_mask"].sum()) / len(inputs["completion_mask"])
        narrow = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        if narrow or self.contract["noise_floor"] is None:
            return HALF_NOISE * tokens
        return float(self.contract["noise_floor"]) + FLOAT32_NOISE * tokens


def setting_differences(contract: Mapping[str, Any], args: DPOConfig) -> list[str]:
    """The trainer's settings that would put other tokens, or other sums, behind the values."""
    text = contract["text"]
    lengths = {text["max_length"], text["limit"]} if text["max_length"] is None else {text["max_length"]}
    checks = (
        ("made_for", contract["made_for"], "trl", contract["made_for"] == "trl"),
        ("max_length", _length(text), args.max_length, args.max_length in lengths),
        (
            "truncation",
            text["truncation"],
            args.truncation_mode,
            text["truncation"] in ("reject", args.truncation_mode),
        ),
        ("ld_alpha", contract["ld_alpha"], args.ld_alpha, contract["ld_alpha"] == args.ld_alpha),
    )
    return [f"{name} was {scored!s}, here it is {here!s}" for name, scored, here, same in checks if not same]


def _length(text: Mapping[str, Any]) -> str:
    asked = text["max_length"]
    return str(asked) if asked is not None else f"None (the model's own limit, {text['limit']})"


def tokenizer_differences(contract: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """The tokenizer; and its chat template, with the date it prints, where conversations are rendered."""
    text, found = contract["text"], []
    pads = (text["pad_token"], getattr(tokenizer, "pad_token", None))
    candidates = [tokenizer_digest(tokenizer, without) for without in (pads[:1], pads)]
    if text["tokenizer"] not in candidates:
        found.append(f"tokenizer was {_short(text['tokenizer'])}, here it is {_short(candidates[-1])}")
    if text["chat"]:
        here = template_sha256(tokenizer)
        if here != text["template_sha256"]:
            found.append(f"chat template was {_short(text['template_sha256'])}, here it is {_short(here)}")
        elif text["template_date"] not in (None, date.today().isoformat()):
            found.append(f"the template's date was {text['template_date']}, here it is {date.today()}")
    return found


def template_sha256(tokenizer: Any) -> str | None:
    """SHA-256 (hex) of the chat template, as it is without and with tools."""
    if not tokenizer.chat_template:
        return None
    sources = (tokenizer.get_chat_template(None), tokenizer.get_chat_template(None, tools=[{}]))
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any, without: Sequence[str | None] = ()) -> str:
    """SHA-256 (hex) of what decides text → ids; special tokens in `without` and the pad token do not."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    absent = {name for name in without if name not in ends}
    added = [token for token in rules.get("added_tokens") or [] if token["content"] not in absent]
    parts = ("normalizer", "pre_tokenizer", "post_processor", "model")
    flags = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    text = json.dumps([[rules.get(p) for p in parts], added, ends, flags], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:16]


def rows_of(dataset: Dataset) -> Iterator[tuple[str, str, list[list[int]]]]:
    """(row_id, pair_digest, [prompt, chosen, rejected]) of every row that TRL tokenised."""
    columns = ("row_id", "pair_digest", *IDS)
    for batch in dataset.select_columns(list(columns)).iter(batch_size=1000):
        for row_id, digest, *ids in zip(*(batch[name] for name in columns), strict=True):
            yield row_id, digest, ids


def cut(ids: Sequence[list[int]], max_length: int | None) -> list[list[int]]:
    """The three id lists as TRL's collator leaves them: the first max_length tokens of each sequence."""
    if max_length is None:
        return list(ids)
    prompt = ids[0][:max_length]
    return [prompt, *(side[: max_length - len(prompt)] for side in ids[1:])]


def pair_digest(ids: Sequence[list[int]]) -> str:
    """blake2b-128 (hex) of the lists: each its length as 8 bytes, then 4 bytes an id, little-endian."""
    digest = hashlib.blake2b(digest_size=16)
    for part in ids:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(b"".join(number.to_bytes(4, "little") for number in part))
    return digest.hexdigest()


def has_weights(model: Any, fingerprint: Mapping[str, Any] | None) -> bool:
    """Whether a model holds the weights that a fingerprint was taken of: {parameter: {dtype: digest}}.

    A fresh adapter, which changes nothing yet, does not count against it. False where it cannot be told.
    """
    weights = {_plain_name(name): tensor for name, tensor in model.state_dict().items()}
    zero = all(not tensor.any() for name, tensor in weights.items() if ".lora_B." in name)
    if not fingerprint or not zero or not all(name in weights for name in fingerprint):
        return False
    return all(_matches(weights[name], digests) for name, digests in fingerprint.items())


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _matches(tensor: torch.Tensor, digests: Mapping[str, str]) -> bool:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor.numel() > 0 and digests.get(dtype) == weight_digest(tensor)


def weight_digest(tensor: torch.Tensor) -> str:
    """blake2b-64 (hex) of 8 evenly spaced values of each of the first, middle and last rows, as float32."""
    rows = [tensor] if tensor.ndim < 2 else [tensor[row] for row in sorted({0, len(tensor) // 2, len(tensor) - 1})]
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        flat = row.detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(8, flat.numel())).long().to(flat.device)
        digest.update(flat[places].float().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()
