"""Models in directories, pictures, and the command line as a user calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer import testing
from typer.main import get_command
from typer.testing import CliRunner, Result

from tests import tiny_vlm


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    return tiny_vlm.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def next_dir(tmp_path_factory) -> Path:
    return tiny_vlm.save_llava_next(tmp_path_factory.mktemp("llava-next"))


@pytest.fixture(scope="session")
def blind_dir(tmp_path_factory) -> Path:
    return tiny_vlm.save_blind(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def built_once():
    """The tree of all commands, which takes a tenth of a second to build, is built for one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "_get_command", functools.cache(get_command))
        yield


@pytest.fixture
def not_loaded(monkeypatch):
    from budwood.cli import models

    def load(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load", load)


@pytest.fixture
def budwood() -> Callable[..., Result]:
    """Runs a command and returns what it printed, and its exit code."""
    from budwood.cli import app

    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call
