"""Which preference pairs to train on: every published rule over the same stored columns, and the controls. Pure.

In: the scored pairs of a run and a rule. Out: for every pair a score, a rank and the reason why it is kept or left
out. A rule is a function from pairs to one score a pair (higher is kept first, NaN has no score); what all rules have
in common (how many, shares per subset, length matching, whole prompts, near-duplicates, seeds) is in `select_pairs`.

Kept sets are nested (10 % lies within 20 %) and do not depend on the order of the rows: pairs are put in one order and
a prefix of it is kept. Papers contradict each other about the best rule, so nothing here recommends one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dpo_score.errors import ConfigError, nearest
from dpo_score.losses.ops import Floats, sigmoid

LENGTH_BINS = 10
"""Bins of equal count of chosen − rejected tokens, in each of which `length_match` keeps the same share."""
DUAL_CLIP = (0.01, 0.99)
"""Quantiles at which both margins of the `dual` rule are clipped before they become probabilities."""
MARGINS = ("margins_nats", "margins")
LOGPS = ("policy_chosen_logps", "policy_rejected_logps")
JUDGED = (*MARGINS, *LOGPS)
SQUARES = ("policy_chosen_log_sum_sq_probs", "policy_rejected_log_sum_sq_probs")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
TOKENS = ("chosen_tokens", "rejected_tokens")
EVERYTHING = (*JUDGED, *SQUARES, *REFERENCE, *TOKENS)
"""The stored columns that rules read of each judge, of the reference, and of the pair."""
UNREAD: Floats = np.empty(0)
"""In place of a column that no rule asked for: whoever computes with it fails."""


class Reason(StrEnum):
    """Why a row is in a selection or not. Every row of a run has exactly one."""

    KEPT = "kept"
    BELOW_CUT = "below_cut"
    """It has a score; pairs with higher scores filled the number asked for."""
    OUTSIDE_RULE = "outside_rule"
    """The rule does not admit it: outside the band, too few policies agree, the expression is false."""
    NO_VALUE = "no_value"
    """A value that the rule reads is null for this pair."""
    DUPLICATE_PROMPT = "duplicate_prompt"
    """A near-duplicate of a prompt that comes first in the order of the rule."""
    LABELLED_TIE = "labelled_tie"
    """The data says that neither answer is better."""
    NOT_SCORED = "not_scored"
    """A rejected row: it has no scores."""


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """What one policy says of every pair: float64 arrays of one length, NaN for null; UNREAD where no rule reads it.

    `margins_nats`: log-ratio difference; `margins`: times beta; `*_logps`: sums under the policy, in nats;
    `*_log_sum_sq_probs`: sums over tokens of log Σ_v p_v², or None where `--stats wpo` did not store them.
    """

    name: str
    margins_nats: Floats
    margins: Floats
    chosen_logps: Floats
    rejected_logps: Floats
    chosen_log_sum_sq_probs: Floats | None = None
    rejected_log_sum_sq_probs: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The scored pairs of a run, one element a pair.

    `prompts`: each pair's prompt, as a place in `prompt_keys` (digests); pairs of one prompt are kept or left out
    together. `subsets`: each pair's subset, as a place in `subset_names`, −1 without one. `*_tokens`: NaN for null;
    UNREAD where no rule reads them.
    `stored`: the columns that an expression or an outside score may name (a polars frame of as many rows).
    """

    row_ids: Sequence[str] | pl.Series
    prompts: NDArray[np.int64]
    prompt_keys: Sequence[str]
    subsets: NDArray[np.int64]
    subset_names: Sequence[str]
    chosen_tokens: Floats
    rejected_tokens: Floats
    tied: NDArray[np.bool_]
    judges: Sequence[Judge]
    stored: pl.DataFrame | None = None
    reference_chosen_logps: Floats | None = None
    reference_rejected_logps: Floats | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def length_difference(self) -> Floats:
        """Tokens of the chosen answer minus tokens of the rejected one."""
        return self.chosen_tokens - self.rejected_tokens


@dataclass(frozen=True, slots=True)
class Settings:
    """How a rule is applied. `keep`: pairs to keep, None for all that the rule admits.

    `per_token`: margins are divided by each answer's tokens; `scaled`: margins times beta instead of nats;
    `score_columns`: the outside scores of chosen and rejected, for `dual`; `duplicates`: for each pair the key of its
    group of near-duplicate prompts, of which one is kept.
    """

    keep: int | None = None
    per_token: bool = False
    scaled: bool = False
    by_subset: bool = False
    length_match: bool = False
    score_columns: tuple[str, str] | None = None
    duplicates: Sequence[str] | None = None
    seed: int = 0


