"""Every setting of a run, once: its type, default, help line, panel and option, as one tree of pydantic models.

A value may come from an option (`--max-length`), an environment variable (`DPO_SCORE_MAX_LENGTH`) or a key of the
pipeline file (`text: {max_length: …}`, or `max_length: …` at the top); `load.py` reads all three from this tree.
Models are frozen and refuse unknown keys. Nothing here imports torch or transformers.

To add a setting, add a field with a `Setting`; to add a choice to one, add it to its `Literal`:

    >>> [option.flag for option in OPTIONS if option.path == ("text", "max_length")]
    ['--max-length']
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from dpo_score.errors import nearest

STATS = ("wpo", "entropy", "top1")
"""What `stats` may ask for of each answer."""
POLICY_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
SHARE = re.compile(r"(\d{1,6})/(\d{1,6})")
FIRST, DATA, MODELS, TEXT, LOSS, COMPUTE, OUTPUT, SAFETY = PANELS = (
    "What most people need first",
    "Data",
    "Models",
    "Text",
    "Loss",
    "Compute",
    "Output",
    "Safety",
)
"""Groups of options in `--help`, in the order in which they are shown."""
FIRST_OPTIONS = ("data", "reference", "policy", "out", "loss", "beta", "max_length", "dtype", "limit")
"""The options of the first panel, in order; `--dry-run` of the command is the tenth."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a person reads of a field. `option`: the option's name where it is not the field's."""

    panel: str
    help: str
    option: str | None = None
    repeatable: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """A setting as it is typed. `path`: its keys in the pipeline file, where "*" stands for every data set.

    `type`: what the command line parses it as; `choices`: all values it takes, where they are few.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    panel: str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _as_map(value: Any) -> Any:
    """`a=b,c=d` as it is typed on a command line."""
    if isinstance(value, str):
        items = [item.strip() for item in value.split(",") if item.strip()]
        bare = next((item for item in items if "=" not in item), None)
        if bare is not None:
            raise ValueError(f"{bare!r} is no assignment: write NAME=COLUMN, as in prompt=question,chosen=best")
        return dict(item.split("=", 1) for item in items)
    return {} if value is None else value


def _as_list(value: Any) -> Any:
    """`a,b` as it is typed on a command line."""
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    return () if value is None else value


def _as_date(value: Any) -> Any:
    """YAML reads a bare 2024-07-26 as a date."""
    return f"{value:%Y-%m-%d}" if isinstance(value, datetime.date) else value


Columns = Annotated[dict[str, str], BeforeValidator(_as_map)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
AtLeastOne = Annotated[int | None, Field(ge=1, lt=2**62)]
Processes = Annotated[int | None, Field(ge=1, le=65_536)]
"""Threads, processes or devices: more than any machine has, and less than what torch cannot count."""


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DataSpec(Spec):
    """One named set. `path`: file, folder, glob, fsspec URL or hub data set `org/name[:config]`."""

    name: str
    path: str
    revision: Annotated[
        str | None, Setting(DATA, "commit, tag or branch of a data set on the hub", option="data_revision")
    ] = None
    split: Annotated[Names, Setting(DATA, "splits to read: train, test, …; a comma list")] = ()
    format: Annotated[str, Setting(DATA, "a name that `dpo-score formats` lists; auto: detected from the columns")] = (
        "auto"
    )
    map: Annotated[Columns, Setting(DATA, "columns by hand: prompt=a,chosen=b,rejected=c; help: all keys")] = Field(
        default_factory=dict
    )
    ignore_columns: Annotated[
        Names, Setting(DATA, "columns to leave unread although they look like a part of the question; a comma list")
    ] = ()
    pairing: Annotated[
        Literal["best-worst", "all", "adjacent", "random"],
        Setting(DATA, "which pairs to make of a list of ranked answers"),
    ] = "best-worst"
    preference: Annotated[
        Literal["better", "safer"] | None, Setting(DATA, "which label to use where the data carries both")
    ] = None
    keep_ties: Annotated[bool, Setting(DATA, "score pairs labelled as ties instead of rejecting them")] = False
    media_root: Annotated[str | None, Setting(DATA, "folder that the data's paths of pictures are relative to")] = None


class ModelSpec(Spec):
    """`model`: folder, hub id, `package:NAME/FILE`, or for the reference `columns:CHOSEN,REJECTED`."""

    model: Annotated[
        str,
        Setting(FIRST, "frozen model: MODEL, MODEL+ADAPTER, or columns:A,B of the data", option="reference"),
    ]
    revision: Annotated[
        str | None, Setting(MODELS, "commit, tag or branch of the reference", option="reference_revision")
    ] = None
    adapter: str | None = None

    @field_validator("model")
    @classmethod
    def _two_columns(cls, value: str) -> str:
        if value.startswith("columns:") and not all(map(str.strip, value.removeprefix("columns:").partition(","))):
            raise ValueError("name two columns of the data, as in columns:ref_chosen,ref_rejected")
        return value

    @property
    def columns(self) -> tuple[str, str] | None:
        """The two columns of a `columns:a,b` reference, else None."""
        if not self.model.startswith("columns:"):
            return None
        chosen, _, rejected = self.model.removeprefix("columns:").partition(",")
        return chosen.strip(), rejected.strip()


class LossSpec(Spec):
    """`beta` and `label_smoothing` null = the loss's own default."""

    name: Annotated[
        str,
        Setting(
            FIRST, "a loss, a comma list (rescore), a sum as 0.8*sigmoid+1*sft, or path.py:function", option="loss"
        ),
    ] = "sigmoid"
    beta: Annotated[float | None, Setting(FIRST, "strength of the KL constraint (default: the loss's own)")] = None
    label_smoothing: Annotated[
        float | None, Setting(LOSS, "share of labels taken to be wrong (default: the loss's own)")
    ] = None
    params: Annotated[
        dict[str, float | int | bool | str],
        Setting(LOSS, "KEY=VALUE, a parameter of the loss; repeatable", option="loss_param", repeatable=True),
    ] = Field(default_factory=dict)


