"""Several ranks on one machine, over gloo."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests import tiny_llm as tiny


def run(work: Callable[..., Any], folder: Path, n: int = 2, **options: Any) -> list[Any]:
    """What a function returns on each rank.

    Args:
        work: a function of a module that can be imported.
        folder: for results.
        n: ranks.
        options: arguments of the function.
    """
    # Forking saves importing everything again, but is not possible beside an accelerator.
    context = multiprocessing.get_context("spawn" if torch.accelerator.is_available() else "fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(work, rank, n, port, folder, options) for rank in range(n)]
    ranks = [context.Process(target=_rank, args=one) for one in arguments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
    for i, rank in enumerate(ranks):
        if rank.is_alive():
            rank.kill()
        error = folder / f"error-{i}.txt"
        assert rank.exitcode == 0, error.read_text() if error.exists() else "a rank hangs"
    return [torch.load(folder / f"rank-{i}.pt", weights_only=False) for i in range(n)]


def _rank(work: Any, rank: int, n: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in places.items()})
    # As torchrun sets it; accelerate warns where it is not.
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    try:
        torch.save(work(rank, n, **options), folder / f"rank-{rank}.pt")
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # a forked process must not run the exit handlers of its parent


def data(step: int, rank: int, n: int) -> dict[str, torch.Tensor]:
    """This rank's share of a step's batch; shares have equally many labels."""
    whole = tiny.batch(n=4, seed=step, padding=None)
    whole["attention_mask"][:, :2] = 0  # padding, the same in each row
    whole["labels"][:, :2] = -100
    return {key: value.chunk(n)[rank] for key, value in whole.items()}


def loop(rank: int, n: int, kind: str, parts: int = 1, steps: int = 4) -> dict[str, Any]:
    """A plain loop, on one rank or several: ``"ddp"`` or ``"fsdp"``."""
    model = tiny.slim(l1=0.5)
    wrapped: Any = model
    if kind != "one":
        dist.init_process_group("gloo")
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    elif kind == "fsdp":
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optim = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for step in range(steps):
        optim.zero_grad()
        share = data(step, rank, n)
        for part in range(parts):
            piece = {key: value.chunk(parts)[part] for key, value in share.items()}
            (wrapped(**piece).loss / parts).backward()
        optim.step()
    # The process group is left to the end of the process: freeing the last reference, which DDP
    # holds, joins gloo's threads under the GIL while one of them may wait for it.
    return {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for key, value in model.state_dict().items()
        if ".slim_" in key
    }


def trainer(rank: int, n: int, output: str, resume: str | None = None) -> dict[str, Any]:
    """The Trainer of transformers, which starts and ends the process group itself."""
    from transformers import Trainer, TrainingArguments

    rows = tiny.batch(n=16, length=20)
    rows = [{key: value[i] for key, value in rows.items()} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // n,
        max_steps=4,
        save_steps=2,
        learning_rate=0.5,
        optim="sgd",
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo" if n > 1 else None,
        disable_tqdm=True,
        seed=3,
    )
    model = tiny.slim(l1=0.5)
    Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
    return tiny.states(model)


def command(
    rank: int, n: int, line: list[str], fsdp: str = "", version: str = "2", stop: int = 0
) -> None:
    """A command of budwood, as `accelerate launch` starts it on each rank.

    Args:
        rank: of this process.
        n: ranks.
        line: of words.
        fsdp: what FSDP writes into checkpoints, as accelerate calls it; none for DDP.
        version: of FSDP.
        stop: step before which the ranks stop as if they were interrupted; 0 for none.
    """
    from accelerate.state import AcceleratorState

    from budwood.cli import app

    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked
    if fsdp:
        _shard(fsdp, version)
    if stop:
        _stop_before(stop)
    with contextlib.suppress(KeyboardInterrupt):
        app(line, standalone_mode=False)


def _stop_before(step: int) -> None:
    from budwood.tune.training.trainer import AnswerTrainer

    inner = AnswerTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    AnswerTrainer.training_step = training_step


def _shard(kind: str, version: str) -> None:
    """Set what `accelerate launch --use_fsdp` sets, and let it do so without a GPU."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION=version,
        FSDP_STATE_DICT_TYPE=kind,
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    )
    inner = AcceleratorState.__init__

    def on_an_accelerator(self: Any, *args: Any, **kwargs: Any) -> None:
        PartialState(cpu=True)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        inner(self, *args, **kwargs)

    AcceleratorState.__init__ = on_an_accelerator