# --- rules ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its name on the command line, what it keeps, who proposes it.

    `score` gives a score a pair, NaN where there is none; `reads` names what it reads of EVERYTHING; `admits`, where
    set, says which pairs may be kept at all; `columns`: other stored columns that it reads, by the user's names.
    """

    name: str
    keeps: str
    source: str
    score: Callable[[Candidates, Settings], Floats]
    reads: Callable[[Settings], tuple[str, ...]]
    admits: Callable[[Floats], NDArray[np.bool_]] | None = None
    columns: tuple[str, ...] = ()

    @property
    def is_filter(self) -> bool:
        """Whether the rule says by itself how many pairs it keeps."""
        return self.admits is not None


def parse_rule(text: str) -> Rule:
    """The rule that `--rule TEXT` names; what is no rule and not a single word is an expression over stored columns.

    Raises ConfigError for an unknown rule (with the nearest) and for values out of range.
    """
    name, _, argument = re.sub(r"\s", "", text).partition("=") if _looks_like_a_rule(text) else (text, "", "")
    if name in _PLAIN and not argument:
        return _PLAIN[name]
    if name == "margin:band":
        return _band(text, argument)
    if name in ("agree", "suspect"):
        return _voting(name, argument)
    if name == "all":
        raise ConfigError("--rule all compares the rules and keeps no pairs: name one rule to keep pairs by it")
    if re.fullmatch(r"[\w:-]*", text.strip()) or name in _PLAIN:
        column = f"; to keep pairs by a stored column alone, write it as a sum: '{text.strip()} + 0'"
        hint = column if re.fullmatch(r"[a-z_]+", text.strip()) else ""
        raise ConfigError(f"--rule {text}: {nearest(name, rule_names())}; `--rule all` compares them{hint}")
    return _expression(text)


def rule_names() -> list[str]:
    """The names of all rules, as they are written on the command line."""
    return [*_PLAIN, "margin:band=LOW,HIGH", "agree=K", "suspect", "suspect=K"]


def comparable_rules(candidates: Candidates, settings: Settings) -> list[Rule]:
    """The rules that can be applied to these pairs without further arguments, for a comparison side by side."""
    rules = [rule for name, rule in _PLAIN.items() if name != "dual" or settings.score_columns is not None]
    return [*rules, _voting("agree", ""), _voting("suspect", "")]


def _looks_like_a_rule(text: str) -> bool:
    return (
        re.match(r"\s*(margin:band|agree|suspect)\s*=[^=]", text) is not None
        or re.fullmatch(r"\s*[\w:-]+\s*", text) is not None
    )


def mean_margin(candidates: Candidates, settings: Settings) -> Floats:
    """The mean over policies of each pair's margin, in nats or times beta, of sums or of means per token."""
    return _mean([_margin(candidates, judge, settings) for judge in candidates.judges])


def _margin_columns(settings: Settings) -> tuple[str, ...]:
    """What `_margin` reads."""
    if not settings.per_token:
        return ("margins",) if settings.scaled else ("margins_nats",)
    return (*LOGPS, *REFERENCE, *TOKENS, *(MARGINS if settings.scaled else ()))


def _margin(candidates: Candidates, judge: Judge, settings: Settings) -> Floats:
    if not settings.per_token:
        return judge.margins if settings.scaled else judge.margins_nats
    if candidates.reference_chosen_logps is None or candidates.reference_rejected_logps is None:
        raise ConfigError(
            f"margins per token need the reference's log-probs, and there are no {' and '.join(REFERENCE)}"
        )
    chosen = judge.chosen_logps - candidates.reference_chosen_logps
    rejected = judge.rejected_logps - candidates.reference_rejected_logps
    chosen, rejected = chosen / _positive(candidates.chosen_tokens), rejected / _positive(candidates.rejected_tokens)
    beta = _ratio(judge.margins, judge.margins_nats) if settings.scaled else 1.0
    return (chosen - rejected) * beta


