"""Accuracy and retention of pruning methods on held-out sprout scenes."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from budwood.bench.prune.answering import (
    Answered,
    Encoded,
    answer_full,
    answer_pruned,
    encode,
)
from budwood.bench.prune.times import Run, Times, measure
from budwood.bench.prune.variants import Variant
from budwood.errors import InputError
from budwood.prune.budget import Budget
from budwood.prune.chat import prepare
from budwood.sprout.questions import Question, balanced
from budwood.sprout.scenes import Scene

FULL = Run("full")
BLIND = Run("blind")

_GREY = (128, 128, 128)

Progress = Callable[[int, int], None]
"""Told how many answers there are and how many there will be."""


@dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        variants: methods to compare; the first of the method ``reference`` is what the others'
            differences are taken to.
        keeps: budgets, each a count or a ratio as in ``attach``.
        seed: of the scenes, the draws of methods and the bootstrap.
        n_scenes: scenes; each has one question of every kind that it allows.
        split: ``"test"``, or ``"shifted"`` for looks outside the training range.
        batch: about how many questions a call answers; whole scenes.
        max_new_tokens: where an answer is cut.
        n_timed: questions whose first token is timed.
        n_resamples: of the bootstrap.
        reference: a method.

    Raises:
        InputError: a number is too small, or a variant or budget comes twice.
        BudgetError: a budget is neither a count nor a ratio.
    """

    variants: tuple[Variant, ...]
    keeps: tuple[int | float, ...]
    seed: int = 0
    n_scenes: int = 200
    split: str = "test"
    batch: int = 24
    max_new_tokens: int = 4
    n_timed: int = 10
    n_resamples: int = 2000
    reference: str = "adav"

    def __post_init__(self) -> None:
        for name in ("n_scenes", "batch", "max_new_tokens", "n_timed", "n_resamples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is below 1; give at least 1")
        if not self.variants or not self.keeps:
            raise InputError("nothing to compare: give at least one method and one budget")
        for keep in self.keeps:
            Budget.parse(keep)
        if len(set(self.runs)) < len(self.runs):
            raise InputError(f"keep has the same budget twice: {', '.join(map(str, self.keeps))}")

    @property
    def runs(self) -> list[Run]:
        """All that is compared: baselines, then budget by budget."""
        pruned = [Run("", variant, keep) for keep in self.keeps for variant in self.variants]
        return [FULL, BLIND, *pruned]

    def reference_run(self, keep: int | float | None) -> Run | None:
        """What runs of this budget are compared to, if the reference takes part."""
        found = (run for run in self.runs if run.variant and run.keep == keep)
        return next((run for run in found if run.method == self.reference), None)


@dataclass(frozen=True)
class Asked:
    """One question of the benchmark and the scene, counted from 0, that it is about."""

    scene: int
    question: Question


@dataclass(eq=False)
class Outcome:
    """What the model answered.

    Attributes:
        asked: the questions.
        right: for each run, whether each question was answered rightly.
        n_visual: visual tokens of each question's picture.
        n_kept: for each run, those that the LLM saw.
        times: for each run, the time to the first token.
    """

    asked: list[Asked]
    right: dict[Run, list[bool]]
    n_visual: list[int] = field(default_factory=list)
    n_kept: dict[Run, list[int]] = field(default_factory=dict)
    times: dict[Run, Times] = field(default_factory=dict)


def run(model: Any, processor: Any, config: Config, progress: Progress | None = None) -> Outcome:
    """Ask every question with every method and budget, with all tokens, and blind.

    Blind means all tokens of a grey picture. Deterministic, but for the times.

    Args:
        model: a transformers model of a known family, with nothing attached.
        processor: its processor.
        config: what to run.
        progress: told about progress.
    """
    scenes = balanced(config.seed, config.n_scenes, config.split)
    asked = [Asked(i, q) for i, (_, questions) in enumerate(scenes) for q in questions]
    if not asked:
        raise InputError(f"no question can be asked about {config.n_scenes} scenes; take more")
    outcome = Outcome(asked, {run: [] for run in config.runs})
    outcome.n_kept = {run: [] for run in config.runs}
    n_done, n_answers = 0, len(asked) * len(config.runs)
    for number, chunk in enumerate(_chunks(scenes, config.batch)):
        exam = _Exam(model, processor, config, number, chunk)
        for run_ in config.runs:
            answered = exam.sit(run_)
            outcome.right[run_] += [
                normalise(text) == normalise(question.answer)
                for text, question in zip(answered.texts, exam.questions)
            ]
            outcome.n_kept[run_] += answered.n_kept
            n_done += len(answered.texts)
            if progress:
                progress(n_done, n_answers)
        outcome.n_visual += exam.n_visual
    timed = _spread([(scenes[one.scene][0].image, one.question.text) for one in asked], config)
    outcome.times = measure(model, processor, config.runs, timed, _blank)
    return outcome


