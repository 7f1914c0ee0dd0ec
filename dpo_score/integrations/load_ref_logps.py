"""Train with TRL on reference log-probabilities that were computed before, and only on those that belong.

    from load_ref_logps import DPOTrainerWithRefLogps, load

    data = load()                                       # the splits that lie beside this file
    DPOTrainerWithRefLogps(model, args=DPOConfig(...), train_dataset=data["train"]).train()

or `python load_ref_logps.py --config dpo.yaml`, which is `trl dpo` on the data beside this file, or TRL's own trainer:
after `load()` its DPOTrainer takes the columns where precompute_ref_log_probs=True, and refuses to ignore them.

Needs trl and datasets alone. No reference model is loaded. Before the first step it is refused to train when ld_alpha
is another, or when the token ids that TRL makes of any row, after its own cut, are not the ones that were scored; the
message then says which of max_length, truncation, tokenizer and chat template differ. A model that starts with the
reference's weights must begin with rewards of zero, up to rounding. `beta` and the loss are free: no reference value
depends on them. Streamed data sets are refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Image, load_dataset
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).parent
CONTRACT = "dpo_score.json"
VALUES = ("ref_chosen_logps", "ref_rejected_logps")
IMAGES = "images"
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
NEEDED = ("chosen", "rejected", *VALUES, "pair_digest", "row_id")
HALF_NOISE, FLOAT32_NOISE = 0.05, 1e-4
"""Nats by which 16-bit and float32 arithmetic may move a token's log-probability, on average over an answer."""
_LOADED_FROM = "reference log-probs loaded from "
log = logging.getLogger("dpo_score")


def load(folder: str | Path = HERE, **options: Any) -> Any:
    """The data set in `folder`, as `datasets.load_dataset` gives it; trainers find its contract again.

    TRL's own DPOTrainer then takes its columns, too: see `teach_trl`.
    """
    teach_trl()
    found: Any = load_dataset(str(folder), **options)
    if isinstance(found, dict):
        for name, part in found.items():
            found[name] = _with_pictures(part)
    else:
        found = _with_pictures(found)
    for part in found.values() if isinstance(found, Mapping) else [found]:
        part.info.description = _LOADED_FROM + str(Path(folder).absolute())
    return found


def _with_pictures(dataset: Any) -> Any:
    """Files of pictures as the pictures that a processor takes."""
    if IMAGES not in (dataset.column_names or ()):
        return dataset
    return dataset.cast_column(IMAGES, [Image()])


def read_contract(where: str | Path | Mapping[str, Any] | None, dataset: Any = None) -> dict[str, Any]:
    """What the values belong to: from a folder, a file, or as it is; None: from beside the data set or this file."""
    if isinstance(where, Mapping):
        return dict(where)
    places = [Path(where)] if where is not None else _beside(dataset)
    for place in places:
        path = place / CONTRACT if place.is_dir() else place
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    looked = ", ".join(str(place / CONTRACT if place.suffix != ".json" else place) for place in places)
    raise FileNotFoundError(
        f"no {CONTRACT}, which says what the reference log-probs belong to; looked for {looked}. Give contract=FOLDER, "
        "the folder that `dpo-score precompute` wrote"
    )


def _beside(dataset: Any) -> list[Path]:
    """Where the contract of a data set may be: where it was loaded from, beside this file, beside its files."""
    info = getattr(dataset, "info", None)
    places = [HERE]
    if info is not None and (info.description or "").startswith(_LOADED_FROM):
        places.insert(0, Path(info.description.removeprefix(_LOADED_FROM)))
    if info is not None and getattr(info, "dataset_name", None):
        places.append(Path(info.dataset_name))
    for file in getattr(dataset, "cache_files", ()):
        places.append(Path(file["filename"]).parent)
    return list(dict.fromkeys(places))


