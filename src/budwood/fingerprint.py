"""Recognise a model by some of its weights."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

N_SAMPLED = 32
_NUMBERED = re.compile(r"\.\d+\.")


def sampled_weights(model: nn.Module) -> dict[str, float]:
    """One value from each of a few matrices of the layers, by name; unreadable ones are left out.

    Args:
        model: adapters in it are left out.
    """
    matrices = sorted(_matrices(model))
    step = max(1, len(matrices) // N_SAMPLED)
    sampled = {}
    for name, weight in matrices[::step][:N_SAMPLED]:
        place = zlib.crc32(name.encode()) % weight.numel()
        row, column = divmod(place, weight.shape[1])
        sampled[name] = float(f"{weight.detach()[row, column].item():.4g}")
    return sampled


def fingerprint_of(model: nn.Module) -> str:
    """A digest of sampled weights, by which a run recognises its model."""
    return hashlib.sha256(json.dumps(sampled_weights(model)).encode()).hexdigest()[:16]


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Linear layers of numbered blocks, without heads, which may be new, and without adapters."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or "lora_" in name:
            continue
        if _NUMBERED.search(name) and _is_readable(module.weight):
            yield name.removesuffix(".base_layer"), module.weight


def _is_readable(weight: Tensor) -> bool:
    """Whether single values can be read; not from quantised, sharded or meta tensors."""
    plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
    return plain and weight.is_floating_point() and weight.numel() > 0
