"""Adapt a frozen encoder to sparse clouds, with unlabelled dense clouds.

Source: ESP-Zero (arXiv 2404.19639), a reconstruction: the frozen encoder on a dense cloud teaches
the adapted one on a few of its points. Parts of ours are marked.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budwood.checks import need_at_least, need_kind, need_positive, need_seed
from budwood.errors import DivergedError, InputError
from budwood.notices import warn_user
from budwood.points.adapters import Adapter, make_adapter
from budwood.points.adapters.base import Usage, check_folder
from budwood.points.batches import SparseSampler, encode
from budwood.points.distill import Curriculum, Objective
from budwood.points.encoders import PointEncoder, as_encoder
from budwood.points.encoders.base import PreparedCloud
from budwood.points.inputs import CloudLike, InputOptions, OnError, Prepared, prepare_each
from budwood.points.io import Assumed
from budwood.points.methods import METHODS, Method
from budwood.points.sampling import SAMPLERS
from budwood.points.text import TextEmbeddings, embed_labels_for
from budwood.points.towers import TextTower
from budwood.points.unfinished import Unfinished, digest
from budwood.progress import Progress, silent

WARM_UP = 20
SAVE_EVERY = 50
ESTIMATE_WITH = 256
"""Clouds from which BatchNorm statistics are estimated at most, for each number of points."""
ESTIMATE_BATCH = 64
ONE_SIDED = ("lidar", "occluded")
"""Samplers that leave out the hidden side of an object."""


@dataclass(frozen=True)
class AdaptConfig:
    """How to adapt.

    Attributes:
        method: a name in ``METHODS``.
        steps: optimiser steps, 1 or more; methods without an objective train nothing.
        batch_size: clouds a step, 1 or more.
        lr: learning rate; default the method's.
        seed: of all randomness, 0 or more.
        objective: what is minimised; default the method's.
        curriculum: how many points the student sees.
        sampler: how they are chosen, a name in ``SAMPLERS``. With one-sided samplers, adapters
            that fade in do so from the encoder's number of points on, since such clouds lack more
            than points; ours.
        options: of the adapter, over the method's.
    """

    method: str = "sparse-lora"
    steps: int = 400
    batch_size: int = 32
    lr: float | None = None
    seed: int = 0
    objective: Objective | None = None
    curriculum: Curriculum = field(default_factory=Curriculum)
    sampler: str = "random"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        METHODS.get(self.method)
        SAMPLERS.get(self.sampler)
        need_at_least(1, steps=self.steps, batch_size=self.batch_size)
        need_seed(self.seed)
        need_kind(Curriculum, "Curriculum", curriculum=self.curriculum)
        need_kind(Objective, "Objective", objective=self.objective)
        if self.lr is not None:
            need_positive(lr=self.lr)

    @property
    def resolved(self) -> Method:
        """The method, with the settings of this configuration in place of its defaults."""
        method: Method = METHODS.get(self.method)
        options = {**method.options, **self.options}
        if method.options.get("fade") and self.sampler in ONE_SIDED and "fade" not in self.options:
            options["fade"] = 1.0
        return dataclasses.replace(
            method,
            lr=self.lr or method.lr,
            objective=method.objective and (self.objective or method.objective),
            options=options,
        )


def adapt(
    clouds: CloudLike | Iterable[CloudLike],
    labels: Sequence[str] | TextEmbeddings | None = None,
    encoder: str | PointEncoder = "sprout",
    config: AdaptConfig | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    output: str | os.PathLike[str] | None = None,
    up: str = "auto",
    columns: str | None = None,
    box: Sequence[float] | None = None,
    invalid: str = "error",
    strays: str = "drop",
    remove_ground: bool = False,
    text: str | TextTower | None = None,
    templates: str | Sequence[str] = "points64",
    on_error: OnError | None = None,
    progress: Progress = silent,
) -> Adapter:
    """Adapt an encoder to sparse clouds; the encoder itself is not changed.

    Deviations from the paper, all ours: the teacher sees each cloud once, as it is; the student
    sees freshly drawn points in each step, as many as the curriculum says; the objective of the
    default method has a positive term; AdamW with a cosine schedule.

    Example::

        adapter = adapt("scans/", output="adapted")
        classify("scan.ply", ["chair", "table"], points=64, adapter=adapter)

    Args:
        clouds: dense and unlabelled: files, folders, :class:`Cloud` objects or arrays, as for
            :func:`budwood.points.classify`. A step on n points uses the clouds that have n, or
            nearly.
        labels: labels, or their embeddings, for a method that compares labels; see
            :attr:`Method.compares_labels`. Which of them a cloud has stays unknown.
        encoder: a name in ``ENCODERS``, or an encoder.
        config: how to adapt; default ``AdaptConfig()``.
        checkpoint: a local file for a named encoder.
        device: where a named encoder runs, such as ``"cuda"``, or ``"auto"``; default the CPU.
        output: a folder for the adapter. An unfinished run with the same settings there is resumed.
        up: the axis of the clouds that points up; as for :func:`budwood.points.classify`, and so
            are ``columns``, ``box``, ``invalid``, ``strays`` and ``remove_ground``.
        columns: letters of the columns of tables and arrays, such as ``"xyz_rgb"``.
        box: x0, y0, z0, x1, y1, z1 in the units of the file: keep the points inside.
        invalid: ``"error"`` or ``"drop"``, for points of which one or two coordinates are NaN or
            infinite.
        strays: ``"drop"`` or ``"keep"``, for a few points far from all others.
        remove_ground: leave out the ground, the lowest large plane.
        text: a text tower instead of the encoder's, for a method that compares labels.
        templates: a name in ``TEMPLATES``, or sentences with ``{}``.
        on_error: called with the name of a cloud that cannot be used and the error; the cloud is
            left out. Default: raise the error.
        progress: called after each step.

    Returns:
        The adapter, in evaluation mode. Its ``usage`` tells how many clouds had enough points for
        which steps; a warning tells of those that had enough for none.

    Raises:
        InputError: no clouds, or unusable ones; fewer than two labels for a method that compares
            them; or an output for a method that is more than an adapter.
        ShapeError: embeddings of another width than the encoder's features.
        DivergedError: the loss or its gradient was NaN or infinite; no adapter is written.
        OutputError: the folder has an adapter or an unfinished run with other settings, or cannot
            be written to.
    """
    config = config or AdaptConfig()
    inputs = InputOptions(
        up=up,
        columns=columns,
        box=box,
        invalid=invalid,
        strays=strays,
        remove_ground=remove_ground,
        seed=config.seed,
    )
    if output is not None:
        check_output(output, config)
    if config.resolved.compares_labels:
        _check_labels(labels, config)
    encoder = as_encoder(encoder, checkpoint, device)
    texts = None
    if config.resolved.compares_labels:
        texts = embed_labels_for(encoder, labels, text=text, templates=templates)
    named = _prepared(clouds, encoder, inputs, on_error)
    prepared = [one.cloud for one in named]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapter = make_adapter(config.resolved.adapter, encoder, **config.resolved.options)
    unfinished = None
    if output is not None:
        unfinished = Unfinished(Path(output), digest(config, adapter, texts, prepared))
    adaptation = _Adaptation(adapter, config, prepared, texts, unfinished)
    adapter.usage = adaptation.usage({one.source: one.assumed for one in named if one.assumed})
    _warn_of_unused(adapter.usage)
    adaptation.run(progress)
    if output is not None and unfinished is not None:
        adapter.save(output)
        unfinished.remove()
    return adapter


def check_output(folder: str | os.PathLike[str], config: AdaptConfig) -> None:
    """Check that an adapter can be written to a folder, before slow work; raises as adapt does."""
    if not config.resolved.density_aware:
        raise InputError(
            f"method {config.method!r} is for comparison in `budwood bench points`: an adapter "
            "cannot hold its group sizes; choose another"
        )
    check_folder(folder)


def _check_labels(labels: Sequence[str] | TextEmbeddings | None, config: AdaptConfig) -> None:
    n_labels = 0 if labels is None else len(labels)
    if n_labels < 2:
        raise InputError(
            f"method {config.method!r} compares labels, and there are {n_labels}; give two or more"
        )


def _warn_of_unused(usage: Usage) -> None:
    if usage.n_used < usage.n_clouds:
        warn_user(
            f"{usage.n_clouds - usage.n_used} of {usage.n_clouds} clouds have too few points for "
            f"steps on {min(usage.by_count)}, and are not used"
        )


def _prepared(
    clouds: Any, encoder: PointEncoder, options: InputOptions, on_error: OnError | None
) -> list[Prepared]:
    prepared = [*prepare_each(clouds, encoder, options, on_error)]
    if not prepared:
        raise InputError("there are no clouds to adapt to; give at least one")
    return prepared


class _Adaptation:
    """One adaptation: the adapter, what it trains on, and the step it is at."""

    def __init__(
        self,
        adapter: Adapter,
        config: AdaptConfig,
        clouds: Sequence[PreparedCloud],
        texts: TextEmbeddings | None,
        unfinished: Unfinished | None,
    ) -> None:
        encoder, method = adapter.encoder, config.resolved
        self.adapter, self.config, self.clouds = adapter, config, clouds
        self.device = next(encoder.parameters()).device
        self.sparse = SparseSampler(clouds, config.sampler, encoder.preparation.grey, self.device)
        counts = self._usable(config.curriculum.counts)
        self.curriculum = dataclasses.replace(config.curriculum, counts=counts)
        self.vectors = None if texts is None else texts.vectors.to(self.device)
        self.objective, self.lr = method.objective, method.lr
        self.unfinished = unfinished
        self.step = 0

    def usage(self, assumed: Mapping[str, Assumed]) -> Usage:
        """How many clouds have enough points for the steps."""
        by_count = {n: self.sparse.n_available(n) for n in self.curriculum.counts}
        return Usage(len(self.clouds), by_count[min(by_count)], by_count, assumed)

    def run(self, progress: Progress) -> None:
        """Estimate statistics, then train."""
        if self.objective is None:
            self._estimate()
            return
        optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=self.lr, weight_decay=0.0)
        resumed = None
        if self.unfinished is not None:
            resumed = self.unfinished.resume(self.adapter, optimizer)
        if resumed is None:
            self._estimate()
        self.step = resumed or 0
        teacher = encode(self.adapter.encoder, self.clouds).to(self.device)
        while self.step < self.config.steps:
            self._update(optimizer, self._loss(self.objective, teacher))
            progress(self.step, self.config.steps)
            if self.unfinished is not None and self.step % SAVE_EVERY == 0:
                self.unfinished.save(self.step, self.adapter, optimizer)

    def _estimate(self) -> None:
        """Estimate BatchNorm statistics, if the adapter has its own."""
        if self.adapter.statistics is not None:
            self.adapter.estimate(self._batches())

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        rng = np.random.default_rng(self.config.seed)
        counts = self.sparse.available(self._reached(self.adapter.config.counts))
        for n_points in counts or self.curriculum.counts:
            chosen = self.sparse.choose(n_points, ESTIMATE_WITH, rng)
            for start in range(0, len(chosen), ESTIMATE_BATCH):
                yield self.sparse.sample(chosen[start : start + ESTIMATE_BATCH], n_points, rng)

    def _loss(self, objective: Objective, teacher: Tensor) -> Tensor:
        """The loss of this step. Its randomness depends on seed and step, so that runs resume."""
        rng = np.random.default_rng([self.config.seed, self.step])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 32)))
        n_points = self.curriculum.points(self.step, self.config.steps, generator)
        chosen = self.sparse.choose(n_points, self.config.batch_size, rng)
        xyz, rgb = self.sparse.sample(chosen, n_points, rng)
        student = self.adapter(xyz, rgb, strength=1.0)  # fading is for use, not for training
        return objective(student, teacher[chosen], self.vectors, self.adapter.encoder.logit_scale)

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.lr * _schedule(self.step, self.config.steps)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise DivergedError(
                f"the loss or its gradient is NaN or infinite at step {self.step + 1}, and no "
                f"adapter is written; give a learning rate below {self.lr:g}"
            )
        optimizer.step()
        self.step += 1

    def _usable(self, counts: Sequence[int]) -> tuple[int, ...]:
        """The numbers of points at which the adapter has an effect and that some cloud has.

        Raises:
            InputError: there are none.
        """
        reached = self._reached(counts)
        encoder, given = self.adapter.encoder, ", ".join(map(str, counts))
        if not reached:
            raise InputError(
                f"the adapter does nothing at {given} points: {encoder.name} was made for "
                f"{encoder.grouping.n_dense}; give smaller counts"
            )
        usable = self.sparse.available(reached)
        if not usable:
            raise InputError(
                f"no cloud has {min(reached)} points, the densest has {self.sparse.sizes.max()}; "
                "give denser clouds, or smaller counts"
            )
        return usable

    def _reached(self, counts: Sequence[int]) -> tuple[int, ...]:
        """The numbers of points at which the adapter has an effect."""
        return tuple(n for n in counts if self.adapter.strength(n) > 0)


def _schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine."""
    warm_up = min(WARM_UP, steps)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
