"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils import resolve_quantization_backend
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block; afterwards every module is in the mode that it was in.

    Quantised layers are in training mode meanwhile: those of bitsandbytes on a CPU repack their
    weights in the first pass that is not, and have wrong gradients ever after.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = resolve_quantization_backend(module) is not None
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
