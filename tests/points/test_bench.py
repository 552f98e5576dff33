"""The benchmark's rows: against counting by hand, and with the method that each promises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from budwood.bench import points as bench
from budwood.bench.frames import HEIGHT, street, sweep
from budwood.bench.points import BenchConfig, run, top_k
from budwood.bench.points_paths import looped, path_rows, random_texts, write_clouds
from budwood.bench.points_speed import encoder_rows, grouping_rows, looped_groups
from budwood.errors import InputError, UnknownNameError
from budwood.points import Curriculum, classify, sampling
from budwood.points.batches import thinned
from budwood.points.grouping import Grouping
from budwood.points.io import Cloud
from tests.points import sets
from tests.points.models import sparse_sprout

SMALL = {"points": (30, 8), "lidar": (8,), "steps": 2, "batch_size": 4}
COUNTS = Curriculum((30, 8))


def test_rows():
    model = sparse_sprout()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grouping, jobs = model.grouping, []
    config = BenchConfig(("frozen", "t3a", "esp-zero"), **SMALL, seeds=2, curriculum=COUNTS)
    rows = run(
        sets.clouds(),
        sets.texts(model.embed_dim),
        model,
        config,
        lambda done, total, note="": jobs.append((done, total)),
    )
    assert jobs == [(0, 3), (1, 3), (2, 3), (3, 3)]
    each = [("random", 30), ("random", 8), ("lidar", 8)]
    names = [(row["method"], row["sampler"], row["points"]) for row in rows]
    assert names == [(m, *density) for m in config.methods for density in each]
    for row in rows:
        assert row["seeds"] == 2 and row["seconds"] >= 0
        for group in ("seen", "unseen", "novel"):
            assert 0 <= row[f"{group}_top1"] <= row[f"{group}_top5"] == 1  # five names at most
            assert row[f"{group}_std"] >= 0
        assert row["novel_top1"] == 1  # one name
    params = {row["method"]: row["params"] for row in rows}
    assert params["frozen"] == params["t3a"] == 0 < params["esp-zero"]
    assert {row["lr"] for row in rows if row["method"] == "frozen"} == {None}
    assert model.grouping is grouping
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_accuracy_is_what_counting_gives():
    model = sparse_sprout()
    clouds, texts = sets.clouds(), sets.texts(model.embed_dim)
    config = BenchConfig(("tokens",), points=(8,), lidar=(), seeds=1, curriculum=COUNTS)
    (row,) = run(clouds, texts, model, config)
    tested = clouds.where(group="unseen", use="test")
    hits = 0
    for i, (xyz, one) in enumerate(zip(tested.xyz, tested.about)):
        thin, _ = thinned(model.prepare(Cloud(xyz.astype(float))), 8, "random", i)
        feature = model(thin[None])[0]
        scores = {
            label: float(feature @ texts.vectors[texts.labels.index(label)])
            for label in ("plate", "ring")
        }
        hits += max(scores, key=scores.get) == one.label
    assert row["unseen_top1"] == pytest.approx(hits / len(tested))
    assert row["unseen_std"] is None


def test_frozen_has_the_published_groups_and_tokens_do_not():
    model = sparse_sprout()
    seen = []
    forward = type(model).forward

    class Watching(type(model)):
        def forward(self, xyz, rgb=None, around=None):
            seen.append((self.grouping.density_aware, xyz.shape[1]))
            return forward(self, xyz, rgb, around)

    model.__class__ = Watching
    clouds, texts = sets.clouds(1), sets.texts(model.embed_dim)
    for method, aware in (("frozen", False), ("tokens", True)):
        seen.clear()
        run(clouds, texts, model, BenchConfig((method,), points=(8,), lidar=(), seeds=1))
        assert {one for one, _ in seen} == {aware}


def test_tuning_tries_rates_of_the_method():
    model = sparse_sprout()
    config = BenchConfig(
        ("lora",), points=(8,), lidar=(), steps=1, seeds=1, tune=True, curriculum=COUNTS
    )
    (row,) = run(sets.clouds(), sets.texts(model.embed_dim), model, config)
    assert row["lr"] in [pytest.approx(1e-3 * factor) for factor in (0.3, 1, 3)]


@pytest.mark.parametrize("sampler", ["random", "lidar"])
def test_methods_adapt_and_are_tuned_to_samples_of_the_kind_asked_for(sampler, monkeypatch):
    drawn, tuned_on, tested_on = [], set(), set()
    inner, thin = sampling.lidar_points, bench.thinned
    monkeypatch.setattr(sampling, "lidar_points", lambda *args: drawn.append(1) or inner(*args))

    def sampled(cloud, n_points, sampler, seed):  # the seed for tuning is one that no row uses
        (tuned_on if seed >= 1_000_003 else tested_on).add(sampler)
        return thin(cloud, n_points, sampler, seed)

    monkeypatch.setattr(bench, "thinned", sampled)
    model = sparse_sprout()
    for tune in (False, True):
        config = BenchConfig(
            ("lora",), (8,), (), 1, 2, 4, sampler=sampler, tune=tune, curriculum=COUNTS
        )
        run(sets.clouds(), sets.texts(model.embed_dim), model, config)
        assert bool(drawn) == (sampler == "lidar")
        drawn.clear()
    assert tuned_on == {sampler} and tested_on == {"random"}


def test_groups_without_clouds_are_empty():
    model = sparse_sprout()
    clouds = sets.clouds()
    kept = [i for i, one in enumerate(clouds.about) if one.group != "novel"]
    rest = dataclasses.replace(
        clouds, xyz=clouds.xyz[kept], about=tuple(clouds.about[i] for i in kept)
    )
    config = BenchConfig(("tokens",), points=(8,), lidar=(), seeds=1)
    (row,) = run(rest, sets.texts(model.embed_dim), model, config)
    assert row["novel_top1"] is row["novel_std"] is None and row["seen_top1"] is not None


def test_top_k():
    logits = torch.tensor([[2.0, 0.1, -2.0], [0.1, 3.0, 0.0], [-1.0, -0.9, 1.0]])
    assert top_k(logits, torch.tensor([0, 1, 2]), 1) == 1
    assert top_k(logits, torch.tensor([1, 1, 0]), 1) == pytest.approx(1 / 3)
    assert top_k(logits, torch.tensor([1, 0, 0]), 2) == pytest.approx(2 / 3)
    assert top_k(logits, torch.tensor([1, 0, 0]), 9) == 1


def test_a_loop_makes_the_same_groups():
    grouping = Grouping(9, 5, 40)
    xyz = torch.randn(3, 31, 3, generator=torch.Generator().manual_seed(1))
    centers, members = grouping(xyz)
    for cloud, own_centers, own_members in zip(xyz, centers, members):
        looped = looped_groups(cloud.numpy(), *grouping.sizes(31))
        assert looped[0].tolist() == own_centers.tolist()
        assert [sorted(a) for a in looped[1].tolist()] == [sorted(b) for b in own_members.tolist()]


def test_speed_rows():
    model = sparse_sprout()
    rows = encoder_rows(model, 20, 2, 2)
    assert [row["what"] for row in rows][:3] == ["frozen", "fca random", "fca random, fused"]
    assert rows[0]["over_frozen"] == 1 and all(row["clouds_per_s"] > 0 for row in rows)
    ours, loop = grouping_rows(model.grouping, 20, 2, 2)
    assert loop["over_loop"] == 1 and ours["over_loop"] > 0


def test_a_loop_over_files_finds_the_same_labels(tmp_path):
    model = sparse_sprout()
    files, texts = write_clouds(tmp_path, 50, 4), random_texts(model)
    found = classify(files, texts, encoder=model, points=50)
    assert [ranking.best for ranking in found] == looped(files, texts, model, 50)
    ours, loop = path_rows(model, 50, 4, 1)
    assert ours["what"] == "classify" and loop["over_loop"] == 1


def test_a_simulated_frame():
    scene = street()
    xyz, hit = sweep(scene, shots=400)
    assert np.allclose(xyz[hit == -1, 2], -HEIGHT, atol=0.05)
    for index, one in enumerate(scene):
        if one.kind == "car":
            away = np.linalg.norm(xyz[hit == index, :2] - (one.x, one.y), axis=1)
            assert (away < 2.5).all()
    assert xyz[hit >= 0, 2].max() < 5.1 and np.linalg.norm(xyz, axis=1).max() < 80.1
    bare, nothing = sweep([], shots=50, ground=False)
    assert bare.shape == (0, 3) and len(nothing) == 0


def test_bad_settings():
    with pytest.raises(UnknownNameError):
        BenchConfig(("esp",))
    with pytest.raises(UnknownNameError, match="did you mean 'lidar'"):
        BenchConfig(("tokens",), (8,), sampler="lida")
    for options in (
        {"methods": ()},
        {"methods": ("lora", "lora")},
        {"methods": ("lora",), "seeds": 0},
        {"methods": ("lora",), "points": (1,)},
        {"methods": ("lora",), "points": (), "lidar": ()},
    ):
        with pytest.raises(InputError):
            BenchConfig(**options)
