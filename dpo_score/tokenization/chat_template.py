"""Chat templates: which one is used, with which date, and what text it makes of a conversation.

A template comes with a model and is somebody else's program. It runs only in transformers' sandbox and sees only plain
values. What it raises becomes the problem of the row; a template that does not end stops the run. A template that
prints the date prints one fixed date.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dpo_score.config.schema import TextSpec
from dpo_score.data.formats.cells import MAX_CHARACTERS
from dpo_score.data.types import SYSTEM_ROLES, Message, Problem, Source
from dpo_score.errors import ConfigError, ModelError
from dpo_score.escape import seen

MAX_RENDERED = 4 * MAX_CHARACTERS
MAX_TEMPLATE = 1_000_000
"""Characters of a template that is compiled. The longest ones of public models have some 20,000."""
TEMPLATE_SECONDS = 60.0
"""A template needs about a millisecond for a conversation, so a slow machine never comes near this limit."""
TICK_SECONDS = 0.2
_DATES = "dates_of_the_run"
_CLOCK = "strftime_now"
_RAISED_ON_PURPOSE = "TemplateError"
"""What `raise_exception` in a template raises; a mistake in it raises a subclass or something else."""
_CALL_SETTINGS = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
    }
)
"""Arguments of `apply_chat_template` itself, which a row must not set."""


@dataclass(frozen=True, slots=True, eq=False)
class ChatTemplate:
    """The template of a run. `plain` and `with_tools` are the two sources a tokenizer may choose between."""

    tokenizer: Any
    plain: str
    with_tools: str
    sha256: str
    """Of the two sources as they came, without the fixed date."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    """ISO date that the template prints; None if it prints none."""

    def without_tools(self, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str | Problem:
        """The prompt as the template for tools writes it when there are none: what shows whether it reads them."""
        return replace(self, plain=self.with_tools).render(messages, None, kwargs, to_answer=True)

    def render(
        self, messages: Sequence[Message], tools: Any, kwargs: Mapping[str, Any], to_answer: bool = False
    ) -> str | Problem:
        """The text of a conversation; with `to_answer` it ends where the assistant's turn begins."""
        clash = _CALL_SETTINGS & kwargs.keys()
        if clash:
            reason = f"chat_template_kwargs sets {sorted(clash)[0]}, which is no argument of a template"
            return Problem("template_error", reason, "chat_template_kwargs")
        source = self.with_tools if tools else self.plain
        try:
            with template_deadline():
                text = self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=source,
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=to_answer,
                    **{**self.kwargs, **kwargs},
                )
        except _template_errors() as error:
            reason = f"the chat template failed: {seen(str(error), 120)}"
            return Problem("template_error", reason, "prompt", type(error).__name__)
        if len(text) > MAX_RENDERED:
            return Problem("too_large", f"the chat template made {len(text):,} characters", "prompt")
        return _unicode(text)


def _unicode(text: str) -> str | Problem:
    """JSON can smuggle lone surrogates past the checks of single texts, in arguments and tools."""
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError:
        return Problem("invalid_utf8", "the conversation holds a lone surrogate: not Unicode text", "prompt")
    return text


def _template_errors() -> tuple[type[Exception], ...]:
    """All that evaluating an expression of a template can raise."""
    from jinja2 import TemplateError

    limits = (RuntimeError, MemoryError)
    return (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, *limits)


def chat_template(tokenizer: Any, text: TextSpec) -> ChatTemplate | None:
    """The template that `text` asks for, or else the tokenizer's own; None if there is none."""
    _refuse_call_settings(text.chat_template_kwargs)
    asked = named_template(tokenizer, text.chat_template)
    if asked is None and not tokenizer.chat_template:
        return None
    try:
        plain = tokenizer.get_chat_template(asked)
        with_tools = tokenizer.get_chat_template(asked, tools=[{}])
    except ValueError as error:
        raise ModelError(f"no chat template to use: {str(error)[:300]}. Name one with --chat-template.") from None
    if (length := max(len(plain), len(with_tools))) > MAX_TEMPLATE:
        raise ModelError(
            f"the chat template has {length:,} characters, and one of more than {MAX_TEMPLATE:,} is not compiled: name "
            "another with --chat-template, or --render raw for texts without one"
        )
    date = _date(text.date) if _CLOCK in plain + with_tools else None
    return ChatTemplate(
        tokenizer,
        _dated(plain, date),
        _dated(with_tools, date),
        hashlib.sha256("\0".join((plain, with_tools)).encode()).hexdigest(),
        {**text.chat_template_kwargs, **_dates(plain + with_tools, date)},
        date,
    )


