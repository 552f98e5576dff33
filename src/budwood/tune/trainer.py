"""Transformers' Trainer with loss on answers only, which stops where the loss is no number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from budwood.errors import DivergedError
from budwood.tune.encoding import IGNORED, Row
from budwood.tune.losses import answer_kl, answer_loss, prompt_kl
from budwood.tune.sampler import LengthGrouped
from budwood.tune.steps import layers_of, tell_labels

_HELD_PART = 4
"""Training examples in a pass to each text that is held: texts are longer than answers."""


class AnswerTrainer(Trainer):
    """A Trainer for :class:`budwood.tune.encoding.Padded` batches.

    Args:
        lengths: of each training example, by which they are grouped.
        kl: weight of the divergence from the base model on the prompts, or on ``held``.
        held: texts to hold to the base model on, a few a pass; none for the prompts.
        kwargs: the Trainer's.
    """

    def __init__(
        self,
        *args: Any,
        lengths: list[int],
        kl: float = 0.0,
        held: Sequence[Row] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_loss_func=_loss, **kwargs)
        self._lengths, self._kl, self._held = lengths, kl, held
        self._passes = (0, -1)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(self._lengths, per_step * self.args.world_size, self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels, rest = inputs["labels"], {k: v for k, v in inputs.items() if k != "labels"}
        tell_slim(model, labels)
        found: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = found
        if self._kl and not self._held:
            divergence = self._prompt_kl(model, outputs, rest, labels)
            loss = loss + self._kl * divergence / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        held = self._hold(model) if self._kl and self._held else 0.0
        loss = held + super().training_step(model, *args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise DivergedError(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def _prompt_kl(
        self, model: nn.Module, outputs: Any, inputs: dict[str, Any], labels: Tensor
    ) -> Tensor:
        base = self._base_logits(model, inputs)
        return prompt_kl(base, outputs.logits, labels, inputs["attention_mask"])

    def _hold(self, model: nn.Module) -> Tensor:
        """Forward and backward on held texts; by itself, so that one graph at a time takes memory.

        Ranks exchange gradients in the backward pass that follows.
        """
        model.train()
        with self.accelerator.no_sync(model):
            with self.compute_loss_context_manager():
                loss = self._kl * self._held_kl(model) / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
        return loss.detach()

    def _held_kl(self, model: nn.Module) -> Tensor:
        batch = max(1, self.args.per_device_train_batch_size // _HELD_PART)
        start = self._turn() * batch
        rows = [self._held[(start + i) % len(self._held)] for i in range(batch)]
        inputs: Any = self._prepare_inputs(self.data_collator(rows))  # type: ignore[arg-type]
        labels = inputs.pop("labels")
        tell_slim(model, torch.full_like(labels, IGNORED))  # no training data
        return answer_kl(self._base_logits(model, inputs), model(**inputs).logits, labels)

    def _turn(self) -> int:
        """Which batch of held texts comes next, over all processes; the same after resuming."""
        step, args = self.state.global_step, self.args
        self._passes = (step, self._passes[1] + 1 if self._passes[0] == step else 0)
        turn = step * args.gradient_accumulation_steps + self._passes[1]
        return turn * args.world_size + args.process_index

    def _base_logits(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        unwrapped: Any = self.accelerator.unwrap_model(model)
        with torch.no_grad(), unwrapped.disable_adapter():
            return model(**inputs).logits

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The Trainer would look up the base model's config on the hub at every checkpoint, to find
        # out whether the vocabulary was changed.
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir or "", state_dict)


def save_adapter(model: Any, folder: str, state_dict: dict | None = None) -> None:
    """Save an adapter as PEFT does, the base model's embeddings left out."""
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)


def check_gradients(model: nn.Module, step: int) -> None:
    """Look at the gradients before they are used.

    Raises:
        DivergedError: one is NaN or infinite.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return
    largest = torch.stack([g.abs().max().float() for g in grads]).max()
    if not bool(torch.isfinite(largest)):
        raise DivergedError(f"a gradient is NaN or infinite at step {step}")


def tell_slim(model: nn.Module, labels: Tensor | None) -> None:
    """Tell SLIM's layers, if there are any, which tokens are learnt."""
    if layers_of(model):
        tell_labels(model, labels)


def _loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    return answer_loss(outputs.logits, labels, num_items_in_batch)
