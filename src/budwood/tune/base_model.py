"""Base models: how one is recognised, and how a model is run without training it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import nn

from budwood.errors import InputError
from budwood.fingerprint import sampled_weights
from budwood.loading import NO_CODE, SMOLLM2_ID, SMOLLM2_TOKENS

WIDTHS = ("hidden_size", "n_embd", "d_model", "intermediate_size")
SIZES = (*WIDTHS, "num_hidden_layers", "n_layer", "vocab_size")
FEWEST = 8
"""Fewest weights in common that are compared."""
LIKENESS = 0.9
"""Least cosine of two samples of weights: about 1 for one model, near 0 for two of one kind."""


def describe_base(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Describe a model by its kind, sizes and some weights.

    Args:
        config: of transformers, as a dict.
        model: adapters in it are left out.
    """
    text = config.get("text_config") or config
    description: dict[str, Any] = {"model_type": config.get("model_type")}
    description |= {key: text[key] for key in SIZES if isinstance(text.get(key), int)}
    return {**description, "weights": sampled_weights(model)}


def check_base(made_for: Mapping[str, Any] | None, base: Mapping[str, Any]) -> None:
    """Compare the base model that an adapter was made for with the one at hand.

    The vocabulary may differ, since tokens are often added. Weights may differ by rounding and
    further training.

    Raises:
        InputError: kind, sizes or weights differ.
    """
    made_for = dict(made_for or {})
    weights = made_for.pop("weights", None) or {}
    for key, value in made_for.items():
        if key in base and base[key] != value and key != "vocab_size":
            raise InputError(
                f"the adapter was made for a base model with {key}={value!r}, this one has "
                f"{base[key]!r}; load it on the model that it was trained on"
            )
    if not _alike(weights, base.get("weights") or {}):
        raise InputError(
            "the adapter was made for a base model of this kind and size with other weights; load "
            "it on the model that it was trained on"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode, and then put every module back into its own mode.

    Quantised layers stay in training mode: on a CPU, those of bitsandbytes repack their weights in
    the first evaluation pass, and have wrong gradients from then on.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = resolve_quantization_backend(module) is not None
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def adapter_off(model: Any) -> AbstractContextManager[None]:
    """Switch a model's adapter off for a block; a model without one stays as it is."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def _alike(weights: Mapping[str, float], other: Mapping[str, float]) -> bool:
    shared = [name for name in weights if name in other]
    a, b = (torch.tensor([values[name] for name in shared]) for values in (weights, other))
    lengths = a.norm() * b.norm()
    if len(shared) < FEWEST or not lengths > 0:
        return True
    return bool(a @ b >= LIKENESS * lengths)


def is_resized(model: Any) -> bool:
    """Whether a model has another number of embeddings than where it was loaded from.

    No hub is asked; a model that was not loaded by a name, or is not in its cache, has not.
    """
    from transformers import AutoConfig

    n_tokens = model.get_input_embeddings().weight.shape[0]
    if model.name_or_path == SMOLLM2_ID:
        return n_tokens != SMOLLM2_TOKENS
    try:
        saved = AutoConfig.from_pretrained(model.name_or_path, local_files_only=True, **NO_CODE)
    except (OSError, ValueError, KeyError):
        return False
    return saved.get_text_config().vocab_size != n_tokens
