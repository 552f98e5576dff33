"""Calls that would go past an attached ``forward``, and so not be pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from budwood.errors import AttachError


class Guard:
    """Refuses images and videos that reach the inner model past the attached ``forward``.

    A trainer of TRL gives the model a ``forward`` of its own, which calls the inner model. Where
    that happens after ``attach``, training would see all visual tokens and generation few.

    Args:
        model: the model whose ``forward`` is attached.
        has_visuals: tells from the arguments of a call whether there is something to prune.
    """

    def __init__(self, model: Any, has_visuals: Callable[[dict[str, Any]], bool]) -> None:
        self._model, self._attached = model, vars(model)["forward"]
        self._has_visuals = has_visuals
        self._handle = model.base_model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Check one call of the inner model.

        Raises:
            AttachError: it has images or videos, and comes from another ``forward``.
        """
        bypassed = vars(self._model).get("forward") is not self._attached
        if bypassed and not kwargs.get("mm_encoder_outputs") and self._has_visuals(kwargs):
            raise AttachError(
                "model.forward was replaced after attach(), as TRL's trainers do, and this call "
                "would not be pruned; call attach(..., forward=True) after the trainer is made"
            )

    def remove(self) -> None:
        """Take it off the model."""
        self._handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model is not attached, and refuses nothing."""
        return getattr, (Guard, "nothing")

    @staticmethod
    def nothing(_module: nn.Module, _args: Any, _kwargs: dict[str, Any]) -> None:
        """Refuse nothing."""
