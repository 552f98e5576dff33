import pytest
import torch
from torch import nn

from budwood import bfloat16
from budwood.bfloat16 import RoundedLinear, has_bfloat16, round_products


@pytest.fixture
def lacking(monkeypatch):
    """A CPU without bfloat16 products."""
    monkeypatch.setattr(bfloat16, "has_bfloat16", lambda device="cpu": False)


def block(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96, bias=False)).to(dtype)


def test_every_device_but_a_cpu_is_taken_to_have_bfloat16_products():
    assert has_bfloat16("cuda:0")
    assert isinstance(has_bfloat16(), bool)


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
    monkeypatch.setattr(bfloat16, "has_bfloat16", lambda device="cpu": True)
    model = block()
    round_products(model)
    assert type(model[0]) is nn.Linear
