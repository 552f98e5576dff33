"""A training run that is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from budwood.tune.training import trainer


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """End training runs before the optimiser takes this step."""
    inner = trainer.check_gradients

    def check(model, now):
        if now == step:
            raise KeyboardInterrupt
        inner(model, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "check_gradients", check)
        yield
