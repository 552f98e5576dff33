"""Fine-tuning in a folder: resumable, with a history, and with the last good checkpoint kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from budwood.errors import DivergedError, InputError, UnknownNameError
from budwood.runs import RunFolder
from budwood.tune.base import fingerprint_of
from budwood.tune.encoding import Padded, Row
from budwood.tune.observe import observe
from budwood.tune.steps import SlimCallback
from budwood.tune.trainer import AnswerTrainer, check_gradients, tell_slim

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
_KL_POSITIONS = 48
"""Positions of the prompt, counted from its end, that are held to the base model."""

RATE, RATE_WIDTH = 3e-3, 576
"""A learning rate that was good for all methods, and the model width that it was tried at."""

Probe = Callable[[Any, int], dict[str, Any]]
"""Measures something about the model after a step, as JSON values."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        lr: peak learning rate; None for :func:`default_lr` of the model.
        steps: optimiser steps; 0 for as many as ``epochs`` make.
        epochs: passes over the data, if ``steps`` is 0.
        batch: examples per device in one forward pass.
        accumulate: forward passes a step.
        warmup: share of the steps in which the learning rate rises.
        schedule: one of ``SCHEDULES``.
        max_length: tokens; longer examples are left out.
        max_grad_norm: where gradients are clipped.
        seed: of the adapter's start, of the order of examples and of dropout.
        save_every: steps between checkpoints.
        log_every: steps between rows of the history.
        probe_every: steps between probes; 0 for none.
        checkpointing: recompute activations in the backward pass, to save memory.
    """

    lr: float | None = None
    steps: int = 0
    epochs: float = 1.0
    batch: int = 16
    accumulate: int = 1
    warmup: float = 0.05
    schedule: str = "cosine"
    max_length: int = 512
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every: int = 100
    log_every: int = 10
    probe_every: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "max_length", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is below 1")
        for name in ("steps", "probe_every", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} is below 0")
        if self.seed >= 2**32:
            raise InputError(f"seed={self.seed} is above {2**32 - 1}, the largest that NumPy takes")
        numbers = {"epochs": self.epochs, "max_grad_norm": self.max_grad_norm}
        numbers |= {} if self.lr is None else {"lr": self.lr}
        for name, value in numbers.items():
            if not 0 < value < math.inf:
                raise InputError(f"{name}={value} must be a number above 0")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup={self.warmup} is outside [0, 1)")
        if self.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise UnknownNameError(f"unknown schedule {self.schedule!r}; known: {known}")


def fingerprint(rows: Sequence[Any]) -> str:
    """A digest of tokenised examples, or other JSON values, by which a run knows them again."""
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:16]


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    settings: Settings,
    folder: RunFolder,
    *,
    weight_decay: float = 0.0,
    kl: float = 0.0,
    held: Sequence[Row] = (),
    strength: float = 1.0,
    advance: Callable[..., None] | None = None,
    probe: Probe | None = None,
) -> list[dict[str, Any]]:
    """Train an adapter; a run that was cut off goes on from its last checkpoint.

    The adapter is saved in the folder when all steps are done, and checkpoints are removed.

    Args:
        model: a ``PeftModel`` whose adapter is fresh, and prepared unless the run goes on.
        tokenizer: its padding token is used.
        rows: from :func:`budwood.tune.encoding.encode`.
        settings: how to train.
        folder: where; one that is complete is not trained again.
        weight_decay: AdamW's.
        kl: weight of the divergence from the base model on the prompts, or on ``held``.
        held: texts to hold to the base model on; none for the prompts.
        strength: part of what was learnt that is kept at the end, as of :func:`weaken`.
        advance: a function (done, total, note), for a progress bar.
        probe: called every ``settings.probe_every`` steps, before the first and after the last.

    Returns:
        The history: dicts with ``step`` and what was noted then.

    Raises:
        DivergedError: the loss, a gradient or a layer's input was NaN or infinite; the message
            names the last good checkpoint.
        InputError: as :func:`check_trainable`, or the model is split up by FSDP1 or DeepSpeed.
        OutputError: another process is at this run.
    """
    if folder.is_complete:
        return folder.history()
    check_trainable(model)
    with folder.claimed() if _processes(model).is_main_process else nullcontext():
        start = _take_up(folder, model)
        watch = _Watch(folder, settings, advance, probe)
        trainer = AnswerTrainer(
            model=model,
            args=_arguments(model, settings, folder, weight_decay),
            train_dataset=list(rows),  # type: ignore[arg-type]
            data_collator=Padded.of(
                model, tokenizer, n_before=_KL_POSITIONS if kl and not held else 0
            ),
            lengths=[len(row["input_ids"]) for row in rows],
            kl=kl,
            held=held,
            callbacks=[watch, *_slim_callbacks(model)],
        )
        _check_sharding(trainer)
        trainer.remove_callback(PrinterCallback)
        if start is None and probe and settings.probe_every:
            watch.take_probe(model, 0)
        _take_steps(trainer, folder, start, watch)
        tell_slim(model, None)
        weaken(model, strength)
        _save(trainer, tokenizer, folder)
    return folder.history()


def _take_steps(
    trainer: AnswerTrainer, folder: RunFolder, start: Path | None, watch: _Watch
) -> None:
    """Train to the end; what diverges says what is left."""
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    except DivergedError as error:
        last = folder.last_checkpoint()
        kept = f"the last good checkpoint is {last}" if last else "there was no checkpoint yet"
        hint = "try a lower learning rate"
        if not trainer.state.global_step:
            hint = "nothing was learnt yet, so look at the base model's weights and its dtype"
        raise DivergedError(f"{error}; {kept}; {hint}") from None
    finally:
        watch.close()
    # Without the Trainer's mixed precision the model computes what it will when it is loaded.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


def _save(trainer: AnswerTrainer, tokenizer: Any, folder: RunFolder) -> None:
    """Write the adapter, and after it that the run is over."""
    if sharding := _sharding(trainer):  # checkpoints may be in shards, the adapter is whole
        sharding.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder.path))
    if trainer.args.should_save:
        tokenizer.save_pretrained(folder.path)
        folder.complete()
        folder.drop_checkpoints()


def _sharding(trainer: AnswerTrainer) -> Any:
    """Accelerate's settings of FSDP, None without it."""
    return trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None