def _refuse_call_settings(kwargs: Mapping[str, Any]) -> None:
    for name in sorted(_CALL_SETTINGS & kwargs.keys()):
        way_out = "give tools in a column of that name" if name == "tools" else "leave it out"
        raise ConfigError(f"--chat-template-kwargs sets {name!r}, which is no argument of a template: {way_out}")


def named_template(tokenizer: Any, value: str | None) -> str | None:
    """`--chat-template`: the name of one of the tokenizer's, the template itself, or a file that holds it."""
    if value is None or "{{" in value or "{%" in value:
        return value
    if isinstance(tokenizer.chat_template, dict) and value in tokenizer.chat_template:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {value}: {error}; give a file, or the template itself") from None


def _date(given: str | None) -> str:
    try:
        return datetime.date.fromisoformat(given).isoformat() if given else datetime.date.today().isoformat()
    except ValueError:
        raise ConfigError(f"text.date {given!r} is not a date such as 2024-07-26") from None


def _dated(source: str, date: str | None) -> str:
    """The template with its clock stopped: a macro of the clock's name looks the date up by its format.

    The macro is on a line of its own, whose end the sandbox trims: the template's text stays as it was.
    """
    if date is None or _CLOCK not in source:
        return source
    lookup = f"{_DATES}[format] or raise_exception('the template computes the format of its date')"
    return f"{{%- macro {_CLOCK}(format) -%}}{{{{ {lookup} }}}}{{%- endmacro %}}\n{source}"


def _dates(source: str, date: str | None) -> dict[str, Any]:
    """The date in each format that is in the template as a string."""
    if date is None:
        return {}
    from jinja2 import Environment

    day = datetime.datetime.fromisoformat(date)
    strings = {value[1:-1] for _, kind, value in Environment(autoescape=True).lex(source) if kind == "string"}
    return {_DATES: {format_: day.strftime(format_) for format_ in strings if "%" in format_}}


def refuses_system(
    template: ChatTemplate, problem: Problem, messages: Sequence[Message], tools: Any, kwargs: Mapping[str, Any]
) -> bool:
    """Whether the template raised on purpose, and does not once the system message is gone."""
    if problem.value != _RAISED_ON_PURPOSE:
        return False
    rest = [message for message in messages if message["role"] not in SYSTEM_ROLES]
    return 0 < len(rest) < len(messages) and isinstance(template.render(rest, tools, kwargs), str)


def system_refusal(source: Source, reason: str) -> ConfigError:
    return ConfigError(
        f"the chat template knows no system role, which row {source.row_id} of {source.file} uses ({reason}): "
        "say --system-mode merge-user to put the text before the first question, or --system-mode drop"
    )


# --- a limit on how long a template may run ---------------------------------------------------------------------


class OverdueError(ModelError):
    """A template ran too long. It stops the run: rejecting the row would make results depend on the machine's speed."""

    def __init__(self) -> None:
        super().__init__(
            f"the chat template ran for more than {TEMPLATE_SECONDS:g} s on one conversation: it does not end, or is "
            "not meant to. Look at it, or name another one with --chat-template"
        )


@dataclass
class _Deadlines:
    """Thread id → time (s, monotonic) by which it must be done. One daemon thread checks them, started at first use.

    It raises `OverdueError` inside the late thread, at its next Python instruction: a template is compiled to Python.
    A single call of native code is not interrupted, and memory is not limited.
    """

    until: dict[int, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None

    def check(self) -> None:
        while True:
            time.sleep(TICK_SECONDS)
            now = time.monotonic()
            with self.lock:
                for ident in [ident for ident, moment in self.until.items() if moment < now]:
                    del self.until[ident]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(OverdueError))

    def start(self) -> None:
        if self.thread is None or not self.thread.is_alive():  # a fork leaves the thread behind
            self.thread = threading.Thread(target=self.check, name="template deadline", daemon=True)
            self.thread.start()


_deadlines = _Deadlines()


@contextmanager
def template_deadline() -> Iterator[None]:
    """What runs inside ends after TEMPLATE_SECONDS at the latest, with OverdueError."""
    ident = threading.get_ident()
    with _deadlines.lock:
        _deadlines.until[ident] = time.monotonic() + TEMPLATE_SECONDS
        _deadlines.start()
    try:
        yield
    finally:
        with _deadlines.lock:
            _deadlines.until.pop(ident, None)
