"""What is said of a program that ends badly: the error's own line, not the advice that torch prints after it."""

from __future__ import annotations

from dpo_score.logprobs.compilation import run_apart

FAILS = """
try:
    {}["inner"]
except KeyError as error:
    raise RuntimeError("No working C++ compiler found\\n\\nSet TORCHDYNAMO_VERBOSE=1 for the stack trace") from error
"""


def test_the_error_is_named_in_a_line() -> None:
    assert run_apart(FAILS, 60.0) == "RuntimeError: No working C++ compiler found"
    assert run_apart("import sys; sys.exit('killed by hand')", 60.0) == "killed by hand"
    assert run_apart("import os; os._exit(3)", 60.0) == "exit code 3"
    assert run_apart("import time; time.sleep(60)", 0.2) == "no answer within 0 s"
    assert run_apart("pass", 60.0) is None
