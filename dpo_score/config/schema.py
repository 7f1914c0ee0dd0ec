"""One run as data: pydantic models (frozen, unknown keys refused) for the pipeline file and the options.

Precedence: option > DPO_SCORE_* environment variable > file > default. Merging asks "was it set", never
"is it true", so `false` and 0 override. The resolved configuration is written to OUT/pipeline.yaml and is
itself valid input. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from dpo_score.errors import nearest

STATS = ("wpo", "entropy", "top1")
"""What `stats` may ask for of each answer."""
POLICY_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
SHARE = re.compile(r"(\d{1,6})/(\d{1,6})")


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
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    return () if value is None else value


def _as_date(value: Any) -> Any:
    """YAML reads a bare 2024-07-26 as a date."""
    return f"{value:%Y-%m-%d}" if isinstance(value, datetime.date) else value


Mapping_ = Annotated[dict[str, str], BeforeValidator(_as_map)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DataSpec(Spec):
    """One named set. `path`: file, folder, glob, fsspec URL or hub dataset `org/name[:config]`."""

    name: str
    path: str
    revision: str | None = None
    split: Names = ()
    format: str = "auto"
    map: Mapping_ = Field(default_factory=dict)
    pairing: Literal["best-worst", "all", "adjacent", "random"] = "best-worst"
    preference: Literal["better", "safer"] | None = None
    keep_ties: bool = False


class ModelSpec(Spec):
    """`model`: folder, hub id, `package:NAME/FILE`, or for the reference `columns:CHOSEN,REJECTED`."""

    model: str
    revision: str | None = None
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
    """`name`: a loss of losses.py, a weighted sum `0.8*sigmoid+1*sft`, or `path.py:function`.

    `beta` and `label_smoothing` null = the loss's own default.
    """

    name: str = "sigmoid"
    beta: float | None = None
    label_smoothing: float | None = None
    params: dict[str, float | int | bool | str] = Field(default_factory=dict)


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
    """How rows become token ids. Part of the text identity, every field."""

    tokenizer: str | None = None
    max_length: int | None = Field(None, ge=2)
    render: Literal["auto", "chat", "raw"] = "auto"
    prompt_split: Literal["auto", "marker", "trl"] = "auto"
    score: Literal["completion", "last", "all-assistant"] = "completion"
    truncation: Literal["keep_start", "keep_end", "reject"] = "keep_start"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    system: str | None = None
    system_mode: Literal["fill", "replace", "drop", "merge-user"] = "fill"
    date: Annotated[str | None, BeforeValidator(_as_date)] = None
    keep_nulls: bool = False


class ComputeSpec(Spec):
    """Where and how models run. `auto` is resolved once, before the first block, into the manifest."""

    engine: Literal["auto", "local", "ray"] = "auto"
    ray_address: str | None = None
    workers: int | None = Field(None, ge=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    batch_tokens: int | Literal["auto"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    path: Literal["auto", "fast", "plain"] = "auto"
    threads: int | None = Field(None, ge=1)
    stats: Names = ()
    per_token: bool = False
    device_map: str | None = None
    tensor_parallel: int = Field(1, ge=1)
    quantization: Literal["int8", "nf4"] | None = None

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
        if type(number) is not int or number < 1:
            raise ValueError("give the most tokens that a pack may hold as a whole number from 1 on, or auto")
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

    data: tuple[DataSpec, ...]
    reference: ModelSpec | None = None
    policies: tuple[PolicySpec, ...] = ()
    loss: LossSpec = LossSpec()
    text: TextSpec = TextSpec()
    compute: ComputeSpec = ComputeSpec()
    out: str | None = None
    cache_dir: str | None = None
    policy_base: str | None = None
    keep_columns: Names = ()
    slices: Names = ()
    emit_ids: bool = False
    limit: int | None = Field(None, ge=1)
    sample: int | None = Field(None, ge=1)
    seed: int = 0
    max_bad_rows: float | int | None = None
    blocks: str | None = None
    rewardbench: Literal["exact", "corrected"] | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    strict_env: bool = False
    log_to: Names = ()

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