def _ratio(scaled: Floats, plain: Floats) -> float:
    """The factor between two columns that differ by it alone: beta."""
    there = np.flatnonzero(np.isfinite(scaled) & np.isfinite(plain) & (plain != 0.0))
    return float(scaled[there[0]] / plain[there[0]]) if len(there) else 1.0


def _low_margin(candidates: Candidates, settings: Settings) -> Floats:
    return -mean_margin(candidates, settings)


def _difficulty(candidates: Candidates, settings: Settings) -> Floats:
    return -np.abs(mean_margin(candidates, settings))


def _dual(candidates: Candidates, settings: Settings) -> Floats:
    """P·Q / (P·Q + (1 − P)(1 − Q)): the implicit margin and the outside one, each clipped and mapped to [0, 1]."""
    if settings.score_columns is None:
        raise ConfigError("--rule dual needs the outside scores of both answers: --score-columns CHOSEN,REJECTED")
    chosen, rejected = (stored_column(candidates, name) for name in settings.score_columns)
    implicit, outside = _as_probability(mean_margin(candidates, settings)), _as_probability(chosen - rejected)
    both, neither = implicit * outside, (1.0 - implicit) * (1.0 - outside)
    with np.errstate(invalid="ignore"):
        fused = both / (both + neither)
    return np.where((both + neither) == 0.0, 0.5, fused)


def _as_probability(margin: Floats) -> Floats:
    known = margin[np.isfinite(margin)]
    if not len(known):
        return np.full(len(margin), np.nan)
    low, high = np.quantile(known, DUAL_CLIP)
    scaled: Floats = (np.clip(margin, low, high) - low) / (high - low if high > low else 1.0)
    return scaled


def _on_policy(candidates: Candidates, settings: Settings) -> Floats:
    """The WPO weight w(chosen)·w(rejected) as its logarithm; where its statistic is not stored, log-probs per token."""
    return _mean([closeness(candidates, judge) for judge in candidates.judges])


def closeness(candidates: Candidates, judge: Judge) -> Floats:
    """How likely a policy is to write both answers: nats per token, the sum over the two sides.

    With `--stats wpo`: log w_c + log w_r, w = exp(mean over tokens of (log p − log Σ_v p_v²)) (arXiv 2406.11827,
    sampled alignment). Without: mean log p of each side.
    """
    chosen = judge.chosen_logps / _positive(candidates.chosen_tokens)
    rejected = judge.rejected_logps / _positive(candidates.rejected_tokens)
    if judge.chosen_log_sum_sq_probs is None or judge.rejected_log_sum_sq_probs is None:
        return chosen + rejected
    aligned = judge.chosen_log_sum_sq_probs / _positive(candidates.chosen_tokens)
    return chosen - aligned + rejected - judge.rejected_log_sum_sq_probs / _positive(candidates.rejected_tokens)


def _random(candidates: Candidates, settings: Settings) -> Floats:
    return _draws(candidates, settings.seed)[candidates.prompts]


def _draws(candidates: Candidates, seed: int) -> Floats:
    """A number in [0, 1) for each prompt, by its key and the seed: the same in any set of pairs and any order."""

    def draw(key: str) -> float:
        return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big") / 2.0**64

    return np.fromiter((draw(key) for key in candidates.prompt_keys), np.float64, len(candidates.prompt_keys))


def label_probability(candidates: Candidates, votes: int, against: bool = False) -> Floats:
    """The probability of the label (or of its opposite) that at least `votes` policies give: their votes-th largest.

    σ(margin) of each policy is its probability that the label is right (Bradley–Terry). Over 0.5 exactly where at
    least `votes` policies rank the pair so.
    """
    chances = np.stack([sigmoid(-judge.margins if against else judge.margins) for judge in candidates.judges])
    known = np.where(np.isfinite(chances), chances, -np.inf)
    found: Floats = np.sort(known, axis=0)[::-1][votes - 1]
    return np.where(np.isfinite(found), found, np.nan)


def _voting(name: str, argument: str) -> Rule:
    against = name == "suspect"
    if argument and not re.fullmatch(r"[1-9]\d*", argument):
        raise ConfigError(f"--rule {name}={argument}: K is a whole number of policies, from 1")

    def score(candidates: Candidates, settings: Settings) -> Floats:
        votes = int(argument) if argument else len(candidates.judges)
        if votes > len(candidates.judges):
            there = f"{len(candidates.judges)} policies" if len(candidates.judges) > 1 else "one policy"
            raise ConfigError(f"--rule {name}={argument}: the pairs are judged by {there}")
        return label_probability(candidates, votes, against)

    how_many = f"at least {argument}" if argument else "all"
    return Rule(
        f"{name}={argument}" if argument else name,
        f"pairs that {how_many} of the policies rank {'against' if against else 'with'} their label",
        "the label audit; confident learning, arXiv 1911.00068",
        score,
        lambda settings: ("margins",),
        lambda values: values > 0.5,
    )


