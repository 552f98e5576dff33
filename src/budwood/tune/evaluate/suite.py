"""Everything that a model is tested on, and the weight that SLIM gives to identity experts."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from budwood.checks import need_at_least
from budwood.progress import Progress, silent
from budwood.tune.base_model import adapter_off
from budwood.tune.data.batches import Padded, on_device
from budwood.tune.data.encoding import EncodedExample, encode_rows, longest_for
from budwood.tune.data.examples import styled
from budwood.tune.evaluate.base_results import Kept
from budwood.tune.evaluate.divergence import measure_drift
from budwood.tune.evaluate.scores import Score
from budwood.tune.evaluate.tasks import Task, no_lm_eval
from budwood.tune.slim.architectures import layer_number
from budwood.tune.slim.keeper import tell_labels
from budwood.tune.slim.observe import observe

TARGETS = ("openbookqa", "boolq", "arc_easy")
"""Targets whose files a folder of data holds; see :data:`budwood.tune.tasks.MADE` for others."""
GENERAL = ("winogrande", "social_iqa", "gsm8k")
TEXT = "wikitext2_valid.txt"
ROUTED = 24
"""Rows of each kind of text whose routing is measured."""
LONGEST = 1024
"""Longest row whose routing is measured, in tokens."""


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
    texts: dict[str, list[EncodedExample]] = field(default_factory=dict)
    style: str = "cloze"
    batch: int = 16
    limit: int = 0

    def before(
        self, model: Any, tokenizer: Any, progress: Progress = silent, kept: Kept | None = None
    ) -> list[Score]:
        """Score the base model on the tasks.

        Args:
            model: its adapter is off meanwhile.
            tokenizer: of the model.
            progress: called after each batch.
            kept: scores of earlier adapters on the same base.
        """

        def score() -> list[dict[str, Any]]:
            with adapter_off(model):
                return [asdict(one) for one in self._tasks(model, tokenizer, progress)]

        what = {"tasks": list(map(asdict, self.tasks)), "style": self.style}
        what |= {"batch": self.batch, "limit": self.limit}
        known = self.tasks and all(task.config for task in self.tasks)  # lm-eval's own may change
        rows = kept.get(what, score) if kept and known else score()
        return [Score.from_dict(row) for row in rows]

    def after(self, model: Any, tokenizer: Any, progress: Progress = silent) -> list[Score]:
        """Score the tuned model on the tasks."""
        return self._tasks(model, tokenizer, progress)

    def drift(
        self, model: Any, tokenizer: Any, progress: Progress = silent
    ) -> tuple[list[Score], list[Score]]:
        """Score base and tuned model on the texts."""
        befores: list[Score] = []
        afters: list[Score] = []
        for name, rows in self.texts.items():
            before, after = measure_drift(model, tokenizer, rows, name, progress=progress)
            befores, afters = befores + before, afters + after
        return befores, afters

    def routed(self, model: Any, tokenizer: Any) -> dict[str, list[EncodedExample]]:
        """A few rows of each kind of text, for :func:`routing_rows`: all targets together first.

        Questions that are longer than ``LONGEST`` or than the model reads are left out.
        """
        targets = [task for task in self.tasks if task.group == "target" and task.examples]
        each, longest = max(1, ROUTED // max(1, len(targets))), longest_for(model, LONGEST)
        asked: list[EncodedExample] = []
        for task in targets:
            styles = (styled(one, self.style) for one in task.examples or ())
            rows = itertools.chain.from_iterable(encode_rows(one, tokenizer) for one in styles)
            asked += itertools.islice((r for r in rows if len(r["input_ids"]) <= longest), each)
        found = {"target": asked} if asked else {}
        return found | {name: rows[:ROUTED] for name, rows in self.texts.items()}

    def _tasks(self, model: Any, tokenizer: Any, progress: Progress) -> list[Score]:
        if not self.tasks:
            return []
        try:
            from budwood.tune.evaluate.harness import run_tasks
        except ImportError as error:
            raise no_lm_eval(error) from error
        return run_tasks(
            model,
            tokenizer,
            self.tasks,
            style=self.style,
            batch=self.batch,
            limit=self.limit,
            progress=progress,
        )


@torch.inference_mode()
def routing_rows(
    model: Any, tokenizer: Any, texts: Mapping[str, Sequence[EncodedExample]], batch: int = 8
) -> list[dict[str, Any]]:
    """Measure the weight on identity experts and the distance by layer, for several texts.

    Tokens count whose next one has a label: answers, replies and text, but no prompts.

    Args:
        model: a ``PeftModel`` with a SLIM adapter.
        tokenizer: its padding token is used.
        texts: name → rows.
        batch: rows at a time.

    Returns:
        Dicts of ``text, layer, identity_share, bypassed_share, distance``; a layer's values are
        the means of its projections.

    Raises:
        InputError: ``batch`` is below 1.
    """
    need_at_least(1, batch=batch)
    model.eval()
    collate = Padded.of(model, tokenizer, trim=False)
    found = []
    for name, rows in texts.items():
        with observe(model, supervised=True) as seen:
            try:
                for start in range(0, len(rows), batch):
                    inputs = on_device(collate(rows[start : start + batch]), model.device)
                    tell_labels(model, inputs.pop("labels"))
                    model(**inputs)
            finally:
                tell_labels(model, None)
        found += [{"text": name, **row} for row in by_layer(seen.rows())]
    return found


def by_layer(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the projections of each layer, in the order of layers.

    Args:
        rows: with ``layer``, a module's name that holds the layer's number, and the values.
    """
    groups: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[layer_number(row["layer"]) or 0].append(row)
    keys = ("identity_share", "bypassed_share", "distance")
    return [
        {"layer": number} | {key: sum(row[key] for row in group) / len(group) for key in keys}
        for number, group in sorted(groups.items())
    ]
