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


@pytest.fixture
def case(request, cases) -> Case:
    return cases[request.param]


EVERYWHERE = ("adav", "adav+:merge=0", "fastervlm", "t2i", "eadp", "random", "uniform", "overview")
"""Methods that run on every family: what they read covers all that a family gives.

The others run on LLaVA-NeXT alone, and those that merge in test_merging.py.
"""


def pytest_generate_tests(metafunc):
    """Every family, or a module's ``CASES``, or pairs with a method where a test takes both."""
    families = getattr(metafunc.module, "CASES", FAMILIES.names())
    if "case" in metafunc.fixturenames and "method" not in metafunc.fixturenames:
        metafunc.parametrize("case", families, indirect=True)
    elif "method" in metafunc.fixturenames:
        exact = [name for name in METHODS if METHODS.get(name).exact]
        single = [name for name in exact if not METHODS.get(name).merges]
        pairs = [(family, name) for family in families for name in EVERYWHERE]
        rest = [name for name in single if name not in EVERYWHERE]
        pairs += [("llava_next", name) for name in rest if "llava_next" in families]
        metafunc.parametrize(("case", "method"), [_marked(pair) for pair in pairs], indirect=True)


def _marked(pair: tuple[str, str]) -> Any:
    """On other versions of transformers the methods are the same, so one of them will do."""
    return pytest.param(*pair, marks=pytest.mark.versions if pair[1] == "adav" else ())


@pytest.fixture
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
