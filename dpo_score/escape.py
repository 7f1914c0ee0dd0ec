"""One way for untrusted text to reach a terminal, a log line, an error message or a table cell.

No control, bidi or other format character passes raw (ANSI, OSC, CR, U+202E …); length is bounded; passwords, tokens
and signatures are shown as `***`. HTML escaping is the template engine's work, not this module's.
"""

from __future__ import annotations

import codecs
import os
import re
import sys
import unicodedata

_KEPT = frozenset("\n\t")
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "WANDB_API_KEY",
    "HF_HUB_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_CLIENT_SECRET",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
"""Environment variables whose values are never shown, whatever library puts them into a message."""
SHORTEST_SECRET = 6
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s'\"?#]*@"), "***@"),
    (re.compile(r"(?<=://)[^/\s'\"?#:@]*:(?!:|\d+(?:[/?#\s]|$))[^\s'\"@]*@"), "***@"),  # a password with / ? or # in it
    (
        re.compile(
            r"([?&;#](?:[\w.-]*(?:token|secret|passw|pwd|signature|credential|apikey|accesskey|access[-_]key|api[-_]key)"
            r"[\w.-]*|sig|key|auth|code)=)[^&;\s'\"#<>]+",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
    (re.compile(r"\b(gh[opsu]_|github_pat_|sk-|xox[abp]-)[A-Za-z0-9_-]{12,}"), r"\1***"),
    (re.compile(r"\b((?:AccountKey|SharedAccessSignature|SharedAccessKey)=)[^;\s'\"]+", re.IGNORECASE), r"\1***"),
    (
        re.compile(
            r"""(['"](?:password|passwd|secret|secret_key|client_secret|token|hf_token|access_token|api_key|account_key"""
            r"""|sas_token|connection_string|secret_access_key|session_token)['"]\s*:\s*['"])[^'"]+""",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}"), "***"),
    (re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), r"\1 ***"),
    (
        re.compile(
            r"(\baws_(?:secret_access_key|session_token)['\"]?\s*[=:]\s*['\"]?)[A-Za-z0-9/+=]{8,}",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
)
_MAY_HOLD_SECRETS = re.compile(
    r"://|[?&;#][\w.-]+=|hf_|AKIA|ASIA|bearer|basic|aws_|gh[opsu]_|github_pat_|sk-|xox|Shared|AccountKey|['\"]\s*:",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """`text` with user, password, token and signature parts of URLs, and known credentials, as `***`.

    Every output goes through it: messages, pages, pipeline copies, trackers.
    """
    for name in SECRET_VARIABLES:
        value = os.environ.get(name)
        if value and len(value) >= SHORTEST_SECRET and value in text:
            text = text.replace(value, "***")
    if _MAY_HOLD_SECRETS.search(text) is None:
        return text
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def safe(text: object, limit: int | None = None, keep_newlines: bool = False) -> str:
    """`text` with hidden characters as escapes, cut to `limit` characters with an ellipsis."""
    shown = without_secrets(str(text))
    if limit is not None and len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    if shown.isascii() and shown.isprintable():
        return shown
    kept = _KEPT if keep_newlines else frozenset()
    return "".join(c if c in kept or unicodedata.category(c) not in _HIDDEN else _escape(c) for c in shown)


def _escape(character: str) -> str:
    code = ord(character)
    named = {0x0A: "\\n", 0x09: "\\t", 0x0D: "\\r"}.get(code)
    if named:
        return named
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def seen(value: object, limit: int = 200) -> str:
    """A value as it may be shown anywhere: at most `limit` characters, control and bidi characters escaped."""
    text = value[:limit] if isinstance(value, str) else repr(value)[:limit]
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii") for c in text)[
        :limit
    ]


_ASCII = {
    "…": "...", "−": "-", "–": "-", "—": "-", "·": ".", "×": "x", "≤": "<=", "≥": ">=", "→": "->", "←": "<-",
    "β": "beta", "π": "pi", "ρ": "rho", "Δ": "delta", "±": "+-", "█": "#", "▁": "_", "▂": "_", "▃": "-", "▄": "-",
    "▅": "=", "▆": "=", "▇": "#", "─": "-", "━": "-", "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "’": "'",
    "²": "2", "⁶": "6", "⁸": "8",
}  # fmt: skip
"""What is printed for a character that an encoding lacks."""


def make_encodable() -> None:
    """Let standard output and error print ASCII in place of characters that their encoding lacks."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        text = error.object[error.start : error.end]
        return "".join(_ASCII.get(character, "?") for character in text), error.end

    codecs.register_error("dpo-score", replaced)
    for stream in (sys.stdout, sys.stderr):
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if hasattr(stream, "reconfigure") and not encoding.lower().replace("-", "").startswith("utf"):
            stream.reconfigure(errors="dpo-score")
