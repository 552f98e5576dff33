"""What adaptation gains: accuracy on classes seen in it, unseen, and novel to the encoder as well.

Every method gets the same clouds. A row is one method at one density: the mean over seeds, each of
which draws the points of the test clouds and whatever training draws.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.errors import InputError
from budwood.points.adapt import AdaptConfig, Prepared, adapt, thinned
from budwood.points.adapters import Adapter
from budwood.points.classify import encode
from budwood.points.data import GROUPS, CloudSet
from budwood.points.distill import Curriculum
from budwood.points.encoders import PointEncoder
from budwood.points.io import Cloud
from budwood.points.methods import METHODS, Method
from budwood.points.sampling import SAMPLERS
from budwood.points.text import TextEmbeddings

RATES = (0.3, 1.0, 3.0)
"""Learning rates tried, in units of the method's own."""
TUNED_AT = (128, 64, 32)
"""Numbers of points whose mean accuracy on validation chooses the rate."""

Row = dict[str, Any]
OnJob = Callable[[int, int], Any]


@dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Attributes:
        methods: names in ``METHODS``.
        points: numbers of points.
        lidar: numbers of points of LiDAR-like samples, besides.
        seeds: how many, 1 or more.
        steps: of training.
        batch_size: clouds a step.
        sampler: how the points of clouds are drawn that methods adapt to, and that rates are chosen
            on; a name in ``SAMPLERS``.
        curriculum: of all methods; those that fade in leave out counts at which they do nothing.
        tune: choose each learning rate on validation clouds of seen classes, with a seed of its
            own; else the methods' defaults hold.
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

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError("give at least one method, each once")
        for name in self.methods:
            METHODS.get(name)
        SAMPLERS.get(self.sampler)
        if self.seeds < 1:
            raise InputError(f"seeds={self.seeds} must be 1 or more")
        if not self.points + self.lidar or min(self.points + self.lidar) < 2:
            raise InputError("give numbers of points, 2 or more each")

    @property
    def densities(self) -> tuple[tuple[str, int], ...]:
        """Sampler and number of points of each row of a method."""
        return (*(("random", n) for n in self.points), *(("lidar", n) for n in self.lidar))


@dataclass(frozen=True, eq=False)
class Trial:
    """A method ready to name clouds.

    Attributes:
        method: which.
        adapter: what came out.
        lr: learning rate, None if nothing was trained.
        seconds: that adapting took.
    """

    method: Method
    adapter: Adapter
    lr: float | None
    seconds: float


def run(
    clouds: CloudSet,
    texts: TextEmbeddings,
    encoder: PointEncoder,
    config: BenchConfig,
    on_job: OnJob | None = None,
    *,
    begun: Sequence[Row] = (),
    keep: Callable[[list[Row]], object] | None = None,
) -> list[Row]:
    """Adapt and evaluate every method.

    Args:
        clouds: with uses ``"adapt"``, ``"val"`` and ``"test"``.
        texts: of all labels in ``clouds``.
        encoder: left as it was.
        config: what to measure.
        on_job: called with methods done and to do.
        begun: rows of an earlier run that was cut off; their methods are not measured again.
        keep: called with all rows so far, those of ``begun`` too, after each method.

    Returns:
        Rows with ``method, sampler, points, seeds, params, seconds, lr``, and for each group
        ``…_top1, …_top5`` and ``…_std``, the standard deviation of top-1 over seeds (None for one
        seed); None throughout for a group without test clouds.

    Raises:
        InputError: nothing to adapt to, or to tune on.
    """
    if config.tune and not len(clouds.where(use="val")):
        raise InputError("tuning needs clouds for validation, and there are none")
    bench = _Bench(clouds, texts, encoder, config)
    known = {name: [row for row in begun if row["method"] == name] for name in config.methods}
    grouping = encoder.grouping
    try:
        for done, name in enumerate(config.methods):
            if on_job is not None:
                on_job(done, len(config.methods))
            if not known[name]:
                known[name] = bench.rows_of(name)
                if keep is not None:
                    keep([*itertools.chain(*known.values())])
    finally:
        encoder.grouping = grouping
    if on_job is not None:
        on_job(len(config.methods), len(config.methods))
    return [*itertools.chain(*known.values())]


