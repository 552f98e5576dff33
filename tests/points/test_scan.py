"""Frames to named boxes: each step on simulated frames, and the whole way."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from budwood.bench.frames import HEIGHT, Placed, street, sweep
from budwood.errors import InputError, InputWarning, OutputError, UnknownNameError
from budwood.points import ScanConfig, ScannedFrame, draw_from_above, scan, write_page
from budwood.points.adapters import make_adapter
from budwood.points.axes import turn_up
from budwood.points.data import CloudSet
from budwood.points.io import Assumed, make_cloud, stem
from budwood.points.io.units import METRES
from budwood.points.scanning import folder as folders
from budwood.points.scanning import naming, pipeline, rejection
from budwood.points.scanning.boxes import UNKNOWN, Box, fit_box
from budwood.points.scanning.calibration import CAMERA
from budwood.points.scanning.formats import csv_text, kitti_text, nuscenes_results
from budwood.points.scanning.ground import find_ground
from budwood.points.scanning.naming import batched_count
from budwood.points.scanning.poses import check_poses, read_poses
from budwood.points.scanning.rejection import (
    best_threshold,
    digest_of,
    known_mass,
    with_background,
)
from budwood.points.scanning.segments import cluster_points, in_range, segment
from budwood.points.scanning.tracks import Tracker
from budwood.points.text import TextEmbeddings, save_embeddings
from tests.points import models, sets

pytest.importorskip("sklearn")
LABELS = ("car", "pedestrian")
SCENE = [Placed("car", 8, 4, 1.2), Placed("pedestrian", 6, -3), Placed("car", -12, -5, -0.2)]


def frame(scene=SCENE, shots=700, **options):
    return sweep(scene, shots=shots, **options)


def write(path, xyz):
    np.column_stack([xyz, np.zeros(len(xyz))]).astype("<f4").tofile(path)
    return path


@pytest.fixture
def by_shape(monkeypatch):
    """An encoder that tells what lies from what stands; returns a tiny one for its sizes."""
    model = models.make("sprout")

    def encode(encoder, clouds, adapter=None, batch_size=32):
        features = torch.zeros(len(clouds), model.embed_dim)
        for row, (xyz, _) in zip(features, clouds):
            wide, high = np.ptp(xyz[:, [0, 2]].numpy(), axis=0).max(), np.ptp(xyz[:, 1].numpy())
            row[int(high > wide)] = 1.0
        return features

    monkeypatch.setattr(naming, "encode", encode)
    return model


def texts(model, labels=LABELS):
    from budwood.points import TextEmbeddings

    return TextEmbeddings(tuple(labels), torch.eye(model.embed_dim)[: len(labels)])


@pytest.mark.parametrize("slope", [0.0, 0.08, -0.15])
def test_ground_is_found_level_and_tilted(slope):
    xyz, hit = frame(street(), slope=slope)
    found = find_ground(xyz)
    assert found.is_ground[hit == -1].mean() > 0.97
    # The lowest 20 cm of objects go with it.
    tall = (hit >= 0) & (xyz[:, 2] + HEIGHT - slope * xyz[:, 0] > 0.35)
    assert found.is_ground[tall].mean() < 0.01
    is_road = hit == -1
    truth = slope * xyz[is_road, 0] - HEIGHT
    np.testing.assert_allclose(found.height[is_road], truth, atol=0.3)


def test_ground_on_hills():
    rng = np.random.default_rng(0)
    xy = rng.uniform(-40, 40, (40_000, 2))
    hills = 2 * np.sin(xy[:, 0] / 20) + np.cos(xy[:, 1] / 15)
    box = rng.uniform((5, 5, 0.4), (9, 7, 1.5), (800, 3))
    box[:, 2] += 2 * np.sin(7 / 20) + np.cos(6 / 15)
    found = find_ground(np.vstack([np.column_stack([xy, hills]), box]))
    assert found.is_ground[:40_000].mean() > 0.95 and found.is_ground[40_000:].mean() < 0.1


@pytest.mark.parametrize("n_ghosts", [1, 60, 120])
def test_points_below_the_road_do_not_pull_the_ground_down(n_ghosts):
    xyz, hit = frame(street(), shots=1500)
    rng = np.random.default_rng(0)
    ghosts = np.column_stack([rng.uniform(-30, 30, (n_ghosts, 2)), rng.uniform(-7, -2.2, n_ghosts)])
    found = find_ground(np.vstack([xyz, ghosts]))
    assert found.is_ground[: len(xyz)][hit == -1].mean() > 0.97
    tall = (hit >= 0) & (xyz[:, 2] + HEIGHT > 0.35)
    assert found.is_ground[: len(xyz)][tall].mean() < 0.01
    cut = segment(make_cloud(np.vstack([xyz, ghosts])), ScanConfig(max_range=None))
    alone = segment(make_cloud(xyz), ScanConfig(max_range=None))
    is_found, was_found = cut.cluster[: len(xyz)] >= 0, alone.cluster >= 0
    assert (is_found != was_found).mean() < 0.001


@pytest.mark.parametrize("across", [0, 1])
@pytest.mark.parametrize("depth", [0.6, 1.0, 2.0])
def test_a_person_in_a_ditch_stays(depth, across):
    rng = np.random.default_rng(0)
    xyz = np.column_stack([rng.uniform(-20, 20, (60_000, 2)), np.zeros(60_000)])
    xyz[np.abs(xyz[:, across] - 5) < 0.5, 2] = -depth
    person = rng.uniform((-0.25, -0.25, 0), (0.25, 0.25, 1.7), (400, 3))
    person[:, 2] -= depth
    person[:, across] += 5
    found = find_ground(np.vstack([xyz, person]))
    assert found.is_ground[:60_000].mean() > 0.97
    assert found.is_ground[60_000:].mean() < 0.2  # the feet


def test_a_line_of_points_gives_no_warning_of_scikit_learn():
    rng = np.random.default_rng(6)
    along = np.arange(4.0)
    find_ground(np.stack([along, along, rng.normal(size=4) * 0.3], axis=1))


def test_frames_without_ground():
    cars, _ = frame(ground=False)
    assert find_ground(cars) is None
    wall = np.random.default_rng(0).uniform((0, 0, 0), (30, 0.1, 4), (3000, 3))
    assert find_ground(wall) is None
    segments = segment(make_cloud(cars), ScanConfig())
    assert segments.ground is None and segments.n_clusters == 3
    assert segments.notices == ("no ground was found, and none removed",)
    without = segment(make_cloud(cars), ScanConfig(ground=False))
    assert without.notices == () and without.n_clusters == 3


def test_each_object_is_a_cluster():
    xyz, hit = frame()
    segments = segment(make_cloud(xyz), ScanConfig(max_range=None))
    assert segments.n_clusters == 3 and segments.notices == ()
    sizes = [len(members) for members in segments.members()]
    assert sizes == sorted(sizes, reverse=True)
    for members in segments.members():
        of, counts = np.unique(hit[members], return_counts=True)
        assert of[counts.argmax()] >= 0 and counts.max() / len(members) > 0.99


def test_clusters_are_those_of_dbscan():
    from sklearn.cluster import DBSCAN

    xyz = np.random.default_rng(1).uniform(0, 6, (300, 3))
    got = cluster_points(xyz, 0.6, 1)
    # Voxels of a third of the gap blur distances a little: those between do not decide here.
    flat = xyz * (1, 1, 0.5)
    strict, loose = (DBSCAN(eps=gap, min_samples=1).fit(flat).labels_ for gap in (0.3, 0.9))
    for i in range(0, 300, 7):
        assert (got[strict == strict[i]] == got[i]).all()
        assert (loose[got == got[i]] == loose[i]).all()
    counts = np.bincount(got)
    assert (np.diff(counts) <= 0).all()
    few = cluster_points(xyz, 0.6, 4)
    assert few.max() + 1 == (counts >= 4).sum() and (few == -1).sum() == counts[counts < 4].sum()
    assert len(cluster_points(np.empty((0, 3)), 0.6, 1)) == 0


def test_gaps_grow_with_the_distance():
    pair = np.array([[0, 0, 0], [0, 1.0, 0]])
    counts = [len(set(cluster_points(pair + np.array([x, 0, 0]), 0.6, 1))) for x in (5, 14, 26, 50)]
    assert counts == [2, 2, 1, 1]
    far = np.array([[90, 0, 0], [90, 1.5, 0]])
    assert len(set(cluster_points(far, 0.6, 1))) == 2


def test_gaps_do_not_grow_in_map_coordinates():
    rng = np.random.default_rng(0)
    blocks = [rng.uniform((0, y, 0), (1, y + 1, 1), (300, 3)) for y in (20, 22, 24, 26)]
    xyz = np.vstack(blocks)
    whole = ScanConfig(ground=False, max_range=None)
    assert segment(make_cloud(xyz + np.array([40, 0, 0])), ScanConfig(ground=False)).n_clusters == 1
    assert segment(make_cloud(xyz + np.array([458_000, 5_428_000, 100])), whole).n_clusters == 4
    around = np.vstack(
        [xyz + np.array([40, 0, 0]), [[-60, -60, 0]]]
    )  # the sensor is among the points
    assert segment(make_cloud(around), whole).n_clusters == 1


def test_clusters_that_are_left_out():
    long = np.column_stack([np.arange(0, 30, 0.1), np.full(300, 5.0), np.zeros(300)])
    one_place, small = np.full((40, 3), 3.0), np.random.default_rng(0).normal(size=(30, 3)) * 0.1
    cloud = make_cloud(np.vstack([long, one_place, small - 8]))
    segments = segment(cloud, ScanConfig(ground=False))
    assert segments.n_clusters == 1 and segments.notices == (
        "clusters with all points at one place, left out: 1",
        "clusters longer than 20 m, left out: 1",
    )
    nothing = segment(cloud, ScanConfig(ground=False, min_points=2000))
    assert nothing.n_clusters == 0 and nothing.notices[-1] == "no cluster has 2000 points"


def test_more_clusters_than_are_named():
    places = np.stack(np.meshgrid(*[np.arange(1.0, 40, 2)] * 2, [0.0]), axis=-1).reshape(-1, 3)
    xyz = np.repeat(places, 5, axis=0) + np.random.default_rng(0).normal(size=(2000, 3)) * 0.05
    segments = segment(make_cloud(xyz), ScanConfig(ground=False, min_points=3, max_clusters=50))
    assert segments.n_clusters == 50 and (segments.cluster >= 0).sum() == 250
    assert segments.notices == ("the 50 clusters of most points are named, of 400",)


@pytest.mark.parametrize("n_points", [1, 2, 3])
def test_frames_of_few_points(n_points):
    xyz = np.array([[5.0, 0, 0], [5, 0.1, 0], [5.1, 0, 0.2]])[:n_points]
    segments = segment(make_cloud(xyz), ScanConfig(min_points=2))
    assert segments.n_clusters == int(n_points > 1)
    assert len(segments.notices) == (1 if n_points > 1 else 2)


def test_frames_without_end():
    xyz = np.array([[5.0, 0, 0], [1e12, 1e12, 1e12]])
    with pytest.raises(InputError, match=r"extends over 1e\+12 m, which is too far"):
        segment(make_cloud(xyz), ScanConfig(max_range=None))


def test_range():
    cloud = make_cloud([[0, 0, 0], [3, 4, 100], [5.1, 0, 0], [0.5, 0, 0]])
    assert in_range(cloud, 0, 5).xyz[:, 0].tolist() == [3, 0.5]
    assert in_range(cloud, 1, None).xyz[:, 0].tolist() == [3, 5.1]
    with pytest.raises(InputError, match=r"no point at 0 to 60 m.*x spans 400000 to 400000"):
        in_range(make_cloud([[4e5, 5e6, 3], [4e5, 5e6, 4]], source="map.las"), 0, 60)


def test_boxes():
    rng = np.random.default_rng(0)
    sides, yaw = np.array([4.2, 1.8, 1.5]), 0.7
    local = rng.uniform(-0.5, 0.5, (4000, 3)) * sides
    c, s = math.cos(yaw), math.sin(yaw)
    xyz = local @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + (10, -4, 0.2)
    box = fit_box(xyz)
    np.testing.assert_allclose(box.center, (10, -4, 0.2), atol=0.03)
    np.testing.assert_allclose(box.size, sides, atol=0.05)
    assert box.yaw == pytest.approx(yaw, abs=0.02)
    corners = box.corners()
    np.testing.assert_allclose(corners.mean(axis=0), box.center)
    np.testing.assert_allclose(np.linalg.norm(corners[0] - corners[1]), box.size[0])
    np.testing.assert_allclose(np.linalg.norm(corners[1] - corners[2]), box.size[1])
    assert (corners[:4, 2] < corners[4:, 2]).all()
    along = corners[0, :2] - corners[1, :2]
    assert math.atan2(along[1], along[0]) == pytest.approx(box.yaw)
    low = fit_box(xyz, ground=-0.9)
    assert low.center[2] - low.size[2] / 2 == pytest.approx(-0.9)
    assert low.center[2] + low.size[2] / 2 == pytest.approx(box.center[2] + box.size[2] / 2)
    assert fit_box(xyz, ground=-3.0).size == box.size


@pytest.mark.parametrize(
    ("points", "length", "yaw"),
    [
        ([[0, 0, 0], [0, 2, 1]], 2, math.pi / 2),
        ([[0, 0, 0], [1, 1, 0], [3, 3, 0]], 3 * math.sqrt(2), math.pi / 4),
        ([[0, 0, 0], [-2, 2, 1]], 2 * math.sqrt(2), -math.pi / 4),
        ([[5, 5, 0], [5, 5, 1], [5, 5, 2]], 0.01, 0),
    ],
)
def test_boxes_of_points_on_a_line(points, length, yaw):
    box = fit_box(np.array(points, dtype=float))
    assert box.size[0] == pytest.approx(length) and box.size[1] == 0.01
    assert box.yaw == pytest.approx(yaw)


def test_numbers_of_points_that_make_batches():
    counts = [batched_count(n) for n in range(2, 2000)]
    assert all(0.8 * n <= count <= n for n, count in enumerate(counts, 2))
    assert len(set(counts)) < 40 and batched_count(1024) == 1024


def test_threshold():
    values = np.array([0.1, 0.2, 0.4, 0.6, 0.9])
    assert best_threshold(values, values > 0.3) == pytest.approx(0.3)
    assert best_threshold(values, np.array([0, 1, 0, 1, 1], bool)) == pytest.approx(0.5)
    assert best_threshold(values, values < 0.3) == 0
    assert best_threshold(values, values < 2) == best_threshold(values, values > 2) == 0


def test_calibration_takes_the_parts_of_training_and_knows_synonyms(monkeypatch):
    model = models.make("sprout")
    names = {"ball": "pedestrian", "stick": "standing person"}
    given = sets.clouds(2).where(use="val")
    about = tuple(replace(one, label=names[one.label]) for one in given.about)
    asked, rightly = [], []
    monkeypatch.setattr(
        rejection, "load_clouds", lambda part: asked.append(part) or CloudSet(given.xyz, about)
    )
    monkeypatch.setattr(rejection, "best_threshold", lambda _, known: rightly.append(known) or 0.5)
    for trained in (None, {"indoor": ("a",)}, {"indoor": ("a",), "road": ("b",)}):
        monkeypatch.setattr(rejection, "trained_labels", lambda _, trained=trained: trained)
        background = sets.texts(model.embed_dim, ("wall",))
        words = models.Words(model.embed_dim)
        assert rejection.calibrate(model, None, background, text=words) == 0.5
    assert asked == ["both", "indoor", "both"]
    assert all(known.all() for known in rightly)  # either name means a person


def test_background_without_what_is_asked_for():
    model = models.make("sprout")
    given = texts(model, ("car", "tree"))
    around = sets.texts(model.embed_dim, ("Tree", "wall", "auto", "noise"))
    around.vectors[2] = given.vectors[0]
    labels = with_background(given, around)
    assert labels.texts.labels == ("car", "tree", "wall", "noise") and labels.given == given.labels
    vectors = labels.texts.vectors
    mass = known_mass(torch.stack([vectors[0], vectors[2]]), labels, 50.0)
    assert mass[0] > 0.99 and mass[1] < 0.01
    assert with_background(given, None).texts is given


def test_objects_get_their_names(by_shape):
    xyz, _ = frame()
    (found,) = scan(xyz, texts(by_shape), encoder=by_shape)
    assert [box.label for box in found.boxes] == ["car", "car", "pedestrian"]
    assert found.n_points == len(xyz) and found.n_ground > len(xyz) / 2
    assert found.n_in_range == (np.hypot(xyz[:, 0], xyz[:, 1]) <= 60).sum()
    for box, place in zip(found.boxes, (SCENE[0], SCENE[2], SCENE[1])):
        assert np.hypot(box.center[0] - place.x, box.center[1] - place.y) < 1.2
        assert box.center[2] - box.size[2] / 2 == pytest.approx(-HEIGHT, abs=0.15)
        assert box.track is None and 0.8 * box.n_points <= box.n_used <= box.n_points
        assert box.is_known and box.known == pytest.approx(1)
    turned = np.column_stack([xyz[:, 0], xyz[:, 2], -xyz[:, 1]])
    (again,) = scan(turned, texts(by_shape), encoder=by_shape, up="y")
    for one, other in zip(found.boxes, again.boxes):
        np.testing.assert_allclose(one.center, other.center)


def test_objects_like_the_background_are_unknown(by_shape):
    xyz, _ = frame()
    background = texts(by_shape, ("car", "pole"))
    background = type(background)(("wall", "pole"), torch.eye(by_shape.embed_dim)[[2, 1]])
    given = texts(by_shape, ("car",))
    (found,) = scan(xyz, given, ScanConfig(threshold=0.5), encoder=by_shape, background=background)
    assert [box.label for box in found.boxes] == ["car", "car", UNKNOWN]
    assert [box.best for box in found.boxes] == ["car"] * 3 and found.boxes[2].known < 0.5
    (all_named,) = scan(
        xyz, given, ScanConfig(threshold=0), encoder=by_shape, background=background
    )
    assert {box.label for box in all_named.boxes} == {"car"}


def test_a_file_of_embeddings_has_a_background(by_shape, tmp_path):
    xyz, _ = frame()
    stored = TextEmbeddings(("pole", "car", "wall"), torch.eye(by_shape.embed_dim)[[1, 0, 2]])
    save_embeddings(stored, tmp_path / "all.safetensors")
    save_embeddings(stored.only(["car"]), tmp_path / "car.safetensors")
    how = {"encoder": by_shape, "config": ScanConfig(threshold=0.5)}
    (found,) = scan(xyz, ["car"], embeddings=tmp_path / "all.safetensors", **how)
    assert [box.label for box in found.boxes] == ["car", "car", UNKNOWN]
    some = {"embeddings": tmp_path / "all.safetensors", "background": ["wall"]}
    (found,) = scan(xyz, ["car"], **some, **how)
    assert found.boxes[2].known == pytest.approx(0.5)  # like neither
    for given, rest in (
        (["car"], {"embeddings": tmp_path / "car.safetensors"}),
        (None, {"embeddings": tmp_path / "all.safetensors"}),
        (texts(by_shape, ("car",)), {}),
    ):
        with pytest.warns(InputWarning, match="no object can be 'unknown'.*such as wall"):
            (found,) = scan(xyz, given, **rest, **how)
        assert UNKNOWN not in {box.label for box in found.boxes}
    with pytest.raises(InputError, match="no text embedding of 'tree'"):
        scan(xyz, ["car"], embeddings=tmp_path / "all.safetensors", background=["tree"], **how)


def test_calibration_with_a_file_of_embeddings(monkeypatch):
    model = models.make("sprout")
    monkeypatch.setattr(rejection, "load_clouds", lambda part: sets.clouds(2))
    monkeypatch.setattr(rejection, "embed_labels_for", None)  # there is no text tower
    rounds = []
    monkeypatch.setattr(rejection, "best_threshold", lambda _, known: rounds.append(known) or 0.5)
    background = sets.texts(model.embed_dim, ("wall",))
    for labels, threshold in ((("ball", "cat"), 0.5), (("ball", "stick"), 0.5), (("cat",), 0.0)):
        stored = sets.texts(model.embed_dim, labels)
        assert rejection.calibrate(model, None, background, embeddings=stored) == threshold
    one, other = rounds
    assert 0 < one.mean() < 1 and 0 < other.mean() < 1  # some are kept, some rejected
    keys = {
        rejection._key(model, None, background, stored)
        for stored in (None, background, background.only(["wall"]), sets.texts(model.embed_dim))
    }
    assert len(keys) == 3


@pytest.mark.parametrize("units", ["mm", "ft", "us-ft", "cm"])
def test_boxes_are_metres_in_all_units(by_shape, tmp_path, units):
    xyz, _ = frame()
    (metres,) = scan(xyz, texts(by_shape), encoder=by_shape)
    assert metres.assumed.units == "m"
    other = xyz / METRES[units]
    (found,) = scan(other, texts(by_shape), encoder=by_shape, units=units)
    named = make_cloud(other).assuming(units=units)
    (known,) = scan(named, texts(by_shape), encoder=by_shape)
    for one in (found, known):
        assert one.assumed.units == units
        for box, right in zip(one.boxes, metres.boxes, strict=True):
            np.testing.assert_allclose(box.center, right.center, atol=1e-6)
            np.testing.assert_allclose(box.size, right.size, atol=1e-6)
    with pytest.raises(InputError, match="units='furlong' is unknown; give one of auto, m, km, cm"):
        scan(xyz, texts(by_shape), encoder=by_shape, units="furlong")
    file = write(tmp_path / "a.bin", other)
    how = {"encoder": by_shape, "output": tmp_path / "out"}
    scan([file], texts(by_shape), units=units, **how)
    with pytest.raises(OutputError, match="units"):
        scan([file], texts(by_shape), **how)


def test_lists_and_iterators(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    files = [write(tmp_path / f"{i}.bin", xyz) for i in range(5)]
    whole = scan(files, texts(by_shape), encoder=by_shape)
    assert [one.source for one in whole] == [str(file) for file in files]
    lazy = scan(iter(files), texts(by_shape), encoder=by_shape, batch_frames=2)
    assert not isinstance(lazy, list) and len(list(lazy)) == 5
    assert len(scan(tmp_path, texts(by_shape), encoder=by_shape)) == 5
    with pytest.raises(InputError, match="there are no frames"):
        scan([], texts(by_shape), encoder=by_shape)
    files[1].write_bytes(b"123")
    refused = []
    kept = scan(files, texts(by_shape), encoder=by_shape, on_error=lambda *a: refused.append(a[0]))
    assert len(kept) == 4 and refused == [str(files[1])]
    with pytest.raises(InputError, match=r"1\.bin"):
        scan(files, texts(by_shape), encoder=by_shape)


def test_bad_labels_and_settings(by_shape):
    xyz, _ = frame(shots=50)
    for labels in ([], ["car", ""], ["car", "Car"], "car"):
        with pytest.raises(InputError):
            scan(xyz, labels, encoder=by_shape)
    for wrong in (
        {"max_range": 0},
        {"min_range": -1},
        {"min_range": 70},
        {"gap": 0},
        {"gap": math.nan},
        {"min_points": 1},
        {"max_clusters": 0},
        {"threshold": 1.5},
        {"window": 0},
        {"points": 1},
        {"seed": -1},
        {"ground": 1},
        {"ground_height": math.inf},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            ScanConfig(**wrong)
    with pytest.raises(UnknownNameError, match="did you mean 'kitti'"):
        scan(xyz, texts(by_shape), encoder=by_shape, output="x", formats=["kiti"])


# Poses


def pose(x, y=0.0, yaw=0.0):
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def kitti_line(matrix):
    return " ".join(f"{x:.9g}" for x in matrix[:3].ravel())


def test_poses_of_kitti(tmp_path):
    wanted = np.stack([pose(i, 0.1 * i, 0.05 * i) for i in range(4)])
    frames = [tmp_path / "velodyne" / f"{i:06}.bin" for i in range(4)]
    path = tmp_path / "00.txt"
    path.write_text("\n".join(kitti_line(one @ np.linalg.inv(CAMERA)) for one in wanted))
    found = read_poses(path, frames)
    np.testing.assert_allclose(found.matrices, wanted, atol=1e-6)
    assert "no calib.txt" in found.notices[0]
    np.testing.assert_allclose(read_poses(path, frames[1:3]).matrices, wanted[1:3], atol=1e-6)
    backwards = [f"{i}.bin" for i in (3, 1, 0, 2)]  # as many frames as lines, in another order
    order = [3, 1, 0, 2]
    np.testing.assert_allclose(read_poses(path, backwards).matrices, wanted[order], atol=1e-6)
    unnumbered = [f"frame{i}.bin" for i in order]
    np.testing.assert_allclose(read_poses(path, unnumbered).matrices, wanted, atol=1e-6)
    calibration = CAMERA.copy()
    calibration[:3, 3] = (0.1, -0.2, -0.3)
    path.write_text("\n".join(kitti_line(one @ np.linalg.inv(calibration)) for one in wanted))
    (tmp_path / "calib.txt").write_text(f"P2: 1 2 3\nTr: {kitti_line(calibration)}\n")
    beside = read_poses(path, frames)
    np.testing.assert_allclose(beside.matrices, wanted, atol=1e-6)
    assert beside.notices == ()
    with pytest.raises(InputError, match="has 4 poses, and there are 2 frames"):
        read_poses(path, ["a.bin", "b.bin"])
    with pytest.raises(InputError, match="has 4 poses, and there are 1 frames"):
        read_poses(path, ["000007.bin"])
    for text, reason in (("1 2 3\n", "have 12"), ("", "12"), ("a b\n", "cannot read")):
        path.write_text(text)
        with pytest.raises(InputError, match=reason):
            read_poses(path, frames)
    path.write_text("\n".join([kitti_line(np.eye(4))] * 3 + [" ".join(["2"] * 12)]))
    with pytest.raises(InputError, match="pose 4 is no rotation"):
        read_poses(path, frames)
    with pytest.raises(InputError, match="do not exist"):
        read_poses(tmp_path / "no", frames)
    (tmp_path / "calib.txt").write_text("P2: 1 2 3\n")
    path.write_text("\n".join([kitti_line(np.eye(4))] * 4))
    with pytest.raises(InputError, match="not a KITTI calibration"):
        read_poses(path, frames)


def test_poses_of_nuscenes(tmp_path):
    half = math.sqrt(0.5)
    tables = {
        "sample_data": [
            {
                "filename": f"samples/LIDAR_TOP/{name}.pcd.bin",
                "is_key_frame": name != "between",
                "sample_token": f"s-{name}",
                "ego_pose_token": "e",
                "calibrated_sensor_token": "c",
            }
            for name in ("one", "between", "two")
        ],
        "ego_pose": [{"token": "e", "rotation": [half, 0, 0, half], "translation": [5, 0, 0]}],
        "calibrated_sensor": [{"token": "c", "rotation": [1, 0, 0, 0], "translation": [1, 0, 2]}],
    }
    for name, rows in tables.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    found = read_poses(tmp_path, [Path("a/one.pcd.bin"), Path("a/two.pcd.bin")])
    np.testing.assert_allclose(found.matrices[0] @ (1, 0, 0, 1), (5, 2, 2, 1), atol=1e-9)
    assert found.tokens == {"one.pcd.bin": "s-one", "two.pcd.bin": "s-two"} and not found.notices
    found = read_poses(tmp_path, [Path(f"{name}.pcd.bin") for name in ("one", "between")])
    assert (
        found.tokens == {"one.pcd.bin": "s-one"} and "1 of 2 frames are sweeps" in found.notices[0]
    )
    assert found.times is None and found.order() == [0, 1]  # these tables do not have them
    assert stem(Path("a/one.pcd.bin")) == "one" and stem(Path("1.5.BIN")) == "1.5"
    with pytest.raises(InputError, match="no sample_data of other.bin"):
        read_poses(tmp_path, ["other.bin"])
    (tmp_path / "ego_pose.json").write_text("[]")
    with pytest.raises(InputError, match="no complete tables"):
        read_poses(tmp_path, ["one.pcd.bin"])
    (tmp_path / "sample_data.json").write_text("{}")
    with pytest.raises(InputError, match="not a nuScenes table"):
        read_poses(tmp_path, ["one.pcd.bin"])


def drive_of_nuscenes(folder):
    """Four frames of a drive, of which the third is a sweep, and their tables."""
    xyz, _ = frame(shots=300)
    (folder / "samples").mkdir()
    (folder / "sweeps").mkdir()
    tables = {
        "calibrated_sensor": [{"token": "c", "rotation": [1, 0, 0, 0], "translation": [0, 0, 0]}]
    }
    for i, part in enumerate(("samples", "samples", "sweeps", "samples")):
        write(folder / part / f"{i}.pcd.bin", xyz - (1.5 * i, 0, 0))
        shot = {
            "filename": f"{part}/{i}.pcd.bin",
            "is_key_frame": part == "samples",
            "sample_token": f"s{i}",
            "ego_pose_token": f"e{i}",
            "calibrated_sensor_token": "c",
            "timestamp": 1532402927647951 + 50_000 * i,
        }
        at = {"token": f"e{i}", "rotation": [1, 0, 0, 0], "translation": [1.5 * i, 0, 0]}
        tables.setdefault("sample_data", []).append(shot)
        tables.setdefault("ego_pose", []).append(at)
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return [folder / "samples", folder / "sweeps"]


def test_samples_and_sweeps_are_put_into_the_order_of_time(by_shape, tmp_path):
    parts = drive_of_nuscenes(tmp_path)
    given = {"labels": texts(by_shape), "encoder": by_shape, "poses": tmp_path}
    with pytest.warns(InputWarning, match="are not in the order of time, in which") as warned:
        found = scan(parts, output=tmp_path / "found", formats=["nuscenes"], **given)
    assert len(warned) == 1 and warned[0].filename == __file__
    files = [Path(one.source) for one in found]
    assert [file.name for file in files] == [f"{i}.pcd.bin" for i in range(4)]
    assert [one.pose[0, 3] for one in found] == [0.0, 1.5, 3.0, 4.5]
    results = json.loads((tmp_path / "found/nuscenes.json").read_text())["results"]
    assert list(results) == ["s0", "s1", "s3"] and all(results.values())
    again = scan(files, **given)  # in their order: nothing to say
    assert [one.as_json() for one in again] == [one.as_json() for one in found]
    assert read_poses(tmp_path, files[::-1]).order() == [3, 2, 1, 0]


def test_arrays_of_poses():
    assert check_poses([np.eye(4)] * 2, 2).shape == (2, 4, 4)
    mirrored = np.diag([1.0, 1, -1, 1])
    for wrong, reason in (
        (np.eye(4), "shape"),
        ([np.eye(4)], "1 poses for 2 frames"),
        ([np.eye(4), np.nan * np.eye(4)], "pose 2"),
        ([mirrored, np.eye(4)], "pose 1"),
        ("abc", "not numbers"),
    ):
        with pytest.raises(InputError, match=reason):
            check_poses(wrong, 2)


def test_objects_are_followed():
    rng = np.random.default_rng(0)
    car = rng.uniform(-1, 1, (50, 3)) + np.array([10, 3, 0])
    person = rng.uniform(-0.3, 0.3, (30, 3))
    tracker = Tracker(window=3)
    for i in range(5):
        place = pose(2.0 * i, yaw=0.1 * i)
        back = np.linalg.inv(place)
        walked = person + np.array([6, -2 + 1.2 * i, 0])
        clusters = [xyz @ back[:3, :3].T + back[:3, 3] for xyz in (walked, car)][:: (-1) ** i]
        found = tracker.update(clusters, place)[:: (-1) ** i]
        assert [number for number, _ in found] == [0, 1]
        assert len(found[1][1]) == 50 * min(i + 1, 3)
        # Standing: all points at the same places in this sensor's frame. Walking: about its middle.
        np.testing.assert_allclose(
            np.ptp(found[1][1], axis=0), np.ptp(clusters[:: (-1) ** i][1], axis=0)
        )
        np.testing.assert_allclose(
            np.ptp(found[0][1], axis=0), np.ptp(clusters[:: (-1) ** i][0], axis=0)
        )
    assert tracker.n_followed == tracker.n_possible == 8
    assert [number for number, _ in tracker.update([car + 100], np.eye(4))] == [2]
    for _ in range(4):
        tracker.update([], np.eye(4))
    assert [number for number, _ in tracker.update([car], np.eye(4))] == [3]
    other = Tracker(window=3)
    other.reserve([4, None])
    assert [n for n, _ in other.update([car, person], np.eye(4), [7, None])] == [7, 8]
    assert [n for n, _ in other.update([car, person + 50], np.eye(4))] == [7, 9]


def drive(n=4, shots=400):
    """Frames of a sensor that drives past the scene, and its poses."""
    frames = [frame(shots=shots, at=(2.0 * i, 0.0), seed=i)[0] for i in range(n)]
    return frames, np.stack([pose(2.0 * i) for i in range(n)])


def test_poses_accumulate_points(by_shape):
    frames, poses = drive()
    found = scan(frames, texts(by_shape), ScanConfig(window=2), encoder=by_shape, poses=poses)
    first, last = found[0], found[-1]
    tracks = {box.track: box for box in first.boxes}
    assert sorted(tracks) == [0, 1, 2] == sorted(box.track for box in last.boxes)
    for box in last.boxes:
        assert box.n_used > box.n_points or box.n_used == by_shape.preparation.n_points
        moved = np.subtract(box.center, tracks[box.track].center)
        assert moved[0] == pytest.approx(-6, abs=1.5) and box.label == tracks[box.track].label
    assert all(one.notices == () for one in found)


def test_clusters_for_adaptation(by_shape, tmp_path):
    frames, poses = drive()
    given = {"labels": texts(by_shape), "encoder": by_shape, "formats": ["clusters"]}
    found = scan(frames, poses=poses, output=tmp_path / "a", **given)
    files = sorted((tmp_path / "a" / "clusters").iterdir())
    assert [file.name for file in files] == [f"object-{i:06}.npy" for i in range(3)]
    sizes = [len(np.load(file)) for file in files]
    for number, size in enumerate(sizes):
        views = [
            len(xyz)
            for one in found
            for box, xyz in zip(one.boxes, one.clusters)
            if box.track == number
        ]
        assert size == max(views) and len(views) == 4
    (alone,) = scan(frames[0], output=tmp_path / "b", **given)
    files = sorted((tmp_path / "b" / "clusters").iterdir())
    assert [len(np.load(file)) for file in files] == [box.n_points for box in alone.boxes]


def test_poses_of_other_frames_are_doubted(by_shape):
    frames, poses = drive()
    poses[:, 0, 3] *= 20
    found = scan(frames, texts(by_shape), encoder=by_shape, poses=poses)
    assert "the poses may be those of other frames" in found[-1].notices[-1]
    with pytest.raises(InputError, match="4 poses for 3 frames"):
        scan(frames[:3], texts(by_shape), encoder=by_shape, poses=poses)


# Formats


def box(label="car", center=(10.0, 2.0, -0.9), size=(4.0, 1.8, 1.6), yaw=0.0, **other):
    about = {"score": 0.8, "known": 0.9, "best": "car", "n_points": 50, "n_used": 48} | other
    return Box(center, size, yaw, label, **about)


def scanned(*boxes, source="a/000003.bin", **other):
    return ScannedFrame(source, boxes, 100, 90, 40, ("a notice",), **other)


def test_json_keeps_everything():
    one = scanned(box(track=4), box(UNKNOWN), pose=pose(3.0))
    again = ScannedFrame.from_json(json.loads(json.dumps(one.as_json())))
    assert again.boxes == one.boxes and again.notices == one.notices
    assert again.known == one.boxes[:1] and np.array_equal(again.pose, one.pose)
    assert again.as_json() == one.as_json()


def test_a_warning_shows_the_line_of_the_user(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    write(tmp_path / "0.bin", xyz)
    (tmp_path / "readme.md").write_text("no frame")
    found = scan(iter([tmp_path]), texts(by_shape), encoder=by_shape)
    with pytest.warns(InputWarning, match=r"1 file is of no known format: 1 \.md") as warned:
        assert len(list(found)) == 1
    assert warned[0].filename == __file__


@pytest.mark.parametrize("up", ["y", "-y", "x"])
def test_frames_in_other_axes_are_tracked_and_placed_as_they_are(by_shape, tmp_path, up):
    """The same street, with the same poses, as a sensor with other axes has them."""
    turn = np.eye(4)
    turn[:3, :3] = turn_up("z", up)
    xyz, _ = frame(shots=300)
    poses = np.stack([pose(x=1.5 * i) for i in range(3)])
    frames = [xyz - (1.5 * i, 0, 0) for i in range(3)]
    given = {"labels": texts(by_shape), "encoder": by_shape}
    known = scan(frames, poses=poses, **given)
    frames = [one @ turn[:3, :3].T for one in frames]
    found = scan(frames, poses=turn @ poses @ np.linalg.inv(turn), up=up, **given)
    for one, other in zip(known, found):
        assert [box.track for box in one.boxes] == [box.track for box in other.boxes]
        assert [box.n_used for box in one.boxes] == [box.n_used for box in other.boxes]
        for box, same in zip(one.boxes, other.boxes):  # at the same place of the world
            place = (turn @ one.pose) @ (*box.center, 1)
            np.testing.assert_allclose(other.pose @ (*same.center, 1), place, atol=0.05)
    tracks = {box.track for one in found for box in one.boxes}
    assert len(tracks) < sum(len(one.boxes) for one in found)


def test_kitti_labels_end_at_the_edges_of_the_picture():
    projection = np.array([[700.0, 0, 600, 0], [0, 700, 180, 0], [0, 0, 1, 0]])

    def sides(center, size=None):
        line = kitti_text(scanned(box(center=center)), CAMERA, projection, size)
        return [float(value) for value in line.split()[4:8]]

    inside, over, beside = (20.0, 2.0, -0.9), (8.0, -6.0, 0.0), (8.0, -20.0, 0.0)
    size = (1242, 375)
    assert sides(inside, size) == sides(inside)
    left, top, right, bottom = sides(over)
    assert 0 < left < 1241 < right
    assert sides(over, size) == [left, top, 1241.0, bottom]
    assert sides(over, (1224, 200)) == [left, top, 1223.0, 199.0]
    assert sides(beside)[0] > 1242 and sides(beside, size) == [-1.0] * 4


def test_kitti_labels_of_frames_in_other_axes():
    line = kitti_text(scanned(box())).split()
    to_box = turn_up("-y", "z")  # the frame's boxes are in axes that were turned so that z is up
    camera = np.array([-2.0, 0.9, 10.0])
    ahead = to_box @ (0, 0, 1)
    turned = box(center=tuple(to_box @ camera), yaw=math.atan2(ahead[1], ahead[0]))
    there = replace(scanned(turned), assumed=Assumed(up="-y"))
    found = kitti_text(there).split()
    np.testing.assert_allclose([float(v) for v in found[8:14]], [float(v) for v in line[8:14]])
    assert abs(float(found[14])) == pytest.approx(math.pi / 2, abs=0.01)
    with pytest.raises(InputError, match="x points up, so that a camera's axes are not known"):
        kitti_text(replace(there, assumed=Assumed(up="x")))


def test_options_without_effect_and_labels_alike_are_refused(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    given = {"labels": texts(by_shape), "encoder": by_shape}
    out = {"output": tmp_path / "found"}
    for options, reason in (
        ({"formats": ["csv"]}, "formats says what to write into output"),
        ({"formats": "csv", **out}, "formats='csv' is one string; give a list of names"),
        ({"output": 5}, "output is of type int; give a folder"),
        ({"calibration": "nope.txt"}, "a calibration .* is for poses and for boxes in KITTI's"),
        ({"calibration": "nope.txt", **out}, "a calibration .* is for poses and for boxes"),
        ({"config": ScanConfig(window=3)}, "window=3 is for frames with poses"),
        ({"labels": texts(by_shape, ["car", "Unknown"])}, "'unknown' is that of objects without"),
        (
            {"labels": texts(by_shape, ["a b", "a_b"]), "formats": ["kitti"], **out},
            "labels 'a b' and 'a_b' have the same name",
        ),
    ):
        with pytest.raises(InputError, match=reason):
            scan(xyz, **{**given, **options})
    assert not (tmp_path / "found").exists()


def test_another_calibration_writes_labels_anew(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    file, calibration = write(tmp_path / "0.bin", xyz), tmp_path / "calib.txt"
    given = {"labels": texts(by_shape), "encoder": by_shape, "output": tmp_path / "found"}
    labels = []
    for shift in (0.0, 5.0, 0.0):
        tr = CAMERA[:3].copy()
        tr[0, 3] = shift
        calibration.write_text("Tr: " + " ".join(map(str, tr.ravel())))
        scan([file], formats=["kitti"], calibration=calibration, **given)
        labels.append((tmp_path / "found/kitti/0.txt").read_text())
    x, moved, back = (float(text.split()[11]) for text in labels)
    assert moved == pytest.approx(x + 5, abs=0.02) and back == x


def calibrated(shift=0.0):
    """The text of a calibration: a camera that is moved to the side."""
    to_camera = CAMERA.copy()
    to_camera[0, 3] = shift
    return f"P2: 700 0 600 0 0 700 180 0 0 0 1 0\nTr: {kitti_line(to_camera)}\n"


def sides_of(file):
    return [float(line.split()[11]) for line in file.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:KITTI's labels. pictures of 1242")
def test_labels_use_the_calibration_beside_the_frames(by_shape, tmp_path):
    """With poses, which use it as well, and without."""
    frames, _ = drive(2)
    (tmp_path / "velodyne").mkdir()
    files = [write(tmp_path / f"velodyne/{i}.bin", xyz) for i, xyz in enumerate(frames)]
    (tmp_path / "00.txt").write_text("\n".join([kitti_line(np.eye(4))] * 2))
    given = {"labels": texts(by_shape), "encoder": by_shape, "formats": ["kitti"]}
    alone, posed = {**given, "output": tmp_path / "a"}, {**given, "output": tmp_path / "b"}
    posed["poses"] = tmp_path / "00.txt"
    with pytest.warns(InputWarning, match="the camera is assumed at the place of the LiDAR") as one:
        scan(files, **alone)
    assert len(one) == 1 and one[0].filename == __file__
    assumed = sides_of(tmp_path / "a/kitti/1.txt")
    (tmp_path / "calib.txt").write_text(calibrated(5.0))
    for options in (alone, posed):  # the first one was written with another camera
        scan(files, **options)
        labels = sides_of(options["output"] / "kitti/1.txt")
        np.testing.assert_allclose(sorted(labels), np.sort(assumed) + 5, atol=0.02)


@pytest.mark.filterwarnings("ignore:KITTI's labels. pictures of 1242")
def test_a_calibration_for_each_frame(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    files = [write(tmp_path / f"{i:06}.bin", xyz) for i in range(3)]
    folder = tmp_path / "calib"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i:06}.txt").write_text(calibrated(3.0 * i))
    given = {"labels": texts(by_shape), "encoder": by_shape, "calibration": folder}
    labels = {"output": tmp_path / "found", "formats": ["kitti"], **given}
    refused = {}
    found = scan(files, on_error=refused.__setitem__, **labels)
    assert [Path(one.source).stem for one in found] == ["000000", "000001"]
    first, second = (sides_of(tmp_path / f"found/kitti/00000{i}.txt") for i in range(2))
    np.testing.assert_allclose(np.array(first) + 3, second, atol=0.02)
    assert list(refused) == [str(files[2])]
    reason = "calib has no 000002.txt for the frame .*000002.bin; add it, or give one file for all"
    with pytest.raises(InputError, match=reason):
        scan(files, **labels)
    poses = tmp_path / "00.txt"
    poses.write_text("\n".join([kitti_line(np.eye(4))] * 3))
    moved = read_poses(poses, files[:2], folder).matrices
    np.testing.assert_allclose(moved[1] - moved[0], 3.0 * np.eye(4)[0][:, None] * np.eye(4)[3])
    with pytest.raises(InputError, match=reason):
        scan(files, poses=poses, **given)


def test_the_picture_says_where_boxes_end(by_shape, tmp_path):
    from PIL import Image

    xyz, _ = frame([Placed("car", 8, -6, 1.2)], shots=300)
    (tmp_path / "velodyne").mkdir()
    (tmp_path / "image_2").mkdir()
    file, calibration = write(tmp_path / "velodyne/0.bin", xyz), tmp_path / "calib.txt"
    calibration.write_text(calibrated())
    given = {"labels": texts(by_shape), "encoder": by_shape, "output": tmp_path / "found"}

    def right():
        scan([file], formats=["kitti"], **given)
        return float((tmp_path / "found/kitti/0.txt").read_text().split()[6])

    with pytest.warns(InputWarning, match="pictures of 1242 × 375 pixels are assumed"):
        assert right() == 1241.0
    calibration.write_text(calibrated().replace("600", "960"))  # of a wider picture
    with pytest.warns(InputWarning, match="may go beyond the edges of the picture, whose size"):
        assert right() > 1400
    Image.new("L", (1300, 400)).save(tmp_path / "image_2/0.png")
    assert right() == 1299.0


def test_clusters_of_a_frame_that_changed_are_written_anew(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    file = write(tmp_path / "0.bin", xyz)
    given = {"labels": texts(by_shape), "encoder": by_shape, "output": tmp_path / "found"}
    (first,) = scan([file], formats=["clusters"], **given)
    write(file, xyz[xyz[:, 0] < np.median(xyz[:, 0])])
    (second,) = scan([file], formats=["clusters"], **given)
    assert len(second.boxes) < len(first.boxes)
    assert len(list((tmp_path / "found/clusters").iterdir())) == len(second.boxes)


def test_csv():
    text = csv_text([scanned(box("traffic cone", track=2), box(UNKNOWN)), scanned()])
    head, first, second = text.splitlines()
    assert head.startswith("frame,label,score,known,best,x,y,z,length,width,height,yaw,n_points")
    assert first == "a/000003.bin,traffic cone,0.8,0.9,car,10.0,2.0,-0.9,4.0,1.8,1.6,0.0,50,48,2"
    assert second.split(",")[1] == UNKNOWN and second.endswith(",")


def test_kitti_labels():
    line, other = kitti_text(
        scanned(box(), box(UNKNOWN), box("person sitting", yaw=math.pi / 2))
    ).splitlines()
    kind, truncated, occluded, alpha, *numbers, score = line.split()
    assert (kind, truncated, occluded, score) == ("Car", "-1", "-1", "0.8000")
    # Ahead of the camera, 2 m to the left, its bottom 1.7 m below; facing away: −90°.
    left, top, right, bottom, h, w, length, x, y, z, angle = map(float, numbers)
    assert (left, top, right, bottom) == (-1, -1, -1, -1)
    assert (h, w, length, x, y, z) == (1.6, 1.8, 4.0, -2.0, 1.7, 10.0)
    assert angle == pytest.approx(-math.pi / 2, abs=0.01)
    assert float(alpha) == pytest.approx(angle - math.atan2(x, z), abs=0.01)
    assert other.startswith("Person_sitting ")
    assert abs(float(other.split()[14])) in (pytest.approx(0, abs=0.01), pytest.approx(3.14))
    projection = np.array([[700.0, 0, 600, 0], [0, 700, 180, 0], [0, 0, 1, 0]])
    seen = kitti_text(scanned(box()), CAMERA, projection).split()
    left, top, right, bottom = map(float, seen[4:8])
    assert left < 600 - 700 * 2 / 10 < right and top < 180 + 700 * 0.9 / 10 < bottom
    behind = kitti_text(scanned(box(center=(-10.0, 0, 0))), CAMERA, projection).split()
    assert behind[4:8] == ["-1.00"] * 4


def test_nuscenes_results():
    one = scanned(box(yaw=0.2), box(UNKNOWN), pose=pose(100.0, 5.0, math.pi / 2))
    other = scanned(source="b.pcd.bin")
    assert nuscenes_results([other])["results"] == {"b": []}
    found = nuscenes_results([one, other], {"000003.bin": "token"})
    assert found["meta"]["use_lidar"] and not found["meta"]["use_camera"]
    assert list(found["results"]) == ["token"]  # the other one is a sweep between samples
    (row,) = found["results"]["token"]
    assert row["translation"] == [98.0, 15.0, -0.9] and row["size"] == [1.8, 4.0, 1.6]
    angle = math.pi / 2 + 0.2
    wanted = [math.cos(angle / 2), 0, 0, math.sin(angle / 2)]
    np.testing.assert_allclose(row["rotation"], wanted, atol=1e-5)
    assert row["detection_name"] == "car" and row["sample_token"] == "token"


def test_nuscenes_takes_500_boxes_of_a_sample():
    boxes = [box(score=i / 1000) for i in range(502)]
    with pytest.warns(InputWarning, match="in 1 frames with more, 2 boxes with the lowest scores"):
        found = nuscenes_results([scanned(*boxes), scanned(box(), source="b.bin")])
    scores = [row["detection_score"] for row in found["results"]["000003"]]
    assert len(scores) == 500 and min(scores) == 0.002 and len(found["results"]["b"]) == 1


def test_what_the_devkit_of_nuscenes_does_not_take_is_said(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    given = {"encoder": by_shape, "formats": ["nuscenes"], "output": tmp_path / "found"}
    with pytest.warns(InputWarning) as warned:
        scan([xyz], texts(by_shape, ["Traffic  Cone", "cyclist", "van"]), **given)
    strange, tokens = (str(one.message) for one in warned)
    assert (
        "refuses results with the labels cyclist, van; those of its detection task are" in strange
    )
    assert "names of files as sample tokens, and boxes are in the sensor's frame" in tokens
    results = json.loads((tmp_path / "found/nuscenes.json").read_text())["results"]
    names = {row["detection_name"] for rows in results.values() for row in rows}
    assert "traffic_cone" in names
    given["output"] = tmp_path / "posed"
    with pytest.warns(InputWarning, match="sample tokens; give the folder of nuScenes' tables"):
        scan([xyz], texts(by_shape), poses=[np.eye(4)], **given)


# The folder of a run


def spied(monkeypatch):
    cut = []
    inner = pipeline.segment
    monkeypatch.setattr(
        pipeline, "segment", lambda cloud, config: cut.append(cloud.source) or inner(cloud, config)
    )
    return cut


@pytest.mark.filterwarnings("ignore:KITTI's labels", "ignore:nuScenes' results")
def test_a_run_goes_on_where_it_ended(by_shape, tmp_path, monkeypatch):
    xyz, _ = frame(shots=300)
    files = [write(tmp_path / f"{i}.bin", xyz) for i in range(5)]
    cut = spied(monkeypatch)
    given = {"labels": texts(by_shape), "encoder": by_shape, "output": tmp_path / "found"}
    partial = scan(iter(files), batch_frames=1, formats=["csv"], **given)
    begun = [next(partial) for _ in range(2)]
    partial.close()
    assert sorted(p.name for p in (tmp_path / "found/boxes").iterdir()) == ["0.json", "1.json"]
    cut.clear()
    found = scan(files, formats=["json", "csv", "kitti", "nuscenes"], **given)
    assert cut == [str(file) for file in files[2:]]
    assert found[0].as_json() == begun[0].as_json() and found[0].segments is None
    assert len((tmp_path / "found/boxes.csv").read_text().splitlines()) == 1 + 5 * 3
    assert len(json.loads((tmp_path / "found/nuscenes.json").read_text())["results"]) == 5
    assert json.loads((tmp_path / "found/run.json").read_text())["status"] == "complete"
    cut.clear()
    (tmp_path / "found/boxes/3.json").write_text("{")
    write(files[4], xyz[:-5])
    scan(files, **given)
    assert cut == [str(files[3]), str(files[4])]
    with pytest.raises(OutputError, match="holds another run"):
        scan(files, config=ScanConfig(gap=0.7), **given)
    with pytest.raises(OutputError, match="holds another run"):
        scan(files, templates="plain", **given)


@pytest.mark.filterwarnings("ignore:KITTI's labels", "ignore:nuScenes' results")
def test_formats_that_a_later_run_adds(by_shape, tmp_path, monkeypatch):
    xyz, _ = frame(shots=300)
    files = [write(tmp_path / f"{i}.bin", xyz) for i in range(2)]
    cut, found = spied(monkeypatch), tmp_path / "found"
    given = {"labels": texts(by_shape), "encoder": by_shape, "output": found}
    first = scan(files, **given)
    cut.clear()
    scan(files, formats=["kitti"], **given)  # is made of boxes alone
    assert not cut and {file.name for file in (found / "kitti").iterdir()} == {"0.txt", "1.txt"}
    again = scan(files, formats=["clusters", "html"], **given)
    assert len(cut) == 2 and [one.as_json() for one in again] == [one.as_json() for one in first]
    assert {file.name for file in (found / "pages").iterdir()} == {"0.html", "1.html"}
    assert len(list((found / "clusters").iterdir())) == sum(len(one.boxes) for one in first)
    cut.clear()
    scan(files, formats=["json", "kitti", "clusters", "html"], **given)
    assert not cut


@pytest.mark.filterwarnings("ignore:KITTI's labels", "ignore:nuScenes' results")
def test_labels_that_a_later_run_adds_leave_other_files_alone(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    file, found = write(tmp_path / "0.bin", xyz), tmp_path / "found"
    given = {"labels": texts(by_shape), "encoder": by_shape, "output": found}
    scan([file], formats=["clusters", "html"], **given)
    kept = sorted([*(found / "clusters").iterdir(), found / "pages/0.html"])
    before = [one.read_bytes() for one in kept]
    scan([file], formats=["clusters", "html", "kitti"], **given)
    assert (found / "kitti/0.txt").read_text() and len(before) > 1
    assert [one.read_bytes() for one in kept] == before


def test_frames_of_one_name(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    given = {"labels": texts(by_shape), "encoder": by_shape, "output": tmp_path / "found"}
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(write(tmp_path / name / "0.bin", xyz[: len(xyz) - len(files) * 9]))
    scan(files[:1], **given)
    first = (tmp_path / "found/boxes/0.json").read_text()
    scan(files[::-1], **given)
    assert (tmp_path / "found/boxes/0.json").read_text() == first
    assert sorted(p.name for p in (tmp_path / "found/boxes").iterdir()) == ["0.json", "b_0.json"]


def test_a_full_disk_keeps_what_is_finished(by_shape, tmp_path, monkeypatch):
    xyz, _ = frame(shots=300)
    files = [write(tmp_path / f"{i}.bin", xyz) for i in range(4)]
    given = {"labels": texts(by_shape), "encoder": by_shape, "output": tmp_path / "found"}
    inner = folders.write_text

    def full(path, text):
        if path.name == "2.json":
            raise OutputError(f"cannot write {path}: No space left on device")
        inner(path, text)

    monkeypatch.setattr(folders, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device; finished frames stay"):
        scan(files, **given)
    monkeypatch.setattr(folders, "write_text", inner)
    cut = spied(monkeypatch)
    assert len(scan(files, **given)) == 4 and cut == [str(file) for file in files[2:]]


def test_numbers_of_objects_go_on_with_a_run(by_shape, tmp_path, monkeypatch):
    frames, poses = drive(5)
    files = [write(tmp_path / f"{i}.bin", xyz) for i, xyz in enumerate(frames)]
    given = {"labels": texts(by_shape), "encoder": by_shape, "config": ScanConfig(window=2)}
    whole = scan(files, poses=poses, output=tmp_path / "whole", **given)
    partial = scan(iter(files), poses=poses, output=tmp_path / "part", batch_frames=1, **given)
    for _ in range(3):
        next(partial)
    partial.close()
    cut = spied(monkeypatch)
    found = scan(files, poses=poses, output=tmp_path / "part", **given)
    assert cut == [str(file) for file in files[1:]]  # the window before the first, and the rest
    assert [one.as_json()["boxes"] for one in found] == [one.as_json()["boxes"] for one in whole]


# Views


def test_the_frame_from_above(by_shape, tmp_path):
    from PIL import Image

    xyz, _ = frame()
    (found,) = scan(xyz, texts(by_shape), encoder=by_shape)
    draw_from_above(found, tmp_path / "above.png")
    with Image.open(tmp_path / "above.png") as picture:
        assert picture.format == "PNG" and len(np.unique(np.asarray(picture))) > 50
    with pytest.raises(InputError, match="has no points: it was finished"):
        draw_from_above(scanned(box()), tmp_path / "no.png")


def test_the_page(by_shape, tmp_path):
    pytest.importorskip("plotly")
    xyz, _ = frame()
    (found,) = scan(xyz, texts(by_shape), encoder=by_shape)
    write_page(found, tmp_path / "frame.html")
    page = (tmp_path / "frame.html").read_text(encoding="utf-8")
    assert "car (2)" in page and "pedestrian (1)" in page
    assert '<script src="http' not in page and len(page) > 1_000_000
    nothing = frame([], shots=300)[0]
    (empty,) = scan(nothing, texts(by_shape), encoder=by_shape)
    assert empty.boxes == () and empty.notices == ("no cluster has 10 points",)
    write_page(empty, tmp_path / "empty.html")
    draw_from_above(empty, tmp_path / "empty.png")


def test_a_folder_takes_over_only_what_is_the_same(by_shape, tmp_path):
    (one, _), (two, _) = frame(shots=300), frame(shots=200)
    given = texts(by_shape)
    options = {"encoder": by_shape, "output": tmp_path / "found"}

    def boxes(xyz, **more):
        (found,) = scan(xyz, given, **options, **more)
        return [tuple(np.round(box.center, 3)) for box in found.boxes]

    first = boxes(one)
    assert boxes(one) == first
    alone = scan(two, given, encoder=by_shape)[0].boxes
    expected = [tuple(np.round(box.center, 3)) for box in alone]
    assert expected != first and boxes(two) == expected  # another array of the same name
    turned = TextEmbeddings(given.labels, given.vectors.flip(0))
    with pytest.raises(OutputError, match="holds another run .*vectors"):
        scan(one, turned, **options)


def test_another_pose_of_a_frame_is_another_frame(by_shape, tmp_path):
    xyz, _ = frame(shots=300)
    options = {"encoder": by_shape, "output": tmp_path / "found", "formats": ["json"]}
    for shift in (0.0, 5.0):
        pose = np.eye(4)
        pose[0, 3] = shift
        (found,) = scan([xyz], texts(by_shape), poses=pose[None], **options)
        assert found.pose[0, 3] == shift
        (file,) = (tmp_path / "found" / "boxes").iterdir()
        assert np.array_equal(json.loads(file.read_text())["pose"], pose)


def test_weights_of_an_adapter_have_a_digest(by_shape):
    adapter = make_adapter("lora", by_shape)
    before = digest_of(adapter)
    assert before == digest_of(adapter)
    with torch.no_grad():
        next(adapter.parameters()).add_(1.0)
    assert digest_of(adapter) != before
