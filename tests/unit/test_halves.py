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
from budwood.halves import fast_half, multiplies, rounded_products
from tests import tiny_chat, tiny_vlm


@pytest.fixture
def lacking(monkeypatch):
    """A CPU without instructions for bfloat16."""
    monkeypatch.setattr(halves, "multiplies", lambda dtype, device="cpu": False)


def matrices(dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = (40, 90), (90, 70), (40, 70), (3, 40, 90), (3, 90, 70), (3, 40, 70)
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def products():
    a, b, c, d, e, f = matrices()
    return {
        "mm": a @ b,
        "addmm": torch.addmm(c, a, b, beta=0.5, alpha=2),
        "bmm": d @ e,
        "baddbmm": torch.baddbmm(f, d, e, beta=0.5, alpha=2),
        "linear": nn.functional.linear(d, b.T.contiguous(), c[0]),
    }


def test_rounded_products_are_those_of_float64_rounded(lacking):
    a, b, c, d, e, f = (one.double() for one in matrices())
    wanted = {
        "mm": a @ b,
        "addmm": 0.5 * c + 2 * (a @ b),
        "bmm": d @ e,
        "baddbmm": 0.5 * f + 2 * (d @ e),
        "linear": d @ b + c[0],
    }
    with rounded_products():
        found = products()
    assert found.keys() == wanted.keys()
    for name, product in found.items():
        assert product.dtype == torch.bfloat16, name
        torch.testing.assert_close(product, wanted[name].bfloat16(), rtol=2**-7, atol=1e-4)


def test_products_are_put_back(lacking, monkeypatch):
    seen, plain = [], halves._rounded
    monkeypatch.setattr(
        halves, "_rounded", lambda *args, **kwargs: seen.append(1) or plain(*args, **kwargs)
    )
    with rounded_products():
        before = len(seen)
        products()
        assert len(seen) == before + 5
    products()
    assert len(seen) == before + 5


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int64])
def test_other_dtypes_are_as_they_were(lacking, kind):
    a, b, c, *_ = (10 * one for one in matrices(torch.float32))
    a, b, c = a.to(kind), b.to(kind), c.to(kind)
    wanted = [a @ b, torch.addmm(c, a, b)]
    with rounded_products():
        assert all(torch.equal(*pair) for pair in zip(wanted, [a @ b, torch.addmm(c, a, b)]))


@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_the_same_up_to_rounding(lacking, autocast):
    def gradients():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96, bias=False))
        model = model if autocast else model.bfloat16()
        x = torch.randn(7, 96, dtype=next(model.parameters()).dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().square().sum().backward()
        return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]

    plain = gradients()
    with rounded_products():
        rounded = gradients()
    for one, other in zip(plain, rounded):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 0.01 * one.norm()


def test_nothing_changes_where_the_cpu_has_them(monkeypatch):
    monkeypatch.setattr(halves, "multiplies", lambda dtype, device="cpu": True)
    monkeypatch.setattr(halves, "_rounded", None)  # would fail
    with rounded_products():
        products()


def operators(monkeypatch, *, available=True, bfloat16=False, float16=False):
    """Pretend that the CPU has instructions, and that PyTorch has the operators that tell."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    answers = {"_is_mkldnn_bf16_supported": bfloat16, "_is_mkldnn_fp16_supported": float16}
    told = {name: lambda answer=answer: answer for name, answer in answers.items() if available}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**told))


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
