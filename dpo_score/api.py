"""The package as a library: the commands as functions, and `score` for pairs and models that are in memory.

Settings are those of the command line by their names: `max_length=512`, `loss_param=["ld_alpha=0.5"]`. A mistake raises
`dpo_score.errors.DpoScoreError`. Importing this file imports neither torch nor transformers.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias, TypedDict, TypeVar, Unpack

from dpo_score.config.hints import meant_by
from dpo_score.config.load import load_config
from dpo_score.config.schema import BY_NAME, RunConfig
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, UsageError, nearest
from dpo_score.storage.cache.location import cache_folder

if TYPE_CHECKING:
    import polars as pl

    from dpo_score.export.precompute import PrecomputeOutcome

__all__ = ["RunResult", "precompute", "rescore", "run", "score", "select"]

PathLike: TypeAlias = "str | os.PathLike[str]"
Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class ScoreSettings(TypedDict, total=False):
    """What `score` takes besides pairs and models; `run` and `precompute` take the same. See `RunSettings`."""

    loss: str
    beta: float
    label_smoothing: float
    loss_param: str | Sequence[str]
    max_length: int
    truncation: Literal["keep_start", "keep_end", "reject"]
    render: Literal["auto", "chat", "raw"]
    chat_template: str
    chat_template_kwargs: Mapping[str, Any] | str
    system: str
    system_mode: Literal["fill", "replace", "drop", "merge-user"]
    prompt_split: Literal["auto", "marker", "trl"]
    score: Literal["completion", "last", "all-assistant"]
    date: str
    keep_nulls: bool
    format: str
    map: Mapping[str, str] | str
    pairing: Literal["best-worst", "all", "adjacent", "random"]
    preference: Literal["better", "safer"]
    ignore_columns: str | Sequence[str]
    media_root: PathLike
    keep_ties: bool
    seed: int
    reference_revision: str
    policy_base: str
    quantization: Literal["int8", "nf4"]
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    device: str
    device_map: str
    tensor_parallel: int
    batch_tokens: int | str
    compile: Literal["auto", "on", "off"]
    path: Literal["auto", "fast", "plain"]
    threads: int
    text_processes: int
    per_token: bool
    stats: str | Sequence[str]
    keep_columns: str | Sequence[str]
    cache_dir: PathLike
    allow_pickle: bool
    trust_remote_code: bool


class RunSettings(ScoreSettings, total=False):
    """Every setting of a run but data, reference, policy and out; `dpo-score run --help` says what each does."""

    tokenizer: PathLike
    limit: int
    sample: int
    split: str | Sequence[str]
    data_revision: str
    max_bad_rows: float
    engine: Literal["auto", "local", "ray"]
    ray_address: str
    workers: int
    blocks: str
    slice: str | Sequence[str]
    emit_ids: bool
    rewardbench: Literal["exact", "corrected"]
    log_to: str | Sequence[str]
    strict_env: bool


OF_RUNS = frozenset({*RunSettings.__annotations__, "data", "out"} - {*ScoreSettings.__annotations__, "tokenizer"})
"""Settings that say something of files, folders or workers: pairs in memory have none."""
LISTS = ("data", "policy", "loss_param", "slice")


def _with_signature(settings: type[Any]) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """Let `help` and completion show each setting of a function that takes `**settings`."""

    def shown(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        keyword = inspect.Parameter.KEYWORD_ONLY
        found = inspect.signature(function)
        own = [p for p in found.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, keyword, default=None, annotation=getattr(kind, "__forward_arg__", kind))
            for name, kind in settings.__annotations__.items()
        ]
        function.__signature__ = found.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return shown


@dataclass(frozen=True, slots=True, repr=False)
class RunResult:
    """What a run wrote. In a notebook it shows the table of policies, the conclusion and the main chart.

    `out`: the folder. `summary`: what summary.json holds, per policy, data set and subset. `failures`: policy → why it
    was not scored.
    """

    out: str
    summary: Mapping[str, Any]
    failures: Mapping[str, str] = field(default_factory=dict)
    _raise: Callable[[], None] = field(default=lambda: None, compare=False)

    @property
    def policies(self) -> list[str]:
        """Names of the policies that were scored."""
        return list(self.summary["policies"])

    @property
    def report(self) -> Path | None:
        """The HTML report, or None where none was written (more than 50,000 rows: `dpo-score report` writes it)."""
        path = Path(self.out) / "report.html"
        return path if path.is_file() else None

    def scores(self, policy: str | None = None) -> pl.DataFrame:
        """Every pair with its log-probs, rewards, margin and loss. `policy` may be left out where there is one."""
        import polars as pl

        from dpo_score.results.run_folder import open_out, parts

        if policy is None and len(self.policies) == 1:
            policy = self.policies[0]
        if policy not in self.policies:
            raise UsageError(f"scores({policy!r}): no such policy was scored; {nearest(str(policy), self.policies)}")
        store, _ = open_out(self.out)
        tables = [pl.DataFrame(pl.from_arrow(store.read_table(name))) for name in parts(store, policy)]
        return pl.concat(tables)

    def raise_failures(self) -> None:
        """PolicyFailedError where a policy was not scored, BadRowsError for more rejects than `max_bad_rows`."""
        self._raise()

    def __repr__(self) -> str:
        cells = {name: policy["overall"] for name, policy in self.summary["policies"].items()}
        shown = [
            f"{name}: {'-' if (value := cell['accuracy']['value']) is None else f'{value:.1%}'} of {cell['scored']}"
            for name, cell in cells.items()
        ]
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"RunResult({self.out!r}, accuracy {', '.join(shown[:6])}{', …' if len(shown) > 6 else ''}{failed})"

    def _repr_html_(self) -> str:
        from dpo_score.report.notebook import run_html

        return run_html(self.out, self.summary, self.failures)


@_with_signature(RunSettings)
def run(
    pipeline: PathLike | None = None,
    *,
    data: Any = None,
    reference: PathLike | None = None,
    policy: PathLike | Sequence[str] | Mapping[str, PathLike] | None = None,
    out: PathLike | None = None,
    restart: bool = False,
    quiet: bool = True,
    **settings: Unpack[RunSettings],
) -> RunResult:
    """`dpo-score run`: score every policy into `out`; the same call again resumes.

    Args:
        pipeline: a pipeline file; arguments override it.
        data: a path, "NAME=PATH", a list of such, a table (pandas, polars, Arrow, datasets.Dataset, dicts), or a
            mapping of names to any of these. A table is kept as a file of the cache, under its content.
        reference: a folder, hub id, BASE+ADAPTER, or "columns:A,B".
        policy: "NAME=MODEL", a list of such, or a mapping of names to models.
        out: folder for the results. restart: throw away what it holds. quiet: say only warnings.

    Returns: RunResult: `.summary`, `.scores("policy")`, `.report`, `.failures`.
    Raises: UsageError and its kinds for a request that cannot be carried out, StorageError, Interrupted.

    >>> import tempfile, transformers
    >>> folder = tempfile.mkdtemp()
    >>> shape = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    >>> model.save_pretrained(f"{folder}/model")
    >>> pairs = [{"prompt_input_ids": [1, 5], "chosen_input_ids": [7, 2], "rejected_input_ids": [9, 2]}]
    >>> result = run(
    ...     data=pairs, reference=f"{folder}/model", policy={"same": f"{folder}/model"}, out=f"{folder}/out",
    ...     cache_dir=folder,
    ... )
    >>> result.scores("same")["margins"].to_list()
    [0.0]
    """
    from dpo_score.engine.executors import choose

    given = {"data": data, "reference": reference, "policy": policy, "out": out}
    config = configured(pipeline, {**given, **settings})
    found = choose.run(config, Progress(quiet), restart=restart)
    return RunResult(found.out, found.summary, found.failures, found.raise_failures)


@_with_signature(RunSettings)
def precompute(
    pipeline: PathLike | None = None,
    *,
    data: Any = None,
    reference: PathLike | None = None,
    out: PathLike | None = None,
    to: Literal["trl", "ids"] = "trl",
    rename: str | None = None,
    restart: bool = False,
    quiet: bool = True,
    **settings: Unpack[RunSettings],
) -> PrecomputeOutcome:
    """`dpo-score precompute`: fill the cache with reference log-probs and, with `out`, write the data set with them.

    Args:
        pipeline, data, reference, restart, quiet: as for `run`.
        to: whose columns: "trl" (texts as they were scored) or "ids" (token ids). rename: "OLD=NEW,…", columns.

    Returns: an object with `.out` and `.summary` (rows, scored, rejected by code, splits).
    Raises: as `run`.

    >>> import tempfile, transformers
    >>> folder = tempfile.mkdtemp()
    >>> shape = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(f"{folder}/model")
    >>> pairs = [{"prompt_input_ids": [1, 5], "chosen_input_ids": [7, 2], "rejected_input_ids": [9, 2]}]
    >>> made = precompute(
    ...     data=pairs, reference=f"{folder}/model", out=f"{folder}/out", to="ids", cache_dir=folder
    ... )
    >>> made.summary["scored"]
    1
    """
    from dpo_score.export import precompute as stage

    stage.refuse_unread_options(settings)
    config = configured(pipeline, {"data": data, "reference": reference, "out": out, **settings})
    return stage.precompute(config, Progress(quiet), restart=restart, to=to, rename=rename)


def configured(pipeline: PathLike | None, given: Mapping[str, Any]) -> RunConfig:
    """The configuration that a command line with these options gives; options that are None are not set."""
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in BY_NAME:
            raise ConfigError(f"unknown option {name!r}: {meant_by(name, BY_NAME)}")
    for name in ("data", "policy"):
        if name in options:
            options[name] = _assignments(options[name], options.get("cache_dir") if name == "data" else None)
    for name, value in options.items():
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        options[name] = [plain] if name in LISTS and isinstance(plain, str) else plain
    return load_config(os.fspath(pipeline) if pipeline is not None else None, options)


def _assignments(given: Any, cache_dir: PathLike | None) -> list[str]:
    """NAME=PATH strings, of a path, a list or a mapping of names; tables become files."""
    if isinstance(given, str | os.PathLike):
        return [os.fspath(given)]
    if isinstance(given, Mapping):
        return [f"{name}={_path_of(value, cache_dir)}" for name, value in given.items()]
    if isinstance(given, Sequence) and all(isinstance(item, str | os.PathLike) for item in given):
        return [os.fspath(item) for item in given]
    return [f"pairs={_path_of(given, cache_dir)}"]


def _path_of(given: Any, cache_dir: PathLike | None) -> str:
    """A path as it is; a table as a file of the cache that is named after its content."""
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    from dpo_score.engine.in_memory import kept_table

    return kept_table(given, cache_folder(None if cache_dir is None else os.fspath(cache_dir)))


def rescore(
    out: str | Path,
    loss: str | Iterable[str] = "sigmoid",
    beta: float | Iterable[float] | None = None,
    *,
    label_smoothing: float | None = None,
    loss_param: Sequence[str] = (),
    reference_policy: str | None = None,
) -> dict[str, Any]:
    """`dpo-score rescore`: every loss × beta over the log-probs that `out` holds, without a model.

    Args:
        loss, beta: one or several; each loss is computed with each beta. label_smoothing, loss_param: of all of them.
        reference_policy: a scored policy that takes the reference's place.

    Returns: strict JSON; `rows` holds one dictionary per policy, loss and beta. The grid is also written to `out`.
    Raises: UsageError and its kinds.

    >>> import tempfile, transformers
    >>> folder = tempfile.mkdtemp()
    >>> shape = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(f"{folder}/model")
    >>> pairs = [{"prompt_input_ids": [1, 5], "chosen_input_ids": [7, 2], "rejected_input_ids": [9, 2]}]
    >>> models = {"reference": f"{folder}/model", "policy": {"same": f"{folder}/model"}}
    >>> result = run(data=pairs, out=f"{folder}/out", cache_dir=folder, **models)
    >>> [(row["loss_name"], row["beta"]) for row in rescore(result.out, ["sigmoid", "ipo"], 0.5)["rows"]]
    [('sigmoid', 0.5), ('ipo', 0.5)]
    """
    from dpo_score.results import rescore as grid

    losses = loss if isinstance(loss, str) else ",".join(loss)
    betas = [beta] if isinstance(beta, int | float) else beta
    listed = None if betas is None else ",".join(str(value) for value in betas)
    return grid.rescore(str(out), losses, listed, label_smoothing, loss_param, reference_policy)


def select(
    source: str | Path | pl.DataFrame,
    *,
    rule: str,
    keep: int | str | None = None,
    policies: str | Sequence[str] | None = None,
    per_token: bool = False,
    scaled: bool = False,
    by_subset: bool = False,
    length_match: bool = False,
    dedupe: bool = False,
    score_columns: tuple[str, str] | None = None,
    folds: tuple[str, Mapping[str, str]] | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """Which pairs a rule would keep for training: one row for every row of `source`, and why it is in or out.

    Args:
        source: the folder of a run, or a frame of its score columns (as `score` returns them).
        rule: "margin:high", "difficulty", "random", … or an expression over the columns, as for `dpo-score select`.
        keep: how many pairs, or a share of the scored ones such as "10%"; None with a rule that is a filter.
        policies: those that judge (default: all). folds: a column and {fold: the policy that did not train on it}.

    Returns: a polars frame with row_id, select_score (higher is kept first), select_rank (1 first), kept, reason, code.
    Raises: UsageError, ConfigError, in one sentence.

    >>> import polars as pl
    >>> margins = pl.DataFrame({"margins_nats": [3.0, -1.0, 2.0], "margins": [0.3, -0.1, 0.2]})
    >>> scores = margins.with_columns(policy_chosen_logps=-1.0, policy_rejected_logps=-2.0)
    >>> select(scores, rule="margin:high", keep=2)["kept"].to_list()
    [True, False, True]
    """
    from dpo_score.results import select as selecting

    request = selecting.Request(
        rule=rule,
        keep=keep,
        policies=policies.split(",") if isinstance(policies, str) else policies,
        per_token=per_token,
        scaled=scaled,
        by_subset=by_subset,
        length_match=length_match,
        dedupe=dedupe,
        score_columns=score_columns,
        folds=selecting.Folds(folds[0], {str(fold): name for fold, name in folds[1].items()}) if folds else None,
        seed=seed,
    )
    return selecting.select(os.fspath(source) if isinstance(source, str | Path) else source, request).frame


@_with_signature(ScoreSettings)
def score(
    pairs: Any,
    *,
    policy: Any,
    reference: Any = None,
    tokenizer: Any = None,
    quiet: bool = True,
    **settings: Unpack[ScoreSettings],
) -> pl.DataFrame:
    """Score columns of `pairs`, in their order: one row a pair, null where it could not be scored (see `status`).

    Args:
        pairs: a path, or a table: pandas, polars, Arrow, a datasets.Dataset or dicts, in any form of
            `dpo-score formats`.
        policy, reference: a folder, hub id or BASE+ADAPTER, or a loaded model, which is left as it was found; reference
            "base" is a loaded PEFT policy without its adapters. policy may be a mapping, name → model: then the first
            column of the result is `policy`.
        tokenizer: a loaded one or a name (default: the reference's, else the policy's).

    Returns: a polars frame; log-probs are sums over an answer, in nats, float64.
    Raises: UsageError and its kinds.

    >>> import transformers
    >>> shape = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    >>> pairs = [{"prompt_input_ids": [1, 5], "chosen_input_ids": [7, 2], "rejected_input_ids": [9, 2]}]
    >>> score(pairs, policy=model, reference=model)["margins"].to_list()
    [0.0]
    """
    import polars as pl

    with tempfile.TemporaryDirectory(prefix="dpo-score-") as folder:
        found = _scored(pairs, policy, reference, tokenizer, quiet, dict(settings), Path(folder))
    frames = {name: pl.DataFrame(pl.from_arrow(table)) for name, table in found.items()}
    if not isinstance(policy, Mapping):
        return frames["policy"]
    named = [frame.select(pl.lit(name).alias("policy"), pl.all()) for name, frame in frames.items()]
    return pl.concat(named, how="diagonal_relaxed")


def _scored(
    pairs: Any, policy: Any, reference: Any, tokenizer: Any, quiet: bool, options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    from dpo_score.engine.in_memory import loaded_models, scored_tables, written

    _refuse_options_of_runs(options)
    policies = dict(policy) if isinstance(policy, Mapping) else {"policy": policy}
    loaded = loaded_models(policies, reference)
    settings = {
        **options,
        "data": [f"pairs={os.fspath(pairs) if isinstance(pairs, str | os.PathLike) else written(pairs, folder)}"],
        "policy": [f"{name}={'held' if name in loaded else os.fspath(model)}" for name, model in policies.items()],
        **({"reference": os.fspath(reference)} if reference is not None and "" not in loaded else {}),
        **({"tokenizer": os.fspath(tokenizer)} if isinstance(tokenizer, str | Path) else {}),
    }
    config = configured(None, settings)
    if config.compute.tensor_parallel > 1:
        raise ConfigError("score computes in one process: for tensor_parallel, write the pairs to a file and use run")
    own_tokenizer = None if isinstance(tokenizer, str | Path) else tokenizer
    return scored_tables(config, Progress(quiet), folder, loaded, own_tokenizer)


def _refuse_options_of_runs(options: Mapping[str, Any]) -> None:
    for name in OF_RUNS & {name for name, value in options.items() if value is not None}:
        raise ConfigError(
            f"score() takes no {name!r}, which says something of files, folders or workers: leave it out (a part of "
            "the pairs is given by giving that part), or call dpo_score.run on a file"
        )
