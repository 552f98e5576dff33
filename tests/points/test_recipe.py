"""The recipe of sprout points: classes, splits, licences, VRML, augmentation, resuming."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from budwood.points import load_clouds
from budwood.points.labels import check_labels
from tests.points import models

pytest.importorskip("trimesh")
RECIPES = Path(__file__).parents[2] / "recipes" / "points"


@pytest.fixture
def recipe(monkeypatch):
    """Its modules, which import each other by bare names."""
    monkeypatch.syspath_prepend(str(RECIPES))
    names = ("classes", "shapes", "make_clouds", "train_encoder")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import classes
    import make_clouds
    import shapes
    import train_encoder

    yield argparse.Namespace(classes=classes, shapes=shapes, make=make_clouds, train=train_encoder)
    for name in names:
        sys.modules.pop(name, None)


def test_a_name_is_in_one_class(recipe):
    names = ["Chair", "Coffee table", "Table", "Bar stool", "Bar table", "Double window 3 panes"]
    names += ["Exterior door", "Wooden desk", "Desk lamp", "Little bank", "Screen", "Screen door"]
    wanted = ["chair", "coffee table", "table", "stool", "table", "window"]
    wanted += ["door", "desk", "table lamp", "bench", "television", "door"]
    for name, label in zip(names, wanted):
        found = [
            key
            for key, (_, pattern) in recipe.classes.FURNITURE.items()
            if re.fullmatch(pattern, name, re.IGNORECASE)
        ]
        assert found == [label], name
    assert recipe.shapes._furniture_class("Window blind") == ("window blind", "other")
    assert recipe.shapes._furniture_class("Bean bag") == ("bean bag", "other")
    assert not set(recipe.classes.FURNITURE) & set(recipe.classes.PARTS)


@pytest.mark.parametrize("n", [3, 4, 7, 20, 40])
def test_cut(recipe, n):
    seen, unseen, novel, other = (
        recipe.make.cut(group, n) for group in ("seen", "unseen", "novel", "other")
    )
    assert len(seen) == len(unseen) == len(novel) == len(other) == n
    assert {"test", "adapt", "pretrain"} <= set(seen)
    assert set(unseen) == {"test", "pretrain"}
    assert set(novel) <= {"test", "left"} and set(other) == {"pretrain"}


BOX = """#VRML V2.0 utf8
Shape { appearance Appearance {material DEF A Material { shininess 0.7 } } }
Shape { geometry IndexedFaceSet { creaseAngle 0.5
  coordIndex [0,1,2,3,-1, 4,5,6,-1]
  coord Coordinate { point [0 0 0, 1 0 0, 1 2 0, 0 2 0, 0 0 5, 1 0 5, 1 2 5] } }
  appearance Appearance { material USE A } }
Shape { geometry IndexedFaceSet { coord Coordinate { point [9 9 9,8 8 8,7 9 7] }
  coordIndex [0,1,2,-1] } }
"""


def test_vrml(recipe, tmp_path):
    path = tmp_path / "a.wrl"
    path.write_text(BOX)
    vertices, faces = recipe.shapes.read_vrml(path)
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert vertices[4].tolist() == [0, 5, 0]  # what was up along z is up along y
    assert vertices[2].tolist() == [1, 0, -2]
    path.write_text(BOX.replace("Shape {", "Transform { translation 1 0 0 children Shape {", 1))
    assert recipe.shapes.read_vrml(path) is None
    path.write_text("#VRML V2.0 utf8\nShape { geometry Box {} }")
    assert recipe.shapes.read_vrml(path) is None


COPYRIGHT = """Format: x

Files: *
Copyright: 2018 A
License: CC-BY-SA-4.0-with-exception

Files: Relay.3dshapes/Relay_A.step
 Relay.3dshapes/Relay_A.wrl
Copyright: 2017 B
License: GPL-3+

License: GPL-3+
 text
