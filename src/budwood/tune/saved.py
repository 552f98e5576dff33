"""Checks of a saved adapter: its files are whole, and they fit the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from budwood.errors import InputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
"""File of older adapters of other kinds, which PEFT reads by itself."""


def check_adapter_files(folder: Path) -> None:
    """Check the files of a saved adapter, without a model.

    Args:
        folder: the directory.

    Raises:
        InputError: a file is missing, malformed or truncated.
    """
    config = folder / CONFIG_FILE
    if config.is_file():
        try:
            options = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{config} is not JSON: {error}; save the adapter again") from None
        if not isinstance(options, dict):
            raise InputError(f"{config} is not the config of an adapter; save the adapter again")
    weights = folder / WEIGHTS_FILE
    if weights.is_file():
        check_safetensors(weights)
    elif not (folder / PICKLED_FILE).exists():
        raise InputError(f"{folder} has no {WEIGHTS_FILE}; save the adapter again")


def check_safetensors(path: Path) -> None:
    """Compare a safetensors file with its own header.

    Raises:
        InputError: the file is truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise InputError(
            f"{path} is truncated or no safetensors file ({size} bytes): {error}; copy or save it "
            "again"
        ) from None


def check_state(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a saved adapter with those of the model.

    Args:
        saved: key to tensor in the file.
        expected: key to tensor in the model.

    Raises:
        InputError: keys are missing, shapes differ, or values are NaN or infinite.
    """
    missing = [key for key in expected if key not in saved]
    if missing:
        raise InputError(
            f"the adapter lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]!r}; "
            "it was made for another model or its file is incomplete"
        )
    for key, tensor in saved.items():
        if key in expected and tensor.shape != expected[key].shape:
            raise InputError(
                f"the adapter's {key!r} has shape {tuple(tensor.shape)}, this model needs "
                f"{tuple(expected[key].shape)}; it was made for another base model"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the adapter's {key!r} has NaN or infinite values; use an earlier one"
            )
