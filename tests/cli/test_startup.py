"""Help, lists and refusals come at once: they import none of the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"accelerate", "datasets", "matplotlib", "numpy", "peft", "scipy", "torch", "transformers"}

RUN = """
import sys
from budwood.cli import main
try:
    main()
except SystemExit:
    pass
"""

RUN_EVERY_HELP = """
from typer.main import get_command
from budwood.cli import app

def paths(command, path=()):
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from paths(below, (*path, name))

for path in paths(get_command(app)):
    try:
        app([*path, "--help"])
    except SystemExit as end:
        assert not end.code, path
"""

COMMANDS = [
    "--version",
    "--help",
    "ls methods",
    "ls families",
    "ls tuners",
    "ls models",
    "ls encoders --json",
    "ls adaptations",
    "nonsense",
    "prune",
    "prune picture.png question --kep 3",
    "prune picture.png question --dtype int8",
    "demo --seed -1",
]


def imported_by(program: str, *arguments: str) -> set[str]:
    """The packages that a program imports, in a process of its own."""
    program += "\nimport sys\nprint('imported:', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    modules = done.stdout.splitlines()[-1].split()[1:]
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    assert not HEAVY & imported_by(RUN, *command.split())


def test_help_of_every_command():
    assert not HEAVY & imported_by(RUN_EVERY_HELP)


def test_importing_budwood():
    assert not HEAVY & imported_by("import budwood, budwood.loading, budwood.prune")
