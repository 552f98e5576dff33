"""The strength of a trained adapter: a point on the way from the base model to the tuned one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from budwood.checks import need_number
from budwood.errors import InputError


@torch.no_grad()
def weaken(model: Any, strength: float) -> None:
    """Set the adapter strength of a trained LoRA or SLIM adapter: multiply B by it.

    Source: WiSE-FT, arXiv 2109.01903, eq. 1, for W + B·A. A point on the way from the base model
    (0) to the tuned one (1) often knows the task as well and forgets less.

    Args:
        model: a ``PeftModel`` after training; its active adapters are changed.
        strength: in (0, 1].

    Raises:
        InputError: the strength is out of range, or no LoRA or SLIM adapter is active.
    """
    need_number(lambda value: 0 < value <= 1, "number above 0 and up to 1", strength=strength)
    if strength == 1:
        return
    ends = tuple(
        end
        for name in (model.active_adapters if isinstance(model, PeftModel) else ())
        for end in (f".lora_B.{name}.weight", f".slim_out.{name}.weight")
    )
    weights = [weight for name, weight in model.named_parameters() if name.endswith(ends)]
    if not weights:
        raise InputError("no LoRA or SLIM adapter is active in the model; give a PEFT model")
    for weight in weights:
        weight.mul_(strength)


@contextmanager
def rewound(model: Any, strength: float, start: Mapping[str, Tensor]) -> Iterator[None]:
    """Set a trained adapter of any method part of the way back to its start, for a block.

    As :func:`weaken` for LoRA and SLIM, whose B is scaled. Of other methods, all that is trained
    goes back along the straight line to its start.

    Args:
        model: a ``PeftModel`` after training.
        strength: in (0, 1); 0 would be the base model.
        start: name → value of the parameters of the fresh adapter.
    """
    from_zero = all(not bool(value.any()) for name, value in start.items() if _is_end(name))
    moved = {
        name: weight
        for name, weight in model.named_parameters()
        if name in start and not (from_zero and _is_beginning(name))
    }
    kept = {name: weight.detach().clone() for name, weight in moved.items()}
    try:
        with torch.no_grad():
            for name, weight in moved.items():
                weight.lerp_(start[name].to(weight), 1 - strength)
        yield
    finally:
        with torch.no_grad():
            for name, weight in moved.items():
                weight.copy_(kept[name])


def _is_beginning(name: str) -> bool:
    return ".lora_A." in name or ".slim_in." in name


def _is_end(name: str) -> bool:
    return ".lora_B." in name or ".slim_out." in name
