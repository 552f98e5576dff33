"""How to train: budwood's settings, and what is taken over from a ``TrainingArguments``."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from budwood.checks import need_bool, need_int, need_number, need_positive, need_seed
from budwood.errors import InputError, UnknownNameError

SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup"),
    *("polynomial", "inverse_sqrt", "cosine_with_restarts"),
)

RATE, RATE_WIDTH = 3e-3, 576
"""A learning rate that was good for all methods, and the model width that it was tried at."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        lr: peak learning rate; None for :func:`default_lr` of the model.
        steps: optimiser steps; 0 for as many as ``epochs`` make.
        epochs: passes over the data, if ``steps`` is 0.
        batch: examples per device in one forward pass.
        accumulate: forward passes per step.
        warmup: fraction of the steps in which the learning rate rises.
        schedule: one of ``SCHEDULES``.
        max_length: in tokens; longer examples are left out.
        max_grad_norm: norm that gradients are clipped to.
        seed: seed of the adapter's initial weights, the order of examples and dropout.
        save_every: steps between checkpoints.
        log_every: steps between rows of the history.
        probe_every: steps between probes; 0 for none.
        eval_every: steps between measurements of the validation loss; 0 for ten in a run.
        patience: measurements without a lower validation loss after which training ends; 0 for
            never.
        checkpointing: recompute activations in the backward pass, to save memory.
        report_to: trackers that are told the history, such as ``"tensorboard"`` or ``"wandb"``.

    Raises:
        InputError: a value is of another type, or outside its range.
        UnknownNameError: there is no such schedule.
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
    eval_every: int = 0
    patience: int = 0
    checkpointing: bool = False
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "max_length", "save_every", "log_every"):
            need_int(1, **{name: getattr(self, name)})
        for name in ("steps", "probe_every", "eval_every", "patience"):
            need_int(0, **{name: getattr(self, name)})
        need_int(None, seed=self.seed)
        need_seed(self.seed)
        above = {"epochs": self.epochs, "max_grad_norm": self.max_grad_norm}
        above |= {} if self.lr is None else {"lr": self.lr}
        need_positive(**above)
        need_number(lambda value: 0 <= value < 1, "fraction in [0, 1)", warmup=self.warmup)
        for name in (*above, "warmup"):  # NumPy's numbers are not JSON values
            if not isinstance(getattr(self, name), (int, float)):
                object.__setattr__(self, name, float(getattr(self, name)))
        need_bool(checkpointing=self.checkpointing)
        if self.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise UnknownNameError(f"unknown schedule {self.schedule!r}; known: {known}")
        if isinstance(self.report_to, str):
            raise InputError(f"report_to={self.report_to!r} is a string; give a list of names")
        object.__setattr__(self, "report_to", tuple(self.report_to))
        _check_trackers(self.report_to)


def _check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker that transformers does not know, or that is not installed."""
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise UnknownNameError(f"unknown tracker {name!r} in report_to; known: {known}")
        if name not in installed:
            raise InputError(f"report_to={name!r} needs a package that is missing; install {name}")


def default_lr(model: Any) -> float:
    """The learning rate if none is given: smaller for wider models.

    Ours: inversely to the width, which is a rule of thumb and was not measured.
    """
    width = getattr(model.config.get_text_config(), "hidden_size", RATE_WIDTH)
    return RATE * min(1.0, RATE_WIDTH / width)


def trainer_arguments(
    model: Any, settings: Settings, folder: str, weight_decay: float, extra: dict[str, Any]
) -> TrainingArguments:
    """The arguments of transformers' Trainer.

    Args:
        model: the model that is trained; its device and dtype decide.
        settings: how to train.
        folder: where checkpoints go.
        weight_decay: AdamW's.
        extra: further arguments, from :func:`settings_from`; they take precedence.
    """
    on_cpu = model.device.type == "cpu"
    values: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": settings.steps if settings.steps else -1,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.lr or default_lr(model),
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": settings.schedule,
        "weight_decay": weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": next(model.parameters()).dtype == torch.bfloat16,
        "seed": settings.seed,
        "use_cpu": on_cpu,
        "logging_steps": settings.log_every,
        "logging_nan_inf_filter": False,
        "save_steps": settings.save_every,
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
        "disable_tqdm": True,
        "report_to": list(settings.report_to),
    }
    if settings.checkpointing:
        values[_checkpointing_name()] = True
    arguments = TrainingArguments(**{**values, **extra})
    # Without a launcher, Trainer copies the model to all GPUs in each step, and what the copies
    # gather is lost: one GPU per process.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _checkpointing_name() -> str:
    """The option by the name that this version of transformers has for it."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    new = "activation_checkpointing"
    return new if new in names else "gradient_checkpointing"


_TAKEN_OVER = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulate",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "gradient_checkpointing": "checkpointing",
    "activation_checkpointing": "checkpointing",
    "max_length": "max_length",  # TRL's
}
"""Fields of ``TrainingArguments`` → fields of :class:`Settings`."""

_TOLD = ("lr", "epochs", "batch", "accumulate", "schedule", "seed", "max_length")
"""Settings whose defaults change what is learnt."""

