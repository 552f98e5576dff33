"""Adapters: the encoder is never written to, fused equals unfused, and files come back."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from budwood.errors import InputError, OutputError, UnknownNameError, UnsupportedModelError
from budwood.points.adapters import ADAPTERS, fingerprint, load_adapter, make_adapter
from budwood.points.adapters.base import FILE
from budwood.points.adapters.training_free import t3a_text
from budwood.points.encoders.blocks import Attention, Context
from budwood.points.logits import cosine_logits
from tests.points import models

NAMES = [name for name in ADAPTERS if name != "fused"]
START_FROZEN = {"frozen": {}, "lora": {}, "tent": {}, "full": {}, "adabn": {}, "t3a": {}}
START_FROZEN |= {"uni-adapter": {}, "point-cache": {}}
START_FROZEN["fca"] = {"init": "closed"}


def clouds(n=30, batch=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, 3, generator=rng) * 0.4, torch.rand(batch, n, 3, generator=rng)


def snapshot(encoder):
    return {key: value.clone() for key, value in encoder.state_dict().items()}


def assert_untouched(encoder, before):
    after = encoder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())
    assert not encoder.training


def train(adapter, steps=2):
    """A few steps on a loss that reaches every path; closed gates open at the first."""
    xyz, rgb = clouds()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        loss = adapter(xyz, rgb, 1.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("encoder", models.MAKERS)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, encoder, tmp_path):
    model = models.make(encoder)
    before = snapshot(model)
    xyz, rgb = clouds()
    frozen = model(xyz, rgb)
    adapter = make_adapter(name, model)
    assert not any(key in before for key in adapter.state_dict())
    if name in ("adabn", "t3a"):
        adapter.estimate([clouds(16)])
    if list(adapter.parameters()):
        train(adapter)
        assert not torch.equal(adapter(xyz, rgb), frozen)
    else:
        streams = ("uni-adapter", "point-cache")  # without statistics of their own
        assert torch.equal(adapter(xyz, rgb), frozen) == (name in ("frozen", *streams))
    assert_untouched(model, before)
    assert torch.equal(model(xyz, rgb), frozen)
    adapter.save(tmp_path / "a")
    back = load_adapter(tmp_path / "a", models.make(encoder))
    assert type(back) is type(adapter) and back.config == adapter.config
    assert torch.equal(back(xyz, rgb), adapter(xyz, rgb))
    assert not back.training


@pytest.mark.parametrize("encoder", models.MAKERS)
@pytest.mark.parametrize("name", START_FROZEN)
def test_starts_at_the_frozen_encoder(name, encoder):
    model = models.make(encoder)
    adapter = make_adapter(name, model, **START_FROZEN[name])
    xyz, rgb = clouds()
    if name == "fca":  # its attention is computed in another order
        torch.testing.assert_close(adapter(xyz, rgb), model(xyz, rgb), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(adapter(xyz, rgb), model(xyz, rgb))


def test_random_init_does_not_start_there():
    model = models.make("ulip")
    assert not torch.allclose(make_adapter("fca", model)(*clouds()), model(*clouds()))


@pytest.mark.parametrize("encoder", models.MAKERS)
def test_fca_is_the_published_reading(encoder):
    # Literally: join, run the frozen block on everything, drop the new tokens.
    model = models.make(encoder)
    adapter = make_adapter("fca", model, n_tokens=5)
    xyz, rgb = clouds()

    def literal(index, block, x):
        new = adapter.learned[index](adapter.tokens[index : index + 1]).expand(len(x), -1, -1)
        return block(torch.cat([x, new], dim=1))[:, : x.shape[1]]

    torch.testing.assert_close(adapter(xyz, rgb), model(xyz, rgb, literal), rtol=1e-5, atol=1e-5)


def test_an_open_gate_is_no_gate():
    model = models.make("sprout")
    closed = make_adapter("fca", model, init="closed")
    state = {k: v for k, v in closed.state_dict().items() if not k.startswith("gates")}
    plain = make_adapter("fca", model)
    plain.load_state_dict(state)
    with torch.no_grad():
        for gate in closed.gates:
            gate.fill_(1.0)
    torch.testing.assert_close(closed(*clouds()), plain(*clouds()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", [-0.5, 0.0, 0.3, 1.0, 4.0])
def test_gates_with_and_without_gradient_are_one_function(gate):
    model = models.make("ulip")
    adapter = make_adapter("fca", model, init="closed")
    with torch.no_grad():
        for own in adapter.gates:
            own.fill_(gate).add_(0.1 * torch.rand_like(own))
    xyz, rgb = clouds()
    with torch.no_grad():
        plain = adapter(xyz, rgb)
    torch.testing.assert_close(adapter(xyz, rgb).detach(), plain, rtol=1e-5, atol=1e-5)


def test_a_gate_weights_exponentials():
    torch.manual_seed(0)
    attention = Attention(12, 3)
    x, extra = torch.randn(2, 5, 12), torch.randn(4, 12)
    gate = torch.tensor([0.0, 0.4, 2.5])
    _, keys, values = attention.split(extra[None])
    q, k, v = attention.split(x)
    rows = torch.empty(2, 5, 12)
    for b in range(2):
        for i in range(5):
            for h in range(3):
                scores = torch.cat([k[b, h], keys[0, h]]) @ q[b, h, i] / 2
                weights = scores.exp() * torch.cat([torch.ones(5), gate[h].expand(4)])
                mixed = weights @ torch.cat([v[b, h], values[0, h]]) / weights.sum()
                rows[b, i, 4 * h : 4 * h + 4] = mixed
    found = attention(x, Context(keys, values, gate))
    torch.testing.assert_close(found, attention.proj(rows), rtol=1e-5, atol=1e-5)


def test_a_shut_gate_can_open_again():
    model = models.make("sprout")
    adapter = make_adapter("fca", model, init="closed")
    with torch.no_grad():
        for gate in adapter.gates:
            gate.fill_(-0.2)
    adapter(*clouds()).square().mean().backward()
    assert all(gate.grad.abs().max() > 0 for gate in adapter.gates)


def test_closed_gates_learn():
    model = models.make("sprout")
    adapter = make_adapter("fca", model, init="closed")
    losses = train(adapter, 4)
    assert all(gate.abs().max() > 0 for gate in adapter.gates)
    assert losses[-1] < losses[0]
    train(adapter, 1)
    assert adapter.tokens.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fca", {"n_tokens": 3}),
        ("fca", {"init": "closed"}),
        ("fca", {"batch_norm": True}),
        ("fca", {"init": "closed", "fade": 4}),
        ("fca", {"batch_norm": True, "counts": (40, 10)}),
        ("vpt-deep", {"n_tokens": 4}),
        ("vpt-deep", {"fade": 4}),
    ],
)
@pytest.mark.parametrize("encoder", models.MAKERS)
def test_fused_equals_unfused(encoder, name, options, tmp_path):
    model = models.make(encoder)
    adapter = make_adapter(name, model, **options)
    if options.get("batch_norm"):
        adapter.estimate([clouds(16)])
    train(adapter)
    fused = adapter.fuse()
    assert not list(fused.parameters())
    fused.save(tmp_path)
    xyz, rgb = clouds(seed=4)
    for made in (fused, load_adapter(tmp_path, model)):
        for share in (None, 0.3, 1.0):
            found, expected = made(xyz, rgb, share), adapter(xyz, rgb, share)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_deep_prompts_are_literal_prompts():
    model = models.make("uni3d")
    adapter = make_adapter("vpt-deep", model, n_tokens=5)
    xyz, rgb = clouds()

    def literal(index, block, x):
        joined = torch.cat([x, adapter.tokens[index].expand(len(x), -1, -1)], dim=1)
        return block(joined)[:, : x.shape[1]]

    torch.testing.assert_close(adapter(xyz, rgb), model(xyz, rgb, literal), rtol=1e-5, atol=1e-5)


def test_shallow_prompts_pass_through_and_calls_are_independent():
    model = models.make("uni3d")
    adapter = make_adapter("vpt-shallow", model, n_tokens=5)
    xyz, rgb = clouds()
    with torch.no_grad():
        tokens, pos = model.embed(xyz, rgb)
        x = torch.cat([tokens + pos, adapter.tokens.expand(3, -1, -1)], dim=1)
        for block in model.blocks:
            x = block(x)
        want = model.pool(x)
        torch.testing.assert_close(adapter(xyz, rgb), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(adapter(xyz, rgb), adapter(xyz, rgb))


def test_lora_is_its_formula():
    model = models.make("ulip")
    adapter = make_adapter("lora", model, rank=2, alpha=6.0, targets=("mlp.fc2",))
    train(adapter)
    assert adapter.layers == ("blocks.0.mlp.fc2", "blocks.1.mlp.fc2")
    merged = models.make("ulip")
    with torch.no_grad():
        for name, down, up in zip(adapter.layers, adapter.down, adapter.up, strict=True):
            merged.get_parameter(f"{name}.weight").add_(3.0 * up @ down)
    torch.testing.assert_close(adapter(*clouds()), merged(*clouds()))


@pytest.mark.parametrize("encoder", models.MAKERS)
def test_lora_with_a_copy_of_what_makes_the_tokens(encoder, tmp_path):
    model, other = models.make(encoder), models.make(encoder).requires_grad_(True)
    xyz, rgb = clouds()
    tokens, positions = other.embed(xyz, rgb if other.preparation.color else None)
    (tokens.sum() + positions.sum()).backward()
    read = {name for name, one in other.named_parameters() if one.grad is not None}
    before = snapshot(model)
    adapter = make_adapter("lora", model, stem=True)
    assert set(adapter.names) == {name for name in read if not name.startswith("cls_")}
    assert torch.equal(adapter(*clouds()), model(*clouds()))
    train(adapter)
    assert_untouched(model, before)
    half, whole = adapter.replaced(0.5), adapter.replaced(1.0)
    assert set(whole) == {*adapter.names, *(f"{name}.weight" for name in adapter.layers)}
    for name, value in whole.items():
        assert not torch.equal(value, before[name])
        torch.testing.assert_close(half[name] - before[name], (value - before[name]) / 2)
    adapter.save(tmp_path / "a")
    back = load_adapter(tmp_path / "a", models.make(encoder))
    assert torch.equal(back(*clouds()), adapter(*clouds()))


@pytest.mark.parametrize("encoder", models.MAKERS)
def test_adabn_is_what_training_mode_would_track(encoder):
    model = models.make(encoder)
    adapter = make_adapter("adabn", model)
    xyz, rgb = clouds(16, batch=6)
    adapter.estimate([(xyz, rgb)])
    tracked = models.make(encoder)
    for module in tracked.modules():
        if hasattr(module, "running_var"):
            module.train()
            module.momentum = None
    tracked(xyz, rgb)
    tracked.eval()
    for key, value in adapter.statistics.replaced(model, 16, 1.0).items():
        want = tracked.get_buffer(key)
        # Torch keeps the unbiased variance; 36 values or more a channel.
        torch.testing.assert_close(value, want, rtol=0.05, atol=1e-4)
    # In two halves: the same first layer, over all clouds together.
    other = make_adapter("adabn", model)
    other.estimate([(xyz[:2], rgb[:2]), (xyz[2:], rgb[2:])])
    torch.testing.assert_close(other.statistics.mean_0, adapter.statistics.mean_0)
    torch.testing.assert_close(other.statistics.var_0, adapter.statistics.var_0)


def test_estimate_leaves_no_hooks_behind_an_error():
    model = models.make("ulip")
    adapter = make_adapter("adabn", model)
    before = snapshot(model)

    def batches():
        yield clouds()
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        adapter.estimate(batches())
    assert_untouched(model, before)
    with pytest.raises(InputError, match="at least one batch"):
        adapter.estimate([])
    with pytest.raises(InputError, match="set batch_norm=True"):
        make_adapter("fca", model).estimate([clouds()])


def test_names_lean_on_the_surest_clouds():
    names = torch.eye(3)
    features = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.5, 0.0], [0.0, 0.0, 2.0]])
    got = t3a_text(names, features, 10.0, n_keep=1)
    torch.testing.assert_close(got[1], names[1])
    torch.testing.assert_close(
        got[0], F.normalize(names[0] + F.normalize(features[0], dim=0), dim=0)
    )
    torch.testing.assert_close(t3a_text(names, features, 10.0, n_keep=0), names)
    assert torch.equal(names, torch.eye(3))


def test_t3a_alone_changes_names(tmp_path):
    model = models.make("sprout")
    names, features = torch.eye(model.embed_dim)[:4], torch.randn(9, model.embed_dim)
    plain = cosine_logits(features, names, model.logit_scale)
    for other in ("adabn", "lora", "fca"):
        assert torch.equal(make_adapter(other, model).scorer(names)(features), plain)
    make_adapter("t3a", model, n_keep=2).save(tmp_path)
    expected = t3a_text(names, features, model.logit_scale, 2)
    wanted = cosine_logits(features, expected, model.logit_scale)
    assert torch.equal(load_adapter(tmp_path, model).scorer(names)(features), wanted)
    assert not torch.allclose(expected, names, atol=1e-2)


def test_files(tmp_path):
    model = models.make("ulip")
    make_adapter("fca", model).save(tmp_path)
    with pytest.raises(OutputError, match="exists"):
        make_adapter("lora", model).save(tmp_path)
    make_adapter("lora", model).save(tmp_path, overwrite=True)
    assert load_adapter(tmp_path, model).name == "lora"
    for other, what in (("sprout", "name 'ulip', here 'sprout'"), ("ulip", "weights")):
        with pytest.raises(UnsupportedModelError, match=f"made for another encoder: {what}"):
            load_adapter(tmp_path, models.make(other, seed=1))
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="truncated or no adapter"):
        load_adapter(tmp_path, model)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="no adapter"):
        load_adapter(tmp_path, model)
    save_file({"a": torch.zeros(1)}, path, {"budwood": json.dumps({"format": 9})})
    with pytest.raises(InputError, match="format 9"):
        load_adapter(tmp_path, model)
    with pytest.raises(InputError, match="there is no adapter"):
        load_adapter(tmp_path / "nope", model)
    about = {"format": 1, "adapter": "lora", "encoder": fingerprint(model), "config": {}}
    for wrong in ([about], about | {"encoder": "ulip"}, about | {"config": 3}):
        save_file({"a": torch.zeros(1)}, path, {"budwood": json.dumps(wrong)})
        with pytest.raises(InputError, match="no adapter: its description is damaged"):
            load_adapter(tmp_path, model)
    for config in ({"rank": "8"}, {"counts": 5}, {"rank": 3}, {"ranks": 3}, {"targets": 1}):
        save_file({"a": torch.zeros(1)}, path, {"budwood": json.dumps(about | {"config": config})})
        with pytest.raises(InputError, match="holds a damaged 'lora' adapter: [^\n]*$"):
            load_adapter(tmp_path, model)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        make_adapter("lora", model).save(tmp_path / "file" / "inside")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("fcaa", {}, UnknownNameError, "did you mean 'fca'"),
        ("fused", {}, InputError, "comes from fuse"),
        ("fca", {"tokens": 3}, InputError, "no option 'tokens'"),
        ("fca", {"n_tokens": 0}, InputError, "at least 1"),
        ("fca", {"init": "open"}, InputError, "give 'random' or 'closed'"),
        ("vpt-deep", {"n_tokens": 0}, InputError, "at least 1"),
        ("lora", {"rank": 0}, InputError, "at least 1"),
        ("lora", {"targets": ("nothing",)}, InputError, "match no linear layer"),
        ("adabn", {"batch_norm": False}, InputError, "use 'frozen'"),
        ("lora", {"fade": True}, InputError, "fade=True must be 0, or from 1 to below 128"),
        ("lora", {"fade": 0.5}, InputError, "fade=0.5 must be"),
        ("lora", {"fade": 128}, InputError, "fade=128 must be"),
    ],
)
def test_refusals(name, options, error, message):
    with pytest.raises(error, match=message):
        make_adapter(name, models.make("ulip"), **options)


@pytest.mark.parametrize("encoder", models.MAKERS)
def test_every_weight_of_the_tiny_encoders_matters(encoder):
    """Else what is tested with them is tested in part."""
    adapter = make_adapter("full", models.make(encoder))
    adapter(*clouds()).square().mean().backward()
    for name, value in zip(adapter.names, adapter.values):
        assert value.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["lora", "full", "adabn"])
def test_threads_share_an_encoder(name):
    """With and without an adapter at the same time, and the adapter itself in several threads."""
    model = models.make("sprout")
    adapter = make_adapter(name, model)
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(0.1 * torch.randn_like(value))
    xyz, rgb = clouds()
    if adapter.statistics is not None:
        adapter.estimate([(xyz, rgb)])
    expected = [one(xyz, rgb).detach() for one in (model, adapter)]
    assert not torch.equal(*expected)

    def ask(i):
        with torch.no_grad():
            return (model, adapter)[i % 2](xyz, rgb)

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(ask, range(60))):
            assert torch.equal(found, expected[i % 2])


def test_an_adapter_sees_what_becomes_of_its_encoder():
    model = models.make("sprout")
    adapter = make_adapter("lora", model)
    xyz, rgb = clouds()
    before = adapter(xyz, rgb)
    model.double()
    adapter.double()
    assert torch.allclose(adapter(xyz.double(), rgb.double()).float(), before, atol=1e-4)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert not adapter(xyz.double(), rgb.double()).any()
