"""Whether generated code works on this machine: asked by generating some, in a process that may fail.

Inductor needs a C++ compiler for a CPU; Triton a C compiler and Python's headers for a GPU, which slim images lack. A
package that can be imported says nothing about them.
"""

from __future__ import annotations

import subprocess
import sys

TRY_SECONDS = 180.0
PROGRAM = """
import torch
f = torch.compile(lambda x: torch.nn.functional.silu(x) * x + 1)
x = torch.ones(64, 64, device={device!r})
assert torch.allclose(f(x), torch.nn.functional.silu(x) * x + 1)
"""


_found: dict[str, str | None] = {}


def compile_failure(device: str) -> str | None:
    """None where a function of one line compiles for `device` and gives right values, else why not. Tried once."""
    if device not in _found:
        _found[device] = run_apart(PROGRAM.format(device=device), TRY_SECONDS)
    return _found[device]


def tried(device: str) -> str | None:
    """What `compile_failure` found; None where nobody has asked it."""
    return _found.get(device)


def run_apart(program: str, seconds: float) -> str | None:
    """Run a program in a process of its own; None when it ends well, else its error in a line."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} s"
    if done.returncode == 0:
        return None
    return _error_line(done.stderr) or f"exit code {done.returncode}"


def _error_line(said: str) -> str | None:
    """The line that names the error: the first after a traceback's indented ones, as torch adds advice below it; the
    last line where there is no traceback."""
    _, traceback, after = said.rpartition("Traceback (most recent call last):")
    lines = [line for line in after.splitlines() if line.strip()]
    if traceback:
        lines = [line for line in lines if not line[0].isspace()][:1]
    return lines[-1].strip()[:200] if lines else None