class PolicySpec(Spec):
    """A checkpoint: full weights (`model`), or an `adapter` over `base` (`reference` or a MODEL)."""

    name: str
    model: str | None = None
    adapter: str | None = None
    base: str | None = None
    revision: str | None = None
    reference: ModelSpec | None = None
    loss: LossSpec | None = None
    beta: float | None = None
    glob: str | None = None
    """The pattern that found the checkpoint: half written, it waits for the next run instead of failing this one."""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str) -> str:
        if not POLICY_NAME.fullmatch(value):
            raise ValueError(f"policy name {value!r}: use 1-80 of A-Z a-z 0-9 . _ - without a leading dot")
        return value

    @model_validator(mode="after")
    def _something_to_load(self) -> PolicySpec:
        if self.model is None and self.adapter is None:
            raise ValueError(f"policy {self.name!r} names neither a model nor an adapter")
        return self


class TextSpec(Spec):
    """How rows become token ids. Every field is part of the identity of a run's tokens."""

    tokenizer: Annotated[str | None, Setting(MODELS, "a tokenizer other than the reference's")] = None
    max_length: Annotated[
        int | None,
        Field(ge=2, lt=2**62),
        Setting(FIRST, "cut prompt + answer to N tokens (default: the model's limit; TRL's own default is 1024)"),
    ] = None
    render: Annotated[
        Literal["auto", "chat", "raw"],
        Setting(TEXT, "chat: every row through the chat template; raw: as text; auto: conversations through it"),
    ] = "auto"
    prompt_split: Annotated[
        Literal["auto", "marker", "trl"], Setting(TEXT, "where the prompt ends in data without a prompt column")
    ] = "auto"
    score: Annotated[Literal["completion", "last", "all-assistant"], Setting(TEXT, "which tokens count")] = "completion"
    truncation: Annotated[
        Literal["keep_start", "keep_end", "reject"], Setting(TEXT, "which part of a row that is too long is scored")
    ] = "keep_start"
    chat_template: Annotated[str | None, Setting(TEXT, "a Jinja file, or the template itself")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any], Setting(TEXT, "a JSON object of variables for the chat template")
    ] = Field(default_factory=dict)
    system: Annotated[str | None, Setting(TEXT, "text of the system message")] = None
    system_mode: Annotated[
        Literal["fill", "replace", "drop", "merge-user"],
        Setting(TEXT, "where --system goes in a conversation that has a system message, or may have none"),
    ] = "fill"
    date: Annotated[
        str | None, BeforeValidator(_as_date), Setting(TEXT, "YYYY-MM-DD for templates that print the date")
    ] = None
    keep_nulls: Annotated[
        bool, Setting(TEXT, "keep keys of messages that are null by Arrow's padding, as TRL does")
    ] = False


