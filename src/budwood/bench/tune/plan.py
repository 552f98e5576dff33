"""The plan of a comparison: methods, learning rates, seeds and data."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood.checks import need_at_least, need_number
from budwood.errors import InputError
from budwood.tune.data.examples import Example, read_examples, styled
from budwood.tune.evaluate.divergence import chat_prompts
from budwood.tune.evaluate.suite import GENERAL, TEXT
from budwood.tune.methods import attach, parse_tuner
from budwood.tune.methods.base import Tuner
from budwood.tune.tasks import MADE, made
from budwood.tune.training.settings import Settings

METHODS = ("lora", "lora-wd", "dora", "lora-kl", "moe", "slim")
SPLIT_SEED = 20_250_101
"""Seed of the split into training and validation, the same for every comparison."""


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        methods: names with options, as :func:`parse_tuner` takes them.
        targets: tasks that are trained on, all together: of :data:`budwood.tune.tasks.MADE`, or
            those with a ``NAME_train.jsonl`` in the folder of the data.
        general: tasks that are never trained on.
        strengths: adapter strengths at which each trained adapter is measured as well, on
            validation data and text; ``rewound`` in the record of a run.
        lrs: learning rates to try with each method; none for those in the folder.
        seeds: seeds of the final runs; the first is the sweep's.
        settings: how to train; learning rate and seed are replaced.
        reference: method whose number of trained parameters the others get.
        rank: rank of the reference.
        per_task: training examples per task, at most; 0 for all.
        n_validation: validation examples per task, taken from its training data.
        limit: test questions per task; 0 for all.
        general_limit: questions per general task; 0 for all.
        windows: windows of text, for perplexity.
        prompts: everyday requests, for the divergence.
        probe_limit: validation questions per task at each point of the curve over steps.
        style: how multiple choice is asked.
        batch: prompts in one forward pass of evaluation.
    """

    methods: tuple[str, ...] = METHODS
    targets: tuple[str, ...] = tuple(MADE)
    general: tuple[str, ...] = GENERAL
    strengths: tuple[float, ...] = ()
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Settings = field(default_factory=Settings)
    reference: str = "slim"
    rank: int = 4
    per_task: int = 2_000
    n_validation: int = 200
    limit: int = 0
    general_limit: int = 400
    windows: int = 48
    prompts: int = 48
    probe_limit: int = 40
    style: str = "cloze"
    batch: int = 16

    def __post_init__(self) -> None:
        for text in (*self.methods, self.reference):
            parse_tuner(text)
        for name in ("methods", "targets", "general", "lrs", "seeds", "strengths"):
            values = getattr(self, name)
            needed = name in ("methods", "targets", "seeds")
            if (needed and not values) or len(set(values)) < len(values):
                raise InputError(f"{name} {list(values)} must hold something, and nothing twice")
        positive = ("rank", "n_validation", "batch")
        need_at_least(1, **{name: getattr(self, name) for name in positive})
        counts = ("per_task", "limit", "general_limit", "windows", "prompts", "probe_limit")
        need_at_least(0, **{name: getattr(self, name) for name in counts})
        chat_prompts(self.prompts)  # refuses more than there are
        allowed = "number above 0 and below 1"
        for strength in self.strengths:
            need_number(lambda value: 0 < value < 1, allowed, strength=strength)
        for lr in self.lrs:
            dataclasses.replace(self.settings, lr=lr)
        for seed in self.seeds:
            dataclasses.replace(self.settings, seed=seed)

    @property
    def comparable(self) -> dict[str, Any]:
        """What must be equal for runs to be compared: all but methods, rates and seeds."""
        plain = dataclasses.asdict(self)
        # What is asked is in the digests of the data and of the tests.
        for name in ("methods", "targets", "general", "strengths", "lrs", "seeds"):
            del plain[name]
        for name in ("lr", "seed"):
            del plain["settings"][name]
        return plain


