"""The `dpo-score` command: which commands there are, how spellings are read, how errors are said.

Errors are one paragraph on standard error with the exit code of `errors.py`, never a traceback for a user's mistake;
`--max_length` and `--max-length` are one option; only the commands that run a model import torch.

To add a command: write a function in `run.py`, `results.py` or `export.py` and name it in COMMANDS.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from typing import Annotated

import typer

from dpo_score.cli import doctor, export, results, run, select
from dpo_score.cli.console import make_encodable
from dpo_score.cli.options import help_of
from dpo_score.config.hints import MEANINGS, meant_by
from dpo_score.errors import DpoScoreError
from dpo_score.escape import safe

CPU_RUNTIME = {
    # on a shared machine, threads that spin while they wait cost a factor of ten
    "OMP_WAIT_POLICY": "PASSIVE",
    # generated kernels are kept per shape, 1,024 of them by default: half a gigabyte that grows for the first hour
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""Read by OpenMP and oneDNN when torch is imported; what the user has set is kept."""
HELP_FLAGS = {"help_option_names": ["-h", "--help"]}
COMMANDS = {
    "Before a run": (run.quickstart, doctor.doctor, results.formats, run.inspect),
    "Score": (run.run, run.precompute, results.finish),
    "Look at the results": (
        results.status, results.verify, results.report, results.compare, results.rescore, results.audit,
    ),
    "Hand them on": (select.select, export.export, export.push),
}  # fmt: skip
"""Panel of the help page → its commands, in the order of work."""
OTHER_NAMES = {
    **dict.fromkeys(("score", "eval", "evaluate", "test", "rank"), "run"),
    **dict.fromkeys(("rewardbench", "benchmark"), "run --rewardbench corrected"),
    **dict.fromkeys(("cache-ref", "precompute-ref", "ref", "reference", "train", "dpo"), "precompute"),
    **dict.fromkeys(("show", "view", "tokens"), "inspect"),
    **dict.fromkeys(("diff", "gate", "leaderboard"), "compare"),
    **dict.fromkeys(("resume", "continue"), "run"),
    **dict.fromkeys(("check", "validate"), "verify"),
    **dict.fromkeys(("upload", "publish"), "push"),
    **dict.fromkeys(("ls", "info", "list"), "status"),
    **dict.fromkeys(("html", "plot"), "report"),
    **dict.fromkeys(("version",), "--version"),
}
"""Commands that people try → what does it here."""

app = typer.Typer(
    name="dpo-score",
    help="Score preference pairs for Direct Preference Optimization: reference log-probs, losses, rewards, margins.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings=HELP_FLAGS,
)
for _panel, _commands in COMMANDS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel, context_settings=HELP_FLAGS, help=help_of(_command))(_command)
cache_app = typer.Typer(help="Log-probs by content, shared by all runs.", no_args_is_help=True)
app.add_typer(cache_app, name="cache", rich_help_panel="The cache", context_settings=HELP_FLAGS)
cache_app.command("ls")(results.cache_ls)
cache_app.command("verify")(results.cache_verify)
cache_app.command("gc")(results.cache_gc)
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]
"""The root of errors of the command line's parser, which lies in another module in newer releases of typer."""


def _print_version(asked: bool) -> None:
    if asked:
        from dpo_score import __version__

        typer.echo(f"dpo-score {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main(argv: list[str] | None = None) -> None:
    """Entry point: ends with the exit code of the error, or 0."""
    for name, value in CPU_RUNTIME.items():
        os.environ.setdefault(name, value)
    make_encodable()
    arguments = [_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        code = app(arguments, prog_name="dpo-score", standalone_mode=False)
    except DpoScoreError as error:
        typer.echo(f"error: {safe(error, keep_newlines=True)}", err=True)
        raise SystemExit(error.exit_code) from None
    except typer.Abort:
        typer.echo("aborted", err=True)
        raise SystemExit(1) from None
    except _ClickError as error:
        typer.echo(_parse_error(error), err=True, nl=bool(str(error)))
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _parse_error(error: Exception) -> str:
    """One paragraph for a command line that cannot be parsed, with what was probably meant and where help is."""
    context = getattr(error, "ctx", None)
    said = getattr(error, "format_message", lambda: str(error))()
    if context is None or not said:
        return str(said)
    name = getattr(error, "option_name", None)
    command = re.fullmatch(r"No such command ['\"]([^'\"]*)['\"].*", said, re.DOTALL)
    if isinstance(name, str):
        flags = [flag for parameter in context.command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
        said = f"there is no option {name}"
        if "--policy" in flags and name.lstrip("-").replace("-", "_").lower() in MEANINGS:
            said += f": {meant_by(name, ())}"
        elif close := difflib.get_close_matches(name, flags, n=1, cutoff=0.5):
            said += f": did you mean {close[0]}?"
    elif command is not None:
        known = getattr(context.command, "commands", {})
        near = difflib.get_close_matches(command[1], known, n=1, cutoff=0.5)
        meant = OTHER_NAMES.get(command[1].lower()) or (near[0] if near else None)
        said = f"there is no command {command[1]!r}" + (f": did you mean `dpo-score {meant}`?" if meant else "")
    return f"error: {safe(said)}\n`{context.command_path} --help` lists what there is"


def _dashed(argument: str) -> str:
    """`--max_length=5` is `--max-length=5`; values and single-letter options stay as typed."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
