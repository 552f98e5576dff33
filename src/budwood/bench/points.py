"""`bench points`: what adaptation gains on classes seen in it, unseen, and novel to the encoder.

Every method gets the same clouds. A row is one method at one density: the mean over seeds, each of
which draws the points of the test clouds and all randomness of training.

The test clouds of a group come one by one, in an order that the seed draws and that knows no
labels. A method that sees earlier clouds answers for each before it gets the next, and begins with
nothing for each row, group and seed; with ``warm_up`` it sees the clouds for adaptation before, at
the same density, and is not asked about them. One that sees all gets them at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.points.adaptation import AdaptConfig, adapt
from budwood.points.adapters import Adapter
from budwood.points.batches import encode, thinned
from budwood.points.data import GROUPS, CloudSet
from budwood.points.distill import Curriculum
from budwood.points.encoders import PointEncoder
from budwood.points.encoders.base import PreparedCloud
from budwood.points.io import Cloud
from budwood.points.methods import METHODS, Method
from budwood.points.sampling import SAMPLERS
from budwood.points.text import TextEmbeddings
from budwood.progress import Progress, silent

RATES = (0.3, 1.0, 3.0)
"""Learning rates to try, in units of the method's default."""
TUNED_AT = (128, 64, 32)
"""The rate with the best mean accuracy on validation clouds of these numbers of points wins."""

