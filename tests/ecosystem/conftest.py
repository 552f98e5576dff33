"""One tiny LLaVA on disk for all tests of other libraries."""

from __future__ import annotations

import pytest

from tests.ecosystem import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture
def loaded(folder):
    """A fresh model and its processor."""
    return tiny.load(folder)
