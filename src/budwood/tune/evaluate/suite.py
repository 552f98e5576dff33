"""All that a model is tested on, before and after."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.tune.data import styled
from budwood.tune.encoding import Row, encode_one, longest_for
from budwood.tune.evaluate.drift import chat_prompts, measure_drift, text_windows
from budwood.tune.evaluate.harness import Task, expanded, find_task, run_tasks, task_names
from budwood.tune.evaluate.scores import Score
from budwood.tune.own_text import replies

TARGETS = ("openbookqa", "boolq", "arc_easy")
GENERAL = ("winogrande", "social_iqa", "gsm8k")
TEXT = "wikitext2_valid.txt"
CHAT = "chat"
"""What the base model's own replies are called among the texts."""
ROUTED = 24
"""Rows of each kind of text whose routing is looked at."""
LONGEST = 1024
"""Tokens of a row whose routing is looked at."""

Advance = Callable[..., None]


@dataclass(frozen=True)
class Suite:
    """Tasks and texts.

    Attributes:
        tasks: for :func:`run_tasks`.
        texts: name → rows, for perplexity and divergence.
        style: how multiple choice is asked.
        batch: prompts at a time.
        limit: for tasks of lm-eval's own.
    """

    tasks: tuple[Task, ...] = ()
    texts: dict[str, list[Row]] = field(default_factory=dict)
    style: str = "cloze"
    batch: int = 16
    limit: int = 0

    def before(self, model: Any, tokenizer: Any, advance: Advance | None = None) -> list[Score]:
        """Scores of the base model on the tasks."""
        off = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
        with off:
            return self._tasks(model, tokenizer, advance)

    def after(self, model: Any, tokenizer: Any, advance: Advance | None = None) -> list[Score]:
        """Scores of the tuned model on the tasks."""
        return self._tasks(model, tokenizer, advance)

    def drift(
        self, model: Any, tokenizer: Any, advance: Advance | None = None
    ) -> tuple[list[Score], list[Score]]:
        """Scores of base and tuned model on the texts."""
        befores: list[Score] = []
        afters: list[Score] = []
        for name, rows in self.texts.items():
            before, after = measure_drift(model, tokenizer, rows, name, advance=advance)
            befores, afters = befores + before, afters + after
        return befores, afters

    def routed(self, model: Any, tokenizer: Any) -> dict[str, list[Row]]:
        """A few rows of each kind of text, for :func:`routing_rows`: all targets together first.

        Questions that are longer than ``LONGEST`` or than the model reads are left out.
        """
        targets = [task for task in self.tasks if task.group == "target" and task.examples]
        each, longest = max(1, ROUTED // max(1, len(targets))), longest_for(model, LONGEST)
        asked: list[Row] = []
        for task in targets:
            rows = (encode_one(styled(one, self.style), tokenizer) for one in task.examples or ())
            asked += itertools.islice((r for r in rows if len(r["input_ids"]) <= longest), each)
        found = {"target": asked} if asked else {}
        return found | {name: rows[:ROUTED] for name, rows in self.texts.items()}

    def _tasks(self, model: Any, tokenizer: Any, advance: Advance | None) -> list[Score]:
        return run_tasks(
            model,
            tokenizer,
            self.tasks,
            style=self.style,
            batch=self.batch,
            limit=self.limit,
            advance=advance,
        )


def find_tasks(
    targets: Sequence[str], general: Sequence[str], data: Path | None, limit: int, seed: int
) -> tuple[Task, ...]:
    """Tasks by their names, no two the same; the rest as in :func:`find_task`.

    A group or tag of lm-eval's is all of its tasks.

    Raises:
        InputError: a task is there twice, or a file is missing or malformed; a group of lm-eval's
            changes settings of its tasks.
        UnknownNameError: there is no such task.
    """
    asked = [(one, "target") for one in targets] + [(one, "general") for one in general]
    names = task_names([one for one, _ in asked])
    found = (find_task(one, data, group, limit, seed) for one, group in asked)
    return tuple(expanded([replace(task, name=name) for task, name in zip(found, names)]))


def make_texts(
    model: Any,
    tokenizer: Any,
    *,
    text: Path | None,
    n_windows: int,
    n_prompts: int,
    seed: int = 0,
    advance: Advance | None = None,
) -> dict[str, list[Row]]:
    """Windows of a text, and the base model's own replies to everyday requests.

    Args:
        model: its adapter is off while it replies.
        tokenizer: of the model.
        text: a file; None for no text.
        n_windows: of the text.
        n_prompts: requests; 0 for none.
        seed: of the replies.
        advance: a function (done, total, note), for a progress bar.

    Raises:
        InputError: the file can't be read, is too short, or is called as the replies are; a count
            is below 0.
    """
    need_at_least(0, n_windows=n_windows, n_prompts=n_prompts)
    texts = {}
    if text is not None:
        texts[text_name(text)] = text_windows(text, tokenizer, n_windows)
    if n_prompts:
        off = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
        with off:
            asked = chat_prompts(n_prompts)
            texts[CHAT] = replies(model, tokenizer, asked, seed=seed, advance=advance)
    return texts


def text_name(text: Path) -> str:
    """What a file is called among the texts: its stem.

    Raises:
        InputError: that is the name of the replies.
    """
    if text.stem == CHAT:
        raise InputError(
            f"{text} is called {CHAT!r} in the results, as the base model's replies are; give the "
            "file another name"
        )
    return text.stem