ORDER = 1
"""With a row's seed, the seed of the order in which test clouds come."""

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Attributes:
        methods: names in ``METHODS``.
        points: numbers of points of random samples.
        lidar: numbers of points of LiDAR-like samples.
        occluded: numbers of points of random samples from one side.
        seeds: how many, 1 or more.
        steps: of training.
        batch_size: clouds a step.
        sampler: how points are drawn in adaptation and on validation clouds; a name in
            ``SAMPLERS``.
        curriculum: of all methods; those that fade in skip counts at which they have no effect.
        tune: choose each learning rate on validation clouds of seen classes, with an extra seed;
            otherwise the methods' defaults are used.
        warm_up: methods that see other clouds see those for adaptation before the test clouds.
    """

    methods: tuple[str, ...]
    points: tuple[int, ...] = (1024, 256, 128, 64, 32, 16)
    lidar: tuple[int, ...] = (64,)
    seeds: int = 3
    steps: int = 400
    batch_size: int = 32
    sampler: str = "random"
    curriculum: Curriculum = dataclasses.field(default_factory=Curriculum)
    tune: bool = False
    warm_up: bool = False
    occluded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError("give at least one method, each once")
        for name in self.methods:
            METHODS.get(name)
        SAMPLERS.get(self.sampler)
        need_at_least(1, seeds=self.seeds)
        counts = [n for _, n in self.densities]
        if not counts or min(counts) < 2:
            raise InputError("give numbers of points, 2 or more each")

    @property
    def densities(self) -> tuple[tuple[str, int], ...]:
        """Sampler and number of points of each row of a method."""
        counts = {"random": self.points, "lidar": self.lidar, "occluded": self.occluded}
        return tuple((sampler, n) for sampler, numbers in counts.items() for n in numbers)


def run(
    clouds: CloudSet,
    texts: TextEmbeddings,
    encoder: PointEncoder,
    config: BenchConfig,
    progress: Progress = silent,
    *,
    begun: Sequence[Row] = (),
    keep: Callable[[list[Row]], object] | None = None,
) -> list[Row]:
    """Adapt with every method, and evaluate.

    Args:
        clouds: with uses ``"adapt"``, ``"val"`` and ``"test"``.
        texts: embeddings of all classes in ``clouds``.
        encoder: left as it was.
        config: what to measure.
        progress: called with the number of methods done.
        begun: rows of an earlier run that was cut off; their methods are not measured again.
        keep: called with all rows so far, those of ``begun`` too, after each method.

    Returns:
        Rows with ``method, sees, sampler, points, seeds, params, seconds, lr``, and for each group
        ``…_top1, …_top5`` and ``…_std``, the standard deviation of top-1 over seeds (None for one
        seed); None throughout for a group without test clouds.

    Raises:
        InputError: there are no clouds to adapt to, or to tune on, or they have too few points.
    """
    if config.tune and not len(clouds.where(use="val")):
        raise InputError("tuning needs clouds for validation, and there are none")
    most = clouds.xyz.shape[1]
    if too_many := [n for _, n in config.densities if n > most]:
        raise InputError(f"the clouds have {most:,} points each; {too_many[0]:,} are more")
    evaluation = _Evaluation(clouds, texts, encoder, config.warm_up)
    rows = {name: [row for row in begun if row["method"] == name] for name in config.methods}
    grouping = encoder.grouping
    try:
        for done, name in enumerate(config.methods):
            progress(done, len(config.methods))
            if not rows[name]:
                rows[name] = _rows_of(name, config, evaluation)
                if keep is not None:
                    keep([*itertools.chain(*rows.values())])
    finally:
        encoder.grouping = grouping
    progress(len(config.methods), len(config.methods))
    return [*itertools.chain(*rows.values())]


@dataclass(frozen=True, eq=False)
class Trial:
    """A method after adaptation, with one seed.

    Attributes:
        method: which.
        adapter: its result.
        lr: learning rate; None if nothing was trained.
        seconds: time that adapting took.
    """

    method: Method
    adapter: Adapter
    lr: float | None
    seconds: float


class _Evaluation:
    """Test clouds by group, and the accuracy of trials on sparse samples of them."""

    def __init__(
        self, clouds: CloudSet, texts: TextEmbeddings, encoder: PointEncoder, warm_up: bool
    ) -> None:
        self.encoder, self.texts, self.warm_up = encoder, texts, warm_up
        self.grouping = encoder.grouping
        self.parts = {group: clouds.where(group=group, use="test") for group in GROUPS}
        self.parts |= {use: clouds.where(use=use) for use in ("val", "adapt")}
        self.dense = {name: self._prepared(part) for name, part in self.parts.items()}
        self.seen_texts = texts.only(clouds.where(group="seen").classes)
        self._samples: dict[tuple[str, str, int, int], list[PreparedCloud]] = {}

    def accuracy(
        self, trial: Trial, part: str, sampler: str, n_points: int, seed: int
    ) -> tuple[float, float]:
        """Top-1 and top-5 among the classes of a part."""
        clouds, adapter = self.parts[part], trial.adapter
        rng = np.random.default_rng([seed, ORDER])
        order = rng.permutation(len(clouds))
        tested = self.samples(part, sampler, n_points, seed)
        stream = [tested[i] for i in order]
        if self.warm_up and adapter.sees != "one":
            before = self.samples("adapt", sampler, n_points, seed)
            stream = [*(before[i] for i in rng.permutation(len(before))), *stream]
        texts = self.texts.only(clouds.classes)
        described = encode(self.encoder, stream, adapter)
        logits = adapter.scorer(texts.vectors)(described)[-len(tested) :]
        truth = torch.tensor([texts.labels.index(clouds.labels[i]) for i in order])
        return top_k(logits, truth, 1), top_k(logits, truth, 5)

    def samples(self, part: str, sampler: str, n_points: int, seed: int) -> list[PreparedCloud]:
        """Sparse samples of the clouds of a part, the same for every method."""
        key = (part, sampler, n_points, seed)
        if key not in self._samples:
            first = seed * 1_000_003
            self._samples[key] = [
                thinned(cloud, n_points, sampler, first + i)
                for i, cloud in enumerate(self.dense[part])
            ]
        return self._samples[key]

    def _prepared(self, clouds: CloudSet) -> list[PreparedCloud]:
        return [self.encoder.prepare(Cloud(xyz.astype("float64"))) for xyz in clouds.xyz]


def _rows_of(name: str, config: BenchConfig, evaluation: _Evaluation) -> list[Row]:
    """The rows of one method, one for each density."""
    method: Method = METHODS.get(name)
    evaluation.encoder.grouping = dataclasses.replace(
        evaluation.grouping, density_aware=method.density_aware
    )
    lr = _tuned_rate(name, config, evaluation) if config.tune and method.objective else None
    trials = [_try(name, seed, lr, config, evaluation) for seed in range(config.seeds)]
    about_trials = {
        "sees": trials[0].adapter.sees,
        "params": sum(p.numel() for p in trials[0].adapter.parameters()),
        "seeds": len(trials),
        "seconds": round(statistics.fmean(trial.seconds for trial in trials), 1),
        "lr": trials[0].lr,
    }
    rows = []
    for sampler, n_points in config.densities:
        per_seed = [
            _accuracies(trial, evaluation, sampler, n_points, seed)
            for seed, trial in enumerate(trials)
        ]
        density = {"method": name, "sampler": sampler, "points": n_points}
        rows.append({**density, **_means(per_seed), **about_trials})
    return rows


def _try(
    name: str, seed: int, lr: float | None, config: BenchConfig, evaluation: _Evaluation
) -> Trial:
    """Adapt with one method and one seed."""
    settings = AdaptConfig(
        name,
        config.steps,
        config.batch_size,
        lr,
        seed,
        sampler=config.sampler,
        curriculum=config.curriculum,
    )
    start = time.perf_counter()
    adapter = adapt(evaluation.dense["adapt"], evaluation.seen_texts, evaluation.encoder, settings)
    seconds = time.perf_counter() - start
    method = settings.resolved
    return Trial(method, adapter, method.lr if method.objective else None, seconds)


def _tuned_rate(name: str, config: BenchConfig, evaluation: _Evaluation) -> float:
    """The learning rate with the best accuracy on seen classes, with a seed that no row uses."""
    seed = config.seeds
    scored = []
    for factor in RATES:
        trial = _try(name, seed, factor * METHODS.get(name).lr, config, evaluation)
        top1 = [
            evaluation.accuracy(trial, "val", config.sampler, n_points, seed)[0]
            for n_points in TUNED_AT
        ]
        scored.append((statistics.fmean(top1), trial.lr))
    return max(scored)[1]


def _accuracies(
    trial: Trial, evaluation: _Evaluation, sampler: str, n_points: int, seed: int
) -> Row:
    """Top-1 and top-5 of each group; None for a group without test clouds."""
    row: Row = {}
    for group in GROUPS:
        top1 = top5 = None
        if len(evaluation.parts[group]):
            top1, top5 = evaluation.accuracy(trial, group, sampler, n_points, seed)
        row |= {f"{group}_top1": top1, f"{group}_top5": top5}
    return row


def top_k(logits: Tensor, truth: Tensor, k: int) -> float:
    """Fraction of clouds whose true class is among the k best.

    Args:
        logits: shape (n, n_classes).
        truth: index of the true class of each, shape (n,).
        k: all classes count if there are fewer.
    """
    best = logits.topk(min(k, logits.shape[1]), dim=-1).indices
    return (best == truth[:, None]).any(-1).float().mean().item()


def _means(per_seed: Sequence[Mapping[str, float | None]]) -> Row:
    """Means over seeds, and standard deviations of top-1."""
    row: Row = {}
    for key in per_seed[0]:
        values = [value for accuracies in per_seed if (value := accuracies[key]) is not None]
        row[key] = statistics.fmean(values) if values else None
        if key.endswith("_top1"):
            spread = statistics.stdev(values) if len(values) > 1 else None
            row[key.replace("_top1", "_std")] = spread
    return row
