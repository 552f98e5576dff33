from __future__ import annotations

import json

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
    assert "budwood bench prune" in result.stdout
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {f"scene-{i}{end}.png" for i in (1, 2) for end in ("", "-kept")}
    with Image.open(tmp_path / "demo" / "scene-1.png") as scene:
        assert max(scene.size) == 672
    rows = json.loads(budwood(*command, "--json").stdout)["rows"]  # replaces its own pictures
    assert {row["scene"] for row in rows} == {1, 2}
    assert {row["kind"] for row in rows} == {"presence", "colour"}
    assert all(row["n_visual"] == 16 and row["n_kept"] == 2 for row in rows)


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


def test_ls_labels(budwood):
    rows = json.loads(budwood("ls", "labels", "--json").stdout)["labels"]
    assert {"name": "chair", "part": "indoor"} in rows
    assert {"name": "car", "part": "road"} in rows
    n_indoor = sum(row["part"] == "indoor" for row in rows)
    shown = budwood("ls", "labels").stdout
    assert f"indoor ({n_indoor}): " in shown and f"road ({len(rows) - n_indoor}): " in shown
