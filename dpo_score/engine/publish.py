"""After a run: the page for people, and trackers. Neither can fail the run; what goes wrong is said."""

from __future__ import annotations

from dpo_score.engine.context import Desk
from dpo_score.engine.plan import Job
from dpo_score.errors import UsageError
from dpo_score.report.build import write_report
from dpo_score.report.trackers import log_run, tensorboard_folder

REPORT_ROWS = 50_000
"""Pairs up to which a run writes its report by itself: beyond, memory would grow with the rows."""


def publish(desk: Desk, job: Job) -> None:
    """OUT/report.html, and --log-to."""
    out = job.config.out or ""
    if job.rows.wanted <= REPORT_ROWS:
        _report(desk, out)
    else:
        desk.progress.say(f"no report for more than {REPORT_ROWS:,} rows unasked: dpo-score report {out}")
    if "tensorboard" in job.config.log_to:
        desk.progress.say(f"TensorBoard: tensorboard --logdir {tensorboard_folder(out)}")
    for problem in log_run(job.config.log_to, desk.store, out) if job.config.log_to else ():
        desk.progress.warn(problem)


def _report(desk: Desk, out: str) -> None:
    try:
        write_report(desk.store, out)
    except UsageError as error:
        desk.progress.warn(f"no report: {error}")
