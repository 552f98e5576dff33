"""Train an adapter in a folder: resumable, with a history; the last good checkpoint is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback

from budwood.errors import DivergedError, InputError, OutputError
from budwood.fingerprint import fingerprint_of
from budwood.progress import Progress, silent
from budwood.runs import RunFolder
from budwood.tune.data.batches import Padded
from budwood.tune.data.encoding import EncodedExample
from budwood.tune.slim.keeper import SlimCallback, is_slim
from budwood.tune.training.settings import Settings, trainer_arguments
from budwood.tune.training.strength import weaken
from budwood.tune.training.trainer import AnswerTrainer, Probe, RunWatch, tell_slim
from budwood.tune.training.validation import KeepBest, Validation

_KL_POSITIONS = 48
"""Positions of the prompt, counted from its end, at which ``kl`` compares with the base model."""
_FEW_STEPS = 3
"""Fewer steps than this, which nobody asked for, get a warning."""

WITHOUT_EFFECT = frozenset(
    (
        *("log_every", "save_every", "save_strategy", "save_total_limit", "save_on_each_node"),
        *("report_to", "run_name", "project", "trackio_space_id", "logging_first_step"),
        *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm"),
        *("skip_memory_metrics", "torch_empty_cache_steps", "ddp_timeout"),
    )
)
"""Settings and arguments of the Trainer that do not change the weights: a run may change them."""


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[EncodedExample],
    settings: Settings,
    folder: RunFolder,
    *,
    weight_decay: float = 0.0,
    kl: float = 0.0,
    kl_on_others: bool = False,
    texts: Sequence[EncodedExample] = (),
    strength: float = 1.0,
    arguments: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    probe: Probe | None = None,
    eval_rows: Sequence[EncodedExample] = (),
) -> list[dict[str, Any]]:
    """Train an adapter; an interrupted run continues from its last checkpoint.

    The adapter is saved in the folder when all steps are done, and checkpoints are removed. With
    ``eval_rows`` it is the one with the lowest validation loss.

    Args:
        model: a ``PeftModel`` whose adapter is fresh, and prepared unless the run is resumed.
        tokenizer: its padding token is used.
        rows: from :func:`budwood.tune.data.encoding.encode`.
        settings: how to train.
        folder: folder of the run; a complete run is not trained again.
        weight_decay: AdamW's.
        kl: weight of the divergence from the base model on the prompts, or on ``texts``.
        kl_on_others: take it on answers instead, as :class:`AnswerTrainer`.
        texts: self-generated texts to stay close to the base model on; none for the prompts.
        strength: adapter strength at the end, as in :func:`budwood.tune.training.strength.weaken`.
        arguments: further arguments of the Trainer, from
            :func:`budwood.tune.training.settings.settings_from`.
        progress: called after each step.
        probe: called every ``settings.probe_every`` steps, before the first and after the last.
        eval_rows: held-out examples for validation; none for no validation.

    Returns:
        The history: dicts with ``step`` and what was noted then.

    Raises:
        DivergedError: the loss, a gradient or a layer's input was NaN or infinite; the message
            names the last good checkpoint.
        KeyboardInterrupt: on Ctrl-C, after the step under way and a checkpoint; on a second one at
            once.
        InputError: as :func:`check_trainable`, or the model is split up by FSDP1 or DeepSpeed.
        OutputError: another process is at this run, or has just finished it.
    """
    if folder.is_complete:
        return folder.history()
    check_trainable(model)
    with folder.claimed() if processes(model).is_main_process else nullcontext():
        if folder.is_complete:
            raise OutputError(
                f"another process has just finished the run in {folder.path}; repeat the call, "
                "which loads its adapter"
            )
        start = _resume_from(folder, model)
        n_steps = _n_steps(rows, settings, model)
        if n_steps < _FEW_STEPS and not settings.steps:
            warnings.warn(
                f"{len(rows)} examples make {n_steps} step{'s' * (n_steps > 1)} of training; give "
                "more steps or epochs (--steps, --epochs)",
                stacklevel=2,
            )
        watch = RunWatch(folder, settings, progress, probe)
        n_before = _KL_POSITIONS if kl and not (texts or kl_on_others) else 0
        every = settings.eval_every or max(1, n_steps // 10)
        validation = Validation(eval_rows, every, settings.patience)
        keeper = KeepBest(folder, validation, Padded.of(model, tokenizer), settings.batch)
        trainer = AnswerTrainer(
            model=model,
            args=trainer_arguments(
                model, settings, str(folder.path), weight_decay, dict(arguments or {})
            ),
            train_dataset=list(rows),  # type: ignore[arg-type]
            data_collator=Padded.of(model, tokenizer, n_before=n_before),
            lengths=[len(row["input_ids"]) for row in rows],
            kl=kl,
            kl_on_others=kl_on_others,
            texts=texts,
            callbacks=[
                watch,
                *([SlimCallback()] if is_slim(model) else []),
                *([keeper] if eval_rows else []),
            ],
        )
        _check_sharding(trainer, bool(eval_rows))
        trainer.remove_callback(PrinterCallback)
        if start is None and probe and settings.probe_every:
            watch.take_probe(model, 0)
        if start is None and eval_rows:
            keeper.measure(model, 0)
        _take_steps(trainer, folder, start, watch)
        tell_slim(model, None)
        if eval_rows:
            keeper.restore(model)
        weaken(model, strength)
        _save(trainer, tokenizer, folder)
        if processes(model).is_main_process:
            keeper.drop()
    return folder.history()


def _take_steps(
    trainer: AnswerTrainer, folder: RunFolder, start: Path | None, watch: RunWatch
) -> None:
    """Train to the end; where training diverges, say which checkpoint is left."""
    try:
        with _interruptible(watch):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except DivergedError as error:
        last = folder.last_checkpoint()
        kept = f"the last good checkpoint is {last}" if last else "there was no checkpoint yet"
        hint = "try a lower learning rate"
        if not trainer.state.global_step:
            hint = "no step was taken yet, so look at the base model's weights and its dtype"
        raise DivergedError(f"{error}; {kept}; {hint}") from None
    finally:
        watch.close()
    if watch.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    # Without the Trainer's mixed precision the model computes what it will when it is loaded.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


@contextmanager
def _interruptible(watch: RunWatch) -> Iterator[None]:
    """Let Ctrl-C end training after the step under way; a second one, or one elsewhere, at once."""
    before = signal.getsignal(signal.SIGINT)
    if (
        threading.current_thread() is not threading.main_thread()
        or before is not signal.default_int_handler
    ):
        yield  # signals are somebody else's
        return

    def note(number: int, frame: Any) -> None:
        if watch.interrupted:
            signal.default_int_handler(number, frame)
        watch.interrupted = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _save(trainer: AnswerTrainer, tokenizer: Any, folder: RunFolder) -> None:
    """Write the adapter, and then that the run is complete."""
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


def _n_steps(rows: Sequence[Any], settings: Settings, model: Any) -> int:
    """Steps of a run."""
    per_step = settings.batch * settings.accumulate * processes(model).num_processes
    return settings.steps or math.ceil(settings.epochs * math.ceil(len(rows) / per_step))


def _check_sharding(trainer: AnswerTrainer, validates: bool) -> None:
    """Refuse ways to split a model for which the saved adapter was not checked."""
    if trainer.is_deepspeed_enabled:
        raise InputError("training under DeepSpeed was not tried; launch with DDP, or with FSDP2")
    sharding = _sharding(trainer)
    if sharding and validates:
        raise InputError("validation under FSDP was not tried; leave eval_data out, or use DDP")
    if sharding and sharding.fsdp_version != 2:
        raise InputError("training under FSDP1 was not tried; launch with --fsdp_version 2")


def check_trainable(model: Any) -> None:
    """Refuse a model that the Trainer would not train, or not where it is.

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