class DPOTrainerWithRefLogps(DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer on a data set with `ref_chosen_logps` and `ref_rejected_logps`.

    `train_dataset` may be the folder that was written. `contract`: folder or file of `dpo_score.json`, or what is in it
    (default: where `load` read the data, else beside this file). Other arguments are DPOTrainer's; without `args` it is
    DPOConfig's defaults; `ref_model` must be left out. Raises `refusal` before the first step.
    """

    refusal: type[Exception] = ValueError

    def __init__(
        self,
        model: Any,
        ref_model: None = None,
        args: DPOConfig | None = None,
        *more: Any,
        contract: Any = None,
        train_dataset: Any = None,
        **named: Any,
    ) -> None:
        if ref_model is not None:
            raise self.refusal("ref_model: its log-probs are in the data set already; leave it out")
        if args is None:
            raise self.refusal("args: give a DPOConfig; its max_length must be the one that was scored with")
        if isinstance(train_dataset, str | Path):
            contract = train_dataset if contract is None else contract
            train_dataset = load(train_dataset)["train"]
        try:
            self.contract = read_contract(contract, train_dataset)
        except FileNotFoundError as error:
            raise self.refusal(str(error)) from None
        differences = value_differences(self.contract, args)
        if differences:
            raise self.refusal(_not_of("this trainer", differences))
        args = copy.copy(args)
        self._unchecked = True
        if IMAGES in (getattr(train_dataset, "column_names", None) or ()):
            self._begin_with_pictures(model, args, *more, train_dataset=train_dataset, **named)
        else:
            args.precompute_ref_log_probs = True  # TRL then takes the values from the data, and loads no reference
            super().__init__(model, None, args, *more, train_dataset=train_dataset, **named)
        self._is_reference = has_weights(self.model, self.contract["reference"]["fingerprint"])

    def _begin_with_pictures(self, model: Any, args: DPOConfig, *more: Any, train_dataset: Any, **named: Any) -> None:
        """TRL refuses precompute_ref_log_probs for pictures and would load a reference: here it is given a second name
        of the model in its place, which is dropped, and batches bring the values along."""
        if args.truncation_mode != "keep_start" or named.get("data_collator") is not None:
            raise self.refusal("pairs about pictures: leave data_collator out, and truncation_mode at keep_start")
        args.precompute_ref_log_probs = False
        args.dataloader_num_workers = 0  # a refusal of a row must end the training, not a worker
        if isinstance(named.get("eval_dataset"), Dataset):
            named["eval_dataset"] = self._usable(named["eval_dataset"], "eval")
        data = self._usable(train_dataset, "train")
        stand_in = None if isinstance(model, str) or hasattr(model, "peft_config") else copy.copy(model)
        if named.get("peft_config") is not None:
            stand_in = None
        super().__init__(model, stand_in, args, *more, train_dataset=data, **named)
        self.ref_model, self.precompute_ref_logps = None, True
        self.data_collator = PictureBatches(getattr(self, "data_collator"), self.refusal)  # noqa: B009 - TRL has no types

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if not self._is_vision_dataset:
            return
        extra = [*VALUES, "pair_digest", "row_id"]
        self._signature_columns += [name for name in extra if name not in self._signature_columns]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        if not isinstance(dataset, Dataset):
            raise self.refusal(f"{dataset_name}: streamed data sets cannot be checked; load it without streaming")
        dataset = self._usable(dataset, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if len(prepared) != len(dataset):
            lost = len(dataset) - len(prepared)
            raise self.refusal(
                f"{dataset_name}: TRL drops {lost} scored rows: their prompts fill max_length here. "
                f"{_way_out(self.contract, args)}"
            )
        splits_itself = "prompt" not in dataset.column_names
        problem = other_ids(prepared, self.contract, args, self._tokenizer, dataset_name, splits_itself)
        if problem:
            raise self.refusal(problem)
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

    def _usable(self, dataset: Dataset, name: str) -> Dataset:
        """Only rows that have both values, under the names that TRL reads."""
        back = {new: old for old, new in self.contract["columns"].items() if new in dataset.column_names}
        dataset = dataset.rename_columns(back) if back else dataset
        absent = [column for column in NEEDED if column not in dataset.column_names]
        if absent:
            raise self.refusal(f"{name}: no column {absent[0]!r}; it has {', '.join(dataset.column_names)}")
        return with_values(dataset, name)

    def _refuse_moved_start(self, inputs: Mapping[str, Any]) -> None:
        """Policy = reference: every reward is zero, or the values are not this model's."""
        metrics = self._metrics["train"]
        found = max(abs(metrics[f"rewards/{side}"][-1]) for side in ("chosen", "rejected"))
        tokens = float(inputs["completion_mask"].sum()) / len(inputs["completion_mask"])
        narrow = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        floor = HALF_NOISE * tokens  # nats that the mean of a batch's log-ratios may be off, in this arithmetic
        if not narrow and self.contract["noise_floor"] is not None:
            floor = float(self.contract["noise_floor"]) + FLOAT32_NOISE * tokens
        if not found <= self.beta * floor:
            raise self.refusal(
                f"the model has the reference's weights, so the first rewards must be 0; they are off by {found:.3g}, "
                f"more than beta × the noise floor = {self.beta} × {floor:.3g} nats. The reference log-probs are not "
                "this model's: compute them again"
            )


class PictureBatches:
    """Batches of TRL's vision collator with reference log-probs beside them; the ids of every row are compared with
    those that were scored. `refusal` is raised where they are others."""

    def __init__(self, collator: Any, refusal: type[Exception]) -> None:
        self.collator, self.refusal = collator, refusal

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        count = len(examples)
        known = [{name: row[name] for name in (*VALUES, "pair_digest", "row_id")} for row in examples]
        batch = self.collator([{k: v for k, v in row.items() if k not in known[0]} for row in examples])
        real, answer = batch["attention_mask"].bool(), batch["completion_mask"].bool()
        for row, given in enumerate(known):
            prompt = batch["input_ids"][row][real[row] & ~answer[row]]
            sides = [batch["input_ids"][at][real[at] & answer[at]] for at in (row, row + count)]
            found = pair_digest([part.tolist() for part in (prompt, *sides)])
            if found != given["pair_digest"]:
                raise self.refusal(
                    f"row {given['row_id']}: the token ids that TRL's vision collator makes of it are not those that "
                    f"were scored (pair_digest {found} here, {given['pair_digest']} there). Train with the processor "
                    "and max_length that were scored with, or compute the values again with --prompt-split trl, which "
                    "makes ids of prompt and answers apart as this collator does"
                )
        for name in VALUES:
            batch[name] = torch.tensor([given[name] for given in known])
        return batch


# --- TRL's own trainer ------------------------------------------------------------------------------------------------


def teach_trl() -> None:
    """Let TRL's own DPOTrainer take reference log-probs that are in the data, in this process.

    With precompute_ref_log_probs=True it appends the two columns, and fails where they are there; with False it ignores
    them. Afterwards it takes them, by the same checks as DPOTrainerWithRefLogps, or says how to have them taken.
    """
    if getattr(DPOTrainer, "_takes_columns", False):
        return
    prepare, precompute = DPOTrainer._prepare_dataset, DPOTrainer._precompute_ref_logps

    def prepare_dataset(self: Any, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        columns = getattr(dataset, "column_names", None) or ()
        if isinstance(self, DPOTrainerWithRefLogps) or not {*VALUES, "pair_digest"} <= set(columns):
            return prepare(self, dataset, processing_class, args, dataset_name)
        if not args.precompute_ref_log_probs:
            raise ValueError(
                f"{dataset_name}: DPOTrainer would ignore the reference log-probs of this data set: "
                "DPOConfig(precompute_ref_log_probs=True) or DPOTrainerWithRefLogps uses them; without the columns "
                f"({', '.join(VALUES)}) it computes its own"
            )
        contract = read_contract(None, dataset)
        differences = value_differences(contract, args)
        if differences:
            raise ValueError(_not_of("this trainer", differences))
        found = prepare(self, with_values(dataset, dataset_name), processing_class, args, dataset_name)
        problem = other_ids(found, contract, args, self._tokenizer, dataset_name, "prompt" not in columns)
        if problem:
            raise ValueError(problem)
        return found

    def precompute_ref_logps(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        if set(VALUES) <= set(dataset.column_names):
            return dataset
        return precompute(self, dataset, name, batch_size)

    DPOTrainer._prepare_dataset, DPOTrainer._precompute_ref_logps = prepare_dataset, precompute_ref_logps
    DPOTrainer._takes_columns = True


def main(arguments: list[str] | None = None) -> None:
    """`trl dpo` with its own options and --config, on the data beside this file unless --dataset_name says another."""
    import trl
    from trl.scripts.dpo import main as train
    from trl.scripts.dpo import make_parser

    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    parsed = parser.parse_args_and_config(args=given, fail_with_unknown_args=False)
    script, training, model, mixture = parsed[:4]
    if script.dataset_name is None and not mixture.datasets:
        script.dataset_name = str(HERE)
    folder = Path(script.dataset_name) if script.dataset_name else HERE

    class Trainer(DPOTrainerWithRefLogps):
        def __init__(self, **named: Any) -> None:
            super().__init__(contract=folder if folder.is_dir() else None, **named)

    stock, trl.DPOTrainer = trl.DPOTrainer, Trainer
    try:
        train(script, training, model, mixture)
    finally:
        trl.DPOTrainer = stock


# --- what is checked --------------------------------------------------------------------------------------------------


def with_values(dataset: Dataset, name: str) -> Dataset:
    """The rows that have both values; how many have not is said once."""
    values = zip(*(dataset[column] for column in VALUES), strict=True)
    kept = [row for row, pair in enumerate(values) if None not in pair]
    if len(kept) == len(dataset):
        return dataset
    if PartialState().is_main_process:
        lost = len(dataset) - len(kept)
        log.warning("%s: %d of %d rows have no reference log-probs and are left out", name, lost, len(dataset))
    return dataset.select(kept)


def value_differences(contract: Mapping[str, Any], args: DPOConfig) -> list[str]:
    """What would put other sums behind the values, whatever the tokens."""
    checks = (("made_for", contract["made_for"], "trl"), ("ld_alpha", contract["ld_alpha"], args.ld_alpha))
    return [f"{name} was {scored!s}, here it is {here!s}" for name, scored, here in checks if scored != here]


def _not_of(who: str, differences: Sequence[str]) -> str:
    return (
        f"the reference log-probs do not belong to {who}: {'; '.join(differences)}. Change the trainer, or compute "
        "them again with its settings"
    )


def other_ids(
    prepared: Dataset, contract: Mapping[str, Any], args: DPOConfig, tokenizer: Any, name: str, splits_itself: bool
) -> str | None:
    """Which row TRL makes other token ids of than those that were scored, and why; None where there is none."""
    for row_id, expected, ids in rows_of(prepared):
        found = pair_digest(cut(ids, args.max_length, args.truncation_mode))
        if found == expected:
            continue
        text, template = contract["text"], _short(template_sha256(tokenizer))
        why = [*length_differences(contract, args), *tokenizer_differences(contract, tokenizer)]
        split = "no prompt column, so TRL splits the prompt off itself" if splits_itself else "the prompt column"
        return (
            f"{name} row {row_id}: the token ids that TRL makes of it are not those that were scored "
            f"(pair_digest {found} here, {expected} there; {', '.join(str(len(part)) for part in ids)} tokens "
            f"of prompt, chosen and rejected here). {'; '.join(why) + '. ' if why else ''}"
            f"Scored: max_length {text['max_length']}, truncation {text['truncation']}, prompt_split "
            f"{text['prompt_split']}, template {_short(text['template_sha256'])} of {text['template_date']}. Here: "
            f"max_length {args.max_length}, truncation {args.truncation_mode}, {split}, template {template} of "
            f"{date.today()}. {_way_out(contract, args)}"
        )
    return None


def _way_out(contract: Mapping[str, Any], args: DPOConfig) -> str:
    scored, here = contract["text"]["max_length"], args.max_length
    if scored == here:
        return "Train with the tokenizer and the data set that were scored, or compute the values again"
    again = "without --max-length" if here is None else f"--max-length {here}"
    return f"Train with DPOConfig(max_length={scored}), or compute the values again with `dpo-score precompute {again}`"


def length_differences(contract: Mapping[str, Any], args: DPOConfig) -> list[str]:
    """The trainer's settings that may put other tokens behind the values."""
    text = contract["text"]
    lengths = {text["max_length"], text["limit"]} if text["max_length"] is None else {text["max_length"]}
    length = text["max_length"]
    shown = str(length) if length is not None else f"None (the model's own limit, {text['limit']})"
    same_cut = text["truncation"] in ("reject", args.truncation_mode)
    checks = (
        ("max_length", shown, args.max_length, args.max_length in lengths),
        ("truncation", text["truncation"], args.truncation_mode, same_cut),
    )
    return [f"{name} was {scored!s}, here it is {here!s}" for name, scored, here, same in checks if not same]


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


def cut(ids: Sequence[list[int]], max_length: int | None, mode: str = "keep_start") -> list[list[int]]:
    """The three id lists as TRL's collator leaves them: the first, or last, max_length tokens of each sequence.

    With "keep_end" a prompt that is cut differs between the two answers; then there are four lists.
    """
    prompt, *sides = ids
    if max_length is None or all(len(prompt) + len(side) <= max_length for side in sides):
        return list(ids)
    if mode == "keep_end":
        whole = [(prompt + side)[-max_length:] for side in sides]
        starts = [max(len(found) - len(side), 0) for found, side in zip(whole, sides, strict=True)]
        return [part for found, start in zip(whole, starts, strict=True) for part in (found[:start], found[start:])]
    prompt = prompt[:max_length]
    return [prompt, *(side[: max_length - len(prompt)] for side in sides)]


def pair_digest(ids: Sequence[list[int]]) -> str:
    """blake2b-128 (hex) of the lists: each its length as 8 bytes, then 4 bytes an id, little-endian."""
    digest = hashlib.blake2b(digest_size=16)
    for part in ids:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(b"".join(number.to_bytes(4, "little") for number in part))
    return digest.hexdigest()


def has_weights(model: Any, fingerprint: Mapping[str, Any] | None) -> bool:
    """Whether a model holds the weights that a fingerprint was taken of: {parameter: {dtype: digest}}.

    A fresh adapter, which changes nothing yet, does not count against it. Parameters that a checkpoint calls otherwise
    than its model does (the parts of a wrapper with a vision tower) are known by their values. False where that cannot
    be known.
    """
    weights = {_plain_name(name): tensor for name, tensor in model.state_dict().items()}
    zero = all(not tensor.any() for name, tensor in weights.items() if ".lora_B." in name)
    if not fingerprint or not zero:
        return False
    if all(name in weights for name in fingerprint):
        return all(_matches(weights[name], digests) for name, digests in fingerprint.items())
    there = {(_dtype(tensor), weight_digest(tensor)) for tensor in weights.values() if tensor.numel()}
    return all(there & set(digests.items()) for digests in fingerprint.values())


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _matches(tensor: torch.Tensor, digests: Mapping[str, str]) -> bool:
    return tensor.numel() > 0 and digests.get(_dtype(tensor)) == weight_digest(tensor)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def weight_digest(tensor: torch.Tensor) -> str:
    """blake2b-64 (hex) of 8 evenly spaced values of each of the first, middle and last rows, as float32."""
    rows = [tensor] if tensor.ndim < 2 else [tensor[row] for row in sorted({0, len(tensor) // 2, len(tensor) - 1})]
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        flat = row.detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(8, flat.numel())).long().to(flat.device)
        digest.update(flat[places].float().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
