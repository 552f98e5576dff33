"""Help, lists and refusals come at once: they import none of the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"accelerate", "datasets", "matplotlib", "numpy", "peft", "scipy", "torch", "transformers"}

RUN_EACH = """
import json, sys
from budwood.cli import main

found = {}
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line.split()
    try:
        main()
    except SystemExit as end:
        assert end.code in (None, 0, 2), (line, end.code)
    found[line] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(found))
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
    "demo --keep none",
    "prune missing.png question",
    "prune missing.png question --keep 0",
    "prune missing.png question --method adv",
    "prune missing.png question --question trun",
    "prune missing.png question --compat oficial",
    "prune missing.png question --overlay missing/kept.png",
    "tune missing.jsonl --output tuned",
    "tune missing.jsonl --output tuned --method slam",
    "tune eval missing --target test.jsonl",
    "tune export-lora missing --output lora",
    "bench prune --methods adav,randm",
    "bench prune --keep 0.1,none",
    "bench prune-speed --method adv",
    "bench points --methods token",
    "bench points --part street",
    "scan missing.bin --labels car --format kiti",
    "bench tune --data nlp --output runs --methods lra",
    "bench show missing.json",
    "bench serve nonsense",
    "serve missing",
    "serve missing --keep 0",
    "serve missing --method adv",
]


CLOUDS = [
    "classify missing.ply --labels chair,table",
    "points adapt missing --output adapted",
    "scan missing.bin --labels car",
]
"""Commands that need NumPy."""


READERS = [
    "tune {} --output {}.tuned",
    "tune {} --output {}.tuned --eval {}",
    "tune eval {folder} --target {}",
    "tune export-lora {folder} --output {}.lora --calibration {}",
]
"""Commands that read rows before anything else."""


def said_by(program: str, *arguments: str) -> str:
    """The last line that a program prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def imported_by(program: str) -> set[str]:
    """The packages that a program imports."""
    program += "\nimport sys\nprint(*sys.modules)"
    return {name.partition(".")[0] for name in said_by(program).split()}


def check_imports(commands: list[str], needed: set[str]) -> None:
    """Run commands one after another in a process; of those that fail, the first is to blame."""
    found = json.loads(said_by(RUN_EACH, json.dumps(commands)))
    assert list(found) == commands
    heavy = {line: HEAVY & {*names} for line, names in found.items()}
    assert not {line: names for line, names in heavy.items() if names != needed}


def test_commands():
    check_imports(COMMANDS, set())


def test_clouds_need_numpy_alone():
    check_imports(CLOUDS, {"numpy"})


@pytest.mark.parametrize("line", ["{no json", '{"instruct": "a"}', ""])
def test_a_malformed_first_line(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text(line + "\nand another\n" * bool(line))
    (tmp_path / "adapter_config.json").write_text("{}")
    rows = str(tmp_path / "rows.jsonl")
    commands = [one.replace("{folder}", str(tmp_path)).replace("{}", rows) for one in READERS]
    check_imports(commands, set())


def test_help_of_every_command():
    assert not HEAVY & imported_by(RUN_EVERY_HELP)


def test_importing_budwood():
    assert not HEAVY & imported_by("import budwood, budwood.loading, budwood.prune, budwood.tune")
