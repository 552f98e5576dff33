"""Losses against their formulas in double precision, and their edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from budwood.errors import InputError
from budwood.points.distill import (
    RULES,
    Curriculum,
    Objective,
    complementary,
    cosine,
    divergence,
    entropy,
    negatives,
)


def logits(n=5, c=7, seed=0, scale=3.0):
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed)) * scale


def test_negatives():
    teacher = torch.tensor([[5.0, 4.0, 0.0, -9.0]])
    assert negatives(teacher, k=2).tolist() == [[False, False, True, True]]
    assert negatives(teacher, k=9).tolist() == [[False, False, True, True]]  # half, at most
    assert negatives(teacher[:, :1], k=9).tolist() == [[False]]
    assert negatives(teacher[:, :3], k=9).tolist() == [[False, True, True]]
    assert negatives(teacher, "all_but_argmax").tolist() == [[False, True, True, True]]
    assert negatives(teacher, "threshold", threshold=0.01).tolist() == [[False, False, True, True]]
    flat = torch.zeros(1, 4)
    assert negatives(flat, "threshold", threshold=0.9).sum() == 3  # never the best
    for rule in RULES:
        assert negatives(flat[:, :1], rule).tolist() == [[False]]


@pytest.mark.parametrize("rule", RULES)
def test_complementary_is_its_formula(rule):
    student, mask = logits(), negatives(logits(seed=1), rule, k=3, threshold=0.05)
    p = student.double().softmax(-1)
    want = 0.0
    for row, negative in zip(p.tolist(), mask.tolist(), strict=True):
        chosen = [math.log(1 - x) for x, n in zip(row, negative, strict=True) if n]
        want -= sum(chosen) / max(1, len(chosen))
    torch.testing.assert_close(
        complementary(student, mask).double().item(), want / 5, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4])
def test_complementary_stays_finite(scale):
    student = logits(scale=scale).requires_grad_()
    for mask in (torch.ones(5, 7).bool(), torch.zeros(5, 7).bool(), negatives(student.detach())):
        student.grad = None
        loss = complementary(student, mask)
        loss.backward()
        assert loss.isfinite() and loss >= 0 and student.grad.isfinite().all()
    lone = torch.zeros(3, 1, requires_grad=True)
    complementary(lone, torch.zeros(3, 1).bool()).backward()
    assert lone.grad.abs().sum() == 0


def test_complementary_pushes_away_where_p_is_one():
    student = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    complementary(student, torch.tensor([[True, False, False]])).backward()
    assert student.grad[0, 0] == pytest.approx(1.0)  # log(1 − p) alone would give 0 · ∞


def test_positive_terms():
    a, b = logits(), logits(seed=1)
    assert cosine(a, 3 * a).item() == pytest.approx(0, abs=1e-6)
    assert cosine(a, -a).item() == pytest.approx(2)
    assert divergence(a, a).item() == pytest.approx(0, abs=1e-6)
    p, q = (b.double() / 2).softmax(-1), (a.double() / 2).softmax(-1)
    want = 4 * (p * (p / q).log()).sum(-1).mean()
    assert divergence(a, b, 2.0).item() == pytest.approx(want.item(), rel=1e-5)
    assert entropy(torch.zeros(3, 8)).item() == pytest.approx(math.log(8))


def test_objective_is_the_sum_of_its_terms():
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1).requires_grad_()
    texts = F.normalize(logits(9, 6, seed=2), dim=-1)
    own, wise = (10 * F.normalize(x, dim=-1) @ texts.T for x in (student, teacher.detach()))
    want = 0.5 * complementary(own, negatives(wise, k=2)) + 2 * cosine(student, teacher.detach())
    want = want + 3 * divergence(own, wise) + 0.1 * entropy(own)
    mixed = Objective(0.5, 2.0, 3.0, 0.1, k=2)
    got = mixed(student, teacher, texts, 10.0)
    torch.testing.assert_close(got, want)
    got.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    plain = Objective(k=2)(student, teacher, texts, 10.0)
    torch.testing.assert_close(plain, complementary(own, negatives(wise, k=2)))


def test_curriculum():
    draw = torch.Generator().manual_seed(0)
    mixed = Curriculum((32, 1024, 64))
    seen = [mixed.points(step, 100, draw) for step in range(100)]
    assert set(seen) == {32, 64, 1024} and 1024 in seen[50:]
    falling = Curriculum((32, 1024, 64), "falling")
    seen = [falling.points(step, 90, draw) for step in range(90)]
    assert set(seen[:30]) == {1024} and set(seen[30:60]) == {1024, 64} and 32 in seen[60:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: negatives(logits(), "best"), "rule='best' is unknown"),
        (lambda: negatives(logits(), k=0), "k=0"),
        (lambda: Objective(0.0), "one above 0"),
        (lambda: Objective(-1.0), "0 or more"),
        (lambda: Objective(math.nan), "0 or more"),
        (lambda: Objective(rule="x"), "unknown"),
        (lambda: Objective(temperature=0.0), "above 0"),
        (lambda: Curriculum(()), "at least one"),
        (lambda: Curriculum(order="rising"), "unknown"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call()