class ComputeSpec(Spec):
    """Where and how models run. `auto` is resolved once, before the first block, into the manifest."""

    engine: Annotated[
        Literal["auto", "local", "ray"], Setting(COMPUTE, "auto: ray where there are several GPUs, else local")
    ] = "auto"
    ray_address: Annotated[str | None, Setting(COMPUTE, "address of a running Ray cluster")] = None
    workers: Annotated[
        Processes, Setting(COMPUTE, "number of workers, with Ray or --tensor-parallel (default: what fits)")
    ] = None
    device: Annotated[str, Setting(COMPUTE, "auto, cpu, cuda, cuda:1 or mps")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], Setting(FIRST, "number format of the models' arithmetic")
    ] = "auto"
    batch_tokens: Annotated[
        int | Literal["auto"], Setting(COMPUTE, "most tokens in one forward pass, or auto (in place of a batch size)")
    ] = "auto"
    compile: Annotated[Literal["auto", "on", "off"], Setting(COMPUTE, "compile each layer with torch.compile")] = "auto"
    path: Annotated[
        Literal["auto", "fast", "plain"], Setting(COMPUTE, "fast: packed sequences; plain: padded, one answer a row")
    ] = "auto"
    threads: Annotated[Processes, Setting(COMPUTE, "CPU threads (default: all)")] = None
    text_processes: Annotated[
        int | None,
        Field(ge=0, le=65_536),
        Setting(COMPUTE, "processes that read and tokenise rows (default: some beside a GPU)"),
    ] = None
    stats: Annotated[Names, Setting(COMPUTE, "also for each answer: wpo, entropy, top1; a comma list")] = ()
    per_token: Annotated[bool, Setting(COMPUTE, "keep the log-probability of every token")] = False
    device_map: Annotated[str | None, Setting(COMPUTE, "auto: spread one model over devices (accelerate)")] = None
    tensor_parallel: Annotated[
        int, Field(ge=1, le=65_536), Setting(COMPUTE, "split one model over N devices; G devices hold G/N copies")
    ] = 1
    quantization: Annotated[
        Literal["int8", "nf4"] | None, Setting(MODELS, "load the models with fewer bits (bitsandbytes)")
    ] = None

    @field_validator("dtype", mode="before")
    @classmethod
    def _short_names(cls, value: Any) -> Any:
        known = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
        return known.get(value, value) if isinstance(value, str) else value

    @field_validator("batch_tokens", mode="before")
    @classmethod
    def _some_tokens(cls, value: Any) -> Any:
        if value == "auto":
            return value
        number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
        if type(number) is not int or not 1 <= number < 2**31:
            raise ValueError("give the most tokens that a pack may hold as a whole number from 1 to 2 billion, or auto")
        return number

    @field_validator("stats")
    @classmethod
    def _known_stats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in STATS:
                raise ValueError(f"unknown statistic {name!r}: {nearest(name, STATS)}")
        return value

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_booleans(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare on/off as a boolean."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class RunConfig(Spec):
    """Everything one `dpo-score run` needs."""

    data: Annotated[
        tuple[DataSpec, ...],
        Setting(FIRST, "[NAME=]PATH: file, folder, glob, URL or hub data set; repeatable", repeatable=True),
    ]
    reference: ModelSpec | None = None
    policies: Annotated[
        tuple[PolicySpec, ...],
        Setting(
            FIRST,
            "NAME=MODEL[+ADAPTER], or a glob of checkpoints; repeatable",
            option="policy",
            repeatable=True,
        ),
    ] = ()
    loss: LossSpec = LossSpec()
    text: TextSpec = TextSpec()
    compute: ComputeSpec = ComputeSpec()
    out: Annotated[str | None, Setting(FIRST, "folder for the results")] = None
    cache_dir: Annotated[
        str | None, Setting(OUTPUT, "folder of log-probs and converted models (default: the user's cache)")
    ] = None
    policy_base: Annotated[str | None, Setting(MODELS, "model under the adapters: reference, or a MODEL")] = None
    keep_columns: Annotated[Names, Setting(OUTPUT, "input columns to carry along; a comma list")] = ()
    slices: Annotated[
        Names,
        Setting(
            OUTPUT,
            "also by this column of the data or of the scores, by length, turns or data; repeatable",
            option="slice",
            repeatable=True,
        ),
    ] = ()
    emit_ids: Annotated[bool, Setting(OUTPUT, "precompute: write token ids beside the values")] = False
    limit: Annotated[AtLeastOne, Setting(FIRST, "only the first N rows")] = None
    sample: Annotated[AtLeastOne, Setting(DATA, "N rows drawn at random with --seed")] = None
    seed: Annotated[int, Field(ge=0), Setting(DATA, "for --sample and --pairing random")] = 0
    max_bad_rows: Annotated[
        float | int | None, Setting(DATA, "a share (< 1) or a count of rejected rows; more ends with exit code 3")
    ] = None
    blocks: Annotated[
        str | None, Setting(COMPUTE, "I/N: only the I-th (from 0) of N shares of the work, for job arrays")
    ] = None
    rewardbench: Annotated[
        Literal["exact", "corrected"] | None, Setting(OUTPUT, "score as RewardBench does, or without its faults")
    ] = None
    allow_pickle: Annotated[bool, Setting(SAFETY, "read .bin and .pt weights, which can run code")] = False
    trust_remote_code: Annotated[bool, Setting(SAFETY, "run Python code that comes with a model")] = False
    strict_env: Annotated[bool, Setting(SAFETY, "refuse to resume with other versions or devices")] = False
    log_to: Annotated[Names, Setting(OUTPUT, "mlflow, wandb, tensorboard; a comma list")] = ()

    @field_validator("blocks")
    @classmethod
    def _one_share(cls, value: str | None) -> str | None:
        match = SHARE.fullmatch(value or "0/1")
        if match is None or not int(match[1]) < int(match[2]):
            raise ValueError("blocks takes I/N, the I-th of N shares, counted from 0: 0/3, 1/3 and 2/3 make a whole")
        return value

    @property
    def share(self) -> tuple[int, int]:
        """`blocks` as (I, N); (0, 1) is everything."""
        index, _, shares = (self.blocks or "0/1").partition("/")
        return int(index), int(shares)

    @model_validator(mode="after")
    def _unique_names(self) -> RunConfig:
        for kind, names in (("data set", [d.name for d in self.data]), ("policy", [p.name for p in self.policies])):
            repeated = {n for n in names if names.count(n) > 1}
            if repeated:
                raise ValueError(f"{kind} name used twice: {', '.join(sorted(repeated))}")
        if not self.data:
            raise ValueError("no data: name at least one set")
        return self


# --- the tree as a list of options ------------------------------------------------------------------------------------


def section_of(annotation: Any) -> type[Spec] | None:
    """The model that a field holds, as itself, as `Model | None` or in a tuple; None for a plain value."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Spec)), None)


def _options(model: type[Spec], path: tuple[str, ...] = ()) -> Iterator[Option]:
    for name, field in model.model_fields.items():
        inner, here = section_of(field.annotation), (*path, name)
        for setting in field.metadata:
            if isinstance(setting, Setting):
                default = None if field.is_required() else field.get_default(call_default_factory=True)
                yield Option(
                    name=setting.option or name,
                    path=here,
                    type=list[str] if setting.repeatable else _typed_as(field.annotation),
                    panel=setting.panel,
                    help=setting.help,
                    default=default if isinstance(default, str | int) and default is not False else None,
                    choices=_choices(field.annotation),
                )
        if inner is not None and inner is not PolicySpec:
            yield from _options(inner, (*here, "*") if inner is DataSpec else here)


def _typed_as(annotation: Any) -> Any:
    """The type that the command line parses: a number, a flag, or text that the field itself reads."""
    members = set(get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)) - {
        type(None)
    }
    if members == {int, float}:
        return float
    only = members.pop()
    return only if not members and only in (int, float, bool) else str


def _choices(annotation: Any) -> tuple[str, ...]:
    members = [m for m in (annotation, *get_args(annotation)) if get_origin(m) is Literal]
    only = {type(None), *members} >= set(get_args(annotation)) or get_origin(annotation) is Literal
    return get_args(members[0]) if members and only else ()


def _place_in_help(option: Option) -> tuple[int, int]:
    first = FIRST_OPTIONS.index(option.name) if option.name in FIRST_OPTIONS else 0
    return PANELS.index(option.panel), first


OPTIONS: tuple[Option, ...] = tuple(sorted(_options(RunConfig), key=_place_in_help))
"""Every option, in the order of `--help`."""
BY_NAME: dict[str, Option] = {option.name: option for option in OPTIONS}
