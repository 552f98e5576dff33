"""The model that a command works with, loaded behind a spinner."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from budwood import loading
from budwood.cli.console import warnings_said, working
from budwood.errors import InputWarning
from budwood.loading import Loaded, device_of

SLOW = "this CPU takes several times as long "
"""How the warning of a slow dtype begins."""


def load(source: str | None, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a vision-language model; see :func:`budwood.loading.load_vlm_model`."""
    with _loading(source or loading.SPROUT):
        return loading.load_vlm_model(source, device, dtype)


def load_language_model(source: str | None, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a causal language model; see :func:`budwood.loading.load_language_model`."""
    with _loading(source or loading.SMOLLM2_ID):
        return loading.load_language_model(source, device, dtype)


def load_adapted(
    adapter: str, model: str | None, device: str = "auto", dtype: str = "auto"
) -> Loaded:
    """Load an adapter on its base model; see :func:`budwood.tune.saved.loading.load_adapted`."""
    with _loading(adapter):
        from budwood.tune.saved import loading as adapters

        return adapters.load_adapted(adapter, model, device, dtype)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    with working(f"loading {name}"), warnings_said(SLOW, category=InputWarning):
        be_quiet()
        yield


def place(device: str, dtype: str) -> tuple[Any, Any]:
    """A torch device and dtype by their names, float32 for ``"auto"``.

    Raises:
        InputError: there is no such device or dtype.
    """
    import torch

    return device_of(device), loading.dtype_of(dtype) or torch.float32


def be_quiet() -> None:
    """Keep other libraries from writing between a command's own lines."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    else:  # it reads these when it is imported, which takes a second
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
