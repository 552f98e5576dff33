"""The documentation: its commands are understood, its code runs, its tables are their records'."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from budwood.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
LINKED = [*PAGES, ROOT / "benchmarks/LOG.md", ROOT / "recipes/README.md", ROOT / "CHANGELOG.md"]
QUICK = ("budwood ls ", "budwood bench show ", "budwood --help")
"""Beginnings of commands that are run as printed; the others are only parsed."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# Commands


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
            found += [(name_of(page), line) for line in _lines(block)]
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
    if words[len(path) :] != ["--help"]:
        ALL[path].make_context(" ".join(path), words[len(path) :])


def quick_examples() -> list[str]:
    """Commands that take no time and read no file of the reader's own."""
    lines = {line for _, line in examples() if line.startswith(QUICK)}
    return sorted(line for line in lines if "show" not in line or " benchmarks/results/" in line)


@pytest.mark.parametrize("line", quick_examples())
def test_quick_example_runs(line, budwood, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert budwood(*shlex.split(line, comments=True)[1:]).exit_code == 0


@pytest.mark.parametrize("path", ALL)
def test_every_command_has_an_example(path):
    assert "budwood " in (ALL[path].help or "")


@pytest.mark.parametrize("path", [path for path in ALL if not hasattr(ALL[path], "commands")])
def test_every_command_is_documented(path):
    assert " ".join(path) in (ROOT / "docs/cli.md").read_text()


def test_help(budwood):
    for path in ALL:
        result = budwood(*path[1:], "--help")
        assert result.exit_code == 0 and "Example" in result.stdout
    assert budwood().stdout == budwood("--help").stdout
    assert budwood("--version").stdout.startswith("budwood ")


# Tables


def tables() -> list[tuple[str, str, str]]:
    """Page, command and table, where a comment before the table has the command that prints it."""
    pattern = r"<!-- (budwood bench show .+?) -->\n\n((?:\|.*\n)+)"
    return [
        (name_of(page), *found) for page in PAGES for found in re.findall(pattern, page.read_text())
    ]


@pytest.mark.parametrize(("page", "line", "table"), tables())
def test_table_is_what_its_record_says(page, line, table, budwood, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert table == budwood(*shlex.split(line)[1:]).stdout


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_have_at_most_six_columns(page):
    rules = re.findall(r"^\|(?: ?:?---:? ?\|)+$", page.read_text(), re.MULTILINE)
    assert all(rule.count("|") - 1 <= 6 for rule in rules)


# Links


def anchors(page: Path) -> set[str]:
    """Where links to a page can point to, as GitHub and the site name headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def links() -> list[tuple[str, str]]:
    pattern = r"\]\((?!https?:)([^)\s]+)\)"
    return [
        (name_of(page), link) for page in LINKED for link in re.findall(pattern, page.read_text())
    ]


@pytest.mark.parametrize(("page", "link"), links())
def test_link_leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/api/*.md")), ids=name_of)
def test_reference_lists_what_the_package_exports(page):
    text = page.read_text()
    package, members = re.search(
        r"::: (budwood[.\w]*)\n.*members: \[(.+?)\]", text, re.DOTALL
    ).groups()
    exported = set(importlib.import_module(package).__all__) - {"__version__"}
    assert set(members.split(", ")) == exported


# Python


def blocks(page: Path) -> list[tuple[str, str]]:
    """The Python blocks of a page: what stands behind the language, and the code."""
    return re.findall(r"```python ?(\w*)\n(.*?)```", page.read_text(), re.DOTALL)


def to_compile() -> list[tuple[str, str]]:
    return [(name_of(page), code) for page in PAGES for mark, code in blocks(page) if mark]


@pytest.mark.parametrize(("page", "code"), to_compile())
def test_python_that_is_not_run_names_what_there_is(page, code):
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            assert all(importlib.import_module(alias.name) for alias in node.names)


def run(code: str) -> dict:
    """Run code as a script of its own, where warnings of other libraries do not matter."""
    names = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "<documentation>", "exec"), names)
    return names


README = [code for _, code in blocks(ROOT / "README.md")]


@pytest.mark.parametrize(
    ("code", "says"),
    [*zip(README, ("red", "default", "after: 3"), strict=True)],
    ids=("prune", "tune", "points"),
)
def test_readme_runs_as_printed(code, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(code)
    assert says in capsys.readouterr().out
    assert len([line for line in code.splitlines() if line]) <= 10


def pages_to_run() -> list[tuple[str, str]]:
    """The other pages that have code to run, each in one piece."""
    pieces = {page: [code for mark, code in blocks(page) if not mark] for page in PAGES[1:]}
    return [(name_of(page), "\n".join(codes)) for page, codes in pieces.items() if codes]


@pytest.fixture
def lent(model_dir, tmp_path, monkeypatch):
    """Tiny models in place of those that ship, and a folder of scans."""
    import budwood
    from budwood.points.encoders.sprout import Sprout, SproutConfig, save_sprout
    from budwood.prune import METHODS
    from tests import tiny_chat
    from tests.points import models, sets

    def load(name):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if name == "sprout":
            model = AutoModelForImageTextToText.from_pretrained(model_dir)
            return model, AutoProcessor.from_pretrained(model_dir)
        return tiny_chat.model(), tiny_chat.tokenizer()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budwood, "load", load, raising=False)
    monkeypatch.setattr(METHODS, "_targets", dict(METHODS._targets))
    (tmp_path / "scans").mkdir()
    for i, xyz in enumerate(sets.clouds(1).xyz):
        np.save(tmp_path / "scans" / f"{i}.npy", xyz.astype(float))
    sizes = {"dim": 16, "depth": 2, "n_heads": 2, "embed_dim": 12, "group_width": 8}
    save_sprout(Sprout(SproutConfig(**sizes)), tmp_path / "tiny.safetensors")
    monkeypatch.setattr("budwood.points.encoders.sprout.WEIGHTS", tmp_path / "tiny.safetensors")
    monkeypatch.setattr("budwood.points.towers.MiniLM", lambda: models.Words(12))
    monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("page", "code"), pages_to_run())
def test_python_on_the_page_runs(page, code, lent):
    run(code)
