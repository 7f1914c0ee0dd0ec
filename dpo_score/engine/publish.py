"""After a run: the page for people, and trackers. Neither can fail the run; what goes wrong is said."""

from __future__ import annotations

from dpo_score.engine.context import RunContext
from dpo_score.engine.plan import RunPlan
from dpo_score.errors import UsageError
from dpo_score.report.build import write_report
from dpo_score.report.trackers import log_run, tensorboard_folder

REPORT_ROWS = 50_000
"""Pairs up to which a run writes its report by itself: beyond, memory would grow with the rows."""


def publish(context: RunContext, plan: RunPlan) -> None:
    """OUT/report.html, and --log-to."""
    out = plan.config.out or ""
    if plan.rows.wanted <= REPORT_ROWS:
        _report(context, out)
    else:
        context.progress.say(f"no report for more than {REPORT_ROWS:,} rows unasked: dpo-score report {out}")
    if "tensorboard" in plan.config.log_to:
        context.progress.say(f"TensorBoard: tensorboard --logdir {tensorboard_folder(out)}")
    for problem in log_run(plan.config.log_to, context.store, out) if plan.config.log_to else ():
        context.progress.warn(problem)


def _report(context: RunContext, out: str) -> None:
    try:
        write_report(context.store, out)
    except UsageError as error:
        context.progress.warn(f"no report: {error}")
