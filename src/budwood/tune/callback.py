"""A callback that commits statistics at the end of each optimiser step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from budwood.tune.steps import commit


class SlimCallback(TrainerCallback):
    """Commits right after each optimiser step, on every rank.

    A ``Trainer`` in a single process trains and saves correctly without it. Add it

    - over several ranks, if a resumed run must be bit-equal: otherwise the statistics of a
      checkpoint lack its last step;
    - with an optimiser that changes weights behind PyTorch's back, as some 8-bit ones do; a
      warning says so.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        commit(kwargs["model"])
