import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import budwood
from budwood import halves, loading
from budwood.cli.models import SLOW
from budwood.errors import InputWarning
from budwood.halves import RoundedLinear, fast_half, multiplies, round_products
from tests import tiny_chat, tiny_vlm


@pytest.fixture
def lacking(monkeypatch):
    """A CPU without bfloat16 products."""
    monkeypatch.setattr(halves, "multiplies", lambda dtype, device="cpu": False)


def block(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96, bias=False)).to(dtype)


def test_rounded_products_are_those_of_float32_rounded(lacking):
    model, x = block(), torch.randn(7, 96).bfloat16()
    layer = model[0]
    wanted = (x.double() @ layer.weight.double().T + layer.bias.double()).bfloat16()
    round_products(model)
    ulp = 2.0**-8
    torch.testing.assert_close(layer(x), wanted, rtol=ulp, atol=ulp / 16)


def test_rounded_layers_agree_with_plain_ones_forward_and_backward(lacking):
    plain, rounded = block(), block()
    round_products(rounded)
    assert [type(module) for module in rounded[::2]] == [RoundedLinear, RoundedLinear]
    inputs = [torch.randn(7, 96).bfloat16() for _ in range(2)]
    inputs[1] = inputs[0].clone()
    for model, x in zip((plain, rounded), inputs):
        x.requires_grad_()
        model(x).float().square().sum().backward()
    torch.testing.assert_close(rounded(inputs[1]), plain(inputs[0]), rtol=0.02, atol=0.01)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0.05, atol=0.05)
    assert rounded[0].weight.grad.dtype == torch.bfloat16
    assert rounded.state_dict().keys() == plain.state_dict().keys()


def test_float32_layers_are_untouched(lacking):
    plain, rounded = block(torch.float32), block(torch.float32)
    round_products(rounded)
    x = torch.randn(7, 96)
    assert torch.equal(rounded(x), plain(x))


def test_autocast_chooses_the_dtype_as_for_plain_layers(lacking):
    rounded = block(torch.float32)
    round_products(rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rounded(torch.randn(7, 96)).dtype == torch.bfloat16


def test_nothing_changes_where_the_device_has_them(monkeypatch):
    monkeypatch.setattr(halves, "multiplies", lambda dtype, device="cpu": True)
    model = block()
    round_products(model)
    assert type(model[0]) is nn.Linear


def operators(monkeypatch, *, available=True, bfloat16=False, float16=False):
    """Pretend that the CPU has some products."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    ops = (
        SimpleNamespace()
        if not available
        else SimpleNamespace(
            _is_mkldnn_bf16_supported=lambda: bfloat16, _is_mkldnn_fp16_supported=lambda: float16
        )
    )
    monkeypatch.setattr(torch.ops, "mkldnn", ops)


def test_what_a_cpu_multiplies(monkeypatch):
    operators(monkeypatch, bfloat16=True)
    assert multiplies(torch.bfloat16) and not multiplies(torch.float16)
    assert fast_half() == torch.bfloat16
    operators(monkeypatch)
    assert not multiplies(torch.bfloat16) and multiplies(torch.float32)
    assert multiplies(torch.bfloat16, "cuda:0") and fast_half("cuda:0") == torch.bfloat16
    assert fast_half() == torch.float32


def test_a_build_without_its_operators(monkeypatch):
    """PyTorch for Macs has no oneDNN, and none of its operators."""
    operators(monkeypatch, available=False)
    assert not multiplies(torch.bfloat16) and not multiplies(torch.float16)


@pytest.mark.parametrize(("bfloat16", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("name", ["smollm2", "sprout-256"])
def test_embedded_models_have_the_dtype_that_the_cpu_multiplies(
    monkeypatch, name, bfloat16, wanted
):
    operators(monkeypatch, bfloat16=bfloat16)
    asked = []
    monkeypatch.setattr(loading, "_smollm2", lambda dtype: asked.append(dtype) or small())
    monkeypatch.setattr(loading, "_sprout", lambda dtype, **_: asked.append(dtype) or small())
    budwood.load(name)
    budwood.load(name, dtype="bfloat16")
    assert asked == [wanted, torch.bfloat16]


def small():
    return tiny_chat.model(), tiny_chat.tokenizer()


@pytest.mark.parametrize("save", [tiny_vlm.save_llava_next, tiny_chat.save])
def test_a_slow_checkpoint_is_warned_of(monkeypatch, tmp_path, save):
    save(tmp_path / "half")
    as_half(tmp_path / "half")
    operators(monkeypatch, bfloat16=True)
    with pytest.warns(InputWarning, match=SLOW + ".* half, as in bfloat16: give dtype bfloat16"):
        budwood.load(tmp_path / "half")
    operators(monkeypatch)
    with pytest.warns(InputWarning, match=SLOW + ".* half, as in float32: give dtype float32"):
        budwood.load(tmp_path / "half")
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        budwood.load(tmp_path / "half", dtype="float32")
        budwood.load(tmp_path / "half", dtype="float16")  # as asked


def as_half(folder):
    """Save the weights of a folder in float16."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight.half() for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