def _band(text: str, argument: str) -> Rule:
    found = re.fullmatch(r"(-?[\d.eE+-]+|-?inf),(-?[\d.eE+-]+|-?inf)", argument)
    try:
        low, high = (float(part) for part in found.groups()) if found else (0.0, -1.0)
    except ValueError:
        low, high = 0.0, -1.0
    if not low <= high:
        raise ConfigError(f"--rule {text}: write margin:band=LOW,HIGH with two numbers, the smaller one first")
    return Rule(
        f"margin:band={low:g},{high:g}",
        f"pairs whose margin lies between {low:g} and {high:g}, the largest first",
        "the two tails left out, as arXiv 2502.14560 and 2508.04149 each argue for one of them",
        mean_margin,
        _margin_columns,
        lambda values: (values >= low) & (values <= high),
    )


def _expression(text: str) -> Rule:
    """A polars SQL expression: true or false says which pairs are kept, a number is a score. No code is run."""
    try:
        expression = pl.sql_expr(text)
        columns = tuple(dict.fromkeys(expression.meta.root_names()))
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise ConfigError(
            f"--rule {text}: neither a rule ({', '.join(rule_names())}) nor an expression over stored "
            f"columns: {_first_line(error)}"
        ) from error

    def score(candidates: Candidates, settings: Settings) -> Floats:
        for name in columns:
            stored_column(candidates, name)
        assert candidates.stored is not None
        try:
            column = candidates.stored.select(expression.alias("rule"))["rule"]
        except pl.exceptions.PolarsError as error:
            raise ConfigError(f"--rule {text}: {_first_line(error)}") from error
        if not (column.dtype.is_numeric() or column.dtype == pl.Boolean) or len(column) != len(candidates):
            raise ConfigError(
                f"--rule {text}: give one number (a score) or one true/false (a filter) for each pair; "
                f"this gives {len(column):,} values of type {column.dtype}"
            )
        if column.dtype.is_float() and column.is_nan().any():
            first = candidates.row_ids[int(column.is_nan().arg_max() or 0)]
            raise ConfigError(
                f"--rule {text}: NaN for {int(column.is_nan().sum()):,} pairs, the first is row {first}; "
                "write an expression that gives a number or null"
            )
        filters.append(column.dtype == pl.Boolean)
        return column.cast(pl.Float64).fill_null(float("nan")).to_numpy().astype(np.float64)

    filters: list[bool] = []

    def admits(values: Floats) -> NDArray[np.bool_]:
        return values == 1.0 if filters[-1] else np.ones(len(values), np.bool_)

    return Rule(text, f"pairs by the expression {text}", "your own", score, lambda settings: (), admits, columns)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


_PLAIN: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "margin:high",
            "the largest margins: what the policies already rank clearly as labelled",
            "arXiv 2502.14560 (margin maximisation), implicit margin alone",
            mean_margin,
            _margin_columns,
        ),
        Rule(
            "margin:low",
            "the smallest margins, wrongly ranked pairs first",
            "the signed implicit reward gap; compare arXiv 2508.04149",
            _low_margin,
            _margin_columns,
        ),
        Rule(
            "difficulty",
            "the smallest gaps between the two implicit rewards, whichever is larger",
            "arXiv 2508.04149 (DPO implicit reward gap)",
            _difficulty,
            _margin_columns,
        ),
        Rule(
            "dual",
            "large implicit and large outside margins together",
            "arXiv 2502.14560 (Bayesian aggregation of two margins; clipped here at the 1st and 99th percentile)",
            _dual,
            _margin_columns,
        ),
        Rule(
            "on-policy",
            "answers that the policies are likely to write themselves",
            "arXiv 2406.11827 (WPO)",
            _on_policy,
            lambda settings: (*LOGPS, *SQUARES, *TOKENS),
        ),
        Rule("random", "pairs by chance: the control", "none", _random, lambda settings: ()),
    )
}


