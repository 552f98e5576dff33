"""How a command refuses bad input: exit code 2, nothing on standard output, one line."""

from __future__ import annotations

from typer.testing import Result


def refused(result: Result, *fragments: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("budwood: error: "), result.stderr
    for fragment in fragments:
        assert fragment in lines[0]