class _Bench:
    def __init__(
        self, clouds: CloudSet, texts: TextEmbeddings, encoder: PointEncoder, config: BenchConfig
    ) -> None:
        self.encoder, self.config, self.texts = encoder, config, texts
        self.grouping = encoder.grouping
        self.parts = {g: clouds.where(group=g, use="test") for g in GROUPS}
        self.parts["val"] = clouds.where(use="val")
        self.dense = {name: self._prepared(part) for name, part in self.parts.items()}
        self.thin: dict[tuple[str, str, int, int], Prepared] = {}
        self.adapting = self._prepared(clouds.where(use="adapt"))
        self.seen_texts = self._texts_of(clouds.where(group="seen").labels)

    def rows_of(self, name: str) -> list[Row]:
        """One row for each density."""
        method: Method = METHODS.get(name)
        aware = method.density_aware
        self.encoder.grouping = dataclasses.replace(self.grouping, density_aware=aware)
        lr = self._tuned(name) if self.config.tune and method.objective else None
        trials = [self._trial(name, seed, lr) for seed in range(self.config.seeds)]
        params = sum(p.numel() for p in trials[0].adapter.parameters())
        shared = {
            "params": params,
            "seeds": len(trials),
            "seconds": round(statistics.fmean(t.seconds for t in trials), 1),
            "lr": trials[0].lr,
        }
        rows = []
        for sampler, n_points in self.config.densities:
            found = [
                self._accuracies(trial, sampler, n_points, seed)
                for seed, trial in enumerate(trials)
            ]
            about = {"method": name, "sampler": sampler, "points": n_points}
            rows.append({**about, **_means(found), **shared})
        return rows

    def _trial(self, name: str, seed: int, lr: float | None) -> Trial:
        config = AdaptConfig(
            name,
            self.config.steps,
            self.config.batch_size,
            lr,
            seed,
            sampler=self.config.sampler,
            curriculum=self.config.curriculum,
        )
        start = time.perf_counter()
        adapter = adapt(self.adapting, self.seen_texts, self.encoder, config)
        seconds = time.perf_counter() - start
        method = config.resolved
        return Trial(method, adapter, method.lr if method.objective else None, seconds)

    def _tuned(self, name: str) -> float:
        """The rate with the best accuracy on seen classes; a seed that no row uses."""
        seed = self.config.seeds
        scored = []
        for factor in RATES:
            trial = self._trial(name, seed, factor * METHODS.get(name).lr)
            drawn = self.config.sampler
            tops = [self._accuracy(trial, "val", drawn, n, seed)[0] for n in TUNED_AT]
            scored.append((statistics.fmean(tops), trial.lr))
        return max(scored)[1]

    def _accuracies(self, trial: Trial, sampler: str, n_points: int, seed: int) -> Row:
        row: Row = {}
        for group in GROUPS:
            known = len(self.parts[group]) > 0
            found = self._accuracy(trial, group, sampler, n_points, seed) if known else (None, None)
            row |= {f"{group}_top1": found[0], f"{group}_top5": found[1]}
        return row

    def _accuracy(
        self, trial: Trial, part: str, sampler: str, n_points: int, seed: int
    ) -> tuple[float, float]:
        """Top-1 and top-5 among the names of the classes in a part."""
        clouds = self.parts[part]
        thin = self._thinned(part, sampler, n_points, seed)
        features = encode(self.encoder, thin, trial.adapter)
        texts = self._texts_of(clouds.labels)
        vectors = trial.adapter.adjusted_names(texts.vectors, features)
        wanted = torch.tensor([texts.labels.index(one.label) for one in clouds.about])
        return top_k(features, vectors, wanted, 1), top_k(features, vectors, wanted, 5)

    def _thinned(self, part: str, sampler: str, n_points: int, seed: int) -> Prepared:
        """The clouds of a part with fewer points, the same for every method."""
        key = (part, sampler, n_points, seed)
        if key not in self.thin:
            first = seed * 1_000_003
            self.thin[key] = [
                thinned(cloud, n_points, sampler, first + i)
                for i, cloud in enumerate(self.dense[part])
            ]
        return self.thin[key]

    def _texts_of(self, labels: Sequence[str]) -> TextEmbeddings:
        rows = [self.texts.labels.index(label) for label in labels]
        return TextEmbeddings(tuple(labels), self.texts.vectors[rows])

    def _prepared(self, clouds: CloudSet) -> Prepared:
        return [self.encoder.prepare(Cloud(xyz.astype("float64"))) for xyz in clouds.xyz]


def top_k(features: Tensor, vectors: Tensor, wanted: Tensor, k: int) -> float:
    """Share of features whose right name is among the k nearest.

    Args:
        features: shape (n, d).
        vectors: of the names, of length 1, shape (n_names, d).
        wanted: number of the right name of each, shape (n,).
        k: all names count if there are fewer.
    """
    cosines = F.normalize(features, dim=-1) @ vectors.T
    best = cosines.topk(min(k, len(vectors)), dim=-1).indices
    return (best == wanted[:, None]).any(-1).float().mean().item()


def _means(found: Sequence[Mapping[str, float | None]]) -> Row:
    row: Row = {}
    for key in found[0]:
        values = [one[key] for one in found]
        known = [value for value in values if value is not None]
        row[key] = statistics.fmean(known) if known else None
        if key.endswith("_top1"):
            spread = statistics.stdev(known) if len(known) > 1 else None
            row[key.replace("_top1", "_std")] = spread
    return row
