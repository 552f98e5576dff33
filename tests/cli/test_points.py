"""Commands on point clouds, with a tiny random sprout and words that no tower embeds."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from budwood import records
from budwood.bench import points as bench
from budwood.errors import InputError
from budwood.points import ENCODERS, METHODS, classification
from budwood.points.adapters.base import read_description
from budwood.points.encoders.sprout import Sprout, SproutConfig, save_sprout
from tests.points import layouts, sets, shipped
from tests.refusals import refused

NAMES = "ball,stick,plate"


@pytest.fixture(autouse=True)
def tiny_sprout(tmp_path, monkeypatch):
    shipped.tiny(tmp_path, monkeypatch, n_points=480)


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    given = sets.clouds(2)
    for i, xyz in enumerate(given.xyz[:7]):
        np.save(folder / f"{i}.npy", xyz.astype(float))
    return folder


def test_classify(budwood, scans, tmp_path):
    command = ["classify", scans / "0.npy", "--labels", NAMES, "--points", 9]
    result = budwood(*command, "--plot", tmp_path / "out.png", "--csv", tmp_path / "out.csv")
    assert result.exit_code == 0, result.output
    head, row = result.stdout.splitlines()
    assert head.split() == ["cloud", "points", "label", "score", "then"]
    assert row.split()[1] == "9"
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height  # dense beside sparse
    found = json.loads(budwood(*command, "--json", "--top", 2).stdout)
    (one,) = found["rows"]
    assert one["n_points"] == 9 and len(one["names"]) == len(one["scores"]) == 2
    assert row.split()[2] == one["names"][0]
    with (tmp_path / "out.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["rank"] for line in lines] == ["1", "2", "3"]
    assert sum(float(line["score"]) for line in lines) == pytest.approx(1, abs=1e-4)
    assert [line["name"] for line in lines[:2]] == one["names"]


def test_classify_a_folder(budwood, scans, tmp_path):
    (tmp_path / "names.txt").write_text("ball\n\nstick\ndesk lamp\n", encoding="utf-8")
    command = ["classify", scans, "--labels-file", tmp_path / "names.txt", "--json", "--batch", 3]
    rows = json.loads(budwood(*command).stdout)["rows"]
    assert [row["cloud"] for row in rows] == [str(scans / f"{i}.npy") for i in range(7)]
    assert set(rows[0]["names"]) == {"ball", "stick", "desk lamp"}
    alone = json.loads(budwood("classify", scans / "4.npy", *command[2:]).stdout)["rows"]
    assert alone[0]["names"] == rows[4]["names"]
    assert alone[0]["scores"] == pytest.approx(rows[4]["scores"], abs=1e-5)


def test_a_cloud_that_cannot_be_read_stops_no_other(budwood, scans, tmp_path):
    np.save(scans / "2.npy", np.full((5, 3), np.nan))
    (scans / "6.npy").write_bytes(b"no array")
    table = tmp_path / "names.csv"
    command = ["classify", scans, "--labels", NAMES, "--csv", table, "--batch", 3]
    result = budwood(*command, "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)
    named = [str(scans / f"{i}.npy") for i in (0, 1, 3, 4, 5)]
    assert [row["cloud"] for row in told["rows"]] == named
    assert [row["cloud"] for row in told["skipped"]] == [str(scans / f"{i}.npy") for i in (2, 6)]
    assert result.stderr.splitlines()[0] == "assumed y up (--up), columns xyz (--columns)"
    *_, nan, damaged, last = result.stderr.splitlines()
    assert "2.npy" in nan and "NaN" in nan and "6.npy" in damaged
    assert last == "budwood: error: 2 of 7 clouds have no label; see above"
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * len(named)
    for i in (0, 1, 3, 4, 5):
        (scans / f"{i}.npy").unlink()
    table.unlink()
    refused(budwood(*command), "2.npy", "NaN")
    assert not table.exists()


def test_adapt_then_classify(budwood, scans, tmp_path):
    output = tmp_path / "adapted"
    command = ["points", "adapt", scans, "--output", output]
    command += ["--steps", 3, "--counts", "12,6", "--lr", 0.1, "--batch", 4]
    result = budwood(*command)
    assert result.exit_code == 0, result.output
    assert "adapted sprout by sparse-lora to 7 clouds" in result.stdout
    classify = ["classify", scans / "0.npy", "--labels", NAMES, "--points", 6, "--json"]
    before = json.loads(budwood(*classify).stdout)["rows"][0]
    after = json.loads(budwood(*classify, "--adapter", output).stdout)["rows"][0]
    assert sorted(before["names"]) == sorted(after["names"])
    assert sorted(before["scores"]) != pytest.approx(sorted(after["scores"]), abs=1e-5)
    kept = (output / "adapter.safetensors").read_bytes()
    refused(budwood(*command), "exists; choose another folder")
    assert (output / "adapter.safetensors").read_bytes() == kept
    (scans / "2.npy").write_bytes(b"no array")
    (tmp_path / "names.txt").write_text("\ufeffball\nstick\n", encoding="utf-8")
    command = ["points", "adapt", scans, "--output", tmp_path / "b", "--json"]
    refused(budwood(*command, "--method", "esp-zero"), "give one of --labels")
    again = budwood(*command, "--method", "adabn")
    found = json.loads(again.stdout)
    assert found["params"] == 0 and found["clouds"] == 6
    assert [one["cloud"] for one in found["skipped"]] == [str(scans / "2.npy")]
    assert again.stderr.startswith(f"left out: {scans / '2.npy'}")
    assert "assumed y up" in again.stderr and found["given"] == 6
    (tmp_path / "file").write_text("")
    refused(budwood(*command[:3], "--output", tmp_path / "file" / "x"), "is a file; give a folder")
    refused(budwood(*command[:3], "--output", tmp_path / "no" / "x"), "there is no folder")
    named = budwood("classify", scans / "0.npy", "--labels-file", tmp_path / "names.txt", "--json")
    assert set(json.loads(named.stdout)["rows"][0]["names"]) == {"ball", "stick"}
    for file in scans.iterdir():
        file.write_bytes(b"no array")
    refused(budwood(*command[:3], "--output", tmp_path / "c"), "0.npy", "no NumPy file")


def test_a_missing_adapter_is_refused_before_anything_is_loaded(budwood, scans, monkeypatch):
    monkeypatch.delattr("budwood.points.encoders.sprout.load_sprout")
    command = ["classify", scans, "--labels", NAMES, "--adapter", scans / "no"]
    refused(budwood(*command), "there is no adapter at")


def test_adapting_another_checkpoint(budwood, scans, tmp_path):
    config = SproutConfig(dim=16, depth=3, n_heads=2, embed_dim=12, n_points=480, group_width=8)
    save_sprout(Sprout(config), tmp_path / "other.safetensors")
    command = ["points", "adapt", scans, "--method", "adabn", "--output", tmp_path / "a"]
    refused(budwood(*command, "--device", "cudda"), "device 'cudda' cannot be used")
    result = budwood(*command, "--checkpoint", tmp_path / "other.safetensors")
    assert result.exit_code == 0, result.output
    assert read_description(tmp_path / "a")["encoder"]["depth"] == 3


def test_labels_that_a_method_does_not_compare(budwood, scans, tmp_path):
    command = ["points", "adapt", scans, "--labels", NAMES, "--steps", 1, "--counts", "12"]
    unused = budwood(*command, "--output", tmp_path / "a")
    assert unused.exit_code == 0
    first, second = unused.stderr.splitlines()
    assert first == "method 'sparse-lora' compares no labels; those given are not used"
    assert second == "assumed y up (--up), columns xyz (--columns)"
    command += ["--output", tmp_path / "b", "--method", "esp-zero", "--up", "y", "--columns", "xyz"]
    assert budwood(*command).stderr == ""  # nothing is assumed


def test_only_what_is_in_a_box(budwood, tmp_path):
    chair = sets.clouds(2).xyz[0].astype(float)
    np.save(tmp_path / "chair.npy", chair)
    np.save(tmp_path / "room.npy", np.concatenate([chair, chair + 50, chair - 50]))
    command = ["--labels", NAMES, "--json"]
    (alone,) = json.loads(budwood("classify", tmp_path / "chair.npy", *command).stdout)["rows"]
    room = ["classify", tmp_path / "room.npy", *command, "--box"]
    (found,) = json.loads(budwood(*room, "-10,-10,-inf,10,10,10").stdout)["rows"]
    assert found["names"] == alone["names"] and found["scores"] == alone["scores"]
    refused(budwood(*room, "200,200,200,300,300,300"), "no point in the box; the cloud spans")
    refused(budwood(*room, "1,2,3"), "must be six numbers")
    refused(budwood(*room, "1,1,1,0,2,2"), "x0 ≤ x1")


def test_what_is_said_about_files(budwood, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    rows = np.vstack([np.zeros((50, 3)), layouts.car(400), [[60, 60, 9]]])
    layouts.kitti(rows).tofile(folder / "a.bin")
    np.save(folder / "b.npy", layouts.car(100))
    for name in ("a.md", "b.md", "c.jpg"):
        (folder / name).write_text("")
    command = ["classify", folder, "--labels", NAMES]
    result = budwood(*command, "--json")
    assert result.exit_code == 0, result.output
    left_out, assumed = result.stderr.splitlines()
    assert left_out == "left out: 3 files are of no known format: 2 .md, 1 .jpg"
    assert assumed == (
        "assumed z up (1), y up (1) (--up), columns xyz_ (1), columns xyz (1) (--columns), "
        "metres (1), unknown units (1); "
        "left out 50 rows without a return, 1 stray point (--keep-strays)"
    )
    one, two = json.loads(result.stdout)["rows"]
    assert one["assumed"] == {
        "columns": "xyz_",
        "up": "z",
        "units": "m",
        "dropped": {"no return": 50, "stray": 1},
        "notes": [],
    }
    assert two["assumed"]["up"] == "y" and two["assumed"]["dropped"] == {}
    given = budwood(*command, "--up", "-y", "--columns", "xyz_", "--keep-strays", "--json")
    assert given.exit_code == 2  # b.npy has no such columns
    one = json.loads(given.stdout)["rows"][0]["assumed"]
    assert one["up"] == "-y" and one["dropped"] == {"no return": 50}
    degrees = layouts.car(100) * (1e-5, 1e-5, 1) + (8, 49, 0)
    np.save(folder / "b.npy", degrees)
    *_, note = budwood(*command, "--points", 9999).stderr.splitlines()
    assert note.startswith(f"note: {folder / 'b.npy'}: the coordinates look like degrees")


def test_ground_and_templates(budwood, tmp_path):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    ground = np.hstack([rng.uniform(-4, 4, (300, 2)) + np.array([12, 4]), np.full((300, 1), -1.9)])
    layouts.kitti(np.vstack([layouts.car(400), ground])).tofile(tmp_path / "a.bin")
    (tmp_path / "mine.txt").write_text("a scan of a {}\n")
    command = ["classify", tmp_path / "a.bin", "--labels", NAMES, "--json"]
    plain = json.loads(budwood(*command).stdout)["rows"][0]
    found = budwood(*command, "--remove-ground", "--templates", tmp_path / "mine.txt")
    (row,) = json.loads(found.stdout)["rows"]
    assert row["assumed"]["dropped"] == {"ground": 300}
    assert "left out 300 points of the ground" in found.stderr
    assert row["scores"] != plain["scores"]


def test_embeddings_have_their_phrasings(budwood, scans, tmp_path):
    from budwood.points import classify, save_embeddings
    from budwood.points.encoders import load_encoder
    from budwood.points.text import embed_labels_for

    file = tmp_path / "labels.safetensors"
    known = embed_labels_for(load_encoder("sprout"), ["ball", "stick"], templates="plain")
    save_embeddings(known, file)
    command = ["classify", scans / "0.npy", "--embeddings", file]
    assert budwood(*command).exit_code == 0
    refused(budwood(*command, "--templates", "short"), "templates='short' has no effect")
    refused(budwood(*command, "--no-synonyms"), "synonyms=False has no effect")
    for labels, options in ((known, {}), (None, {"embeddings": file})):
        with pytest.raises(InputError, match="has no effect on embeddings"):
            classify(scans / "0.npy", labels, templates="plain", **options)


def test_files_without_units_are_counted(budwood, tmp_path):
    np.save(tmp_path / "a.npy", layouts.car(200))
    layouts.kitti(layouts.car(200)).tofile(tmp_path / "b.bin")
    result = budwood("classify", tmp_path / "a.npy", tmp_path / "b.bin", "--labels", NAMES)
    assert "unknown units (1), metres (1)" in result.stderr


def test_more_points_than_sprout_was_made_for(budwood, tmp_path):
    np.save(tmp_path / "a.npy", layouts.car(1500))
    command = ["classify", tmp_path / "a.npy", "--labels", NAMES, "--points", 1000]
    result = budwood(*command)
    note = "sprout was made for 480 points and gets 480, not the 1,000 asked for"
    assert result.stderr.splitlines()[-1] == f"note: {tmp_path / 'a.npy'}: {note}"
    assert result.stdout.splitlines()[1].split()[1] == "480"


def test_adapting_to_clouds_of_which_few_are_dense(budwood, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for i, n_points in enumerate([8, 9, 11, 14, 30, 400]):
        np.save(folder / f"{i}.npy", layouts.car(n_points, seed=i))
    command = ["points", "adapt", folder, "--steps", 2, "--lr", 0.01, "--counts", "100,24,12"]
    result = budwood(*command, "--output", tmp_path / "a", "--json")
    found = json.loads(result.stdout)
    assert (found["clouds"], found["given"]) == (4, 6)
    assert found["clouds_by_points"] == {"100": 1, "24": 2, "12": 4}
    assert "clouds with enough points for steps on 100 points: 1, 24 points: 2, 12" in result.stderr
    result = budwood(*command, "--output", tmp_path / "b")
    assert "to 4 of 6 clouds" in result.stdout


def test_the_library_takes_every_option_of_the_command():
    import inspect

    from budwood.cli.classify import classify as command
    from budwood.points import classify

    written = {"plot", "table", "force", "json"}
    renamed = {"paths": "clouds", "batch": "batch_size", "drop_invalid": "invalid"}
    renamed |= {"keep_strays": "strays", "labels_file": "labels"}
    options = set(inspect.signature(command).parameters) - written
    assert {renamed.get(name, name) for name in options} <= set(
        inspect.signature(classify).parameters
    )


def test_an_adapter_for_another_encoder(budwood, scans, tmp_path):
    command = ["points", "adapt", scans, "--labels", NAMES, "--output", tmp_path / "a"]
    assert budwood(*command, "--method", "adabn").exit_code == 0
    other = Sprout(SproutConfig(dim=16, depth=3, n_heads=2, embed_dim=12, group_width=8))
    save_sprout(other, tmp_path / "other.safetensors")
    command = ["classify", scans / "0.npy", "--labels", NAMES, "--adapter", tmp_path / "a"]
    result = budwood(*command, "--checkpoint", tmp_path / "other.safetensors")
    refused(result, "made for another encoder", "depth 2, here 3")


def test_t3a_looks_at_a_whole_folder(budwood, scans, tmp_path, monkeypatch):
    made = budwood("points", "adapt", scans, "--output", tmp_path / "a", "--method", "t3a")
    assert made.exit_code == 0, made.output
    command = ["classify", scans, "--labels", NAMES, "--points", "20", "--json"]
    scores, passes, at_once = {}, {}, {}
    forward, encode = Sprout.forward, classification.encode

    def spied_forward(self, xyz, *arguments):
        passes[adapted, batch].append(len(xyz))
        return forward(self, xyz, *arguments)

    def spied_encode(encoder, clouds, *arguments):
        at_once[adapted, batch].append(len(clouds))
        return encode(encoder, clouds, *arguments)

    monkeypatch.setattr(Sprout, "forward", spied_forward)
    monkeypatch.setattr(classification, "encode", spied_encode)
    for adapted, adapter in ((False, []), (True, ["--adapter", tmp_path / "a"])):
        for batch in (32, 3):
            passes[adapted, batch], at_once[adapted, batch] = [], []
            rows = json.loads(budwood(*command, *adapter, "--batch", batch).stdout)["rows"]
            scores[adapted, batch] = [row["scores"] for row in rows]
        assert passes[adapted, 32] == [7] and passes[adapted, 3] == [3, 3, 1]
    assert at_once[True, 3] == at_once[True, 32] == [7] and at_once[False, 3] == [3, 3, 1]
    assert len(scores[True, 3]) == len(list(scans.iterdir()))
    for adapted in (True, False):
        np.testing.assert_allclose(scores[adapted, 3], scores[adapted, 32], atol=1e-5)
    assert not np.allclose(scores[True, 32], scores[False, 32], atol=1e-3)


def test_files_that_options_name_are_no_clouds(budwood, scans, tmp_path):
    shutil.copytree(scans, tmp_path / "mine")
    names = tmp_path / "mine" / "names.txt"
    names.write_text(NAMES.replace(",", "\n"))
    table = tmp_path / "mine" / "found.csv"
    command = ["classify", tmp_path / "mine", "--labels-file", names, "--csv", table]
    n_clouds = len(list(scans.iterdir()))
    for _ in range(2):
        result = budwood(*command, "--json", "--force")
        assert len(json.loads(result.stdout)["rows"]) == n_clouds
    (tmp_path / "other").mkdir()
    names.rename(tmp_path / "other" / "names.txt")
    command = ["classify", tmp_path / "other", "--labels-file", tmp_path / "other" / "names.txt"]
    refused(budwood(*command), "has no clouds apart from the files that other options name")


def test_bench(budwood, tmp_path):
    command = ["bench", "points", "--methods", "tokens,esp-zero", "--points", "30,8"]
    command += ["--lidar", "", "--seeds", 2, "--steps", 2, "--batch", 4, "--json"]
    result = budwood(*command, "--out", tmp_path / "r.json", "--plot", tmp_path / "curve.png")
    found = json.loads(result.stdout)
    names = [(row["method"], row["points"]) for row in found["rows"]]
    assert names == [(name, n) for name in ("tokens", "esp-zero") for n in (30, 8)]
    promised = {"method", "points", "unseen_top1", "seen_top1", "unseen_std", "seeds", "params"}
    assert all(promised <= set(row) for row in found["rows"])
    assert found["config"]["n_unseen_clouds"] == 6 and found["config"]["n_seen_classes"] == 2
    assert records.read(tmp_path / "r.json").rows == found["rows"]
    assert "| tokens | one | random | 30 |" in budwood("bench", "show", tmp_path / "r.json").stdout
    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.format == "PNG"
    result = budwood(*command[:-1])
    assert "6 clouds of 2 unseen classes" in result.stderr
    assert result.stdout.split()[:4] == ["method", "sees", "sampler", "points"]


def test_bench_of_parts(budwood, tmp_path, monkeypatch):
    out, plot = tmp_path / "r.json", tmp_path / "curve.png"
    command = ["bench", "points", "--part", "both", "--methods", "frozen,tokens", "--points", ""]
    command += ["--lidar", "30,8", "--occluded", "8", "--seeds", 1, "--out", out, "--plot", plot]
    inner, left = bench.run, ["indoor", "road"]

    def cut_off(*arguments, **options):
        if left.pop(0) == "road":
            raise KeyboardInterrupt
        return inner(*arguments, **options)

    monkeypatch.setattr(bench, "run", cut_off)
    assert budwood(*command).exit_code != 0
    first = records.read(out)
    assert first.status == "partial" and [row["part"] for row in first.rows] == ["indoor"] * 6
    monkeypatch.setattr(bench, "run", inner)
    result = budwood(*command)
    whole = records.read(out)
    assert whole.rows[:6] == first.rows and [row["part"] for row in whole.rows[6:]] == ["road"] * 6
    densities = [("lidar", 30), ("lidar", 8), ("occluded", 8)]
    assert [(row["sampler"], row["points"]) for row in whole.rows] == densities * 4
    assert whole.config["part"] == "both" and whole.config["n_road_unseen_clouds"] == 6
    assert "road: 6 clouds of 2 seen classes, 6 clouds of 2 unseen classes" in result.stderr
    assert plot.is_file()
    shown = budwood("bench", "show", out, "--where", "part=road,sampler=occluded")
    assert "| tokens | one | occluded | 8 | road |" in shown.stdout
    page = tmp_path / "page.html"
    assert budwood("report", out, "--out", page).exit_code == 0
    for part in ("indoor", "road"):
        assert f"seen classes, {part} clouds thinned by lidar" in page.read_text()


def test_a_bench_that_was_cut_off_goes_on(budwood, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    command = ["bench", "points", "--points", "30", "--lidar", "", "--seeds", 1, "--out", out]
    measured, cut_at = [], ["t3a"]
    adapt = bench.adapt

    def cut_off(clouds, texts, encoder, config):
        if config.method in cut_at:
            raise KeyboardInterrupt
        measured.append(config.method)
        return adapt(clouds, texts, encoder, config)

    def kept():
        return records.read(out).status, [row["method"] for row in records.read(out).rows]

    monkeypatch.setattr(bench, "adapt", cut_off)
    assert budwood(*command, "--methods", "frozen,tokens,t3a,adabn").exit_code != 0
    assert kept() == ("partial", ["frozen", "tokens"])
    first = records.read(out)
    refused(budwood(*command, "--methods", "tokens", "--steps", 2), "steps 400, not 2", "--force")
    records.write(replace(first, versions={"torch": "1.0"}), out, overwrite=True)
    refused(budwood(*command, "--methods", "tokens"), "versions {'torch': '1.0'}, not")
    records.write(first, out, overwrite=True)
    # Cut off once more: what was there stays, whatever is asked for.
    assert budwood(*command, "--methods", "adabn,t3a,tokens").exit_code != 0
    assert kept() == ("partial", ["frozen", "tokens", "adabn"])
    cut_at.clear()
    result = budwood(*command, "--methods", "t3a")
    assert "continues" in result.stderr
    assert kept() == ("complete", ["frozen", "tokens", "adabn", "t3a"]) and measured == kept()[1]
    whole = records.read(out)
    assert whole.rows[:2] == first.rows and whole.config["methods"] == measured
    refused(budwood(*command, "--methods", "tokens,adabn"), "exists")
    again = ["--methods", "tokens", "--steps", 2, "--force"]
    assert budwood(*command, *again).exit_code == 0 and kept() == ("complete", ["tokens"])


def test_bench_speed(budwood, tmp_path):
    command = ["bench", "points-speed", "--points", "20", "--batch", 2, "--repeats", 1]
    rows = json.loads(budwood(*command, "--out", tmp_path / "s.json", "--json").stdout)["rows"]
    assert rows[0]["what"] == "frozen" and rows[-1]["what"] == "groups, loop"
    assert "| frozen | 20 |" in budwood("bench", "show", tmp_path / "s.json").stdout
    assert budwood(*command).stdout.split()[:3] == ["what", "points", "clouds_per_s"]
    two = ["--encoder", "sprout,sprout", "--paths", "--untrained", "--json"]
    rows = json.loads(budwood(*command, *two).stdout)["rows"]
    assert [row["what"] for row in rows] == ["classify", "classify, loop"] * 2
    assert rows[0]["encoder"] == "sprout" and rows[1]["over_loop"] == 1
    large = budwood(*command, "--large", 5000, "--frame")
    assert large.stdout.split()[:3] == ["what", "points", "seconds"], large.output
    wrong = ["--untrained", "--checkpoint", tmp_path / "x"]
    refused(budwood(*command, *wrong), "is for one --encoder, without --untrained")


def test_demo(budwood, tmp_path):
    command = ["points", "demo", "--steps", 2, "--points", 8, "--dir", tmp_path / "demo"]
    result = budwood(*command)
    assert result.exit_code == 0, result.output
    assert "6 objects of 2 classes that adaptation never saw, 8 points each" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "budwood classify" in line)
    arguments = [part.strip('"') for part in line.split()[1:]]
    named = budwood(*arguments, "--json")
    assert json.loads(named.stdout)["rows"][0]["n_points"] == 8
    refused(budwood(*command), "earlier demo")
    found = json.loads(budwood(*command[:-1], tmp_path / "two", "--json").stdout)
    assert found["n_clouds"] == len(found["rows"]) == 6
    right = sum(row["after"] == row["truth"] for row in found["rows"])
    assert found["after"] == pytest.approx(right / 6)
    assert {row["truth"] for row in found["rows"]} == {"plate", "ring"}


def test_ls(budwood):
    for what, names in (("encoders", ENCODERS.names()), ("adaptations", METHODS.names())):
        found = json.loads(budwood("ls", what, "--json").stdout)[what]
        assert [one["name"] for one in found] == list(names)
        assert all(all(one.values()) for one in found)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ([], "give one of --labels"),
        (["--labels", "a,b", "--labels-file", "x"], "are both given; give one of them"),
        (["--labels", "ball,,stick"], "label 2 of 3 is empty"),
        (["--labels", ""], "there are no labels"),
        (["--labels", "ball,stick,Ball"], "'Ball' is repeated"),
        (["--labels-file", "no.txt"], "cannot read no.txt"),
        (["--embeddings", "no.safetensors"], "do not exist"),
        (["--labels", NAMES, "--encoder", "ulip3"], "did you mean 'ulip"),
        (["--labels", NAMES, "--checkpoint", "no.pt"], "no.pt"),
        (["--labels", NAMES, "--sampler", "dense"], "unknown sampler"),
        (["--labels", NAMES, "--up", "w"], "up='w'"),
        (["--labels", NAMES, "--templates", "no.txt"], "'no.txt' are not a file"),
        (["--labels", NAMES, "--text", "minilmm"], "did you mean 'minilm'"),
        (["--labels", NAMES, "--columns", "xyzr"], "columns='xyzr' must have"),
        (["--labels", NAMES, "--device", "cudda"], "device 'cudda' cannot be used"),
        (["--labels", NAMES, "--adapter", "no"], "there is no adapter at no"),
        (["--labels", NAMES, "--points", 1], "--points"),
        (["--labels", NAMES, "--seed", -1], "seed=-1"),
        (["--labels", NAMES, "--plot", "out.gif"], "must end in .png"),
    ],
)
def test_bad_options(budwood, scans, options, fragment):
    refused(budwood("classify", scans / "0.npy", *options), fragment)


def test_bad_clouds(budwood, scans, tmp_path):
    for name, points in {
        "empty": np.zeros((0, 3)),
        "one": np.ones((1, 3)),
        "equal": np.ones((9, 3)),
        "nan": np.array([[0, 0, np.nan], [1, 1, 1], [2, 2, 0]]),
        "columns": np.ones((4, 2)),
    }.items():
        np.save(tmp_path / f"{name}.npy", points)
        result = budwood("classify", tmp_path / f"{name}.npy", "--labels", NAMES)
        refused(result, f"{name}.npy")
    fine = budwood("classify", tmp_path / "nan.npy", "--labels", NAMES, "--drop-invalid")
    assert fine.exit_code == 0
    refused(budwood("classify", tmp_path / "no.ply", "--labels", NAMES), "does not exist")
    (tmp_path / "nothing").mkdir()
    refused(budwood("classify", tmp_path / "nothing", "--labels", NAMES), "no file of a known")
    both = ["--csv", tmp_path / "a.png", "--plot", tmp_path / "." / "a.png"]
    refused(budwood("classify", scans / "0.npy", "--labels", NAMES, *both), "are both")
    many = budwood("classify", scans, "--labels", NAMES, "--plot", tmp_path / "a.png")
    refused(many, "draws one cloud")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    command = ["classify", scans, "--labels-file", tmp_path / "latin.txt"]
    refused(budwood(*command), "not a UTF-8 text")


def test_existing_files_stay(budwood, scans, tmp_path):
    for option, name in (("--csv", "a.csv"), ("--plot", "a.png")):
        (tmp_path / name).write_text("mine")
        command = ["classify", scans / "0.npy", "--labels", NAMES, option, tmp_path / name]
        refused(budwood(*command), "exists")
        assert (tmp_path / name).read_text() == "mine"
        assert budwood(*command, "--force").exit_code == 0
        assert (tmp_path / name).read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--counts", "64,x"], "give whole numbers with commas"),
        (["--counts", ""], "give whole numbers with commas"),
        (["--counts", "12,1"], "counts[1]=1 is below 2"),
        (["--counts", "120,150"], "does nothing at 120, 150 points"),
        (["--method", "esp"], "unknown method"),
        (["--lr", "0"], "lr=0.0"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_bad_adaptation(budwood, scans, tmp_path, options, fragment):
    command = ["points", "adapt", scans, "--output", tmp_path / "a"]
    refused(budwood(*command, *options), fragment)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--methods", "tokens,tokens"], "each once"),
        (["--methods", ""], "at least one method"),
        (["--points", "1"], "2 or more"),
        (["--methods", "espzero"], "did you mean 'esp-zero'"),
    ],
)
def test_bad_benchmark(budwood, options, fragment):
    refused(budwood("bench", "points", *options), fragment)


def test_embed_writes_labels_for_an_encoder(budwood, tmp_path, monkeypatch):
    """With a tiny text model in place of the published one."""
    import torch

    from budwood.points import read_embeddings
    from tests.points import models

    monkeypatch.setattr("budwood.points.text.text_tower", lambda _: models.Words(512))
    monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "labels.safetensors"
    command = ["points", "embed", "--encoder", "ulip", "--text", "tiny", "--templates", "plain"]
    result = budwood(*command, "--output", file)
    assert result.exit_code == 0, result.output
    known = read_embeddings(file)
    assert {"car", "pedestrian", "chair", "noise"} <= set(known.labels)
    assert torch.allclose(known.vectors.norm(dim=1), torch.ones(len(known)))
    again = budwood(*command, "--output", file)
    refused(again, "exists; choose another name, or overwrite it with --force")
    two = budwood(*command, "--output", file, "--labels", "car,bus", "--force")
    assert two.exit_code == 0 and read_embeddings(file).labels == ("car", "bus")
    wrong = budwood("points", "embed", "--output", tmp_path / "labels.txt")
    assert wrong.exit_code == 2 and ".safetensors" in wrong.stderr
    monkeypatch.setattr("budwood.points.text.text_tower", lambda _: models.Words(7))
    narrow = budwood(*command, "--output", tmp_path / "other.safetensors")
    assert narrow.exit_code == 2 and "7 wide" in narrow.stderr


def test_a_file_of_labels_in_one_line_is_refused(budwood, scans, tmp_path):
    (tmp_path / "names.txt").write_text("ball, stick\n")
    command = ["classify", scans, "--labels-file", tmp_path / "names.txt"]
    refused(budwood(*command), "write a label on each line, or give --labels 'ball,stick'")


def test_labels_with_commas_and_comments(budwood, scans, tmp_path):
    (tmp_path / "names.txt").write_text("# what stands there\nball,\nstick, \n")
    by_file = budwood("classify", scans, "--labels-file", tmp_path / "names.txt", "--json")
    by_list = budwood("classify", scans, "--labels", "ball,stick", "--json")
    assert json.loads(by_file.stdout)["rows"] == json.loads(by_list.stdout)["rows"]
    quoted = budwood("classify", scans, "--labels", 'ball,"stick, thin"', "--json")
    assert set(json.loads(quoted.stdout)["rows"][0]["names"]) == {"ball", "stick, thin"}
    (tmp_path / "names.txt").write_text("id,name\n0,ball\n1,stick\n")
    refused(budwood("classify", scans, "--labels-file", tmp_path / "names.txt"), "is a table")


def test_a_file_that_is_read_is_not_written_over(budwood, scans):
    file = next(scans.glob("*.npy"))
    before = file.read_bytes()
    for command in ("classify", "scan"):
        done = budwood(command, file, "--labels", "ball,stick", "--csv", file, "--force")
        refused(done, "is one of the files that are read; give another name")
    assert file.read_bytes() == before


def test_counts_above_those_of_the_clouds(budwood, tmp_path):
    command = ["bench", "points", "--methods", "tokens", "--lidar", "", "--seeds", 1]
    refused(budwood(*command, "--points", 5000), "points each; 5,000 are more")
