"""Accuracy and time to first token of pruning methods on held-out sprout scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from budwood.bench.prune.answering import (
    Answered,
    Sheet,
    answer,
    answer_full,
)
from budwood.bench.prune.earlier import Earlier
from budwood.bench.prune.plan import BLIND, FULL, Config, Run
from budwood.errors import InputError
from budwood.evaluate.scenes import normalise
from budwood.progress import Progress, silent
from budwood.prune.chat import Turns, prepare
from budwood.prune.inside import attach_inside
from budwood.prune.latency import FirstToken, generate_timed
from budwood.prune.session import attach
from budwood.sprout.questions import Question, chats
from budwood.sprout.scenes import Scene
from budwood.timing import median_ratio, side_by_side

Row = dict[str, Any]

_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Asked:
    """One question of the benchmark, the last of a chat.

    Attributes:
        scene: number of the scene, counted from 0.
        question: what is asked.
        before: questions of earlier turns.
    """

    scene: int
    question: Question
    before: tuple[Question, ...] = ()

    @property
    def turns(self) -> Turns:
        """The earlier turns as they are shown to the model, with the right answers."""
        return [(question.text, question.answer) for question in self.before]


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
    n_visual: list[float] = field(default_factory=list)
    n_kept: dict[Run, list[float]] = field(default_factory=dict)
    times: dict[Run, Times] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Task:
    """Questions about some scenes, to be asked in some ways.

    Attributes:
        number: of these scenes among all.
        config: what is compared.
        scenes: with the questions about each.
        missing: numbers of the runs to do, in ``config.runs``.
    """

    number: int
    config: Config
    scenes: Sequence[tuple[Scene, list[Asked]]]
    missing: Sequence[int]

    def rows(self, model: Any, processor: Any) -> Iterator[Row]:
        """What the model answers, run by run."""
        exam = _Exam(model, processor, self.config, self.number, self.scenes)
        for i in self.missing:
            answered = exam.sit(self.config.runs[i])
            right = [
                normalise(text) == normalise(one.question.answer)
                for text, one in zip(answered.texts, exam.asked)
            ]
            yield {
                "chunk": self.number,
                "run": i,
                "n_kept": answered.n_kept,
                "right": right,
            }


AnswersOf = Callable[[Iterable[Task]], Iterator[list[Row]]]
"""Answers tasks, in any order; yields rows of one task at a time, all or some."""


def run(
    model: Any,
    processor: Any,
    config: Config,
    progress: Progress = silent,
    begun: Sequence[Row] = (),
    keep: Callable[[list[Row]], None] | None = None,
    answers_of: AnswersOf | None = None,
    known: Mapping[Run, Earlier] | None = None,
) -> Outcome:
    """Ask every question with every method and budget, with all tokens, and blind.

    Blind means all tokens of a grey picture. Everything but the times is deterministic.

    Args:
        model: a transformers model of a known family, with nothing attached.
        processor: its processor.
        config: what to run.
        progress: called after each batch of answers.
        begun: answers of an interrupted run, as given to ``keep``.
        keep: called after each batch of scenes with all answers so far.
        answers_of: answers the questions, as :meth:`Workers.answers` does; None asks the model in
            this process.
        known: answers of earlier comparisons. Of a run that is there, only batches with a question
            that is not are asked.

    Raises:
        InputError: the scenes allow no question.
    """
    scenes = [
        (scene, [Asked(i, last, tuple(before)) for *before, last in of_scene])
        for i, (scene, of_scene) in enumerate(
            chats(config.seed, config.n_scenes, config.turns, config.split, config.high_resolution)
        )
    ]
    asked = [one for _, of_scene in scenes for one in of_scene]
    if not asked:
        turns = f" in a chat of {config.turns} turns" if config.turns > 1 else ""
        raise InputError(
            f"{config.n_scenes} scenes allow no question{turns}; give more scenes"
            + (" or fewer turns" if turns else "")
        )
    rows = [*begun, *_known_rows(config, scenes, begun, known or {})]
    tasks, n_answers = _tasks(config, scenes, rows), len(asked) * len(config.runs)
    for more in (answers_of or partial(_in_turn, model, processor))(tasks):
        rows += more
        progress(sum(len(row["right"]) for row in rows), n_answers)
        finished = sum(row["chunk"] == more[-1]["chunk"] for row in rows) == len(config.runs)
        if keep and finished:
            keep(rows)
    rows.sort(key=lambda row: row["chunk"])
    outcome = Outcome(asked, {}, [])
    for i, run_ in enumerate(config.runs):
        answers = [row for row in rows if row["run"] == i]
        outcome.right[run_] = [right for row in answers for right in row["right"]]
        outcome.n_kept[run_] = [n_kept for row in answers for n_kept in row["n_kept"]]
    outcome.n_visual = outcome.n_kept[FULL]
    timed = [(scenes[one.scene][0].image, one) for one in _spread(asked, config.n_timed)]
    outcome.times = measure(model, processor, config.runs, timed)
    return outcome


def _known_rows(
    config: Config,
    scenes: Sequence[tuple[Scene, list[Asked]]],
    begun: Sequence[Row],
    known: Mapping[Run, Earlier],
) -> list[Row]:
    """Rows of batches that earlier comparisons answered whole and this one has not begun."""
    done = {(row["chunk"], row["run"]) for row in begun}
    rows, first = [], 0
    for number, chunk in enumerate(_chunks(scenes, config.batch)):
        last = first + sum(len(of_scene) for _, of_scene in chunk)
        for i, run_ in enumerate(config.runs):
            earlier = known.get(run_)
            if earlier and last <= len(earlier.right) and (number, i) not in done:
                right, n_kept = earlier.right[first:last], [earlier.n_kept] * (last - first)
                rows.append({"chunk": number, "run": i, "n_kept": n_kept, "right": right})
        first = last
    return rows


def _tasks(
    config: Config, scenes: Sequence[tuple[Scene, list[Asked]]], begun: Sequence[Row]
) -> Iterator[Task]:
    """What an interrupted run has not done."""
    done = {(row["chunk"], row["run"]) for row in begun}
    for number, chunk in enumerate(_chunks(scenes, config.batch)):
        missing = [i for i in range(len(config.runs)) if (number, i) not in done]
        if missing:
            yield Task(number, config, chunk, missing)


def _in_turn(model: Any, processor: Any, tasks: Iterable[Task]) -> Iterator[list[Row]]:
    """Answer tasks one after the other, row by row."""
    for task in tasks:
        for row in task.rows(model, processor):
            yield [row]


def measure(
    model: Any,
    processor: Any,
    runs: Sequence[Run],
    questions: Sequence[tuple[Image.Image, Asked]],
) -> dict[Run, Times]:
    """Time the first token of each run on each question, one at a time, encoder included.

    Args:
        model: the model, with nothing attached.
        processor: its processor.
        runs: what to time, ``FULL`` among them.
        questions: pictures and questions.
    """

    def time_one(run_: Run, number: int) -> FirstToken:
        image, asked = questions[number]
        image = _blank(image) if run_ == BLIND else image
        inputs = prepare(processor, [image], [asked.question.text], model.device, [asked.turns])
        if run_.variant is None:
            return generate_timed(model, inputs, max_new_tokens=1).first
        if run_.variant.inside:
            assert run_.keep is not None
            with attach_inside(model, method=run_.variant.schedule, keep=run_.keep):
                return generate_timed(model, inputs, max_new_tokens=1).first
        options: dict[str, Any] = {**run_.variant.options, "keep": run_.keep, "timing": True}
        with attach(model, processor=processor, **options) as session:
            return generate_timed(model, inputs, session, max_new_tokens=1).first

    named = {str(i): partial(time_one, run_) for i, run_ in enumerate(runs)}
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
        chunk: Sequence[tuple[Scene, list[Asked]]],
    ) -> None:
        # Draws follow the number of an image in its call, so each call needs a seed of its own.
        self.seed = config.seed * 1_000_003 + number
        self.asked = [one for _, of_scene in chunk for one in of_scene]
        self.images = [scene.image for scene, _ in chunk]
        self.sheet = Sheet(
            model,
            processor,
            self.images,
            [i for i, (_, of_scene) in enumerate(chunk) for _ in of_scene],
            [one.question.text for one in self.asked],
            [one.turns for one in self.asked],
            config.max_new_tokens,
        )

    def sit(self, run_: Run) -> Answered:
        """Answer all questions in one way."""
        if run_.variant is not None:
            assert run_.keep is not None
            return answer(self.sheet, run_.variant, keep=run_.keep, seed=self.seed)
        return answer_full(self._blinded() if run_ == BLIND else self.sheet)

    def _blinded(self) -> Sheet:
        """The same questions about grey pictures, one picture for each size."""
        blanks = {image.size: _blank(image) for image in self.images}
        sizes = list(blanks)
        which = [sizes.index(self.images[i].size) for i in self.sheet.which]
        return dataclasses.replace(self.sheet, images=list(blanks.values()), which=which)


def _blank(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, _GREY)


def _chunks(
    scenes: Sequence[tuple[Scene, list[Asked]]], batch: int
) -> Iterator[list[tuple[Scene, list[Asked]]]]:
    """Whole scenes with about ``batch`` questions; scenes without a question are left out."""
    chunk: list[tuple[Scene, list[Asked]]] = []
    n_questions = 0
    for scene, of_scene in scenes:
        if not of_scene:
            continue
        if chunk and n_questions + len(of_scene) > batch:
            yield chunk
            chunk, n_questions = [], 0
        chunk.append((scene, of_scene))
        n_questions += len(of_scene)
    if chunk:
        yield chunk


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    """``n`` items, or all if there are fewer, evenly spread and so of all kinds."""
    n = min(n, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]