def processes(model: Any) -> PartialState:
    """Accelerate's view of the processes that train a model together."""
    return PartialState(cpu=model.device.type == "cpu")


def _resume_from(folder: RunFolder, model: Any) -> Path | None:
    """The checkpoint to continue from; one process removes half-written ones first."""
    state = processes(model)
    if state.is_main_process:
        folder.drop_checkpoints(only_broken=True)
        start = folder.last_checkpoint()
        folder.rewind(int(start.name.split("-")[-1]) if start else -1)
    state.wait_for_everyone()
    return folder.last_checkpoint()


def run_identity(
    name: str,
    model: Any,
    method: str,
    settings: Settings,
    rank: int,
    data: str,
    arguments: Mapping[str, Any] | None = None,
    eval_data: str | None = None,
    defaults: str = "",
) -> dict[str, Any]:
    """What distinguishes a run from others, for its folder.

    Args:
        name: name of the model.
        model: the base model; some of its weights are sampled.
        method: as :func:`budwood.tune.methods.parse_tuner` takes it.
        settings: how to train.
        rank: of the adapter.
        data: :func:`fingerprint` of the training data.
        arguments: further arguments of the Trainer.
        eval_data: :func:`fingerprint` of the validation data; None without.
        defaults: of the method, as of :class:`budwood.tune.methods.base.Tuner`.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    identity = {"model": name, "weights": fingerprint_of(model), "dtype": dtype}
    identity |= {"method": method, "rank": rank, "data": data}
    how = dataclasses.asdict(settings)
    if defaults:
        identity["defaults"] = defaults
    if eval_data:
        identity["eval_data"] = eval_data
    else:  # runs of older versions have no such settings
        how = {key: how[key] for key in how if key not in ("eval_every", "patience")}
    n_processes = processes(model).num_processes
    if n_processes > 1:
        identity["processes"] = n_processes
    if arguments:
        identity["arguments"] = json.loads(json.dumps(dict(arguments), default=str))
    return identity | how


def fingerprint(rows: Sequence[Any]) -> str:
    """A digest of tokenised examples, or other JSON values, that identifies them.

    What ``asked`` marks follows from the rest, and older digests know nothing of it.
    """
    plain = [
        {key: row[key] for key in row if key != "asked"} if isinstance(row, dict) else row
        for row in rows
    ]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]
