"""The `dpo-score` command: which commands there are, how spellings are read, how errors are said.

Errors are one paragraph on standard error with the exit code of `errors.py`, never a traceback for a user's mistake;
`--max_length` and `--max-length` are one option; only the commands that run a model import torch.

To add a command: write a function in a file of this package and name it in COMMANDS. A command's file imports what the
command needs at its top, since it is loaded only when one of its commands is called.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from dpo_score import __version__
from dpo_score.cli.options import help_of
from dpo_score.config.hints import option_meant
from dpo_score.errors import DpoScoreError
from dpo_score.escape import make_encodable, safe
from dpo_score.heap import collect_garbage_rarely

RUNTIME = {
    # on a shared machine, threads that spin while they wait cost a factor of ten
    "OMP_WAIT_POLICY": "PASSIVE",
    # generated kernels are kept per shape, 1,024 of them by default: half a gigabyte that grows for the first hour
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
    # packs of many sizes leave gaps in a GPU's memory, which then seems full before it is
    **({"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if sys.platform == "linux" else {}),
}
"""Read by OpenMP, oneDNN and torch when they are imported; what the user has set is kept, also by an older name."""
OLDER_NAMES = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}
HELP_FLAGS = {"help_option_names": ["-h", "--help"]}
COMMANDS = {
    "Before a run": {
        "quickstart": ("run", "A first run: three checkpoints of a small model on 140 pairs. Needs no account, GPU or "
                       "data of yours."),
        "doctor": ("doctor", "What this machine can do for a run: processor, GPUs, kernels, compiler, memory; exit 1 "
                   "when a run would fail."),
        "formats": ("status", "The shapes of preference data that are recognised, and which side each takes as "
                    "better."),
        "inspect": ("run", "The pair as the model sees it: tokens, which are scored (coloured), the boundary."),
    },
    "Score": {
        "run": ("run", "Score policies against a reference, and write scores, a summary and a report."),
        "precompute": ("run", "The reference's log-probs alone: fill the cache and, with --out, write the data set "
                       "with them."),
        "finish": ("run", "After `run --blocks 0/N … N-1/N`: check that every block is there; summary, card "
                   "and report."),
    },
    "Look at the results": {
        "status": ("status", "What OUT holds: blocks done, rows, rejects, identities."),
        "verify": ("results", "Prove counts, checksums and derived columns again; exit 4 names each damaged file. Runs "
                   "no code that OUT names."),
        "report": ("results", "OUT/report.html: conclusion, curves, subsets, margins, length, what changed, worst "
                   "pairs, labels in doubt."),
        "compare": ("results", "Which policy is better, pair by pair, with intervals and adjusted p values."),
        "rescore": ("results", "Any grid of losses and betas from the stored log-probs: no model, no GPU."),
        "audit": ("results", "Labels worth a second look: pairs that every policy ranks against the label, as "
                  "OUT/audit.parquet."),
    },
    "Hand them on": {
        "select": ("select", "Which pairs to train on: keep a share of them by a rule, or compare all rules. Loads no "
                   "model."),
        "export": ("export", "Results in the form that another program reads: TRL's columns, token ids, "
                   "RewardBench's JSON."),
        "push": ("export", "Send a finished folder to the Hugging Face hub; without --yes only say what would be "
                 "sent."),
    },
    "The cache": {"cache": ("status", "Log-probs by content, shared by all runs.")},
}  # fmt: skip
"""Panel of the help page → its commands in the order of work: the file that defines each, and its help in short."""
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


OUTPUT_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
"""Errors without a file's name: the disk behind `> file` is full, or the terminal is gone. Files of OUT and CACHE have
errors of their own (storage/faults.py)."""


class Commands(TyperGroup):
    """The commands by name. The file that defines one, and all that it imports, is loaded when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and defined(str(name)), rest


def defined(name: str) -> Any:
    """The command itself, or group of commands, that COMMANDS says in short."""
    file = next(commands[name][0] for commands in COMMANDS.values() if name in commands)
    found = getattr(import_module(f"dpo_score.cli.{file}"), name)
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(rich_markup_mode="rich", add_completion=False)
        found.command(name, context_settings=HELP_FLAGS, help=help_of(function))(function)
    return get_command(found)


app = typer.Typer(
    name="dpo-score",
    cls=Commands,
    help="Score preference pairs for Direct Preference Optimization: reference log-probs, losses, rewards, margins.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings=HELP_FLAGS,
)
for _panel, _commands in COMMANDS.items():
    for _name, (_, _short) in _commands.items():
        app.command(_name, rich_help_panel=_panel, help=_short)(lambda: None)
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]
"""The root of errors of the command line's parser, which lies in another module in newer releases of typer."""


def _print_version(asked: bool) -> None:
    if asked:
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
    for name, value in RUNTIME.items():
        if OLDER_NAMES.get(name, name) not in os.environ:
            os.environ.setdefault(name, value)
    collect_garbage_rarely()
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
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except _ClickError as error:
        typer.echo(_parse_error(error), err=True, nl=bool(str(error)))
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    except OSError as error:
        if error.filename is not None or error.errno not in OUTPUT_LOST:
            raise
        with suppress(OSError):  # the interpreter would try once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError):
            typer.echo(f"error: standard output cannot be written: {error.strerror}", err=True)
        raise SystemExit(1) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _parse_error(error: Exception) -> str:
    """One paragraph for a command line that cannot be parsed, with what was probably meant and where help is."""
    context = getattr(error, "ctx", None)
    said = getattr(error, "format_message", lambda: str(error))()
    if not said:
        return ""
    if context is None:
        return f"error: {safe(said)}"
    name = getattr(error, "option_name", None)
    command = re.fullmatch(r"No such command ['\"]([^'\"]*)['\"].*", said, re.DOTALL)
    if isinstance(name, str):
        flags = [flag for parameter in context.command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
        said = f"there is no option {name}"
        if meant := option_meant(name, flags):
            said += f": {meant}"
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
