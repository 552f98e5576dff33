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
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Ends of names that embeddings of tokens have in models of transformers."""
RECORD_FILE = "record.json"
"""Of the training, beside the adapter."""
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


def embeddings_in(folder: Path) -> int:
    """The number of the base model's embeddings that an adapter brings along; 0 for none."""
    from safetensors import safe_open

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith(EMBEDDINGS)]  # noqa: SIM118
        return max((file.get_slice(name).get_shape()[0] for name in names), default=0)


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


OLD_WEIGHTS = (".slim_in", ".slim_out")
"""How the names of weights end in format 1."""


def present_names(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a saved adapter of format 1; others stay as they are."""
    return {
        f"{key}.weight" if key.endswith(OLD_WEIGHTS) else key: value for key, value in saved.items()
    }


def register_old_names() -> None:
    """Let transformers' ``load_adapter`` read weights of format 1, which it renames by a table.

    By then it has put the adapter's name behind ``slim_in``. Its public list of older names of all
    models is the one place for a rule that belongs to no model.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming

    known = get_checkpoint_conversion_mapping("legacy") or []
    rule = WeightRenaming(r"(slim_(?:in|out)\.[^.]+)$", r"\1.weight")
    register_checkpoint_conversion_mapping("legacy", [*known, rule], overwrite=True)


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
