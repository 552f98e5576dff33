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
except SystemExit as end:
    assert end.code in (None, 0, 2), end.code
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


@pytest.mark.parametrize("line", ["{no json", '{"instruct": "a"}', ""])
@pytest.mark.parametrize(
    "command",
    [
        "tune {} --output {}.tuned",
        "tune {} --output {}.tuned --eval {}",
        "tune eval {folder} --target {}",
        "tune export-lora {folder} --output {}.lora --calibration {}",
    ],
)
def test_a_malformed_first_line(command, line, tmp_path):
    (tmp_path / "rows.jsonl").write_text(line + "\nand another\n" * bool(line))
    (tmp_path / "adapter_config.json").write_text("{}")
    rows = str(tmp_path / "rows.jsonl")
    words = [word.replace("{folder}", str(tmp_path)) for word in command.split()]
    words = [word.replace("{}", rows) for word in words]
    assert not HEAVY & imported_by(RUN, *words)


@pytest.mark.parametrize(
    "command",
    [
        "classify missing.ply --labels chair,table",
        "points adapt missing --output adapted",
        "scan missing.bin --labels car",
    ],
)
def test_clouds_need_numpy_alone(command):
    assert HEAVY & imported_by(RUN, *command.split()) == {"numpy"}


def test_help_of_every_command():
    assert not HEAVY & imported_by(RUN_EVERY_HELP)


def test_importing_budwood():
    assert not HEAVY & imported_by("import budwood, budwood.loading, budwood.prune, budwood.tune")
