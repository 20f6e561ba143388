"""Log lines with names of others in them steer no terminal."""

from __future__ import annotations

import logging

from pixtune.commands.failures import make_fit


def test_a_record_is_made_fit_with_its_arguments() -> None:
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "%s is %d\nnext", ("a\x1b[2J\u202eb", 5), None)
    assert make_fit(record)
    assert logging.Formatter("%(message)s").format(record) == "a\\x1b[2J\\u202eb is 5\nnext"
