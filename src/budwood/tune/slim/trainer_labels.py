"""The tokens that a trainer trains on, read from the trainer around a forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from budwood.tune.data.encoding import IGNORED

Inputs = Mapping[str, Any]


def _chosen(inputs: Inputs) -> Tensor | None:
    """DPO's chosen answers; a batch has all chosen answers, then all rejected ones."""
    labels = _completions(inputs)
    if labels is not None:
        labels[len(labels) // 2 :] = IGNORED
    return labels


def _desirable(inputs: Inputs) -> Tensor | None:
    """KTO's desirable answers."""
    labels = _completions(inputs)
    if labels is None or "label" not in inputs:
        return None
    desirable = torch.as_tensor(inputs["label"], dtype=torch.bool, device=labels.device)
    return labels.masked_fill(~desirable.unsqueeze(-1), IGNORED)


def _generated(inputs: Inputs) -> Tensor | None:
    """What the model itself wrote in GRPO and RLOO, without what tools wrote."""
    if not {"prompt_ids", "completion_ids", "completion_mask"} <= inputs.keys():
        return None
    completions, mask = inputs["completion_ids"], inputs["completion_mask"]
    if inputs.get("tool_mask") is not None:
        mask = mask * inputs["tool_mask"]
    prompts = torch.full_like(inputs["prompt_ids"], IGNORED)
    return torch.cat([prompts, completions.masked_fill(mask == 0, IGNORED)], dim=1)


def _completions(inputs: Inputs) -> Tensor | None:
    if not {"input_ids", "completion_mask"} <= inputs.keys():
        return None
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)


_READERS: dict[str, Callable[[Inputs], Tensor | None]] = {
    "DPOTrainer": _chosen,
    "KTOTrainer": _desirable,
    "GRPOTrainer": _generated,
    "RLOOTrainer": _generated,
}
"""Trainer of TRL, or a base class of one → labels from its inputs."""


def trained_labels() -> tuple[Tensor | None, bool]:
    """Read from the trainer that is computing its loss right now what it trains on.

    A model does not see it: DPO calls it with chosen and rejected answers alike, and a Trainer with
    label smoothing keeps the labels to itself. The trainer is found on the call stack, so that
    nothing has to be set up. ``torch.compile`` hides the stack from compiled code.

    Returns:
        Labels, shape (batch, length), −100 where a token is not trained on; None outside of a
        trainer and where it has none. And whether they go before labels that the model is called
        with: those of TRL's preference trainers do.
    """
    if torch.compiler.is_compiling():
        return None, False
    frame = _trainer_frame("compute_loss")
    if frame is None:
        return None, False
    here = frame.f_locals
    inputs = here.get("inputs")
    if not isinstance(inputs, Mapping):
        return None, False
    name = _with_masks(here["self"])
    labels = None if name is None else _READERS[name](inputs)
    if labels is not None:
        return labels, True
    found = inputs.get("labels", here.get("labels"))  # label smoothing takes them out of inputs
    return (found if isinstance(found, Tensor) else None), False


def trainer_with_masks() -> str | None:
    """Name of the trainer around, at any point of its training, if it has masks to read."""
    frame = _trainer_frame()
    return None if frame is None else _with_masks(frame.f_locals["self"])


def _with_masks(trainer: Any) -> str | None:
    kinds = (kind.__name__ for kind in type(trainer).__mro__)
    return next((kind for kind in kinds if kind in _READERS), None)


def _trainer_frame(method: str | None = None) -> FrameType | None:
    """The innermost frame of a Trainer's method of some name, or of any."""
    module = sys.modules.get("transformers.trainer")
    if module is None:  # nobody uses a Trainer
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        is_it = method is None or frame.f_code.co_name == method
        if is_it and isinstance(frame.f_locals.get("self"), module.Trainer):
            break
        frame = frame.f_back
    return frame
