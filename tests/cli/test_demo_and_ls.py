from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from budwood.prune import FAMILIES, METHODS


def test_demo(budwood, model_dir, tmp_path):
    command = ["demo", "--model", model_dir, "--scenes", 2, "--keep", 2]
    command += ["--overlay-dir", tmp_path / "demo"]
    result = budwood(*command)
    assert result.exit_code == 0, result.output
    assert "with all 16 visual tokens" in result.stdout
    assert "with the 2 that adav+ keeps" in result.stdout
    assert "budwood prune " in result.stdout
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {f"scene-{i}{end}.png" for i in (1, 2) for end in ("", "-kept")}
    with Image.open(tmp_path / "demo" / "scene-1.png") as scene:
        assert max(scene.size) == 672
    rows = json.loads(budwood(*command, "--json").stdout)["rows"]  # replaces its own pictures
    assert {row["scene"] for row in rows} == {1, 2}
    assert {row["kind"] for row in rows} == {"presence", "colour"}
    assert all(row["n_visual"] == 16 and row["n_kept"] == 2 for row in rows)


def test_demo_replaces_pictures_of_a_demo_alone(budwood, model_dir, tmp_path):
    mine = tmp_path / "scene-1.png"
    for content in (b"mine", None):
        if content is None:
            Image.new("RGB", (9, 9)).save(mine)
        else:
            mine.write_bytes(content)
        before = mine.read_bytes()
        result = budwood("demo", "--model", model_dir, "--scenes", 1, "--overlay-dir", tmp_path)
        assert (
            result.exit_code == 2
            and "scene-1.png exists and is not marked as a demo's" in result.stderr
        )
        assert mine.read_bytes() == before and list(tmp_path.iterdir()) == [mine]


def test_what_a_demo_says_comes_next_works(budwood, model_dir, tmp_path):
    options = ["--scenes", 1, "--keep", 3, "--method", "uniform", "--model", model_dir]
    result = budwood("demo", *options, "--overlay-dir", tmp_path / "my demo")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("  budwood prune")]
    again = budwood(*shlex.split(line)[1:], "--json")
    assert again.exit_code == 0, again.stderr
    found = json.loads(again.stdout)
    assert (found["method"], found["n_kept"], found["model"]) == ("uniform", 3, model_dir.name)


@pytest.mark.parametrize("model", [None, "sprout-256"])
def test_the_embedded_models_can_be_measured_next(capsys, model):
    from budwood.cli.demo import _print_next

    chosen = {"keep": "8", "dtype": "bfloat16"} | ({"model": model} if model else {})
    _print_next({"image": "my demo/a.png", "asked": "What's it?"}, "random", chosen)
    options = ["--keep", "8", "--dtype", "bfloat16", *(["--model", model] if model else [])]
    prune, bench = (shlex.split(line) for line in capsys.readouterr().out.splitlines()[2:])
    assert prune[:4] == ["budwood", "prune", "my demo/a.png", "What's it?"]
    assert prune[4:] == ["--method", "random", *options]
    assert bench[:3] == ["budwood", "bench", "prune"]
    assert bench[3:] == ["--scenes", "20", "--methods", "random", *options]


@pytest.mark.parametrize("high_resolution", [True, False])
def test_demo_asks_nothing_about_the_salient_object(high_resolution):
    from budwood.cli.demo import _choose

    chosen = _choose(3, 7, high_resolution)
    assert all(not q.asks_salient for _, questions in chosen for q in questions)
    assert all(q.boxes for _, questions in chosen for q in questions)  # what they ask of is there


def test_demo_needs_a_place_for_its_folder(budwood, tmp_path):
    result = budwood("demo", "--overlay-dir", tmp_path / "none" / "demo")
    assert result.exit_code == 2 and "there is no folder" in result.stderr


def test_ls(budwood):
    for what, names in (("methods", METHODS.names()), ("families", FAMILIES.names())):
        found = json.loads(budwood("ls", what, "--json").stdout)[what]
        assert [one["name"] for one in found] == list(names)
        assert all(one["description"] and one["source"] for one in found)
        assert all(name in budwood("ls", what).stdout for name in names)
    models = json.loads(budwood("ls", "models", "--json").stdout)["models"]
    assert models[0]["name"] == "sprout"
    assert {model["family"] for model in models} <= set(FAMILIES.names())


FULL = Path("/dev/full")


def shell(*command, **options):
    env = os.environ | options.pop("env", {})
    env.pop("PYTHONUNBUFFERED", None)
    program = [sys.executable, "-m", "budwood.cli", *command]
    return subprocess.run(program, stderr=subprocess.PIPE, env=env, **options)


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux")
@pytest.mark.parametrize("command", [("ls", "labels"), ("ls", "methods", "--json"), ("--help",)])
def test_output_that_cannot_be_written(command):
    with FULL.open("w") as full:
        result = shell(*command, stdout=full)
    assert result.returncode == 1
    assert result.stderr == b"budwood: error: cannot write the output: No space left on device\n"
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does when it has enough
    result = shell(*command, stdout=writing)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")
    closed = "import os, sys; os.close(1); os.execv(sys.argv[1], sys.argv[1:])"
    program = [sys.executable, "-m", "budwood.cli", *command]
    result = subprocess.run([sys.executable, "-c", closed, *program], stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_in_other_encodings(encoding):
    options = {"env": {"PYTHONIOENCODING": encoding}, "stdout": subprocess.PIPE}
    assert rb"bill 10\u20ac" in shell("ls", "labels", **options).stdout
    found = json.loads(shell("ls", "labels", "--json", **options).stdout)
    assert any(row["name"] == "bill 10€" for row in found["labels"])


def test_piped_output_is_not_wrapped():
    shown = shell("ls", "labels", stdout=subprocess.PIPE).stdout.decode()
    assert "resistor network" in shown and shown.count("\n") == 2
    assert "slip_vit_b-objaverse" in shell("ls", "encoders", stdout=subprocess.PIPE).stdout.decode()


def test_ls_labels(budwood):
    rows = json.loads(budwood("ls", "labels", "--json").stdout)["labels"]
    assert {"name": "chair", "part": "indoor"} in rows
    assert {"name": "car", "part": "road"} in rows
    n_indoor = sum(row["part"] == "indoor" for row in rows)
    shown = budwood("ls", "labels").stdout
    assert f"indoor ({n_indoor}): " in shown and f"road ({len(rows) - n_indoor}): " in shown
