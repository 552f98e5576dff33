"""Accuracy and time to first token of pruning methods on held-out sprout scenes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from budwood.bench.prune.answering import Answered, answer_full, answer_pruned
from budwood.bench.prune.plan import BLIND, FULL, Config, Run
from budwood.errors import InputError
from budwood.evaluate.scenes import normalise
from budwood.progress import Progress, silent
from budwood.prune.chat import prepare
from budwood.prune.encoded import Encoded, encode
from budwood.prune.latency import FirstToken, generate_timed
from budwood.prune.methods import METHODS
from budwood.prune.session import attach
from budwood.sprout.questions import Question, balanced
from budwood.sprout.scenes import Scene
from budwood.timing import median_ratio, side_by_side

_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Asked:
    """One question of the benchmark and the scene, counted from 0, that it is about."""

    scene: int
    question: Question


@dataclass(frozen=True)
class Times:
    """Medians over the timed questions.

    Attributes:
        first: each part of the time to first token by itself.
        speedup: median ratio of the time with all tokens to this one's.
    """

    first: FirstToken
    speedup: float


@dataclass(eq=False)
class Outcome:
    """What the model answered.

    Attributes:
        asked: the questions.
        right: for each run, whether each question was answered correctly.
        n_visual: visual tokens of each question's picture.
        n_kept: for each run, those that the LLM saw.
        times: for each run, the time to the first token.
    """

    asked: list[Asked]
    right: dict[Run, list[bool]]
    n_visual: list[int] = field(default_factory=list)
    n_kept: dict[Run, list[int]] = field(default_factory=dict)
    times: dict[Run, Times] = field(default_factory=dict)


def run(model: Any, processor: Any, config: Config, progress: Progress = silent) -> Outcome:
    """Ask every question with every method and budget, with all tokens, and blind.

    Blind means all tokens of a grey picture. Everything but the times is deterministic.

    Args:
        model: a transformers model of a known family, with nothing attached.
        processor: its processor.
        config: what to run.
        progress: called after each batch of answers.

    Raises:
        InputError: the scenes allow no question.
    """
    scenes = balanced(config.seed, config.n_scenes, config.split)
    asked = [Asked(i, q) for i, (_, questions) in enumerate(scenes) for q in questions]
    if not asked:
        raise InputError(f"n_scenes={config.n_scenes} scenes allow no question; give more")
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
            progress(n_done, n_answers)
        outcome.n_visual += exam.n_visual
    pictures = [(scenes[item.scene][0].image, item.question.text) for item in asked]
    outcome.times = measure(model, processor, config.runs, _spread(pictures, config.n_timed))
    return outcome


def measure(
    model: Any,
    processor: Any,
    runs: Sequence[Run],
    questions: Sequence[tuple[Image.Image, str]],
) -> dict[Run, Times]:
    """Time the first token of each run on each question, one at a time, encoder included.

    Args:
        model: the model, with nothing attached.
        processor: its processor.
        runs: what to time, ``FULL`` among them.
        questions: pictures and questions.
    """

    def time_one(run_: Run, number: int) -> FirstToken:
        image, text = questions[number]
        image = _blank(image) if run_ == BLIND else image
        inputs = prepare(processor, [image], [text], model.device)
        if run_.variant is None:
            return generate_timed(model, inputs, max_new_tokens=1).first
        options: dict[str, Any] = {**run_.variant.options, "keep": run_.keep, "timing": True}
        with attach(model, processor=processor, **options) as session:
            return generate_timed(model, inputs, session, max_new_tokens=1).first

    named = {str(i): functools.partial(time_one, run_) for i, run_ in enumerate(runs)}
    results = side_by_side(named, len(questions))
    times = {run_: results[str(i)] for i, run_ in enumerate(runs)}
    full = [first.total_ms for first in times[FULL]]
    return {
        run_: Times(
            FirstToken.median(firsts),
            median_ratio(full, [first.total_ms for first in firsts]),
        )
        for run_, firsts in times.items()
    }


class _Exam:
    """The questions about some scenes, asked in one way after the other."""

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
        self._encoded: dict[bool, Encoded] = {}
        self.n_visual = [len(self._encode().saliency[i]) for i in self.which]

    def sit(self, run_: Run) -> Answered:
        """Answer all questions in one way."""
        if run_.variant is not None:
            assert run_.keep is not None
            return answer_pruned(
                self.model,
                self.processor,
                self.inputs,
                self._encode(run_.variant.method).pick(self.which),
                run_.variant,
                keep=run_.keep,
                seed=self.seed,
                max_new_tokens=self.config.max_new_tokens,
            )
        inputs, encoded, which = self.inputs, self._encode(), self.which
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
        """The same questions about grey pictures, one picture for each size."""
        sizes = list(dict.fromkeys(image.size for image in self.images))
        which = [sizes.index(self.images[i].size) for i in self.which]
        first = [self.images[[image.size for image in self.images].index(size)] for size in sizes]
        blanks = [_blank(image) for image in first]
        inputs = self._inputs(blanks, which)
        return inputs, encode(self.model, self._pictures(blanks)), which

    def _encode(self, method: str = "adav") -> Encoded:
        """The scenes' pictures, encoded once for all methods that read them in the same form."""
        whole_crops = METHODS.get(method).whole_crops
        if whole_crops not in self._encoded:
            pictures = self._pictures(self.images)
            self._encoded[whole_crops] = encode(self.model, pictures, method)
        return self._encoded[whole_crops]

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


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    """``n`` items, or all if there are fewer, evenly spread and so of all kinds."""
    n = min(n, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]
