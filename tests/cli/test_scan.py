"""`budwood scan` on simulated frames, with a tiny random sprout and words that no tower embeds."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from budwood.bench.frames import Placed, sweep
from budwood.points.familiar import Unfamiliar
from tests.points import shipped
from tests.refusals import refused

pytest.importorskip("sklearn")
LABELS = ["--labels", "car,pedestrian"]
SCENE = [Placed("car", 8, 4, 1.2), Placed("pedestrian", 6, -3)]


@pytest.fixture(autouse=True)
def tiny_sprout(tmp_path, monkeypatch):
    shipped.tiny(tmp_path, monkeypatch)


@pytest.fixture
def frames(tmp_path):
    folder = tmp_path / "velodyne"
    folder.mkdir()
    for i in range(3):
        xyz, _ = sweep(SCENE, shots=400, at=(1.0 * i, 0), seed=i)
        np.column_stack([xyz, np.zeros(len(xyz))]).astype("<f4").tofile(folder / f"{i:06}.bin")
    return folder


def test_one_frame(budwood, frames, tmp_path):
    command = ["scan", frames / "000000.bin", *LABELS, "--threshold", 0]
    files = ["--plot", tmp_path / "above.png", "--csv", tmp_path / "boxes.csv"]
    result = budwood(*command, *files)
    assert result.exit_code == 0, result.output
    head, *rows = result.stdout.splitlines()
    assert head.split()[:4] == ["frame", "label", "score", "points"] and len(rows) == 2
    assert "1 frames, 2 objects with labels, 0 unknown" in result.stderr
    with Image.open(tmp_path / "above.png") as picture:
        assert picture.format == "PNG"
    with (tmp_path / "boxes.csv").open() as file:
        boxes = list(csv.DictReader(file))
    (found,) = json.loads(budwood(*command, "--json").stdout)["frames"]
    assert [box["label"] for box in found["boxes"]] == [box["label"] for box in boxes]
    assert np.hypot(*np.subtract(found["boxes"][0]["center"][:2], (8, 4))) < 1.2
    refused(budwood(*command, *files), "exists; choose another name")


def test_unfamiliar_labels_are_said_once(budwood, frames, monkeypatch):
    strange = [Unfamiliar("zebra", "horse", 0.1)]
    monkeypatch.setattr("budwood.points.familiar.unfamiliar", lambda *_: strange)
    result = budwood("scan", frames / "000000.bin", "--labels", "car,zebra")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("trained on nothing like 'zebra'") == 1


def test_the_threshold_is_calibrated_once(budwood, frames, tmp_path, monkeypatch):
    command = ["scan", frames / "000000.bin", *LABELS, "--json"]
    first = budwood(*command)
    assert first.exit_code == 0, first.output
    (file,) = (tmp_path / "cache" / "scan").iterdir()
    assert 0 <= json.loads(file.read_text())["threshold"] <= 1
    monkeypatch.delattr("budwood.points.scanning.rejection.calibrate")
    assert budwood(*command).stdout == first.stdout
    file.write_text(json.dumps({"threshold": 1.0}))
    rows = json.loads(budwood(*command).stdout)["frames"][0]["boxes"]
    assert {row["label"] for row in rows} == {"unknown"}
    assert {row["best"] for row in rows} <= {"car", "pedestrian"}


def test_a_folder_with_poses(budwood, frames, tmp_path):
    lines = [f"1 0 0 0 0 1 0 0 0 0 1 {i}" for i in range(3)]  # a camera looks along z
    (tmp_path / "00.txt").write_text("\n".join(lines))
    command = ["scan", frames, *LABELS, "--poses", tmp_path / "00.txt"]
    command += ["--output", tmp_path / "found", "--format", "json,csv,kitti,nuscenes,png"]
    result = budwood(*command)
    assert result.exit_code == 0, result.output
    found = tmp_path / "found"
    assert {path.name for path in found.iterdir()} >= {
        "boxes",
        "boxes.csv",
        "kitti",
        "nuscenes.json",
        "run.json",
        "views",
    }
    last = json.loads((found / "boxes" / "000002.json").read_text())
    assert sorted(box["track"] for box in last["boxes"]) == [0, 1]
    again = json.loads(budwood(*command, "--json").stdout)
    assert [frame["boxes"] for frame in again["frames"]][2] == last["boxes"]
    refused(budwood(*command[:-4], "--output", found, "--gap", 0.5), "holds another run")
    (tmp_path / "00.txt").write_text(lines[0])
    refused(budwood(*command[:4], *command[4:6]), "has 1 poses, and there are 3 frames")


def test_frames_that_cannot_be_read(budwood, frames):
    (frames / "000001.bin").write_bytes(b"1234567")
    result = budwood("scan", frames, *LABELS, "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert len(found["frames"]) == 2 and "000001.bin" in found["skipped"][0]["cloud"]
    assert result.stderr.splitlines()[-1].endswith("1 of 3 frames have no boxes; see above")
    refused(budwood("scan", frames / "000001.bin", *LABELS), "000001.bin")


def test_what_is_assumed_of_a_frame_is_said(budwood, frames):
    command = ["scan", frames / "000000.bin", *LABELS, "--threshold", 0]
    assumed = "assumed z up (--up), columns xyz_ (--columns), metres"
    assert assumed in budwood(*command).stderr
    given = budwood(*command, "--up", "z", "--units", "cm", "--range", 10)
    assert "assumed columns xyz_ (--columns)\n" in given.stderr
    found = json.loads(budwood(*command, "--units", "cm", "--json").stdout)["frames"][0]
    assert (found["assumed"]["units"], found["assumed"]["up"]) == ("cm", "z")
    assert found["n_ground"] == found["n_in_range"]  # a street of a few decimetres is flat
    refused(budwood(*command, "--units", "miles"), "units='miles' is unknown; give one of auto, m")


def test_all_units_have_names():
    from budwood.cli.assumed import UNITS
    from budwood.points.io.units import METRES

    assert {*METRES} < {*UNITS}


def test_another_file_called_calib_is_noted(budwood, frames, tmp_path):
    (tmp_path / "calib.txt").write_text("fx: 700.5\n")
    command = ["scan", frames / "000000.bin", *LABELS, "--threshold", 0]
    command += ["--output", tmp_path / "found", "--format", "json,kitti"]
    done = budwood(*command)
    assert done.exit_code == 0, done.output
    assert "the camera is assumed at the place of the LiDAR" in done.stderr
    assert "calib.txt is not a KITTI calibration" in done.stderr
    refused(budwood(*command, "--calib", tmp_path / "calib.txt"), "is not a KITTI calibration")


def test_embeddings_without_a_background_are_noted(budwood, frames, tmp_path):
    from budwood.points import save_embeddings
    from budwood.points.encoders import load_encoder
    from budwood.points.text import embed_labels_for

    known = embed_labels_for(load_encoder("sprout"), ["car", "wall"], templates="short")
    save_embeddings(known, tmp_path / "all.safetensors")
    command = ["scan", frames / "000000.bin", "--embeddings", tmp_path / "all.safetensors"]
    assert "no object can be 'unknown'" in budwood(*command).stderr
    assert "no object can be" not in budwood(*command, "--labels", "car").stderr


def test_files_that_are_read_are_not_written_over(budwood, frames, tmp_path):
    """Also other files than the frames, with --force."""
    from budwood.points import save_embeddings
    from budwood.points.encoders import load_encoder
    from budwood.points.text import embed_labels_for

    names, vectors = tmp_path / "names.txt", tmp_path / "names.safetensors"
    names.write_text("car\npedestrian\n")
    known = embed_labels_for(load_encoder("sprout"), ["car", "wall"], templates="short")
    save_embeddings(known, vectors)
    poses = tmp_path / "poses.txt"
    poses.write_text("1 0 0 0 0 1 0 0 0 0 1 0")
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "sample.json").write_text("[]")
    one = frames / "000000.bin"
    for command in (
        ["scan", one, "--labels-file", names, "--csv", names],
        ["scan", one, "--embeddings", vectors, "--csv", vectors],
        ["scan", one, *LABELS, "--poses", poses, "--csv", poses],
        ["scan", one, *LABELS, "--poses", tables, "--csv", tables / "sample.json"],
        ["classify", one, "--labels-file", names, "--csv", names],
        ["classify", one, "--embeddings", vectors, "--csv", vectors],
        ["points", "embed", "--labels-file", vectors, "--output", vectors],
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        refused(budwood(*command, "--force"), "is one of the files that are read; give another")
        assert before == {path: path.read_bytes() for path in before}


def test_frames_out_of_range(budwood, tmp_path):
    xyz = np.random.default_rng(0).normal(size=(500, 3))
    xyz += np.array([500_000, 5_000_000, 30])
    np.save(tmp_path / "map.npy", xyz)
    command = ["scan", tmp_path / "map.npy", *LABELS]
    refused(budwood(*command), "has no point at 0 to 60 m from the sensor", "map coordinates")
    assert budwood(*command, "--range", 0, "--threshold", 0).exit_code == 0


def test_bad_input(budwood, frames, tmp_path):
    one = frames / "000000.bin"
    refused(budwood("scan", one), "give one of --labels")
    refused(budwood("scan", one, "--labels", "car,,bus"), "label 2 of 3 is empty")
    refused(budwood("scan", tmp_path / "no.bin", *LABELS), "does not exist")
    refused(budwood("scan", one, *LABELS, "--gap", 0), "gap=0")
    refused(budwood("scan", one, *LABELS, "--format", "csv"), "what to write into --output")
    output = ["--output", tmp_path / "found"]
    refused(budwood("scan", one, *LABELS, *output, "--format", "jsn"), "did you mean 'json'")
    refused(budwood("scan", frames, *LABELS, "--plot", tmp_path / "a.png"), "show one frame")
    refused(budwood("scan", one, *LABELS, "--page", tmp_path / "a.png"), "must end in .html")
    same = ["--csv", tmp_path / "a.png", "--plot", tmp_path / "a.png"]
    refused(budwood("scan", one, *LABELS, *same), "must be different files")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused(budwood("scan", one, *LABELS, "--output", tmp_path / "mine"), "holds no run of budwood")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    refused(budwood("scan", one, *LABELS, "--poses", tmp_path / "no.txt"), "do not exist")


def test_what_files_assume_is_said_in_a_line_each(budwood, frames, tmp_path):
    command = ["scan", frames, "--labels", "car,cyclist", "--threshold", 0, "--json"]
    command += ["--output", tmp_path / "found", "--format", "kitti,nuscenes"]
    for _ in range(2):  # also of frames that are finished
        result = budwood(*command)
        assert result.exit_code == 0, result.output
        notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
        for start in (
            "note: nuScenes' devkit refuses results with the labels cyclist; ",
            "note: nuScenes' results have the names of files as sample tokens, ",
            "note: KITTI's labels: the camera is assumed at the place of the LiDAR",
        ):
            assert sum(line.startswith(start) for line in notes) == 1
        assert ".py:" not in result.stderr and "Warning" not in result.stderr


def test_a_folder_of_calibrations(budwood, frames, tmp_path):
    """Beside the frames or among them; a frame without one is skipped."""
    for i in range(2):
        (frames / f"{i:06}.txt").write_text("Tr: 0 -1 0 0 0 0 -1 0 1 0 0 0\n")
    command = ["scan", frames, *LABELS, "--threshold", 0, "--calib", frames, "--json"]
    command += ["--output", tmp_path / "found", "--format", "kitti"]
    result = budwood(*command)
    assert result.exit_code == 2
    assert len(json.loads(result.stdout)["frames"]) == 2
    assert "has no 000002.txt for the frame" in result.stderr.splitlines()[-2]
    assert result.stderr.splitlines()[-1].endswith("1 of 3 frames have no boxes; see above")
    assert {file.name for file in (tmp_path / "found/kitti").iterdir()} == {
        "000000.txt",
        "000001.txt",
    }


def test_what_options_name_is_no_frame(budwood, frames):
    """A folder as KITTI odometry has it, with the output in it, twice."""
    lines = [f"1 0 0 0 0 1 0 0 0 0 1 {i}" for i in range(3)]
    (frames / "poses.txt").write_text("\n".join(lines))
    (frames / "calib.txt").write_text("Tr: 1 0 0 0 0 1 0 0 0 0 1 0")
    command = ["scan", frames, *LABELS, "--poses", frames / "poses.txt"]
    command += ["--calib", frames / "calib.txt", "--output", frames / "found"]
    command += ["--format", "json,csv,clusters", "--json"]
    for _ in range(2):
        result = budwood(*command)
        assert result.exit_code == 0, result.output
        assert len(json.loads(result.stdout)["frames"]) == 3
