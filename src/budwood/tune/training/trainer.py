"""Transformers' Trainer with a loss on answers only, its order of examples and its history."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from budwood.errors import DivergedError
from budwood.progress import Progress
from budwood.runs import RunFolder
from budwood.tune.base_model import is_resized
from budwood.tune.data.encoding import IGNORED, EncodedExample
from budwood.tune.slim.keeper import is_slim, layers_of, tell_labels
from budwood.tune.slim.observe import observe
from budwood.tune.training.losses import answer_kl, answer_loss, others_kl, prompt_kl
from budwood.tune.training.settings import Settings

Probe = Callable[[Any, int], dict[str, Any]]
"""Measures something about the model after a step, as JSON values."""

_BATCHES_PER_POOL = 32
"""Batches that are sorted by length together."""
_SAVE_AT_LEAST = 300.0
"""Seconds after which a checkpoint is written, whatever ``save_every`` says."""
_EXAMPLES_PER_TEXT = 4
"""Training examples in a pass for each self-generated text: texts are longer than answers."""


def grouped_order(lengths: Sequence[int], batch: int, generator: torch.Generator) -> list[int]:
    """Draw a random order in which neighbours have similar lengths.

    Args:
        lengths: length of each example.
        batch: examples per step.
        generator: source of the draws.

    Returns:
        A permutation of the indices of ``lengths``.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch * _BATCHES_PER_POOL
    pools = [order[i : i + size] for i in range(0, len(order), size)]
    ordered = [i for pool in pools for i in sorted(pool, key=lambda i: lengths[i])]
    batches = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    # A short batch stays last: the loader cuts the order into batches from its start.
    whole = [indices for indices in batches if len(indices) == batch]
    rest = [i for indices in batches if len(indices) < batch for i in indices]
    shuffled = torch.randperm(len(whole), generator=generator).tolist()
    return [i for k in shuffled for i in whole[k]] + rest


class LengthGrouped(Sampler[int]):
    """Draws :func:`grouped_order` anew for each epoch, the same for the same seed and epoch."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next; a resumed run needs that."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(grouped_order(self.lengths, self.batch, generator))

    def __len__(self) -> int:
        return len(self.lengths)


class AnswerTrainer(Trainer):
    """A Trainer for :class:`budwood.tune.data.batches.Padded` batches.

    Args:
        lengths: length of each training example, by which they are grouped.
        kl: weight of the divergence from the base model on the prompts, or on ``texts``.
        kl_on_others: take it on answers instead, over the tokens beside the right one.
        texts: self-generated texts to stay close to the base model on, a few per pass; none to
            stay close on the prompts.
        kwargs: the Trainer's.

    Raises:
        DivergedError: in training, if the loss is NaN or infinite.
    """

    def __init__(
        self,
        *args: Any,
        lengths: list[int],
        kl: float = 0.0,
        kl_on_others: bool = False,
        texts: Sequence[EncodedExample] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_loss_func=_loss, **kwargs)
        self._lengths, self._kl, self._texts = lengths, kl, texts
        self._kl_on_others = kl_on_others
        self._passes = (0, -1)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(self._lengths, per_step * self.args.world_size, self.args.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        # The Trainer rounds a part of a step up to a whole one, in which nothing is learnt.
        if self.args.warmup_steps * num_training_steps < 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels, rest = inputs["labels"], {k: v for k, v in inputs.items() if k != "labels"}
        tell_slim(model, labels)
        result: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = result
        if self._kl and not self._texts:
            divergence = self._batch_kl(model, outputs, rest, labels)
            loss = loss + self._kl * divergence / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        on_texts = self._step_on_texts(model) if self._kl and self._texts else 0.0
        loss = on_texts + super().training_step(model, *args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise DivergedError(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def _batch_kl(
        self, model: nn.Module, outputs: Any, inputs: dict[str, Any], labels: Tensor
    ) -> Tensor:
        base = self._base_logits(model, inputs)
        if self._kl_on_others:
            return others_kl(base, outputs.logits, labels)
        return prompt_kl(base, outputs.logits, labels, inputs["attention_mask"])

    def _step_on_texts(self, model: nn.Module) -> Tensor:
        """Forward and backward on texts; apart, so that only one graph at a time takes memory.

        Ranks exchange gradients in the backward pass that follows.
        """
        model.train()
        with self.accelerator.no_sync(model):
            with self.compute_loss_context_manager():
                loss = self._kl * self._text_kl(model) / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
        return loss.detach()

    def _text_kl(self, model: nn.Module) -> Tensor:
        batch = max(1, self.args.per_device_train_batch_size // _EXAMPLES_PER_TEXT)
        start = self._turn() * batch
        texts = [self._texts[(start + i) % len(self._texts)] for i in range(batch)]
        inputs: Any = self._prepare_inputs(self.data_collator(texts))  # type: ignore[arg-type]
        labels = inputs.pop("labels")
        tell_slim(model, torch.full_like(labels, IGNORED))  # texts are not training data
        return answer_kl(self._base_logits(model, inputs), model(**inputs).logits, labels)

    def _turn(self) -> int:
        """Number of the next batch of texts over all processes; the same after resuming."""
        step, args = self.state.global_step, self.args
        self._passes = (step, self._passes[1] + 1 if self._passes[0] == step else 0)
        turn = step * args.gradient_accumulation_steps + self._passes[1]
        return turn * args.world_size + args.process_index

    def _base_logits(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        unwrapped: Any = self.accelerator.unwrap_model(model)
        with torch.no_grad(), unwrapped.disable_adapter():
            return model(**inputs).logits

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # PEFT would look up the base model's config on the hub at every checkpoint, to find out
        # whether the vocabulary was changed.
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir or "", state_dict)


def _loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    return answer_loss(outputs.logits, labels, num_items_in_batch)


def save_adapter(model: Any, folder: str, state_dict: dict | None = None) -> None:
    """Save an adapter as PEFT does, with the embeddings if their number was changed."""
    resized = is_resized(model.get_base_model())
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=resized)


def tell_slim(model: nn.Module, labels: Tensor | None) -> None:
    """Tell SLIM's layers, if there are any, which tokens are supervised."""
    if layers_of(model):
        tell_labels(model, labels)