@dataclass(frozen=True)
class Trial:
    """One run: a method, a learning rate and a seed."""

    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        plain = re.sub(r"[^a-z0-9.+-]+", "_", self.method.lower())
        return f"{plain}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Material:
    """Training and validation examples by task.

    Attributes:
        train: task → examples.
        validation: task → examples, none of them in ``train``; a suite asks them in its style.
    """

    train: dict[str, list[Example]]
    validation: dict[str, list[Example]]

    @property
    def all_train(self) -> list[Example]:
        """Training examples of all tasks."""
        return [example for examples in self.train.values() for example in examples]


def read_material(plan: Plan, data: Path) -> Material:
    """Read and split the training data.

    Raises:
        InputError: a file is missing or malformed, or too short to be split.
    """
    needed = [f"{name}_train.jsonl" for name in plan.targets if name not in MADE] + [TEXT]
    missing = [name for name in needed if not (data / name).is_file()]
    if missing:
        raise InputError(f"{data} lacks {', '.join(missing)}; see docs/tune.md for what it holds")
    train, validation = {}, {}
    for name in plan.targets:
        if name in MADE:
            parts = made(name)
            validation[name] = list(parts["validation"][: plan.n_validation])
            chosen = list(parts["train"][: plan.per_task or None])
        else:
            examples = read_examples(str(data / f"{name}_train.jsonl"))
            validation[name], chosen = split(examples, plan.n_validation, plan.per_task, name)
        train[name] = [styled(one, plan.style) for one in chosen]
    return Material(train, validation)


def split(
    examples: Sequence[Example], n_validation: int, n_train: int, name: str
) -> tuple[list[Example], list[Example]]:
    """Split examples into validation and training, the same way for the same data.

    A question that occurs twice goes to one side only.
    """
    order = sorted({one.question for one in examples})
    random.Random(f"{SPLIT_SEED} {name}").shuffle(order)
    place = {question: i for i, question in enumerate(order)}
    if len(order) <= n_validation:
        raise InputError(
            f"{name} has {len(order)} questions; it needs more than n_validation={n_validation}"
        )
    shuffled = sorted(examples, key=lambda one: place[one.question])
    validation = [one for one in shuffled if place[one.question] < n_validation]
    train = [one for one in shuffled if place[one.question] >= n_validation]
    return validation[:n_validation], train[: n_train or None]


def fit_rank(
    count: Callable[[int], int],
    n_wanted: int,
    ranks: Sequence[int] = (),
    tolerance: float = 0.05,
) -> int:
    """The rank whose number of trainable parameters is nearest to a given one.

    Args:
        count: rank → parameters, which grow by the same amount with each rank.
        n_wanted: parameters.
        ranks: the only ones that the method has, of which the nearest is taken however far it is;
            none for all.
        tolerance: fraction by which they may differ.

    Raises:
        InputError: no rank comes as near.
    """
    first, second = (count(rank) for rank in (ranks[:2] if len(ranks) > 1 else (1, 2)))
    if ranks:
        low, high = ranks[:2]
        each = (second - first) / (high - low)
        return min(ranks, key=lambda rank: abs(first + (rank - low) * each - n_wanted))
    step = second - first
    rank = max(1, round((n_wanted - first) / step) + 1)
    n_found = first + (rank - 1) * step
    if abs(n_found - n_wanted) > tolerance * n_wanted:
        raise InputError(
            f"no rank gives {n_wanted:,} trainable parameters within {tolerance:.0%}: rank {rank} "
            f"has {n_found:,}; choose another rank for the reference"
        )
    return rank


def count_at(tuner: Tuner, model: Any) -> Callable[[int], int]:
    """A function from rank to trainable parameters; it attaches, counts and detaches."""

    def count(rank: int) -> int:
        adapted = attach(tuner, model, rank, seed=0)
        try:
            return tuner.n_trained(adapted)
        finally:
            adapted.unload()

    return count
