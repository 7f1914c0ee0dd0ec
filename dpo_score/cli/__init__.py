"""The `dpo-score` command: options and arguments are parsed, one function is called, its result is printed.

What was typed comes in; text, JSON and an exit code go out. Every other room may be imported, inside the command that
needs it, so that commands without a model start fast; no other room imports this one.
"""
