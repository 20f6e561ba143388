"""Subcommands, one a file. `cli.py` turns the words of the command line into calls of these; none of them trains."""
