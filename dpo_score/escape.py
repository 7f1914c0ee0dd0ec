"""One way for untrusted text to reach a terminal, a log line, an error message or a table cell.

Promises: no control, bidi or other format character passes raw (ANSI, OSC, CR, U+202E …); length is bounded.
HTML escaping is the template engine's work, not this module's.
"""

from __future__ import annotations

import unicodedata

_KEPT = frozenset("\n\t")
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def safe(text: object, limit: int | None = None, keep_newlines: bool = False) -> str:
    """`text` with hidden characters as escapes, cut to `limit` characters with an ellipsis."""
    shown = str(text)
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
