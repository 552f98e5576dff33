"""`budwood report`: records become one page that needs no other file."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from budwood import records
from budwood.bench.prune import examples
from budwood.errors import InputError
from budwood.sprout import balanced

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class Page(HTMLParser):
    """Tags, cells and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words += [data.strip()]


def test_a_page_has_tables_curves_and_origins_and_needs_nothing(budwood, tmp_path):
    out = tmp_path / "report.html"
    files = [RESULTS / "prune-high.json", RESULTS / "points.json", RESULTS / "tune-speed.json"]
    result = budwood("report", *files, "--out", out)
    assert result.exit_code == 0 and f"wrote {out}" in result.stderr
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert all(source.startswith(("data:image/", "#record-")) for source in page.sources)
    assert not re.search(r"https?://(?!www\.w3\.org)", re.sub(r"base64,[^\"]+", "", text))
    prune = records.read(files[0])
    adav = next(row for row in prune.rows if row["method"] == "adav" and row["keep"] == 0.05)
    low, high = adav["accuracy_low"], adav["accuracy_high"]
    assert f"{adav['accuracy']:.1%} [{low:.1%}, {high:.1%}]" in page.words
    assert f"{adav['accuracy_digit']:.1%}" in page.words
    assert prune.command in page.words and prune.git["commit"][:12] in page.words
    assert page.tags.count("section") == 3 and page.tags.count("img") >= 3


def test_tables_say_once_what_all_rows_have_and_tell_rows_apart(budwood, tmp_path):
    """The positions are the same in all rows of the record, and the question is not."""
    out, file = tmp_path / "report.html", RESULTS / "prune-question.json"
    assert budwood("report", file, "--out", out).exit_code == 0
    words = [word for word in Page(out.read_text(encoding="utf-8")).words if word]
    assert words.count("original") == 1 and "question" in words
    kinds = words[words.index("Accuracy by kind of question") :]
    for question in ("turn", "all"):
        row = next(
            row
            for row in records.read(file).rows
            if (row["method"], row["question"]) == ("adav", question)
        )
        name = f"adav ({question})"
        assert words[words.index(name) + 1] == f"{row['accuracy']:.1%}"
        assert kinds[kinds.index(name) + 2] == f"{row['accuracy_presence']:.1%}"


def test_records_of_other_kinds_show_what_they_have(budwood, tmp_path):
    rows = [{"method": "a", "values": [1, 2], "how": "x"}, {"method": "b", "how": "x"}]
    record = records.new_record("other", rows, seed=0, config={})
    out = tmp_path / "report.html"
    result = budwood("report", records.write(record, tmp_path / "r.json"), "--out", out)
    assert result.exit_code == 0, result.stderr
    words = Page(out.read_text(encoding="utf-8")).words
    assert "[1, 2]" in words and words.count("x") == 1


def test_what_a_record_says_is_text_and_not_markup(budwood, tmp_path):
    record = records.new_record(
        "other",
        [{"method": "<b>x</b>", "value": 1}],
        seed=0,
        config={},
        command="<script>",
        status="partial",
    )
    out = tmp_path / "report.html"
    assert (
        budwood("report", records.write(record, tmp_path / "r.json"), "--out", out).exit_code == 0
    )
    text = out.read_text()
    assert "<b>x" not in text and "<script" not in text and "&lt;b&gt;x" in text
    assert "This run is not complete." in text


def test_bad_input(budwood, tmp_path):
    out, record = tmp_path / "report.html", RESULTS / "prune-high.json"
    old = tmp_path / "old.json"
    old.write_text(record.read_text().replace('"format": 1', '"format": 0'))
    empty = records.new_record("bench prune", [], seed=0, config={})
    records.write(empty, tmp_path / "empty.json")
    for arguments, said in (
        ((old, "--out", out), "has format 0; this version reads 1"),
        ((tmp_path / "none.json", "--out", out), "none.json"),
        ((tmp_path / "empty.json", "--out", out), "has no rows"),
        ((record, "--out", tmp_path / "report.pdf"), "must end in .html"),
        ((record, record, "--out", out), "given twice"),
        ((record, "--out", out, "--examples", -1), "examples"),
        ((RESULTS / "points.json", "--out", out, "--examples", 1), "needs a record of"),
    ):
        result = budwood("report", *arguments)
        assert result.exit_code == 2, arguments
        assert said in result.stderr and result.stderr.count("\n") == 1
        assert not out.exists()
    out.write_text("mine")
    assert budwood("report", record, "--out", out).exit_code == 2
    assert out.read_text() == "mine"


