"""Autograd functions against plain autograd: masked and penalised products, some rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from budwood.tune import SlimLinear
from budwood.tune.equations import l1_slopes
from budwood.tune.slim.autograd import Side, add_rows, product, take_rows, untouched
from tests import tiny_llm as tiny

N_MASKED = 4


def tensors(n_tokens, dtype=torch.float32):
    torch.manual_seed(0)
    x, weight, base = torch.randn(n_tokens, 5), torch.randn(6, 5), torch.randn(n_tokens, 6)
    return [one.to(dtype).requires_grad_() for one in (x, weight, base)]


def side(masked, slope=0.0, due=True, calls=None):
    columns = torch.tensor([True, False, True, True, False]) if masked == "columns" else None
    rows = torch.tensor([True, True, False, True, False, True]) if masked == "rows" else None
    seen = calls if calls is not None else []
    return Side(columns, rows, N_MASKED, slope, lambda: seen.append(1) or due)


def plainly(x, weight, base, masked):
    mask = torch.ones_like(weight)
    if masked == "columns":
        mask[:N_MASKED, [1, 4]] = 0
    elif masked == "rows":
        mask[[2, 4]] = 0
    found = F.linear(x, weight * mask)
    return found if base is None else base + found


@pytest.mark.parametrize("n_tokens", [0, 7])
@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("masked", [None, "columns", "rows"])
def test_value_and_gradients_are_those_of_autograd(masked, has_base, n_tokens):
    found = []
    for way in ("product", "plain"):
        x, weight, base = tensors(n_tokens)
        with_base = base if has_base else None
        if way == "product":
            y = product(x, weight, side(masked), with_base)
        else:
            y = plainly(x, weight, with_base, masked)
        (y.square().sum() + y.sum()).backward()
        found.append([y.detach(), x.grad, weight.grad, base.grad if has_base else y.detach()])
    for one, other in zip(*found):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("masked", ["columns", "rows"])
def test_under_autocast(masked):
    grads = []
    for way in ("product", "plain"):
        x, weight, _ = tensors(7)
        with torch.autocast("cpu", torch.bfloat16):
            y = (
                product(x, weight, side(masked))
                if way == "product"
                else plainly(x, weight, None, masked)
            )
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert x.grad.dtype == weight.grad.dtype == torch.float32
        grads.append((x.grad, weight.grad))
    for one, other in zip(*grads):
        assert torch.allclose(one, other, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("due", [True, False])
def test_the_penalty_is_on_its_rows_alone(due):
    x, weight, _ = tensors(7)
    calls: list = []
    product(x, weight, side(None, 0.5, due, calls)).sum().backward()
    plain = torch.autograd.grad(plainly(x, weight, None, None).sum(), weight)[0]
    extra = 0.5 * weight.sign() * due
    extra[N_MASKED:] = 0
    assert torch.allclose(weight.grad - plain, extra, atol=1e-5) and calls == [1]


def test_untouched_weights_have_the_gradient_of_the_penalty_alone():
    result, a, b = tensors(6)
    inner, calls = result * 1, []
    found = untouched(inner, a, b, *(side(None, slope, calls=calls) for slope in (0.5, 0.25)))
    assert torch.equal(found, inner) and found.data_ptr() == inner.data_ptr()
    found.add_(1)  # as an activation in place does; a view could not be
    (found * 3).sum().backward()
    assert torch.equal(result.grad, torch.full_like(result, 3)) and calls == [1, 1]
    for weight, slope in ((a, 0.5), (b, 0.25)):
        assert torch.equal(weight.grad[:N_MASKED], slope * weight[:N_MASKED].sign())
        assert not weight.grad[N_MASKED:].any()


def test_backward_comes_to_b_first_with_and_without_tokens():
    x, a, result = tensors(7)
    b = torch.randn(6, 6, requires_grad=True)
    order: list[str] = []
    sides = [Side(None, None, 6, 0.0, lambda i=i: bool(order.append(i))) for i in "ab"]
    product(product(x, a, sides[0]), b, sides[1], result).sum().backward()
    untouched(result, a, b, *sides).sum().backward()
    assert order == ["b", "a", "b", "a"]


def test_a_frozen_weight_is_not_counted():
    x, weight, _ = tensors(7)
    calls: list = []
    product(x, weight.detach(), side("columns", 0.5, calls=calls)).sum().backward()
    assert not calls and torch.allclose(
        x.grad,
        plainly(x, weight, None, "columns").new_ones(7, 6)
        @ side("columns").masked(weight.detach()),
    )


def test_backward_through_a_frozen_adapter_is_no_training():
    model = tiny.slim().train()
    layers = [module for module in model.modules() if isinstance(module, SlimLinear)]
    model.requires_grad_(False)
    inputs = model.get_input_embeddings()(tiny.batch()["input_ids"]).requires_grad_()
    model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert not layers[0].keeper.pending


def test_two_passes_before_one_backward_are_penalised_once():
    model = tiny.slim(yielding=False, merging=False, l1=0.5).train()
    layers = [module for module in model.modules() if isinstance(module, SlimLinear)]
    data = tiny.batch()

    def grads(n):
        model.zero_grad()
        sum(model(**data).loss for _ in range(n)).backward()
        layers[0].keeper.commit()
        return [layer.slim_in["default"].weight.grad.clone() for layer in layers]

    for once, twice, layer in zip(grads(1), grads(2), layers):
        slim_in, config = layer.slim_in["default"].weight, layer.slim_config["default"]
        slope, _ = l1_slopes(0.5, config.r, slim_in.shape[1], layer.out_features)
        penalty = 2 * once - twice  # the loss cancels
        expected = slope * slim_in.sign()
        expected[config.rank :] = 0
        assert slope > 1e-3 and torch.allclose(penalty, expected, atol=1e-5)


# --- rows ---------------------------------------------------------------------------------------

ROWS = pytest.mark.parametrize("rows", [[], [4], [5, 0, 2], list(range(6))])


@ROWS
def test_take_rows_is_indexing_with_its_gradient(rows):
    rows = torch.tensor(rows, dtype=torch.long)
    x = torch.randn(6, 3, requires_grad=True)
    scale = torch.randn(len(rows), 3)
    taken = take_rows(x, rows)
    assert torch.equal(taken, x[rows])
    (got,) = torch.autograd.grad((taken * scale).sum(), x, allow_unused=True)
    (expected,) = torch.autograd.grad((x[rows] * scale).sum(), x)
    assert torch.equal(torch.zeros_like(x) if got is None else got, expected)


def test_taking_no_rows_gives_no_gradient_rather_than_zeros():
    x = torch.randn(6, 3, requires_grad=True)
    taken = take_rows(x, torch.tensor([], dtype=torch.long))
    (2 * taken).sum().backward()
    assert x.grad is None


@ROWS
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "view"])
def test_add_rows_adds_and_passes_gradients_on(rows, kind):
    rows = torch.tensor(rows, dtype=torch.long)
    source = torch.randn(3, 2, 4, requires_grad=True)
    delta = torch.randn(len(rows), 4, requires_grad=True)
    weight = torch.randn(2, 3, 4)

    def made():
        own = source * 2  # neither a leaf nor the caller's own memory
        if kind == "view":
            return own.view(2, 3, 4)
        own = own.transpose(0, 1)
        return own.contiguous() if kind == "contiguous" else own

    expected = made().reshape(6, 4).index_add(0, rows, delta).view(2, 3, 4)
    got = add_rows(made(), delta, rows)
    assert torch.equal(got, expected)
    ours = torch.autograd.grad((got * weight).sum(), (source, delta))
    theirs = torch.autograd.grad((expected * weight).sum(), (source, delta))
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)


def test_add_rows_keeps_memory_and_leaves_other_rows_alone():
    result = torch.randn(2, 3, 4)
    before = result.clone()
    got = add_rows(result, torch.ones(1, 4), torch.tensor([4]))
    assert got.data_ptr() == result.data_ptr()
    assert torch.equal(got[1, 1], before[1, 1] + 1)
    got[1, 1] = before[1, 1]
    assert torch.equal(got, before)


def test_what_backward_needs_of_a_result_that_was_added_to_is_an_error():
    source = torch.randn(6, 4, requires_grad=True)
    result = source.exp()  # keeps its output for backward
    add_rows(result, torch.ones(1, 4), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        result.sum().backward()
