"""Encoders: published layouts, the reference on each, one point and more, and foreign files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from budwood.errors import InputError, ShapeError, UnknownNameError, UnsupportedModelError
from budwood.points.encoders import ENCODERS, download, load_encoder, load_weights
from budwood.points.encoders import base as encoders_base
from budwood.points.encoders.base import Hub
from budwood.points.encoders.checkpoints import layout
from budwood.points.encoders.pointbert import PointBert
from budwood.points.encoders.sprout import Sprout, SproutConfig, load_sprout, save_sprout
from budwood.points.io import make_cloud
from tests.points.models import GROUPS, openshape, pointbert, uni3d
from tests.reference import encoders_reference as reference
from tests.reference import published_layouts


def pointbert_color():
    return PointBert("ulip2", color=True, dim=24, depth=3, n_heads=4, embed_dim=10, grouping=GROUPS)


def openshape_bare():
    return openshape(embed_dim=None, grouping=dataclasses.replace(GROUPS, radius=1.1))


TINY = {
    "ulip": (pointbert, reference.ulip, 3),
    "ulip2": (pointbert_color, reference.ulip, 4),
    "openshape": (openshape, reference.openshape, 3),
    "openshape-b32": (openshape_bare, reference.openshape, 3),
    "uni3d-packed": (lambda: uni3d("packed", True), reference.uni3d, 2),
    "uni3d-split": (lambda: uni3d("split", False), reference.uni3d, 2),
    "uni3d-gelu": (lambda: uni3d("gelu", True), reference.uni3d, 2),
}


def random_state(shapes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        else:
            value = torch.randn(shape, generator=rng) * (
                0.5 if len(shape) < 2 else shape[-1] ** -0.5
            )
            state[key] = value.abs() + 0.5 if "running_var" in key else value
    return state


def clouds(n=40, batch=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    xyz = torch.randn(batch, n, 3, generator=rng) * 0.4
    return xyz, torch.rand(batch, n, 3, generator=rng)


def save(tmp_path, content, name="model.pt"):
    path = tmp_path / name
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", published_layouts.layouts())
def test_published_layout_shape_by_shape(name):
    with torch.device("meta"):
        encoder = ENCODERS.get(name).make()
    assert layout(encoder) == published_layouts.layouts()[name]
    assert set(encoder.published()) == set(encoder.state_dict())
    assert encoder.name == name


def test_every_encoder_has_a_layout():
    assert set(published_layouts.layouts()) == set(ENCODERS) - {"sprout", "sprout-dense"}


@pytest.mark.parametrize("name", TINY)
def test_agrees_with_reference(name, tmp_path):
    make, slow, n_heads = TINY[name]
    encoder = make().eval()
    state = random_state(layout(encoder))
    load_weights(encoder, save(tmp_path, state))
    xyz, rgb = clouds()
    with torch.no_grad():
        got = encoder(xyz, rgb)
    centers, members = encoder.grouping(xyz)
    plain = {key: value.double().numpy() for key, value in state.items()}
    for i in range(2):
        color = rgb[i].double().numpy() if encoder.preparation.color else None
        points = xyz[i][:, [0, 2, 1]] if encoder.preparation.swap_yz else xyz[i]
        args = (points.double().numpy(), color, centers[i].numpy(), members[i].numpy())
        want = slow(plain, *args, n_heads)
        np.testing.assert_allclose(got[i].numpy(), want, atol=1e-4 * np.abs(want).max())


# (prefix of the keys, how the state dict is wrapped, logit_scale beside or inside)
WRAPPED = {
    "ulip": lambda s: {
        "epoch": 3,
        "state_dict": {f"module.{k}": v for k, v in s.items()},
        "args": argparse.Namespace(model="ULIP_PointBERT"),
        "best_acc1": np.float64(60.0),
    },
    "openshape": lambda s: {
        "state_dict": {f"module.{k}": v for k, v in s.items() if k != "logit_scale"},
        "logit_scale": {"module.logit_scale": s["logit_scale"]},
        "best_lvis_acc": torch.tensor(0.4),
        "scheduler": None,
    },
    "uni3d-packed": lambda s: {"module": {k: v.half() for k, v in s.items()}, "skipped": set()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappings(name, tmp_path):
    encoder = TINY[name][0]().eval()
    state = random_state(layout(encoder))
    spare = published_layouts.SPARE[name.split("-")[0]]
    extra = {key: torch.zeros(3) for key in spare}
    content = {**state, **extra, "logit_scale": torch.tensor(3.0)}
    load_weights(encoder, save(tmp_path, WRAPPED[name](content)))
    assert encoder.logit_scale == pytest.approx(math.exp(3.0), rel=1e-3)
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    other = TINY[name][0]().eval()
    load_weights(other, save(tmp_path, state, "bare.pt"))
    assert other.logit_scale == encoders_base.LOGIT_SCALE
    for a, b in zip(encoder.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_logit_scales(tmp_path):
    encoder = pointbert().eval()
    state = random_state(layout(encoder))
    for logarithm in (4.7, 1000.0):
        scale = torch.tensor(logarithm)
        load_weights(encoder, save(tmp_path, {**state, "logit_scale": scale}))
        assert encoder.logit_scale == 100.0
    for bad in ("nan", "inf", "-inf"):
        path = save(tmp_path, {**state, "logit_scale": torch.tensor(float(bad))})
        with pytest.raises(InputError, match=rf"model\.pt has logit_scale {bad}; expected"):
            load_weights(encoder, path)


def test_safetensors_and_demo_prefix(tmp_path):
    encoder = openshape().eval()
    state = random_state(layout(encoder))
    save_file({f"pc_encoder.{k}": v for k, v in state.items()}, tmp_path / "a.safetensors")
    load_weights(encoder, tmp_path / "a.safetensors")
    assert torch.equal(encoder.cls_token, state["ppat.cls_token"])


def test_load_encoder(tmp_path, monkeypatch):
    state = random_state(published_layouts.layouts()["uni3d-ti"])
    path = save(tmp_path, {"module": state})
    encoder = load_encoder("uni3d-ti", path)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert not any(p.is_meta for p in (*encoder.parameters(), *encoder.buffers()))
    asked = []
    monkeypatch.setattr("budwood.points.encoders.download", lambda hub: asked.append(hub) or path)
    load_encoder("uni3d-ti")
    assert (asked[0].repo, asked[0].file) == ("BAAI/Uni3D", "modelzoo/uni3d-ti/model.pt")
    with pytest.raises(UnknownNameError, match="did you mean"):
        load_encoder("uni3d-x")


def test_what_is_asked_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def hub(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        return str(tmp_path / "model.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    monkeypatch.setattr("budwood.hub.why_offline", lambda: None)
    assert download(Hub("a/b", "c.pt", "dataset", "MIT")) == tmp_path / "model.pt"
    assert asked == [("a/b", "c.pt", "dataset")]

    def offline(*_, **__):
        raise LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(InputError, match="cannot download .* of BAAI/Uni3D: no network; give a"):
        load_encoder("uni3d-ti")
    monkeypatch.setattr("budwood.hub.why_offline", lambda: "it does not answer")
    with pytest.raises(InputError, match="cannot load checkpoint BAAI/Uni3D: it does not answer"):
        load_encoder("uni3d-ti")


def test_another_architecture_tells_which_keys(tmp_path):
    path = save(tmp_path, random_state(layout(openshape())))
    encoder = pointbert()
    with pytest.raises(UnsupportedModelError) as caught:
        load_weights(encoder, path)
    message = str(caught.value)
    assert "is not a checkpoint of ulip" in message and "\n" not in message
    assert "missing: pc_projection" in message and "unexpected: ppat.cls_token" in message
    state = random_state(layout(encoder))
    state["pc_projection"] = torch.zeros(48, 12)
    with pytest.raises(UnsupportedModelError, match=r"pc_projection \(48, 12\) ≠ \(48, 10\)"):
        load_weights(encoder, save(tmp_path, state))
    color = pointbert_color()
    with pytest.raises(UnsupportedModelError, match=r"first_conv.0.weight \(128, 3, 1\) ≠"):
        load_weights(color, save(tmp_path, random_state(layout(encoder))))


class Payload:
    def __reduce__(self):
        return subprocess.check_output, (["echo", "hello"],)


def test_files_are_refused_in_one_line(tmp_path):
    encoder = pointbert()
    good = save(tmp_path, random_state(layout(encoder)))
    bad = {
        "evil.pt": None,
        "cut.pt": good.read_bytes()[:3000],
        "empty.pt": b"",
        "text.pt": b"no checkpoint",
        "cut.safetensors": b"\x10\0\0\0\0\0\0\0{",
    }
    for name, content in bad.items():
        path = tmp_path / name
        if content is None:
            torch.save({"state_dict": Payload()}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_weights(encoder, path)
        assert "\n" not in str(caught.value) and name in str(caught.value)
        if content is None:
            assert "could run code" in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        load_weights(encoder, tmp_path / "nope.pt")
    with pytest.raises(InputError, match="expected a state dict"):
        load_weights(encoder, save(tmp_path, [1, 2], "list.pt"))


def test_files_with_damaged_bytes(tmp_path):
    """Bits flipped in the pickle of a checkpoint; torch raises what it happens to."""
    encoder = pointbert()
    path = save(tmp_path, {"state_dict": {"a": torch.zeros(30, 30)}})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    start = whole.index(b"state_dict")
    for _ in range(200):
        content = bytearray(whole)
        for place in rng.integers(start - 20, start + 150, size=3):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        with pytest.raises((InputError, UnsupportedModelError)) as caught:
            load_weights(encoder, path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)
    save(tmp_path, {0: torch.zeros(3), "module": {1: torch.zeros(2)}})
    with pytest.raises(UnsupportedModelError, match=r"is not a checkpoint of ulip: .* missing"):
        load_weights(encoder, path)


EVERY = {**{name: make for name, (make, _, _) in TINY.items()}, "sprout": Sprout}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("n", [1, 2, 3, 16, 64, 300])
def test_from_one_point_up(name, n):
    encoder = EVERY[name]().eval()
    xyz, rgb = clouds(n, batch=3)
    with torch.no_grad():
        got = encoder(xyz, rgb)
        assert got.shape == (3, encoder.embed_dim) and got.isfinite().all()
        torch.testing.assert_close(got[1:2], encoder(xyz[1:2], rgb[1:2]), rtol=1e-4, atol=1e-4)
        same = encoder(torch.zeros(1, n, 3))
        assert same.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_colours(name):
    encoder = EVERY[name]().eval()
    xyz, rgb = clouds()
    with torch.no_grad():
        plain, grey = encoder(xyz), encoder(xyz, torch.full_like(xyz, 0.4))
        colored = encoder(xyz, rgb)
    assert torch.equal(plain, grey)
    assert torch.equal(plain, colored) != encoder.preparation.color
    if encoder.preparation.color:
        with pytest.raises(ShapeError, match="rgb has shape"):
            encoder(xyz, rgb[:, :5])


def test_around_replaces_each_block():
    encoder = pointbert().eval()
    xyz, _ = clouds()
    seen = []

    def around(index, block, x):
        seen.append((index, x.shape))
        return block(x)

    with torch.no_grad():
        assert torch.equal(encoder(xyz, None, around), encoder(xyz))
    n_groups, _ = GROUPS.sizes(40)
    assert seen == [(i, (2, 1 + n_groups, 24)) for i in range(2)]


def test_prepare():
    encoder = openshape()
    xyz = np.random.default_rng(0).normal(size=(500, 3)) + 1e6
    cloud = make_cloud(np.vstack([xyz, xyz]), np.ones((1000, 3)))
    points, rgb = encoder.prepare(cloud, 64, seed=1)
    for n in (1, 0, -4, 2.5):
        with pytest.raises(InputError, match=f"n_points={n}(; give a whole| is below 2)"):
            encoder.prepare(cloud, n)
    with pytest.raises(InputError, match="seed=-1 is out of range"):
        encoder.prepare(cloud, seed=-1)
    assert points.shape == rgb.shape == (64, 3) and points.dtype == torch.float32
    assert points.norm(dim=1).max().item() == pytest.approx(1, abs=1e-6)
    assert encoder.prepare(cloud)[0].shape == (500, 3)  # duplicates count once
    axes = make_cloud([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert torch.equal(encoder.prepare(axes)[0], pointbert().prepare(axes)[0])  # y is up
    assert pointbert().prepare(cloud)[1] is None
    # A z-up cloud ends as the same cloud given y-up.
    turned = make_cloud(axes.xyz[:, [0, 2, 1]] * [1, -1, 1])
    torch.testing.assert_close(
        pointbert().prepare(turned, up="z")[0], pointbert().prepare(axes)[0], rtol=0, atol=1e-6
    )
    for scale in (1e-170, 1e200, 1e308):
        with pytest.raises(InputError, match="extends over .* units; give|look for damaged ones"):
            encoder.prepare(make_cloud(axes.xyz * scale))
    many = make_cloud(np.tile(xyz, (4000, 1)))  # two million
    assert pointbert().prepare(many, 64)[0].shape == (64, 3)
    for same in ([[1.0, 2, 3]], [[1.0, 2, 3]] * 9):
        with pytest.raises(InputError, match="there is no shape"):
            encoder.prepare(make_cloud(same))


def test_sprout_saves_and_loads(tmp_path):
    encoder = Sprout(SproutConfig(dim=16, depth=2, n_heads=2, embed_dim=12, n_groups=8, k=6))
    encoder.logit_scale = 20.5
    encoder.text_center += 1
    path = tmp_path / "sprout.safetensors"
    save_sprout(encoder, path)
    back = load_encoder("sprout", path)
    assert back.config == encoder.config and back.logit_scale == 20.5
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, back.state_dict()[key])
    save_sprout(encoder, path, torch.float16)
    assert load_sprout(path).norm.weight.dtype == torch.float32
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="truncated"):
        load_sprout(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UnsupportedModelError, match="not a sprout encoder"):
        load_sprout(path)
    with pytest.raises(InputError, match="check the path"):
        load_sprout(tmp_path / "nope")
    with pytest.raises(InputError, match="must be an integer of 1 or more"):
        SproutConfig(depth=0)
    with pytest.raises(InputError, match="does not divide"):
        SproutConfig(dim=10)


def test_sprout_files_that_differ(tmp_path):
    encoder = Sprout(SproutConfig(dim=16, depth=2, n_heads=2, embed_dim=12, n_groups=8, k=6))
    path = tmp_path / "sprout.safetensors"
    save_sprout(encoder, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        state = {key: file.get_tensor(key).clone() for key in encoder.state_dict()}

    def refused(error, tensors=state, **changed):
        save_file(tensors, path, {**metadata, **changed})
        with pytest.raises(error) as caught:
            load_sprout(path)
        message = str(caught.value)
        assert "\n" not in message and path.name in message
        return message

    fewer = {key: value for key, value in state.items() if key != "norm.weight"}
    assert "1 missing: norm.weight" in refused(UnsupportedModelError, fewer)
    wider = {**state, "norm.weight": torch.zeros(17)}
    message = refused(UnsupportedModelError, wider)
    assert "1 of another shape: norm.weight (17,) ≠ (16,)" in message
    assert "1 unexpected: a" in refused(UnsupportedModelError, {**state, "a": torch.zeros(1)})
    sizes = json.loads(metadata["sprout"])
    message = refused(UnsupportedModelError, sprout=json.dumps({**sizes, "radius": 3}))
    assert "unknown sizes radius" in message
    for bad in ("{", "3", json.dumps({**sizes, "dim": "16"}), json.dumps({**sizes, "depth": 0})):
        refused(InputError, sprout=bad)
    refused(InputError, logit_scale="warm")
    assert "has logit_scale nan; expected" in refused(InputError, logit_scale="nan")
