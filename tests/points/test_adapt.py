"""Adapting: every method runs, learns what it is told to, and goes on where it was killed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from budwood.errors import DivergedError, InputError, OutputError, ShapeError, UnknownNameError
from budwood.points import (
    METHODS,
    AdaptConfig,
    Curriculum,
    Objective,
    TextEmbeddings,
    adapt,
    batches,
    load_adapter,
    make_adapter,
)
from budwood.points.adaptation import SAVE_EVERY
from budwood.points.batches import encode, stacked, thinned
from budwood.points.encoders.sprout import save_sprout
from budwood.points.io import Cloud
from budwood.points.methods import Method
from budwood.points.unfinished import FILE as STATE
from tests.points import models, sets

COUNTS = Curriculum((30, 12, 6))


def prepared(encoder, use="adapt"):
    given = sets.clouds().where(use=use)
    return [encoder.prepare(Cloud(xyz.astype(float))) for xyz in given.xyz]


sprout = models.sparse_sprout


def cut_off(done, total, note=""):
    """Ends a run behind the first step that it has saved."""
    if done > SAVE_EVERY:
        raise KeyboardInterrupt


def distance(encoder, adapter, n_points=6):
    """Of features of few points to those of all, as 1 − cosine."""
    dense = prepared(encoder)
    thin = [thinned(cloud, n_points, "random", i) for i, cloud in enumerate(dense)]
    sparse, whole = encode(encoder, thin, adapter), encode(encoder, dense)
    return (1 - torch.cosine_similarity(sparse, whole, dim=-1)).mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method, tmp_path):
    model = sprout()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = AdaptConfig(method, steps=2, batch_size=4, curriculum=COUNTS)
    if method == "frozen":
        with pytest.raises(InputError, match="an adapter cannot hold its group sizes"):
            adapt(prepared(model), sets.texts(12), model, config, output=tmp_path / "a")
        return
    steps = []
    adapter = adapt(
        prepared(model),
        sets.texts(model.embed_dim),
        model,
        config,
        output=tmp_path / "a",
        progress=lambda done, total, note="": steps.append((done, total)),
    )
    assert not adapter.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert steps == ([(1, 2), (2, 2)] if METHODS.get(method).objective else [])
    xyz = torch.randn(2, 12, 3)
    assert torch.equal(load_adapter(tmp_path / "a", model)(xyz), adapter(xyz))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("method", ["esp-zero", "vpt-deep", "vpt-shallow", "lora", "full"])
def test_the_student_comes_nearer_to_the_teacher(method):
    model = sprout()
    still = AdaptConfig(method, steps=1, lr=1e-9, curriculum=COUNTS)
    config = dataclasses.replace(still, steps=40, lr=0.01)
    texts = sets.texts(model.embed_dim)
    start, end = (
        distance(model, adapt(prepared(model), texts, model, one)) for one in (still, config)
    )
    assert end < 0.8 * start


def test_the_paper_s_objective_falls():
    model = sprout()
    objective = Objective(complementary=1.0, k=1)
    texts = sets.texts(model.embed_dim)
    losses = []
    for steps, lr in ((1, 1e-9), (40, 0.01)):
        config = AdaptConfig(
            "esp-zero-paper", steps, lr=lr, objective=objective, curriculum=Curriculum((12,))
        )
        adapter = adapt(prepared(model), texts, model, config)
        thin = [thinned(c, 12, "random", 7 + i) for i, c in enumerate(prepared(model))]
        student, teacher = encode(model, thin, adapter), encode(model, prepared(model))
        losses.append(objective(student, teacher, texts.vectors, model.logit_scale).item())
    assert losses[1] < losses[0]


def test_same_seed_same_adapter():
    model = sprout()
    texts, config = sets.texts(model.embed_dim), AdaptConfig(steps=3, curriculum=COUNTS)
    a, b = (adapt(prepared(model), texts, model, config).state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    other = adapt(prepared(model), texts, model, dataclasses.replace(config, seed=1)).state_dict()
    assert any(not torch.equal(a[key], other[key]) for key in a)


def test_going_on_equals_never_stopping(tmp_path):
    model = sprout()
    texts, clouds = sets.texts(model.embed_dim), prepared(model)
    config = AdaptConfig("lora", steps=SAVE_EVERY + 3, batch_size=2, curriculum=COUNTS)
    whole = adapt(clouds, texts, model, config)

    with pytest.raises(KeyboardInterrupt):
        adapt(clouds, texts, model, config, output=tmp_path, progress=cut_off)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    steps = []
    resumed = adapt(
        clouds,
        texts,
        model,
        config,
        output=tmp_path,
        progress=lambda done, total, note="": steps.append(done),
    )
    assert steps == [SAVE_EVERY + 1, SAVE_EVERY + 2, SAVE_EVERY + 3]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


def test_an_unfinished_run_of_other_settings_is_refused(tmp_path):
    model = sprout()
    texts, clouds = sets.texts(model.embed_dim), prepared(model)
    config = AdaptConfig("lora", steps=SAVE_EVERY + 1, batch_size=2, curriculum=COUNTS)
    with pytest.raises(KeyboardInterrupt):
        adapt(clouds, texts, model, config, output=tmp_path, progress=cut_off)
    kept = (tmp_path / STATE).read_bytes()
    for other in (dataclasses.replace(config, lr=0.5), dataclasses.replace(config, seed=9)):
        with pytest.raises(OutputError, match="other settings"):
            adapt(clouds, texts, model, other, output=tmp_path)
    with pytest.raises(OutputError, match="other settings"):
        adapt(clouds[1:], texts, model, config, output=tmp_path)
    assert (tmp_path / STATE).read_bytes() == kept
    (tmp_path / STATE).write_bytes(kept[: len(kept) // 2])
    with pytest.raises(InputError, match="is damaged"):
        adapt(clouds, texts, model, config, output=tmp_path)


def test_a_prepared_cloud_is_one_cloud():
    model = models.make("openshape")
    xyz, _ = prepared(model)[0]
    cloud = (xyz, torch.rand_like(xyz))
    config = AdaptConfig("adabn", curriculum=COUNTS, options={"counts": (6,)})
    one, listed = (adapt(clouds, None, model, config).state_dict() for clouds in (cloud, [cloud]))
    assert all(torch.equal(one[key], listed[key]) for key in listed)


def test_refusals_come_before_the_encoder_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delattr("budwood.points.encoders.load_encoder")
    with pytest.raises(OutputError, match="there is no folder"):
        adapt([], None, output=tmp_path / "no" / "adapter")
    with pytest.raises(InputError, match="compares labels, and there are 1"):
        adapt([], ["ball"], config=AdaptConfig("esp-zero"))


def test_an_encoder_by_its_name_has_a_checkpoint_and_a_device(tmp_path):
    model = models.make("sprout")
    save_sprout(model, tmp_path / "small.safetensors")
    config = AdaptConfig("adabn", curriculum=COUNTS)
    options = {"checkpoint": tmp_path / "small.safetensors", "device": "cpu"}
    by_name = adapt(prepared(model), None, "sprout", config, **options)
    assert by_name.encoder.dim == model.dim
    with pytest.raises(InputError, match="device 'cudda' cannot be used"):
        adapt(prepared(model), None, "sprout", config, device="cudda")
    for name, value in options.items():
        with pytest.raises(InputError, match="are for an encoder given by its name"):
            adapt(prepared(model), None, model, config, **{name: value})


def test_nothing_is_overwritten(tmp_path):
    model = sprout()
    texts, config = sets.texts(model.embed_dim), AdaptConfig("adabn", curriculum=COUNTS)
    adapt(prepared(model), texts, model, config, output=tmp_path)
    with pytest.raises(OutputError, match="exists"):
        adapt(prepared(model), texts, model, config, output=tmp_path)


def test_fading_leaves_dense_clouds_to_the_frozen_encoder():
    model = sprout()
    texts = sets.texts(model.embed_dim)
    config = AdaptConfig(steps=5, lr=0.05, curriculum=COUNTS)
    adapter = adapt(prepared(model), texts, model, config)
    dense, sparse = torch.randn(2, 120, 3), torch.randn(2, 6, 3)
    assert torch.equal(adapter(dense), model(dense))
    assert not torch.allclose(adapter(sparse), model(sparse), atol=1e-3)
    shares = [adapter.strength(n) for n in (240, 120, 60, 30, 15, 3)]
    assert shares[:2] == [0, 0] and shares[-1] == 1
    assert shares[2:5] == pytest.approx([0.2, 0.4, 0.6])
    with pytest.raises(InputError, match="does nothing at 120, 200 points"):
        adapt(
            prepared(model), texts, model, AdaptConfig(steps=1, curriculum=Curriculum((120, 200)))
        )


def test_fading_is_for_use_and_not_for_training():
    model = sprout()
    texts = sets.texts(model.embed_dim)
    made = [
        adapt(
            prepared(model),
            texts,
            model,
            AdaptConfig("lora", 3, curriculum=COUNTS, options={"fade": fade, "batch_norm": False}),
        )
        for fade in (4, 0)
    ]
    for key, value in made[0].state_dict().items():
        assert torch.equal(value, made[1].state_dict()[key])


@pytest.mark.parametrize("method", ["vpt-deep", "vpt-shallow", "lora", "full"])
def test_fading_is_between_frozen_and_adapted(method):
    model = sprout()
    texts = sets.texts(model.embed_dim)
    config = AdaptConfig(method, steps=5, lr=0.02, curriculum=COUNTS, options={"fade": 4})
    adapter = adapt(prepared(model), texts, model, config)
    xyz = torch.randn(2, 6, 3)
    far = [
        torch.linalg.norm(model(xyz) - _with_share(adapter, model, xyz, share)).item()
        for share in (0.01, 0.5, 1.0)
    ]
    assert far[0] < 0.2 * far[2] and far[0] < far[1]


def _with_share(adapter, model, xyz, share):
    lent = adapter.replaced(share)
    if lent:
        return torch.func.functional_call(model, lent, (xyz, None, adapter.around(share)))
    return model(xyz, None, adapter.around(share))


def test_thinned():
    model = sprout()
    cloud = prepared(model)[0]
    thin, rgb = thinned(cloud, 7, "random", 3)
    assert thin.shape == (7, 3) and rgb is None
    assert thin.mean(0).abs().max() < 1e-6
    assert thin.norm(dim=1).max().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(thinned(cloud, 7, "random", 3)[0], thin)
    assert not torch.equal(thinned(cloud, 7, "random", 4)[0], thin)
    colors = torch.arange(60.0)[:, None].expand(-1, 3)
    kept = thinned((cloud[0], colors), 7, "random", 3)[1]
    moved = cloud[0][kept[:, 0].long()]
    moved = moved - moved.mean(0)
    torch.testing.assert_close(moved / moved.norm(dim=1).max(), thin)


def test_stacked_cuts_to_the_smallest():
    a, b, red = torch.randn(9, 3), torch.randn(5, 3), torch.rand(9, 3)
    xyz, rgb = stacked([(a, red), (b, b)], 0.4)
    assert xyz.shape == (2, 5, 3) and torch.equal(xyz[1], b) and torch.equal(rgb[1], b)
    rows = [red.tolist().index(color) for color in rgb[0].tolist()]
    assert rows == [0, 2, 4, 6, 8]
    kept = a[rows] - a[rows].mean(0)
    torch.testing.assert_close(xyz[0], kept / kept.norm(dim=1).max())
    assert stacked([(a, None), (b, None)], 0.4)[1] is None
    mixed = stacked([(a, red), (b, None)], 0.4)[1]
    assert torch.equal(mixed[0], rgb[0]) and (mixed[1] == 0.4).all()


def test_a_sparse_cloud_leaves_the_others_as_they_are(monkeypatch):
    model = sprout()
    clouds = prepared(model)
    few = (clouds[0][0][:8], None)
    seen = []
    inner = batches.stacked
    monkeypatch.setattr(
        batches, "stacked", lambda clouds, grey: seen.append(clouds) or inner(clouds, grey)
    )
    config = AdaptConfig("lora", 30, batch_size=4, curriculum=COUNTS)
    adapter = adapt([*clouds, few], sets.texts(model.embed_dim), model, config)
    assert {len(xyz) for batch in seen for xyz, _ in batch} == {60, 32, 30, 16, 12, 6}
    assert all(len({len(xyz) for xyz, _ in batch}) == 1 for batch in seen)
    alone = adapt(clouds, sets.texts(model.embed_dim), model, config)
    assert torch.equal(adapter.statistics.mean_0, alone.statistics.mean_0)  # none of few points
    seen.clear()
    nearly = [(xyz[: len(xyz) - i], rgb) for i, (xyz, rgb) in enumerate(clouds * 2)]
    adapt(nearly, None, model, AdaptConfig("adabn", options={"counts": (60,)}))
    kept = [len(xyz) for xyz, _ in seen[-1]]
    assert sorted(kept, reverse=True) == list(range(60, 53, -1))  # 54 of 60 are nearly so many
    with pytest.raises(InputError, match="no cloud has 12 points, the densest has 8; give denser"):
        adapt([few], None, model, AdaptConfig(steps=1, curriculum=Curriculum((30, 12))))


def test_a_loss_that_is_no_number_ends_it(tmp_path):
    model = sprout()
    config = AdaptConfig("lora", 6, lr=1e30, curriculum=COUNTS)
    with pytest.raises(DivergedError, match="at step 2.*give a learning rate below 1e\\+30"):
        adapt(prepared(model), sets.texts(model.embed_dim), model, config, output=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_features_that_are_no_numbers_are_refused():
    model = sprout()
    adapter = adapt(prepared(model), None, model, AdaptConfig(steps=1, curriculum=COUNTS))
    with torch.no_grad():
        adapter.up[0].fill_(float("nan"))
    with pytest.raises(InputError, match="sprout with the adapter gives NaN or infinite features"):
        encode(model, [(torch.randn(6, 3), None)], adapter)


def test_names_are_for_those_who_compare_them():
    model = sprout()
    one = TextEmbeddings(("ball",), torch.ones(1, model.embed_dim))
    for method in ("sparse-lora", "adabn"):
        config = AdaptConfig(method, 2, curriculum=COUNTS)
        with_names, without = (
            adapt(prepared(model), texts, model, config).state_dict()
            for texts in (sets.texts(model.embed_dim), None)
        )
        assert all(torch.equal(with_names[key], without[key]) for key in without)
    for texts, n in ((None, 0), (one, 1)):
        with pytest.raises(InputError, match=f"'esp-zero-paper' compares labels, .* are {n};"):
            adapt(prepared(model), texts, model, AdaptConfig("esp-zero-paper", 1))


@pytest.mark.parametrize("n_names", [2, 5])
def test_few_names_teach_too(n_names):
    model = sprout()
    texts = TextEmbeddings(tuple("abcde"[:n_names]), torch.eye(model.embed_dim)[:n_names])
    config = AdaptConfig("esp-zero-paper", 2, lr=0.1, curriculum=COUNTS)
    adapter = adapt(prepared(model), texts, model, config)
    torch.manual_seed(config.seed)
    fresh = make_adapter("fca", model)
    assert not torch.equal(adapter.tokens, fresh.tokens)


def test_lidar_sees_all_encoders_clouds_upright():
    cloud = Cloud(np.random.default_rng(0).normal(size=(4000, 3)) * [1, 3, 1])
    seen = [
        thinned(models.make(name).prepare(cloud, 2000), 64, "lidar", 3)[0]
        for name in ("openshape", "ulip")
    ]
    assert torch.equal(*seen)


def test_other_colours_are_another_run(tmp_path):
    model = models.make("openshape")
    grey = [(xyz, torch.full_like(xyz, 0.1)) for xyz, _ in prepared(model)]
    config = AdaptConfig("lora", steps=SAVE_EVERY + 2, batch_size=2, curriculum=COUNTS)
    texts = sets.texts(model.embed_dim)
    with pytest.raises(KeyboardInterrupt):
        adapt(grey, texts, model, config, output=tmp_path / "a", progress=cut_off)
    bright = [(xyz, rgb + 0.5) for xyz, rgb in grey]
    with pytest.raises(OutputError, match="other settings or clouds"):
        adapt(bright, texts, model, config, output=tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        adapt(grey, texts, model, config, output=tmp_path / "file")


def test_lidar_samples_of_varying_size():
    model = sprout()
    config = AdaptConfig("lora", steps=2, curriculum=COUNTS, sampler="lidar")
    adapt(prepared(model), sets.texts(model.embed_dim), model, config)


@pytest.mark.parametrize(
    ("method", "sampler", "options", "fade"),
    [
        ("sparse-lora", "random", {}, 4),
        ("sparse-lora", "lidar", {}, 1),
        ("sparse-full", "occluded", {}, 1),
        ("sparse-lora", "lidar", {"fade": 3}, 3),
        ("lora", "lidar", {}, None),
    ],
)
def test_what_fades_in_does_so_at_once_for_clouds_of_one_side(method, sampler, options, fade):
    config = AdaptConfig(method, sampler=sampler, options=options)
    assert config.resolved.options.get("fade") == fade


def test_statistics_by_density():
    model = sprout()
    config = AdaptConfig("adabn", curriculum=COUNTS, options={"counts": (60, 6)})
    adapter = adapt(prepared(model), sets.texts(model.embed_dim), model, config)
    means = adapter.statistics.mean_0
    assert means.shape[0] == 2 and not torch.allclose(means[0], means[1], atol=1e-3)
    assert [adapter.statistics.nearest(n) for n in (100, 60, 20, 18, 6, 2)] == [0, 0, 0, 1, 1, 1]
    lent, half = (adapter.statistics.replaced(model, 7, share) for share in (1.0, 0.5))
    assert torch.equal(next(iter(lent.values())), means[1])
    for name, value in half.items():
        torch.testing.assert_close(value, (lent[name] + model.get_buffer(name)) / 2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "esp"}, UnknownNameError),
        ({"sampler": "dense"}, UnknownNameError),
        ({"steps": 0}, InputError),
        ({"batch_size": 0}, InputError),
        ({"lr": 0.0}, InputError),
        ({"lr": float("nan")}, InputError),
        ({"seed": -1}, InputError),
        ({"steps": 1.5}, InputError),
        ({"steps": True}, InputError),
        ({"batch_size": "32"}, InputError),
        ({"lr": "1e-3"}, InputError),
        ({"seed": 0.5}, InputError),
        ({"seed": "0"}, InputError),
    ],
)
def test_bad_settings(options, error):
    with pytest.raises(error) as caught:
        AdaptConfig(**options)
    assert "\n" not in str(caught.value)


def test_bad_input():
    model = sprout()
    config = AdaptConfig(steps=1, curriculum=COUNTS)
    with pytest.raises(InputError, match="no clouds"):
        adapt([], sets.texts(model.embed_dim), model, config)
    with pytest.raises(ShapeError, match="13 wide"):
        adapt(prepared(model), sets.texts(13), model, dataclasses.replace(config, method="lora"))
    bad = dataclasses.replace(config, options={"rang": 3})
    with pytest.raises(InputError, match="no option 'rang'"):
        adapt(prepared(model), sets.texts(model.embed_dim), model, bad)
    with pytest.raises(InputError, match="only one point"):
        adapt([Cloud(np.zeros((5, 3)))], sets.texts(model.embed_dim), model, config)


NOT_TRAINED = ("frozen", "adabn", "t3a", "uni-adapter", "point-cache")


def test_methods_without_an_objective():
    for name in METHODS:
        method = METHODS.get(name)
        assert isinstance(method, Method)
        assert (method.objective is None) == (method.adapter in NOT_TRAINED)
