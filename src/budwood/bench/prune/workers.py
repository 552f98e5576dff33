"""Processes that each hold a copy of the model and answer questions for the benchmark."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from typing import Any

from budwood.bench.prune.accuracy import Row, Task
from budwood.checks import need_at_least
from budwood.halves import rounded_products
from budwood.loading import Loaded

_model: Loaded | None = None
"""Of this process, if it is a worker."""
_rounded = ExitStack()
"""Kept until this process ends."""


class Workers:
    """Answers tasks in several processes; a context manager.

    One thread does not keep up with two cores on questions about small models. Answers are the
    same as in one process of as many threads as a worker has. A worker ends with the process that
    started it, also where that one was killed.

    Args:
        n: how many processes. They share the cores.
        load: loads the model, picklable; each process calls it once.

    Raises:
        InputError: ``n`` is below 1.
    """

    def __init__(self, n: int, load: Callable[[], Loaded]) -> None:
        need_at_least(1, workers=n)
        threads = max(1, (os.cpu_count() or 1) // n)
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self._pool = ProcessPoolExecutor(n, context, _begin, (load, threads))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, _error: Any, _trace: Any) -> None:
        if kind is not None:  # a task takes minutes, and what it has answered is lost anyway
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def answers(self, tasks: Iterable[Task]) -> Iterator[list[Row]]:
        """Rows of each task, as they are finished."""
        for done in as_completed([self._pool.submit(_answer, task) for task in tasks]):
            yield done.result()


def _begin(load: Callable[[], Loaded], threads: int) -> None:
    import torch

    global _model
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    _rounded.enter_context(rounded_products())
    _model = load()


def _end_with_parent() -> None:
    """End this process once its parent has; a task would otherwise run on for minutes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(task: Task) -> list[Row]:
    assert _model is not None
    return list(task.rows(_model.model, _model.processor))
