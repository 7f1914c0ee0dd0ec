"""The `dpo-score` command: options and arguments are parsed, one function is called, its result is printed.

What was typed comes in; text, JSON and an exit code go out. Every other package may be imported: only `main`
loads a command's file, when it is called, so that commands start fast; no other package imports this one.
"""