def test_records_that_examples_cannot_be_made_of(budwood, tmp_path):
    out = tmp_path / "report.html"
    for key, value, said in (
        ("n_scenes", None, "malformed: 'n_scenes' of its config is None"),
        ("n_scenes", "many", "malformed: 'n_scenes' of its config is 'many'"),
        ("variants", None, "malformed: 'variants' of its config is None"),
        ("variants", ["adav"], "one of its variants is 'adav'"),
        ("weights", "0000", "the record is of others"),
    ):
        record = records.read(RESULTS / "prune-high.json")
        record.config[key] = value
        records.write(record, tmp_path / "bad.json", overwrite=True)
        result = budwood("report", tmp_path / "bad.json", "--out", out, "--examples", 1)
        assert result.exit_code == 2 and said in result.stderr, result.stderr
        assert not out.exists()


def test_an_unfinished_comparison_says_so(budwood, tmp_path):
    record = records.read(RESULTS / "prune-high.json")
    chunk = {"chunk": 0, "run": 1, "n_kept": [64.0], "right": [True]}
    records.write(replace(record, status="partial", rows=[chunk]), tmp_path / "part.json")
    out = tmp_path / "report.html"
    result = budwood("report", tmp_path / "part.json", "--out", out)
    assert result.exit_code == 2 and "is unfinished" in result.stderr and not out.exists()


def test_examples_have_the_budget_of_the_fewest_tokens(monkeypatch):
    """Where counts and fractions are mixed, 0.5 is more than 16."""
    given = {}

    def noted(*args, **kwargs):
        given.update(args[4][0])
        raise InterruptedError

    monkeypatch.setattr(examples, "compare_ways", noted)
    record = records.read(RESULTS / "prune-high.json")
    record.config["keeps"] = [16, 0.5]
    keeps = ((1.0, 256), (0.5, 128), (16, 16))
    record.rows[:] = [{"keep": keep, "n_kept": n_kept} for keep, n_kept in keeps]
    with pytest.raises(InterruptedError):
        examples.examples_of(None, None, record, 1, 6)
    assert given["keep"] == 16


def test_examples_of_a_high_resolution_record_are_of_its_scenes(monkeypatch):
    def noted(*args, **kwargs):
        raise InterruptedError(args[2].size)

    monkeypatch.setattr(examples, "compare_ways", noted)
    record = records.read(RESULTS / "prune-high.json")
    record.config["high_resolution"] = True
    size = balanced(record.config["seed"], 1, high_resolution=True)[0][0].image.size
    with pytest.raises(InterruptedError, match=re.escape(str(size))):
        examples.examples_of(None, None, record, 1, 6)


def test_examples_prune_as_the_record_did(monkeypatch):
    asked = []

    def noted(*args, **kwargs):
        asked.extend(args[4])
        raise InterruptedError

    monkeypatch.setattr(examples, "compare_ways", noted)
    record = records.read(RESULTS / "prune-high.json")
    with pytest.raises(InterruptedError):
        examples.examples_of(None, None, record, 1, 3)
    variants = record.config["variants"][:3]
    assert {variant["positions"] for variant in variants} == {None, "original"}
    for way, variant in zip(asked, variants, strict=True):
        assert {name: way[name] for name in ("method", "positions")} == {
            name: variant[name] for name in ("method", "positions")
        }
    record.config["turns"] = 2
    with pytest.raises(InputError, match="the record is of chats of 2 turns"):
        examples.examples_of(None, None, record, 1, 3)


@pytest.mark.parametrize("name", ["tune", "tune-learn", "tune-curves"])
def test_comparisons_of_tuning(budwood, tmp_path, name):
    out = tmp_path / "report.html"
    result = budwood("report", RESULTS / name, "--out", out)
    assert result.exit_code == 0, result.stderr
    page = Page(out.read_text())
    assert page.tags.count("section") == 1  # the comparison, and not each of its runs
    assert page.tags.count("img") == 1


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("prune-high.json", "method", None),
        ("prune-high.json", "accuracy", "high"),
        ("points.json", "sampler", {}),
    ],
)
def test_records_that_cannot_be_drawn(budwood, tmp_path, name, key, value):
    record = records.read(RESULTS / name)
    record.rows[2][key] = value
    records.write(record, tmp_path / name)
    out = tmp_path / "report.html"
    result = budwood("report", tmp_path / name, "--out", out)
    assert result.exit_code == 2 and not out.exists()
    assert f"is malformed: {key!r} of a row is {value!r}" in result.stderr


def test_examples_show_what_the_records_methods_keep(budwood, tmp_path):
    record = records.read(RESULTS / "prune-high.json")
    record.config["variants"] = record.config["variants"][:1]
    records.write(record, tmp_path / "record.json")
    out = tmp_path / "report.html"
    result = budwood("report", tmp_path / "record.json", "--out", out, "--examples", 1)
    assert result.exit_code == 0, result.stderr
    page = Page(out.read_text())
    assert sum(source.startswith("data:image/png") for source in page.sources) == 1
    assert any("Right: " in words for words in page.words)
