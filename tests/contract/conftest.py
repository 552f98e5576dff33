"""Fixtures that run a test for every family and every method in the registries."""

from __future__ import annotations

from typing import Any

import pytest

from budwood.prune import FAMILIES, METHODS
from tests.contract.models import BUILDERS, EOS, Case, words


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    """Every family's tiny model, built once."""
    assert set(BUILDERS) == set(FAMILIES.names()), "a family without a tiny model in models.py"
    return {name: build() for name, build in BUILDERS.items()}


@pytest.fixture(params=FAMILIES.names())
def case(request, cases) -> Case:
    return cases[request.param]


def _method(name: str) -> Any:
    """On other versions of transformers the methods are the same, so one of them will do."""
    return pytest.param(name, marks=pytest.mark.versions) if name == "adav" else name


@pytest.fixture(params=[_method(name) for name in METHODS if METHODS.get(name).exact])
def method(request) -> str:
    return request.param


@pytest.fixture
def batch(case):
    """Two images and text between them; no image; one image and a second turn. Left-padded."""
    return case.batch(
        [words(3, 1), 0, words(5, 2), 1, words(4, 3)],
        [words(9, 4)],
        [2, words(6, 5), [EOS], words(3, 6)],
    )