def normalise(text: str) -> str:
    """An answer without case, punctuation and superfluous space."""
    bare = text.casefold().translate(str.maketrans("", "", string.punctuation))
    return " ".join(bare.split())


class _Exam:
    """The questions about some scenes, put to the model in one way after the other."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        config: Config,
        number: int,
        chunk: Sequence[tuple[Scene, list[Question]]],
    ) -> None:
        self.model, self.processor, self.config = model, processor, config
        # Draws follow the number of an image in its call, so each call needs a seed of its own.
        self.seed = config.seed * 1_000_003 + number
        self.questions = [question for _, questions in chunk for question in questions]
        self.images = [scene.image for scene, _ in chunk]
        self.which = [i for i, (_, questions) in enumerate(chunk) for _ in questions]
        self.inputs = self._inputs(self.images, self.which)
        self._encoded: dict[str | None, Encoded] = {}
        layouts = self._encode(None)
        self.n_visual = [len(layouts.saliency[i]) for i in self.which]

    def sit(self, run_: Run) -> Answered:
        """Answer all questions in one way."""
        if run_.variant is not None:
            assert run_.keep is not None
            return answer_pruned(
                self.model,
                self.processor,
                self.inputs,
                self._encode(run_.variant.compat).rows(self.which),
                run_.variant,
                keep=run_.keep,
                seed=self.seed,
                max_new_tokens=self.config.max_new_tokens,
            )
        inputs, encoded, which = self.inputs, self._encode(None), self.which
        if run_ == BLIND:
            inputs, encoded, which = self._blinded()
        texts = answer_full(
            self.model,
            self.processor,
            inputs,
            encoded,
            which,
            max_new_tokens=self.config.max_new_tokens,
        )
        return Answered(texts, self.n_visual, self.n_visual)

    def _blinded(self) -> tuple[dict[str, Any], Encoded, list[int]]:
        """The same questions about grey pictures: one for each size, as they are all alike."""
        sizes = list(dict.fromkeys(image.size for image in self.images))
        which = [sizes.index(self.images[i].size) for i in self.which]
        first = [self.images[[image.size for image in self.images].index(size)] for size in sizes]
        blanks = [_blank(image) for image in first]
        inputs = self._inputs(blanks, which)
        return inputs, encode(self.model, self.processor, self._pictures(blanks)), which

    def _encode(self, compat: str | None) -> Encoded:
        if compat not in self._encoded:
            pictures = self._pictures(self.images)
            self._encoded[compat] = encode(self.model, self.processor, pictures, compat)
        return self._encoded[compat]

    def _pictures(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        return prepare(self.processor, images, ["-"] * len(images), self.model.device)

    def _inputs(self, images: Sequence[Image.Image], which: Sequence[int]) -> dict[str, Any]:
        texts = [question.text for question in self.questions]
        return prepare(self.processor, [images[i] for i in which], texts, self.model.device)


def _blank(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, _GREY)


def _chunks(
    scenes: Sequence[tuple[Scene, list[Question]]], batch: int
) -> Iterator[list[tuple[Scene, list[Question]]]]:
    """Whole scenes with about ``batch`` questions; scenes without a question are left out."""
    chunk: list[tuple[Scene, list[Question]]] = []
    n_questions = 0
    for scene, questions in scenes:
        if not questions:
            continue
        if chunk and n_questions + len(questions) > batch:
            yield chunk
            chunk, n_questions = [], 0
        chunk.append((scene, questions))
        n_questions += len(questions)
    if chunk:
        yield chunk


def _spread(items: Sequence[Any], config: Config) -> list[Any]:
    """``n_timed`` items, evenly spread and of all kinds."""
    n = min(config.n_timed, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]
