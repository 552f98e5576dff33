"""Records: what they say, how they are written and read, and what is made of them."""

from __future__ import annotations

import dataclasses
import getpass
import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

import budwood
from budwood import records
from budwood.errors import InputError, OutputError

ROWS = [
    {"method": "adav", "keep": 28, "accuracy": 0.61, "low": 0.59, "high": 0.63},
    {"method": "adav", "keep": 14, "accuracy": 0.556, "low": 0.53, "high": 0.58},
    {"method": "random", "keep": 28, "accuracy": 0.48, "low": 0.46, "high": 0.5},
]


def make(**kwargs):
    return records.new_record("bench prune", ROWS, seed=3, config={"scenes": 20}, **kwargs)


def test_a_record_says_how_it_came_about(monkeypatch):
    secret = "/home/someone/secret"
    monkeypatch.setattr(
        sys, "argv", [f"{secret}/bin/budwood", "bench", "prune", f"{secret}/out dir.json"]
    )
    record = make()
    assert record.command == "budwood bench prune 'out dir.json'"
    assert set(record.git) == {"commit", "dirty"}
    assert record.versions["python"] == platform.python_version()
    assert record.versions["budwood"] == budwood.__version__
    assert set(record.versions) == {"python", "torch", "transformers", "budwood"}
    assert set(record.hardware) == {"cpu", "cores", "threads", "bfloat16", "gpu"}
    made = datetime.fromisoformat(record.created)
    assert abs((datetime.now(timezone.utc) - made).total_seconds()) < 60
    text = json.dumps(dataclasses.asdict(record))
    assert "someone" not in text
    assert str(Path.home()) not in text
    assert platform.node() not in text or len(platform.node()) < 4
    assert getpass.getuser() not in (record.command, record.hardware["cpu"])


def test_write_and_read_back(tmp_path):
    record = make(command="budwood bench prune --seed 3", status="partial")
    path = records.write(record, tmp_path / "new" / "run.json")
    assert records.read(path) == record
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]  # nothing temporary is left
    assert path.stat().st_mode & 0o777 == 0o644


def test_write_does_not_overwrite_silently(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"run\.json exists"):
        records.write(make(), path)
    assert path.read_text() == "mine"
    records.write(make(), path, overwrite=True)
    assert records.read(path).rows == ROWS


def test_write_reports_what_it_cannot_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        records.write(make(), tmp_path / "file" / "run.json")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        records.write(make(), tmp_path / "directory", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_write_refuses_what_is_not_json(tmp_path, value):
    record = records.new_record("x", [{"accuracy": value}], seed=None, config={})
    with pytest.raises(InputError, match="is not JSON"):
        records.write(record, tmp_path / "run.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no list of rows"),
        ('{"rows": 3}', "no list of rows"),
        ('{"rows": [], "format": 99}', "has format 99; this version reads 1"),
        ('{"rows": [1], "format": 1}', "a row is not an object"),
        ('{"rows": [], "format": 1}', "malformed"),
        ('{"rows": [], "format": 1, "name": "x", "surprise": 1}', "'surprise' is no field"),
        ('{"rows": [], "format": 1, "name": ["x"]}', r"'name' is \['x'\], not text"),
        ('{"rows": [], "format": 1, "git": null}', "'git' is None, not an object"),
        ('{"rows": [], "format": 1, "config": [1]}', "'config' is .*, not an object"),
        ('{"rows": [], "format": 1, "hardware": []}', "'hardware' is .*, not an object"),
        ('{"rows": [], "format": 1, "status": "done"}', "run.json .*status is 'done', none of"),
        ('{"rows": [{"accuracy": NaN}], "format": 1}', "infinite or NaN"),
        ('{"rows": [], "config": {"runs": [{"loss": [1e999]}]}, "format": 1}', "infinite or NaN"),
        ("[" * 200_000, "nested too deep"),
    ],
)
def test_read_refuses_what_is_no_record(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        records.read(path)


def test_read_of_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        records.read(tmp_path / "none.json")


def test_status_is_one_of_three():
    with pytest.raises(InputError, match="status 'done' is unknown"):
        make(status="done")


def test_table():
    rows = [{"method": "a|b", "accuracy": 0.61}, {"method": "random", "accuracy": None}]
    assert records.table(ROWS[:2], ["method", "keep"]) == (
        "| method | keep |\n| --- | ---: |\n| adav | 28 |\n| adav | 14 |\n"
    )
    assert records.cells_of(rows, {"method": "", "accuracy": ".1%"}) == [
        [r"a\|b", "61.0%"],
        ["random", ""],
    ]


def test_table_of_rows_that_come_once():
    assert records.table(iter(ROWS[:1]), ["method"]) == "| method |\n| --- |\n| adav |\n"


def test_rows_side_by_side():
    rows = [
        {"method": "a", "points": 64, "top": 0.5},
        {"method": "b", "points": 64, "top": 0.25},
        {"method": "a", "points": 32, "top": 0.125},
    ]
    spread, columns = records.spread(rows, {"method": "", "top": ".1%"}, "points")
    assert records.table(spread, columns) == (
        "| method | 64 | 32 |\n| --- | ---: | --- |\n| a | 50.0% | 12.5% |\n| b | 25.0% |  |\n"
    )
    with pytest.raises(InputError, match="two rows are a with points 64; add a column"):
        records.spread([*rows, rows[0]], {"method": "", "top": ""}, "points")


def test_git_state(tmp_path):
    assert records.git_state(tmp_path) == {"commit": None, "dirty": None}

    def git(*args):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    record = tmp_path / records.RESULTS / "a.json"
    record.parent.mkdir(parents=True)
    record.write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    state = records.git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    record.write_text("2")
    for folder in (tmp_path, record.parent):
        assert records.git_state(folder)["dirty"] is False
    (tmp_path / "file").write_text("2")
    for folder in (tmp_path, record.parent):
        assert records.git_state(folder)["dirty"] is True
