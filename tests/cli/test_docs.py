"""Every command line in the documentation and in the help is one that budwood takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from budwood.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md")])


def commands(group=None, path=("budwood",)):
    """All commands below a group, with their words."""
    group = group or get_command(app)
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


ALL = dict(commands())


def examples() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
            found += [(page.name, line) for line in _lines(block)]
    for path, command in ALL.items():
        found += [(" ".join(path), line) for line in _lines(command.help or "")]
    return found


def _lines(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    lines = (
        line.strip().removeprefix("$ ").removeprefix(".venv/bin/") for line in joined.splitlines()
    )
    return [line for line in lines if line.startswith("budwood ")]


@pytest.mark.parametrize(("where", "line"), examples())
def test_example_is_understood(where, line):
    words = shlex.split(line, comments=True)
    path = ("budwood",)
    while words and (*path, words[len(path)] if len(words) > len(path) else "") in ALL:
        path = (*path, words[len(path)])
    ALL[path].make_context(" ".join(path), words[len(path) :])


@pytest.mark.parametrize("path", ALL)
def test_every_command_has_an_example(path):
    assert "budwood " in (ALL[path].help or "")


@pytest.mark.parametrize("path", [path for path in ALL if not hasattr(ALL[path], "commands")])
def test_every_command_is_documented(path):
    pages = "".join(page.read_text() for page in PAGES)
    assert " ".join(path) in pages


def test_help(budwood):
    for path in ALL:
        result = budwood(*path[1:], "--help")
        assert result.exit_code == 0 and "Example" in result.stdout
    assert budwood().stdout == budwood("--help").stdout
    assert budwood("--version").stdout.startswith("budwood ")


def tables() -> list[tuple[str, str, str]]:
    """Page, command and table, where a comment before the table has the command that prints it."""
    pattern = r"<!-- (budwood bench show .+?) -->\n\n((?:\|.*\n)+)"
    return [
        (page.name, *found) for page in PAGES for found in re.findall(pattern, page.read_text())
    ]


@pytest.mark.parametrize(("page", "line", "table"), tables())
def test_table_is_what_its_record_says(page, line, table, budwood, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert table == budwood(*shlex.split(line)[1:]).stdout


def snippets() -> list[tuple[str, str]]:
    """Python on each page, in one piece, but for what needs the hub."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        code = "\n".join(block for block in blocks if "from_pretrained(" not in block)
        found += [(page.name, code)] if code else []
    return found


def _lend_points(folder, monkeypatch):
    """A folder of scans, and a small sprout with words that no tower embeds."""
    from budwood.points.encoders.sprout import Sprout, SproutConfig, save_sprout
    from tests.points import models, sets

    (folder / "scans").mkdir()
    for i, xyz in enumerate(sets.clouds(1).xyz):
        np.save(folder / "scans" / f"{i}.npy", xyz.astype(float))
    sizes = {"dim": 16, "depth": 2, "n_heads": 2, "embed_dim": 12, "group_width": 8}
    save_sprout(Sprout(SproutConfig(**sizes)), folder / "tiny.safetensors")
    monkeypatch.setattr("budwood.points.encoders.sprout.WEIGHTS", folder / "tiny.safetensors")
    monkeypatch.setattr("budwood.points.towers.MiniLM", lambda: models.Words(12))
    monkeypatch.setenv("BUDWOOD_CACHE", str(folder / "cache"))


@pytest.mark.parametrize(("page", "code"), snippets())
def test_python_on_the_page_runs(page, code, model_dir, tmp_path, monkeypatch):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from budwood.prune import METHODS
    from budwood.prune.chat import prepare

    model = AutoModelForImageTextToText.from_pretrained(model_dir)
    processor = AutoProcessor.from_pretrained(model_dir)
    image = Image.new("RGB", (60, 40))
    inputs = prepare(processor, [image], ["What ?"])
    known = dict(METHODS._targets)
    monkeypatch.setattr(METHODS, "_targets", known)
    monkeypatch.chdir(tmp_path)
    _lend_points(tmp_path, monkeypatch)
    exec(code, {"model": model, "processor": processor, "inputs": inputs, "image": image})
