"""What counts as a budget, and how many tokens it comes to."""

from __future__ import annotations

import pytest

from budwood.errors import BudgetError
from budwood.prune.budget import Budget


@pytest.mark.parametrize(
    ("keep", "n_visual", "count"),
    [
        (1, 1, 1),
        (64, 576, 64),
        (576, 576, 576),
        (1.0, 576, 576),
        (0.1, 576, 58),
        (0.5, 5, 3),  # halves go up, where Python's round() would give 2
        (0.25, 10, 3),
        (1e-9, 576, 1),
    ],
)
def test_count(keep, n_visual, count):
    assert Budget.parse(keep).count(n_visual) == count


def test_an_image_with_fewer_tokens():
    with pytest.raises(BudgetError, match="keep=9 exceeds the 4 visual tokens; give at most 4"):
        Budget.parse(9).count(4)
    assert Budget.parse(9).count(4, clamp=True) == 4
    assert Budget.parse(3).count(4, clamp=True) == 3


def test_no_tokens():
    with pytest.raises(BudgetError, match="0 visual tokens"):
        Budget.parse(0.5).count(0)


def test_parse_returns_a_budget_as_it_is():
    budget = Budget(0.1)
    assert Budget.parse(budget) is budget
