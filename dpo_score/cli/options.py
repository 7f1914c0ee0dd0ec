"""What commands share: options that several have, and every setting of `config.schema` as options of one command."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable
from copy import copy
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from dpo_score.config.schema import BY_NAME, FIRST, OPTIONS, Option

Out = Annotated[str, typer.Argument(metavar="OUT", help="folder that a run wrote")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", help="only warnings and errors")]
Slices = Annotated[
    list[str] | None,
    typer.Option("--slice", metavar="COL", help="also by this column, by data, length or turns; repeatable"),
]
CacheDir = Annotated[str | None, typer.Option(help="the cache's folder (default: the user's cache)")]


OWN_PANEL = "Of this command"


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add every option of `schema.OPTIONS` to a command; it receives those that were set as one dictionary."""
    own = [p for p in signatures.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
    own = [p.replace(annotation=_in_panel(p.annotation)) for p in own]
    first = [_parameter(option) for option in OPTIONS if option.panel == FIRST]
    after = [_parameter(option) for option in OPTIONS if option.panel != FIRST]
    parameters = [p.replace(kind=signatures.Parameter.KEYWORD_ONLY) for p in (*first, *own, *after)]

    def wrapped(**values: Any) -> None:
        settings = {name: values.pop(name) for name in list(values) if name in BY_NAME}
        if settings.get("map") == "help":
            _print_map_keys()
        command(settings={k: v for k, v in settings.items() if v is not None}, **values)

    wrapped.__signature__ = signatures.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _print_map_keys() -> None:
    """What --map help prints instead of running the command."""
    from dpo_score.data.formats.registry import map_keys

    typer.echo(map_keys())
    raise typer.Exit


def _in_panel(annotation: Any) -> Any:
    """An option of the command's own, in a panel of its own; an argument unchanged."""
    type_, declared = annotation.__origin__, annotation.__metadata__[0]
    if not isinstance(declared, OptionInfo) or declared.rich_help_panel:
        return annotation
    moved = copy(declared)
    moved.rich_help_panel = OWN_PANEL
    return Annotated[type_, moved]


def _parameter(option: Option) -> signatures.Parameter:
    flags = (f"{option.flag}/--no-{option.flag[2:]}",) if option.type is bool else (option.flag,)
    choices = f"{', '.join(option.choices)}: " if option.choices else ""
    default = "" if option.default is None else f" (default: {option.default})"
    declaration = typer.Option(
        *flags,
        help=escaped(choices + option.help + default),
        rich_help_panel=option.panel,
        autocompletion=(lambda: list(option.choices)) if option.choices else None,
    )
    annotation = Annotated[option.type | None, declaration]  # type: ignore[name-defined]
    return signatures.Parameter(option.name, signatures.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def help_of(command: Callable[..., None]) -> str:
    """A command's docstring as help text: lines of a paragraph joined, brackets printed as they are."""
    paragraphs = (signatures.getdoc(command) or "").split("\n\n")
    return escaped("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))


def escaped(text: str) -> str:
    """Help text whose square brackets are printed, not read as markup."""
    return text.replace("[", r"\[")