def check_gradients(model: nn.Module, step: int) -> None:
    """Check the gradients before they are used.

    Raises:
        DivergedError: one is NaN or infinite.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return
    largest = torch.stack([g.abs().max().float() for g in grads]).max()
    if not bool(torch.isfinite(largest)):
        raise DivergedError(f"a gradient is NaN or infinite at step {step}")


class RunWatch(TrainerCallback):
    """Writes the history, checks gradients, reports progress, takes probes, and ends on Ctrl-C.

    A checkpoint is written every five minutes at least, and when the run is interrupted.

    Args:
        folder: folder of the run.
        settings: how often.
        progress: called after each step.
        probe: called every ``settings.probe_every`` steps, and after the last.
    """

    def __init__(
        self, folder: RunFolder, settings: Settings, progress: Progress, probe: Probe | None
    ) -> None:
        self.folder, self.settings = folder, settings
        self.progress, self.probe = progress, probe
        self.routing: dict[str, float] = {}
        self.note = ""
        self.interrupted = False
        self._saved_at = time.perf_counter()
        self._observer: _Observer | None = None
        before = [row["seconds"] for row in folder.history() if "seconds" in row]
        self._began = time.perf_counter() - (before[-1] if before else 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        if step % self.settings.log_every == 0 or step == state.max_steps:
            unwrapped = getattr(kwargs["model"], "module", kwargs["model"])
            self._observer = _Observer(unwrapped) if is_slim(unwrapped) else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_gradients(kwargs["model"], state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        control.should_log |= state.global_step >= state.max_steps
        self._save_in_time(args, control)
        _save_no_last_checkpoint(state, control)
        self.progress(state.global_step, state.max_steps, self.note)
        every = self.settings.probe_every
        if self.probe and every:
            step = state.global_step
            if step % every == 0 or step == state.max_steps:
                self.take_probe(kwargs["model"], step)

    def _save_in_time(self, args: Any, control: Any) -> None:
        """Ask for a checkpoint if the last is old, or if the run is to end."""
        late = time.perf_counter() - self._saved_at > _SAVE_AT_LEAST
        interrupted, late = _of_main_process([self.interrupted, late])
        self.interrupted = interrupted
        control.should_training_stop |= interrupted
        control.should_save |= (interrupted or late) and args.save_strategy != "no"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _save_no_last_checkpoint(state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        row = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "lr": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "seconds": round(time.perf_counter() - self._began, 2),
            **self.routing,
        }
        self.folder.note(row)
        parts = [f"loss {row['loss']:.3f}"]
        parts += [f"{key.split('_')[0]} {value:.2f}" for key, value in self.routing.items()]
        self.note = ", ".join(parts)

    def close(self) -> None:
        """Stop observing the routing of a step, also of one that was broken off."""
        if self._observer is not None:
            self.routing = self._observer.close()
            self._observer = None

    def take_probe(self, model: Any, step: int) -> None:
        """Note what the probe measures."""
        measured = self.probe(model, step) if self.probe else {}
        if PartialState().is_main_process:
            self.folder.note({"step": step, "probe": measured})


def _of_main_process(flags: list[bool]) -> list[bool]:
    """What the main process says, so that all do the same."""
    return broadcast_object_list(flags) if PartialState().num_processes > 1 else flags


def _save_no_last_checkpoint(state: Any, control: Any) -> None:
    """Keep the Trainer from writing a checkpoint after the last step.

    The adapter itself is saved next. A run that is interrupted before that would resume from such a
    checkpoint with one step too many.
    """
    if state.global_step >= state.max_steps:
        control.should_save = False


class _Observer:
    """Observes the routing of one step."""

    def __init__(self, model: Any) -> None:
        self.block = observe(model)
        self.recorder = self.block.__enter__()

    def close(self) -> dict[str, float]:
        self.block.__exit__(None, None, None)
        means = {key: self.recorder.mean(key) for key in ("identity_share", "distance")}
        return {key: round(value, 5) for key, value in means.items() if math.isfinite(value)}