# --- choosing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """One element a pair: its score (NaN without), its rank (1 is kept first, 0 without), its reason.

    `threshold`: the lowest score that is kept (of any subset or length bin), None where nothing is.
    """

    rule: Rule
    scores: Floats
    ranks: NDArray[np.int64]
    reason_codes: NDArray[np.uint8]
    threshold: float | None = field(default=None)

    @property
    def reasons(self) -> NDArray[np.str_]:
        """The reason of each pair in words."""
        return self.reasons_of(slice(None))

    def reasons_of(self, pairs: slice) -> NDArray[np.str_]:
        """The reasons of some pairs: words take more room than all else that is known of a million of them."""
        return _REASONS[self.reason_codes[pairs]]

    @property
    def kept(self) -> NDArray[np.bool_]:
        return np.asarray(self.reason_codes == _code(Reason.KEPT), np.bool_)

    def counts(self) -> dict[str, int]:
        """How many pairs have each reason, in the order of Reason; reasons without pairs are left out."""
        counts = np.bincount(self.reason_codes, minlength=len(_REASONS)).tolist()
        return {str(reason): count for reason, count in zip(_REASONS, counts, strict=True) if count}


_REASONS = np.array([str(reason) for reason in Reason])


def _code(reason: Reason) -> int:
    return list(Reason).index(reason)


def select_pairs(candidates: Candidates, rule: Rule, settings: Settings) -> Selection:
    """Apply a rule: score, admit, put prompts in order, keep a prefix.

    The unit is a prompt with all its admitted pairs; its score is their mean. Units come by score, then by a draw from
    prompt and seed. With `by_subset` or `length_match` they come by their relative rank within their subset and bin of
    length difference (the i-th of n at (i − ½)/n), so that every prefix keeps the same share of each, within one unit.
    Raises ConfigError when fewer pairs are left than `keep` asks for.
    """
    scores = rule.score(candidates, settings)
    reasons = np.full(len(candidates), _code(Reason.BELOW_CUT), np.uint8)
    reasons[~np.isfinite(scores)] = _code(Reason.NO_VALUE)
    if rule.admits is not None:
        with np.errstate(invalid="ignore"):
            reasons[np.isfinite(scores) & ~rule.admits(scores)] = _code(Reason.OUTSIDE_RULE)
    reasons[candidates.tied] = _code(Reason.LABELLED_TIE)

    ranked, sizes = _in_order(candidates, scores, np.flatnonzero(reasons == _code(Reason.BELOW_CUT)), settings)
    if settings.duplicates is not None:
        first = _first_of_each(ranked[np.cumsum(sizes) - sizes], settings.duplicates)
        reasons[ranked[~np.repeat(first, sizes)]] = _code(Reason.DUPLICATE_PROMPT)
        ranked, sizes = ranked[np.repeat(first, sizes)], sizes[first]
    count = len(ranked) if settings.keep is None else _prefix(sizes, settings.keep, rule, len(candidates))
    kept = ranked[:count]
    reasons[kept] = _code(Reason.KEPT)
    ranks = np.zeros(len(candidates), np.int64)
    ranks[ranked] = np.arange(1, len(ranked) + 1)
    return Selection(rule, scores, ranks, reasons, float(scores[kept].min()) if len(kept) else None)


def _prefix(sizes: NDArray[np.int64], keep: int, rule: Rule, pairs: int) -> int:
    """How many pairs the first units have together that make at most `keep`."""
    total = int(sizes.sum())
    if keep > total:
        raise ConfigError(
            f"--keep {keep:,}: the rule {rule.name} has {total:,} pairs to choose from, of {pairs:,} scored ones; "
            f"ask for {total:,} or fewer"
        )
    together = np.cumsum(sizes)
    units = int(np.searchsorted(together, keep, side="right"))
    if units == 0 and keep > 0:
        raise ConfigError(
            f"--keep {keep:,}: the first prompt alone has {int(sizes[0]):,} pairs; ask for as many or more"
        )
    return int(together[units - 1]) if units else 0


def _in_order(
    candidates: Candidates, scores: Floats, rows: NDArray[np.int64], settings: Settings
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows in units of one prompt each, first the one to keep first, within a unit by score; the units' sizes."""
    if not len(rows):
        return rows, rows
    sizes = np.bincount(candidates.prompts[rows], minlength=len(candidates.prompt_keys))
    prompts = np.flatnonzero(sizes)
    unit_of = (np.cumsum(sizes > 0) - 1)[candidates.prompts[rows]]
    sizes = sizes[prompts]
    score = np.bincount(unit_of, scores[rows]) / sizes
    best_first = np.lexsort((_draws(candidates, settings.seed + 1)[prompts], -score))
    if settings.by_subset or settings.length_match:
        stratum, weight = _strata(candidates, rows, unit_of, sizes, settings)
        best_first = _evenly(best_first, stratum, sizes, weight)
    place = np.empty(len(prompts), np.int64)
    place[best_first] = np.arange(len(prompts))
    by_unit = np.lexsort((-scores[rows], place[unit_of]))
    return rows[by_unit], sizes[best_first]


