"""The command line: one function a command, and the tables it prints."""