def _check_sharding(trainer: AnswerTrainer) -> None:
    """Refuse ways to split a model of which it is not known that the adapter comes out right."""
    if trainer.is_deepspeed_enabled:
        raise InputError("training under DeepSpeed was not tried; launch with DDP, or with FSDP2")
    sharding = _sharding(trainer)
    if sharding and sharding.fsdp_version != 2:
        raise InputError("training under FSDP1 was not tried; launch with --fsdp_version 2")


def default_lr(model: Any) -> float:
    """The learning rate where none is given: smaller for wider models.

    Ours: inversely to the width, which is a rule of thumb and was not measured.
    """
    width = getattr(model.config.get_text_config(), "hidden_size", RATE_WIDTH)
    return RATE * min(1.0, RATE_WIDTH / width)


def check_trainable(model: Any) -> None:
    """Refuse a model where or as the Trainer would not train it.

    Raises:
        InputError: it is in float16, whose small gradients become 0 where the loss is not scaled,
            or, without a launcher, on another GPU than the first, to which the Trainer moves it.
    """
    if model.dtype == torch.float16:
        raise InputError(
            "the model is in float16, in which small gradients become 0; train in bfloat16 or "
            "float32 (--dtype)"
        )
    place = model.device
    if place.type == "cuda" and place.index and "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"the model is on {place}, and training takes the first GPU that it sees; set "
            f"CUDA_VISIBLE_DEVICES={place.index} and give --device cuda"
        )


