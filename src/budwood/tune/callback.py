"""A callback that commits statistics at the end of each optimiser step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from budwood.tune.steps import commit


class SlimCallback(TrainerCallback):
    """Commits after each optimiser step, for optimisers that are no ``torch.optim.Optimizer``.

    A ``Trainer`` needs it with none of its own optimisers: the commit happens in a hook that
    PyTorch calls after ``optimizer.step()``. Engines that hold copies of the weights, as DeepSpeed
    does, give that hook nothing to go by; a warning says so, and this callback puts it right. To
    add it where it is not needed changes nothing.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        commit(kwargs["model"])
