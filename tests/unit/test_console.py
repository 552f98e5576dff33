"""Progress where there is no terminal, and warnings as notes."""

from __future__ import annotations

import warnings

import pytest

from budwood.cli import console
from budwood.errors import InputWarning


def test_a_line_of_progress_every_half_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("tune") as advance:
        for second in range(0, 100, 10):
            now[0] = float(second)
            advance(second // 10, 16, "loss 1.000")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["3/16,", "6/16,", "9/16,"]
    assert lines[0] == "tune 3/16, about 2 min left  loss 1.000"


def test_what_is_left_is_told_by_what_was_done_since(monkeypatch, capsys):
    """Of a resumed run, and of the next part of the work."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("tune") as advance:
        for second, done in ((0, 100), (60, 101), (120, 102), (180, 0), (240, 1)):
            now[0] = float(second)
            advance(done, 104)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tune 101/104, about 3 min left"
    assert lines[2:] == ["tune 0/104", "tune 1/104, about 103 min left"]


def test_only_some_warnings_become_notes(capsys):
    def warn():
        with console.warnings_said("", category=InputWarning):
            warnings.warn("a label is strange", InputWarning, stacklevel=1)
            warnings.warn("divide by zero", RuntimeWarning, stacklevel=1)

    with pytest.warns(RuntimeWarning, match="divide"):
        warn()
    assert capsys.readouterr().err == "a label is strange\n"
