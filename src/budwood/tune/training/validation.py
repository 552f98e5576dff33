"""Validation while training: the loss on held-out examples, the best adapter, an early end."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import TrainerCallback

from budwood.errors import DivergedError
from budwood.files import read_json, write_text
from budwood.runs import RunFolder
from budwood.tune.base_model import evaluating
from budwood.tune.data.batches import Padded, on_device
from budwood.tune.data.encoding import EncodedExample, n_supervised
from budwood.tune.training.losses import answer_loss
from budwood.tune.training.trainer import save_adapter

_BEST, _NOTE = "best", "validation.json"


@torch.no_grad()
def validation_loss(
    model: Any, rows: Sequence[EncodedExample], collate: Padded, batch: int
) -> float:
    """Mean loss of the supervised tokens of some examples, in nats per token.

    The model runs in evaluation mode, and is put back into its own. Processes share the examples.

    Args:
        model: with its adapter, not wrapped.
        rows: tokenised examples.
        collate: makes batches of them.
        batch: examples in one forward pass.
    """
    here = PartialState()
    mine = list(rows[here.process_index :: here.num_processes])
    total = 0.0
    with evaluating(model):
        for start in range(0, len(mine), batch):
            inputs = on_device(collate(mine[start : start + batch]), model.device)
            labels = inputs.pop("labels")
            total += float(answer_loss(model(**inputs).logits, labels, 1))
    totals = gather_object([total]) if here.num_processes > 1 else [total]
    return sum(totals) / n_supervised(rows)


@dataclass(frozen=True)
class Validation:
    """What is measured while training.

    Attributes:
        rows: held-out examples, tokenised.
        every: steps between measurements; there is one before the first step and after the last.
        patience: measurements without a lower loss after which training ends; 0 for never.
    """

    rows: Sequence[EncodedExample]
    every: int
    patience: int = 0


class KeepBest(TrainerCallback):
    """Measures the validation loss, keeps the best adapter, and ends training early.

    A checkpoint follows each new best adapter, so that a run that is resumed is never behind it.
    It comes after all callbacks that change the adapter.

    Args:
        folder: of the run.
        validation: what is measured.
        collate: makes batches.
        batch: examples in one forward pass.
    """

    def __init__(
        self, folder: RunFolder, validation: Validation, collate: Padded, batch: int
    ) -> None:
        self.folder, self.validation = folder, validation
        self.collate, self.batch = collate, batch
        self.path = folder.path / _BEST

    def measure(self, model: nn.Module, step: int) -> float:
        """Measure and note the loss.

        Raises:
            DivergedError: it is NaN or infinite.
        """
        unwrapped = getattr(model, "module", model)
        loss = validation_loss(unwrapped, self.validation.rows, self.collate, self.batch)
        if not math.isfinite(loss):
            raise DivergedError(f"the validation loss is {loss} at step {step}")
        if PartialState().is_main_process:
            self.folder.note({"step": step, "eval_loss": loss})
        return loss

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        if step % self.validation.every and not is_last:
            return
        loss = self.measure(kwargs["model"], step)
        if loss < self.best()[1]:
            self._keep(kwargs["model"], step, loss)
            control.should_save |= not is_last and args.save_strategy != "no"
        elif self.validation.patience and self._n_since_best(step) >= self.validation.patience:
            control.should_training_stop = True

    def best(self) -> tuple[int, float]:
        """Step and loss of the best adapter; step 0 and infinity before there is one."""
        noted = read_json(self.path / _NOTE) if (self.path / _NOTE).exists() else {}
        return noted.get("step", 0), noted.get("eval_loss", math.inf)

    def restore(self, model: Any) -> int:
        """Give a model the best adapter.

        Returns:
            The step after which it was best.
        """
        state = load_peft_weights(str(self.path), device=str(model.device))
        set_peft_model_state_dict(model, state, model.active_adapter)
        return self.best()[0]

    def drop(self) -> None:
        """Remove the best adapter, after it was saved as that of the run."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _n_since_best(self, step: int) -> int:
        return (step - self.best()[0]) // self.validation.every

    def _keep(self, model: Any, step: int, loss: float) -> None:
        if PartialState().is_main_process:
            part = Path(f"{self.path}.part")
            shutil.rmtree(part, ignore_errors=True)
            save_adapter(getattr(model, "module", model), str(part))
            write_text(part / _NOTE, f'{{"step": {step}, "eval_loss": {loss!r}}}\n')
            self.drop()
            part.rename(self.path)
        PartialState().wait_for_everyone()