"""


def test_parts_of_another_licence_are_left_out(recipe, tmp_path):
    folder = tmp_path / "Relay_THT.3dshapes"
    folder.mkdir()
    for name in "ABC":
        (folder / f"Relay_{name}.wrl").write_text(BOX)
    (tmp_path / "Socket.3dshapes").mkdir()
    (tmp_path / "Socket.3dshapes" / "Socket.wrl").write_text(BOX)
    (tmp_path / "copyright").write_text(COPYRIGHT.replace("Relay.3d", "Relay_THT.3d"))
    found = list(recipe.shapes.parts(tmp_path))
    assert [shape.id for shape in found] == ["Relay_THT/Relay_B", "Relay_THT/Relay_C"]
    assert {(shape.label, shape.group, shape.package) for shape in found} == {
        ("relay", "unseen", "parts")
    }


def test_furniture(recipe, tmp_path):
    catalogue = (
        "id#1=a\nname#1=Chair\nmodel#1=/x/a.obj\ncreator#1=Ann\n"
        "id#2=b\nname#2=Kazoo\nmodel#2=/x/b.obj\nmodelRotation#2=0 -1 0 1 0 0 0 0 1\n"
    )
    mesh = "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 2 0\nf 1 2 3\n"
    with zipfile.ZipFile(tmp_path / "Lib.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", catalogue)
        archive.writestr("x/a.obj", mesh)
        archive.writestr("x/b.obj", mesh)
    chair, kazoo = recipe.shapes.furniture(tmp_path)
    assert (chair.id, chair.label, chair.creator) == ("Lib/a", "chair", "Ann (Lib)")
    assert (kazoo.label, kazoo.group) == ("kazoo", "other")
    assert sorted(map(tuple, chair.vertices.tolist())) == [(0, 0, 0), (0, 2, 0), (1, 0, 0)]
    assert sorted(map(tuple, kazoo.vertices.tolist())) == [(-2, 0, 0), (0, 0, 0), (0, 1, 0)]
    cloud = recipe.make.cloud_of(chair)
    assert cloud.shape == (4096, 3) and np.abs(cloud.mean(axis=0)).max() < 1e-5
    assert np.linalg.norm(cloud, axis=1).max() == pytest.approx(1)


def test_augmented(recipe):
    rng = np.random.default_rng(0)
    points = (rng.uniform(-1, 1, (4096, 3)) * 20_000).astype(np.int16)
    thin = recipe.train.augmented(points, 200, rng)
    assert thin.shape == (200, 3) and thin.dtype == np.float32
    assert np.linalg.norm(thin, axis=1).max() == pytest.approx(1)
    for axis in range(3):
        matrix = recipe.train.turn(axis, 0.7)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1) and matrix[axis, axis] == 1


def test_training_goes_on_where_it_was(recipe, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "clouds.npz",
        xyz=(rng.uniform(-1, 1, (6, 4096, 3)) * 20_000).astype(np.int16),
        label=np.array(["a", "b", "a", "b", "a", "b"]),
        group=np.array(["seen"] * 6),
        use=np.array(["pretrain"] * 4 + ["val"] * 2),
    )
    config = recipe.train.SproutConfig(dim=16, depth=2, n_heads=2, n_groups=8, group_width=8)
    monkeypatch.setattr(recipe.train, "SproutConfig", lambda: config)
    monkeypatch.setattr(recipe.train, "FEWEST", 16)
    monkeypatch.setattr(recipe.train, "MOST", 32)
    monkeypatch.setattr(recipe.train, "SETTLING", 5)

    def weights(name, *steps):
        folder = tmp_path / name
        folder.mkdir()
        texts = {"labels": ["a", "b"], "averages": torch.eye(2, 384) + 0.1}
        torch.save(texts, folder / "texts.pt")
        for n in steps:
            torch.manual_seed(0)
            shapes = recipe.train.Shapes([tmp_path / "clouds.npz"], folder)
            run = recipe.train.Run(folder, 1e-3, shapes.center)
            # The schedule is that of all steps, also where the run is cut short.
            args = argparse.Namespace(steps=3, settled_steps=3, batch=3, lr=1e-3, seed=0)
            monkeypatch.setattr(run, "log", lambda **values: logged.append(values))
            _until(recipe.train, run, shapes, args, n)
        return run

    logged = []

    whole, resumed, settled = weights("a", 6), weights("b", 2, 3, 5, 6), weights("c", 4)
    assert resumed.step == 6
    for key, value in whole.encoder.state_dict().items():
        assert torch.equal(value, resumed.encoder.state_dict()[key]), key
    assert torch.equal(whole.average.module.cls_token, resumed.average.module.cls_token)
    assert torch.equal(whole.encoder.text_center[:2], torch.tensor([0.6, 0.6]))
    assert set(logged[-1]) == {f"val{own}_{n}" for own in ("", "_own") for n in (1024, 128, 64)}
    # The statistics of normalisation are held in the last steps, and weights go on.
    before, after = settled.encoder.group_net.state_dict(), whole.encoder.group_net.state_dict()
    held = [key for key in before if "running" in key]
    assert held and all(torch.equal(before[key], after[key]) for key in held)
    assert not torch.equal(before["first_conv.0.weight"], after["first_conv.0.weight"])


def _until(train, run, shapes, args, n):
    """Killed when step n is to begin."""

    class KilledError(Exception):
        pass

    def watched(run, *arguments):
        if run.step == n:
            run.save()
            raise KilledError
        return learn(run, *arguments)

    learn, train.learn = train.learn, watched
    with contextlib.suppress(KilledError):
        train.train(run, shapes, args)
    train.learn = learn


def test_a_checkpoint_is_written_when_the_last_is_old(recipe, tmp_path, monkeypatch):
    saved = []
    run = argparse.Namespace(step=0, seconds=0.0, saved=0.0, log=lambda **_: None)

    def save():
        saved.append(run.step)
        run.saved = 100.0 * run.step

    run.save = save

    def learn(run, *_):
        run.step += 1
        return 0.0

    monkeypatch.setattr(recipe.train, "learn", learn)
    monkeypatch.setattr(recipe.train, "watch", lambda *_: None)
    monkeypatch.setattr(recipe.train.time, "monotonic", lambda: 100.0 * run.step)
    shapes = argparse.Namespace(batch=lambda *_: None)
    args = argparse.Namespace(steps=5, settled_steps=0, batch=3, seed=0)
    recipe.train.train(run, shapes, args)
    assert saved == [2, 4, 5]


def test_clouds_are_made_with_the_labels_of_classes(recipe, tmp_path, monkeypatch):
    box = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3.0]]), np.array([[0, 1, 2], [0, 2, 3]])
    names = ["chair", "bench", "armchair", "bean bag"]
    groups = [recipe.classes.FURNITURE.get(name, ("other",))[0] for name in names]
    assert groups == ["seen", "novel", "unseen", "other"]

    def found(folder, package):
        for name, group in zip(names, groups):
            for number in range(5):
                yield recipe.shapes.Shape(f"{name}{number}", name, group, package, "Ann", *box)

    monkeypatch.setattr(recipe.make, "N_DENSE", 64)
    monkeypatch.setattr(recipe.make, "N_SHIPPED", 32)
    monkeypatch.setattr(recipe.make, "furniture", lambda folder: found(folder, "furniture"))
    monkeypatch.setattr(recipe.make, "parts", lambda folder: iter(()))
    command = ["make_clouds.py", "--furniture", "x", "--parts", "x", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(recipe.make, "write_clouds", lambda path, xyz, about: written.append(about))
    written = []
    recipe.make.main()
    with np.load(tmp_path / "clouds.npz") as made:
        rows = set(zip(*(made[key].tolist() for key in ("label", "group", "use"))))
    trained = {label for label, _, use in rows if use == "pretrain"}
    assert trained == {"chair", "armchair", "bean bag"}  # nothing novel
    assert {(label, group) for label, group, _ in rows} == set(zip(names, groups))
    shipped = {(one.label, one.use) for one in written[0]}
    assert ("bench", "test") in shipped and "bean bag" not in {label for label, _ in shipped}
    assert not {use for _, use in shipped} - {"test", "adapt", "val"}
    sizes = json.loads((tmp_path / "clouds.json").read_text())["models"]
    assert sizes == dict.fromkeys(names, 5)


def test_labels_have_no_commas_and_no_case_of_their_own(recipe):
    """A list of labels has commas, and labels that differ in case alone are refused."""
    labels = [*recipe.classes.FURNITURE, *recipe.classes.PARTS]
    assert check_labels(labels) == tuple(labels)
    assert not any("," in label for label in (*labels, *recipe.classes.ROAD))
    for name in ("Butter, salted", "KAZOO", "Cup"):
        label, _ = recipe.shapes._furniture_class(name)
        assert "," not in label and label == label.lower()


def test_report_counts(recipe, tmp_path):
    shape = recipe.shapes.Shape(
        "x", "chair", "seen", "furniture", "Ann", np.eye(3), np.array([[0, 1, 2]])
    )
    recipe.make._report(tmp_path, [(shape, "test"), (shape, "adapt")])
    report = json.loads((tmp_path / "clouds.json").read_text())
    assert report["uses"] == {"seen adapt": 1, "seen test": 1} and report["creators"] == ["Ann"]


# --- the road ------------------------------------------------------------------------------


@pytest.fixture
def road(recipe, monkeypatch):
    """The modules of road objects."""
    import make_road
    import road_shapes

    yield argparse.Namespace(shapes=road_shapes, make=make_road, train=recipe.train)
    for name in ("make_road", "road_shapes"):
        sys.modules.pop(name, None)


def test_every_road_class_has_models_that_differ(road):
    for label in road.shapes.MAKERS:
        one, again, other = (road.shapes.parametric(label, n) for n in (0, 0, 1))
        assert np.array_equal(one.vertices, again.vertices)
        assert one.vertices.shape != other.vertices.shape or not np.allclose(
            one.vertices, other.vertices
        )
        assert np.isfinite(one.vertices).all() and abs(one.vertices[:, 1].min()) < 0.3  # y is up


def test_ac3d(road, tmp_path):
    path = tmp_path / "a.ac"
    path.write_text(
        "AC3Db\nMATERIAL x\nOBJECT world\nkids 1\nOBJECT group\nloc 1 0 0\nkids 2\n"
        "OBJECT poly\ndata 3\nabc\nloc 0 2 0\nnumvert 4\n0 0 0\n1 0 0\n1 1 0\n0 1 0\nnumsurf 2\n"
        "SURF 0x30\nmat 0\nrefs 4\n0 0 0\n1 0 0\n2 0 0\n3 0 0\n"
        "SURF 0x2\nmat 0\nrefs 2\n0 0 0\n1 0 0\nkids 0\n"
        "OBJECT poly\nrot 0 0 -1 0 1 0 1 0 0\nnumvert 3\n1 0 0\n0 1 0\n0 0 1\nnumsurf 1\n"
        "SURF 0x10\nrefs 3\n0 0 0\n1 0 0\n2 0 0\nkids 0\n"
    )
    vertices, faces = road.shapes.read_ac3d(path)
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [4, 5, 6]]
    assert vertices[0].tolist() == [1, 2, 0] and vertices[2].tolist() == [2, 3, 0]
    assert vertices[4].tolist() == [1, 0, -1]


def test_road_clouds_are_split_by_model_and_made_once(road, tmp_path, monkeypatch):
    monkeypatch.setattr(road.make, "MAKERS", {"pole": None, "traffic cone": None})
    command = ["make_road.py", "--out", str(tmp_path), "--models", "14"]
    monkeypatch.setattr(sys, "argv", command)
    road.make.main()
    with np.load(tmp_path / "clouds.npz") as made:
        assert made["xyz"].shape == (28, 4096, 3) and str(made["part"]) == "road"
        assert set(made["use"].tolist()) == {"pretrain", "adapt", "val", "test"}
    shipped = load_clouds([tmp_path / "road.npz"])
    assert set(shipped.classes) == {"pole", "traffic cone"} and shipped.xyz.shape[1] == 1024
    # Of 14 models, 2 are for test, 1 for validation, 2 for adaptation: of poles, for test too.
    uses = Counter((one.label, one.group, one.use) for one in shipped.about)
    seen = {("traffic cone", "seen", use): n for use, n in (("test", 2), ("val", 1), ("adapt", 2))}
    assert uses == {**seen, ("pole", "unseen", "test"): 4}
    monkeypatch.setattr(road.make, "make_class", None)  # nothing is made again
    road.make.main()


def test_a_sensor_sees_as_many_points_as_are_wanted(road):
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(4096, 3)) * 5000).astype(np.int16)
    for _ in range(12):
        assert road.train.seen_points(points, 90, rng).shape == (90,)


def test_scans_are_partly_hidden_or_have_some_ground(road, monkeypatch):
    points = np.random.default_rng(0).integers(-9000, 9000, (4096, 3)).astype(np.int16)
    given = {tuple(row) for row in points.tolist()}

    def scans(hidden, ground):
        monkeypatch.setattr(road.train, "HIDDEN", hidden)
        monkeypatch.setattr(road.train, "GROUND", ground)
        rng = np.random.default_rng(1)
        return [road.train.scanned(points, 1024, rng) for _ in range(24)]

    for xyz in scans(hidden=1, ground=0):
        assert xyz.shape == (1024, 3) and {tuple(row) for row in xyz.tolist()} <= given
    floor = points[:, 1].min()
    fractions = []
    for xyz in scans(hidden=0, ground=1):
        others = [row for row in xyz.tolist() if tuple(row) not in given]
        assert all(row[1] == floor for row in others)
        fractions.append(len(others) / len(xyz))
    assert 0 < min(fractions) < max(fractions) <= 0.16


def test_the_groups_of_road_classes(road, recipe):
    groups = recipe.classes.ROAD
    assert set(groups) == set(road.shapes.MAKERS) and set(groups.values()) == {"seen", "unseen"}
    assert set(road.shapes.PACKAGED) <= set(groups)


def test_texts_of_other_labels_are_embedded_again(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.train, "MiniLM", lambda: models.Words(384))
    shapes = argparse.Namespace(labels=["car", "chair"])
    embed = recipe.train.Shapes._embeddings
    first = embed(shapes, tmp_path / "texts.pt")
    assert torch.equal(embed(shapes, tmp_path / "texts.pt"), first)
    shapes.labels = ["car", "table"]
    other = embed(shapes, tmp_path / "texts.pt")
    assert torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1])


def test_labels_that_mean_the_same_in_both_parts_do_not_compete(road, tmp_path):
    labels = {"indoor": ["chair", "standing person"], "road": ["pedestrian", "car"]}
    for part, names in labels.items():
        cloud = np.ones((4, 4096, 3), np.int16)
        uses = np.array(["pretrain"] * 2 + ["val"] * 2)
        columns = {"label": np.array(names * 2), "use": uses, "group": uses}
        np.savez(tmp_path / f"{part}.npz", xyz=cloud, part=np.array(part), **columns)
    texts = torch.eye(4, 384)
    texts[3] = texts[2]  # car, chair, pedestrian, standing person
    known = ["car", "chair", "pedestrian", "standing person"]
    torch.save({"labels": known, "averages": texts}, tmp_path / "texts.pt")
    shapes = road.train.Shapes([tmp_path / f"{part}.npz" for part in labels], tmp_path)
    assert shapes.labels == ["car", "chair", "pedestrian", "standing person"]
    assert shapes.parts == ["road", "indoor", "road", "indoor"]
    assert shapes.same.nonzero().tolist() == [[2, 3], [3, 2]]
    assert shapes.chance.sum() == pytest.approx(1)
    assert shapes.chance[shapes.part == "road"].sum() == pytest.approx(0.5)