def _strata(
    candidates: Candidates,
    rows: NDArray[np.int64],
    unit_of: NDArray[np.int64],
    sizes: NDArray[np.int64],
    settings: Settings,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The stratum of each unit, and how many rows of the whole set (labelled ties left out) each stratum has."""
    whole = np.flatnonzero(~candidates.tied)
    code = np.zeros(len(candidates), np.int64)
    if settings.by_subset:
        code = candidates.subsets + 1
    if settings.length_match:
        difference = np.nan_to_num(candidates.length_difference)
        edges = np.unique(np.quantile(difference[whole], np.linspace(0.0, 1.0, LENGTH_BINS + 1)[1:-1]))
        code = code * LENGTH_BINS + np.searchsorted(edges, difference, side="left")
    weight = np.bincount(code[whole], minlength=int(code.max()) + 1).astype(np.float64)
    first = np.full(len(sizes), -1, np.int64)
    first[unit_of[::-1]] = code[rows][::-1]  # a prompt whose pairs differ belongs to the stratum of its first pair
    return first, weight


def _evenly(
    best_first: NDArray[np.int64], stratum: NDArray[np.int64], sizes: NDArray[np.int64], weight: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Units by their relative rank in their stratum: a prefix takes of each stratum in proportion to `weight`.

    This is Webster's apportionment, which is monotone: a longer prefix never gives a stratum less.
    """
    strata, counts = stratum[best_first], sizes[best_first]
    by_stratum = np.argsort(strata, kind="stable")
    running = np.cumsum(counts[by_stratum])
    starts = np.flatnonzero(np.r_[True, np.diff(strata[by_stratum]) != 0])
    before = np.repeat(np.r_[0, running][starts], np.diff(np.r_[starts, len(running)]))
    middle = np.empty(len(best_first), np.float64)
    middle[by_stratum] = (running - counts[by_stratum] / 2.0 - before) / weight[strata[by_stratum]]
    return best_first[np.argsort(middle, kind="stable")]


def _first_of_each(rows: NDArray[np.int64], keys: Sequence[str]) -> NDArray[np.bool_]:
    """Whether the near-duplicate group of each row, in the order given, has not come before."""
    seen: set[str] = set()
    found = np.zeros(len(rows), np.bool_)
    for place, row in enumerate(rows.tolist()):
        found[place] = keys[row] not in seen
        seen.add(keys[row])
    return found


# --- helpers --------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[Floats]) -> Floats:
    """The mean over policies; NaN where one of them has no value, so that a pair is judged by all or by none."""
    return np.asarray(np.mean(np.stack(values), axis=0), np.float64)


def _positive(tokens: Floats) -> Floats:
    return np.where(tokens > 0, tokens, np.nan)


def stored_column(candidates: Candidates, name: str) -> Floats:
    """A stored column as float64, NaN for null or for what is no number. Raises ConfigError when it is not stored."""
    there = [] if candidates.stored is None else candidates.stored.columns
    if candidates.stored is None or name not in there:
        raise ConfigError(
            f"column {name!r} is not stored: {nearest(name, there)}; `dpo-score run --keep-columns {name}` stores a "
            "column of the data"
        )
    column = candidates.stored[name]
    if column.dtype.is_numeric() or column.dtype == pl.Boolean:
        return column.cast(pl.Float64).fill_null(float("nan")).to_numpy().astype(np.float64)
    return np.full(len(candidates), np.nan)


def describe(rule: Rule) -> dict[str, Any]:
    """A rule in words, for JSON."""
    return {"rule": rule.name, "keeps": rule.keeps, "source": rule.source}
