"""Some tokens of a batch, taken out and added back, with their gradients."""

from __future__ import annotations

import pytest
import torch

from budwood.tune.rows import add_rows, take_rows

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