@torch.no_grad()
def weaken(model: Any, strength: float) -> None:
    """Keep a part of what a LoRA or SLIM adapter has learnt: B is multiplied by it.

    Source: WiSE-FT, arXiv 2109.01903, eq. 1, for W + B·A: a point on the way from the base model
    (0) to the tuned one (1) often knows the task as well and forgets less.

    Args:
        model: a ``PeftModel`` after training; its active adapters are changed.
        strength: in (0, 1].

    Raises:
        InputError: the strength is out of range, or no LoRA or SLIM adapter is active.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength={strength!r}; give a number above 0 and up to 1")
    if strength == 1:
        return
    ends = tuple(
        end
        for name in (model.active_adapters if isinstance(model, PeftModel) else ())
        for end in (f".lora_B.{name}.weight", f".slim_out.{name}")
    )
    weights = [weight for name, weight in model.named_parameters() if name.endswith(ends)]
    if not weights:
        raise InputError("no LoRA or SLIM adapter is active in the model; give a PEFT model")
    for weight in weights:
        weight.mul_(strength)


def _processes(model: Any) -> PartialState:
    return PartialState(cpu=model.device.type == "cpu")


def _take_up(folder: RunFolder, model: Any) -> Path | None:
    """The checkpoint to go on from; one process removes what a kill left half written."""
    state = _processes(model)
    if state.is_main_process:
        folder.drop_checkpoints(only_broken=True)
        start = folder.last_checkpoint()
        folder.rewind(int(start.name.split("-")[-1]) if start else -1)
    state.wait_for_everyone()
    return folder.last_checkpoint()


def adapter_of(
    name: str, model: Any, method: str, settings: Settings, rank: int, data: str
) -> dict[str, Any]:
    """What makes a run what it is, for its folder, beside what it was asked for."""
    dtype = str(model.dtype).removeprefix("torch.")
    about = {"model": name, "weights": fingerprint_of(model), "dtype": dtype}
    about |= {"method": method, "rank": rank, "data": data}
    n_processes = _processes(model).num_processes
    if n_processes > 1:
        about["processes"] = n_processes
    return about | dataclasses.asdict(settings)


def _arguments(
    model: Any, settings: Settings, folder: RunFolder, weight_decay: float
) -> TrainingArguments:
    on_cpu = model.device.type == "cpu"
    is_bf16 = next(model.parameters()).dtype == torch.bfloat16
    arguments = TrainingArguments(
        output_dir=str(folder.path),
        max_steps=settings.steps if settings.steps else -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr or default_lr(model),
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        weight_decay=weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=is_bf16,
        seed=settings.seed,
        use_cpu=on_cpu,
        **_checkpointing(settings),
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to=[],
    )
    # Without a launcher, Trainer copies the model to all GPUs in each step, and what copies gather
    # is lost: one GPU a process.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _checkpointing(settings: Settings) -> dict[str, Any]:
    """The option by the name that this version of transformers knows it by."""
    if not settings.checkpointing:
        return {}
    names = {one.name for one in dataclasses.fields(TrainingArguments)}
    new = "activation_checkpointing"
    return {new if new in names else "gradient_checkpointing": True}


class _Watch(TrainerCallback):
    """Writes the history, moves the progress bar and takes probes."""

    def __init__(
        self,
        folder: RunFolder,
        settings: Settings,
        advance: Callable[..., None] | None,
        probe: Probe | None,
    ) -> None:
        self.folder, self.settings, self.probe = folder, settings, probe
        self.advance = advance or (lambda done, total, note="": None)
        self.routing: dict[str, float] = {}
        self.note = ""
        self._observing: Any = None
        before = [row["seconds"] for row in folder.history() if "seconds" in row]
        self._began = time.perf_counter() - (before[-1] if before else 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step + 1) % self.settings.log_every == 0:
            self._observing = _observer(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_gradients(kwargs["model"], state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if state.global_step == state.max_steps:
            # The adapter itself is next. From a checkpoint after the last step, a run that was cut
            # off before that would take one step more.
            control.should_save = False
        self.advance(state.global_step, state.max_steps, self.note)
        every = self.settings.probe_every
        if self.probe and every:
            step = state.global_step
            if step % every == 0 or step == state.max_steps:
                self.take_probe(kwargs["model"], step)

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
        """End watching the routing of a step, also one that was broken off."""
        if self._observing is not None:
            self.routing = self._observing.close()
            self._observing = None

    def take_probe(self, model: Any, step: int) -> None:
        """Note what the probe says."""
        found = self.probe(model, step) if self.probe else {}
        if PartialState().is_main_process:
            self.folder.note({"step": step, "probe": found})


class _Observer:
    """Watches the routing of one step."""

    def __init__(self, block: Any) -> None:
        self.block, self.seen = block, block.__enter__()

    def close(self) -> dict[str, float]:
        self.block.__exit__(None, None, None)
        found = {key: self.seen.mean(key) for key in ("identity_share", "distance")}
        return {key: round(value, 5) for key, value in found.items() if math.isfinite(value)}


def is_slim(model: Any) -> bool:
    """Whether the active adapter is SLIM's."""
    config = getattr(model, "active_peft_config", None)
    return str(getattr(config, "peft_type", "")) == "SLIM"


def _observer(model: Any) -> _Observer | None:
    unwrapped = getattr(model, "module", model)
    if not is_slim(unwrapped):
        return None
    return _Observer(observe(unwrapped))


def _slim_callbacks(model: Any) -> list[TrainerCallback]:
    return [SlimCallback()] if is_slim(model) else []