_PASSED_ON = frozenset(
    (
        *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
        *("lr_scheduler_kwargs", "full_determinism", "bf16", "tf32", "save_strategy"),
        *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_drop_last"),
        *("report_to", "run_name", "project", "trackio_space_id", "logging_first_step"),
        *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm"),
        *("save_total_limit", "save_on_each_node", "ddp_backend", "ddp_timeout"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("torch_empty_cache_steps", "skip_memory_metrics", "average_tokens_across_devices"),
    )
)
"""Fields that the Trainer gets as they are."""

_DECIDED = frozenset(
    (
        *("output_dir", "use_cpu", "local_rank", "remove_unused_columns", "do_train"),
        *("logging_nan_inf_filter", "use_cache", "dataset_num_proc"),
    )
)
"""Fields that are read elsewhere, or that change nothing here."""

_SAME = {
    "packing": False,
    "assistant_only_loss": True,
    "completion_only_loss": True,
    "train_sampling_strategy": "group_by_length",
    "group_by_length": True,
}
"""Field → a value that differs from its default and asks for what is done anyway."""


def settings_from(
    arguments: TrainingArguments, given: Mapping[str, Any] | None = None
) -> tuple[Settings, dict[str, Any]]:
    """Settings, and arguments for the Trainer, from a ``TrainingArguments`` or TRL's ``SFTConfig``.

    A field that differs from the default of its class counts as set by the user. It is honoured or
    refused. A field at its default keeps budwood's value, since the Trainer's defaults (a learning
    rate of 5e-5, three epochs) are not for adapters. A warning names budwood's values, and the call
    that trains with the Trainer's.

    Args:
        arguments: what the user would give to a Trainer.
        given: fields of :class:`Settings` that take precedence.

    Returns:
        Settings, and further arguments for :func:`trainer_arguments`.

    Raises:
        InputError: a field is set that can't be honoured.
    """
    changed = _changed(arguments)
    values: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in changed.items():
        if name in _TAKEN_OVER:
            values[_TAKEN_OVER[name]] = value
        elif name in _PASSED_ON:
            extra[name] = value
        elif name == "max_steps":
            values["steps"] = max(0, value)
        elif name == "warmup_steps":
            _set_warmup(value, values, extra)
        elif name not in _DECIDED and (name not in _SAME or value != _SAME[name]):
            raise InputError(
                f"{type(arguments).__name__}.{name}={value!r} is not supported by finetune; leave "
                "it out, or train with a Trainer of your own and SlimConfig"
            )
    if not isinstance(values.get("save_every", 1), int) or values.get("save_every") == 0:
        raise InputError(f"save_steps={values['save_every']}; give a number of steps")
    if not isinstance(values.get("log_every", 1), int):
        raise InputError(f"logging_steps={values['log_every']}; give a number of steps")
    if "warmup" in (given or {}):
        extra.pop("warmup_steps", None)
    values |= given or {}
    settings = Settings(**values)
    _tell_defaults(arguments, settings, values, extra)
    return settings, extra


def _changed(arguments: TrainingArguments) -> dict[str, Any]:
    """Fields that differ from those of an object of the same class made with defaults alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its defaults, which the user has been warned of
        plain = type(arguments)(output_dir=arguments.output_dir, use_cpu=arguments.use_cpu)
    changed = {}
    for field in dataclasses.fields(arguments):
        value, default = getattr(arguments, field.name), getattr(plain, field.name)
        if str(value) != str(default) and not field.name.startswith("_"):
            changed[field.name] = value.value if isinstance(value, enum.Enum) else value
    return changed


def _set_warmup(value: float, values: dict[str, Any], extra: dict[str, Any]) -> None:
    """Below 1 it is a fraction of the steps, else their number."""
    if 0 <= value < 1:
        values["warmup"] = float(value)
    else:
        extra["warmup_steps"] = value


def _tell_defaults(
    arguments: Any, settings: Settings, given: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Say which of budwood's defaults are used in place of the Trainer's."""
    theirs = {
        ours: getattr(arguments, name)
        for name, ours in _TAKEN_OVER.items()
        if ours in _TOLD and hasattr(arguments, name)
    }
    theirs |= {"schedule": str(theirs["schedule"].value), "warmup": 0.0}
    known = {*given, *(("epochs",) if "steps" in given else ())}
    known |= {"warmup"} if "warmup_steps" in extra else set()
    left = [
        name
        for name, value in theirs.items()
        if name not in known and value != getattr(settings, name)
    ]
    if left:
        kind = type(arguments).__name__
        own = {name: getattr(settings, name) for name in left}
        own |= {"lr": "by the model's width"} if own.get("lr", 0) is None else {}
        told = ", ".join(f"{name}={value}" for name, value in own.items())
        call = ", ".join(f"{name}={theirs[name]!r}" for name in left)
        warnings.warn(
            f"where {kind} has its defaults, budwood's are used: {told}; to train with those of "
            f"{kind}, call finetune(…, {call})",
            stacklevel=5,
        )
