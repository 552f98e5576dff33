"""Adapting a frozen encoder to sparse clouds, with unlabelled clouds alone.

Source: ESP-Zero (arXiv 2404.19639), a reconstruction: the frozen encoder on a dense cloud teaches
the adapted one on a few of its points. What is ours is marked where it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budwood.errors import DivergedError, InputError, OutputError, first_line
from budwood.points.adapters import Adapter, identity, make_adapter
from budwood.points.adapters.base import FILE
from budwood.points.classify import embed_names, encode
from budwood.points.distill import Curriculum, Objective
from budwood.points.encoders import PointEncoder
from budwood.points.io import Cloud
from budwood.points.methods import METHODS, Method
from budwood.points.sampling import SAMPLERS, normalize
from budwood.points.text import TextEmbeddings

STATE = "unfinished.pt"
WARM_UP = 20
SAVE_EVERY = 50
ESTIMATE_WITH = 256
"""Clouds that BatchNorm statistics are taken of, at most, for each number of points."""
NEARLY = 0.9
"""Part of a number of points from which on a cloud counts as one of so many: some of its points may
have lain at the same place. Clouds of a batch are cut to the smallest."""
ONE_SIDED = ("lidar", "occluded")
"""Samplers that leave out what is hidden."""

Prepared = Sequence[tuple[Tensor, Tensor | None]]
OnStep = Callable[[int, int], Any]


@dataclass(frozen=True)
class AdaptConfig:
    """How to adapt.

    Attributes:
        method: a name in ``METHODS``.
        steps: optimiser steps, 1 or more; nothing is trained for a method without an objective.
        batch_size: clouds a step, 1 or more.
        lr: learning rate; default the method's.
        seed: of everything drawn.
        objective: what is minimised; default the method's.
        curriculum: how many points the student sees.
        sampler: how they are chosen, a name in ``SAMPLERS``. Adapters that fade in do so at once
            for clouds of which one side is seen, which lack more than points; ours.
        options: of the adapter, over those of the method.
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
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"lr={self.lr} must be above 0")
        if self.seed < 0:
            raise InputError(f"seed={self.seed} must be 0 or more")

    @property
    def resolved(self) -> Method:
        """The method with what is set here instead of its own."""
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
    clouds: Sequence[Cloud] | Prepared,
    texts: TextEmbeddings | None,
    encoder: PointEncoder,
    config: AdaptConfig | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    up: str = "y",
    on_step: OnStep | None = None,
) -> Adapter:
    """Adapt an encoder to sparse clouds; the encoder itself is not written to.

    Deviations from the paper, all ours: the teacher sees each cloud as it is, once; the student
    sees points drawn anew each step, as many as the curriculum says; the objective of the default
    method has a positive term; AdamW with a cosine schedule.

    Args:
        clouds: dense ones, unlabelled: as read, or as :meth:`PointEncoder.prepare` returns them.
            Steps on clearly more points than a cloud has are left to the others.
        texts: embeddings of names, of the encoder's own text tower, for a method that compares
            names; see :attr:`Method.compares_names`. Which of them a cloud is stays unknown.
        encoder: frozen.
        config: how; default ``AdaptConfig()``.
        output: a folder for the adapter. An unfinished run of the same settings there goes on
            where it was.
        up: ``"y"`` or ``"z"``: the axis of the clouds that points up.
        on_step: called with steps done and to do.

    Returns:
        The adapter, in evaluation mode.

    Raises:
        InputError: no clouds, or unusable ones; fewer than two names for a method that compares
            them; or an output for a method that is more than an adapter.
        ShapeError: embeddings of another width than the encoder's features.
        DivergedError: the loss or its gradient was NaN or infinite; no adapter is written.
        OutputError: the folder has an adapter, an unfinished run of other settings, or cannot be
            written.
    """
    config = config or AdaptConfig()
    prepared = [
        encoder.prepare(one, up=up, seed=config.seed) if isinstance(one, Cloud) else one
        for one in clouds
    ]
    if not prepared:
        raise InputError("there are no clouds to adapt to; give at least one")
    texts = _compared(texts, encoder, config)
    if output is not None:
        check_output(Path(output), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapter = make_adapter(config.resolved.adapter, encoder, **config.resolved.options)
    run = _Run(adapter, config, prepared, texts, None if output is None else Path(output))
    run.go(on_step)
    if output is not None:
        adapter.save(output)
        run.finish()
    return adapter


def _compared(
    texts: TextEmbeddings | None, encoder: PointEncoder, config: AdaptConfig
) -> TextEmbeddings | None:
    """The names that a method compares; None if it compares none."""
    if not config.resolved.compares_names:
        return None
    n_names = 0 if texts is None else len(texts.labels)
    if n_names < 2:
        raise InputError(
            f"method {config.method!r} compares names, and there are {n_names}; give two or more"
        )
    return embed_names(encoder, texts)


def check_output(folder: Path, config: AdaptConfig) -> None:
    """Whether an adapter can go to a folder, for a look before slow work; raises as adapt does."""
    method = config.resolved
    if not method.density_aware:
        raise InputError(
            f"method {config.method!r} is for comparison in `budwood bench points`: its group "
            "sizes are no part of an adapter; choose another"
        )
    if (folder / FILE).exists():
        raise OutputError(f"{folder / FILE} exists; choose another folder")
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir():
        raise OutputError(f"{there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {there}; choose another folder")


def thinned(
    cloud: tuple[Tensor, Tensor | None], n_points: int, sampler: str, seed: int
) -> tuple[Tensor, Tensor | None]:
    """A prepared cloud with fewer points, normalised again.

    Args:
        cloud: xyz and rgb (or None), shape (n, 3).
        n_points: to keep at most.
        sampler: a name in ``SAMPLERS``.
        seed: of the draw.
    """
    xyz, rgb = cloud
    points = xyz.double()
    kept = SAMPLERS.get(sampler)(points.numpy(), n_points, seed)
    return _normalized(points[kept]), None if rgb is None else rgb[kept]


def stacked(clouds: Prepared, grey: float) -> tuple[Tensor, Tensor | None]:
    """A batch of as many points each as the smallest cloud has, evenly spread over the others'.

    LiDAR-like samples of one number differ in how many points they have. What was cut is normalised
    again.

    Args:
        clouds: xyz and rgb (or None) of each.
        grey: colour of clouds without any among others with colours.
    """
    n_points = min(len(xyz) for xyz, _ in clouds)
    parts = [_cut(cloud, n_points) for cloud in clouds]
    xyz = torch.stack([xyz for xyz, _ in parts])
    if all(rgb is None for _, rgb in parts):
        return xyz, None
    return xyz, torch.stack(
        [xyz.new_full(xyz.shape[1:], grey) if rgb is None else rgb for _, rgb in parts]
    )


def _cut(cloud: tuple[Tensor, Tensor | None], n_points: int) -> tuple[Tensor, Tensor | None]:
    xyz, rgb = cloud
    if len(xyz) == n_points:
        return cloud
    rows = torch.linspace(0, len(xyz) - 1, n_points).round().long()
    return _normalized(xyz[rows].double()), None if rgb is None else rgb[rows]


def _normalized(xyz: Tensor) -> Tensor:
    return torch.from_numpy(normalize(Cloud(xyz.numpy())).xyz).float()


class _Run:
    """One adaptation: what is trained, how far it is, and where that is kept."""

    def __init__(
        self,
        adapter: Adapter,
        config: AdaptConfig,
        clouds: Prepared,
        texts: TextEmbeddings | None,
        folder: Path | None,
    ) -> None:
        self.adapter, self.config, self.clouds, self.texts = adapter, config, clouds, texts
        self.folder, self.step = folder, 0
        self.device = next(adapter.encoder.parameters()).device
        self.sizes = np.array([len(xyz) for xyz, _ in clouds])
        method = config.resolved
        self.curriculum = dataclasses.replace(
            config.curriculum, counts=self._usable(config.curriculum.counts)
        )
        self.objective, self.lr = method.objective, method.lr
        self.optim = None
        if self.objective is not None:
            self.optim = torch.optim.AdamW(adapter.parameters(), lr=self.lr, weight_decay=0.0)
        self.settings = "" if folder is None else self._settings()
        self.resumed = self._resume()

    def go(self, on_step: OnStep | None) -> None:
        """Statistics first, then the steps that are left."""
        if not self.resumed and self.adapter.statistics is not None:
            self.adapter.estimate(self._sparse_batches())
        if self.objective is None or self.optim is None:
            return
        teacher = encode(self.adapter.encoder, self.clouds).to(self.device)
        vectors = None if self.texts is None else self.texts.vectors.to(self.device)
        while self.step < self.config.steps:
            rng = np.random.default_rng([self.config.seed, self.step])
            n_points = self._points(rng)
            chosen = self._chosen(n_points, self.config.batch_size, rng)
            xyz, rgb = self._batch(chosen, n_points, rng)
            student = self.adapter(xyz, rgb, 1.0)  # whole: it fades in use alone
            loss = self.objective(
                student, teacher[chosen], vectors, self.adapter.encoder.logit_scale
            )
            self._update(loss)
            if on_step is not None:
                on_step(self.step, self.config.steps)
            if self.step % SAVE_EVERY == 0:
                self._save()

    def finish(self) -> None:
        """The adapter is written: what was for going on is no longer needed."""
        if self.folder is not None:
            (self.folder / STATE).unlink(missing_ok=True)

    def _update(self, loss: Tensor) -> None:
        assert self.optim is not None
        for group in self.optim.param_groups:
            group["lr"] = self.lr * _factor(self.step, self.config.steps)
        self.optim.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise DivergedError(
                f"the loss or its gradient is NaN or infinite at step {self.step + 1}, and no "
                f"adapter is written; give a learning rate below {self.lr:g}"
            )
        self.optim.step()
        self.step += 1

    def _usable(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Those at which the adapter does anything, and that there is a cloud for.

        Raises:
            InputError: none.
        """
        reached = self._reached(counts)
        encoder, told = self.adapter.encoder, ", ".join(map(str, counts))
        if not reached:
            raise InputError(
                f"the adapter does nothing at {told} points: {encoder.name} was made for "
                f"{encoder.grouping.n_dense}; give smaller counts"
            )
        usable = self._with_clouds(reached)
        if not usable:
            raise InputError(
                f"no cloud has {min(reached)} points, the densest has {self.sizes.max()}; give "
                "denser clouds, or smaller counts"
            )
        return usable

    def _reached(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Those at which the adapter does anything: one that fades is out of dense clouds."""
        return tuple(n for n in counts if self.adapter.share(n) > 0)

    def _with_clouds(self, counts: Sequence[int]) -> tuple[int, ...]:
        return tuple(n for n in counts if NEARLY * n <= self.sizes.max())

    def _chosen(self, n_points: int, most: int, rng: np.random.Generator) -> np.ndarray:
        """Which clouds: of those that have so many points, or nearly."""
        dense = np.flatnonzero(self.sizes >= NEARLY * n_points)
        return rng.choice(dense, min(most, len(dense)), replace=False)

    def _points(self, rng: np.random.Generator) -> int:
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 32)))
        return self.curriculum.points(self.step, self.config.steps, generator)

    def _batch(
        self, chosen: np.ndarray, n_points: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        seeds = rng.integers(1 << 32, size=len(chosen))
        xyz, rgb = stacked(
            [
                thinned(self.clouds[i], n_points, self.config.sampler, int(seed))
                for i, seed in zip(chosen, seeds)
            ],
            self.adapter.encoder.preparation.grey,
        )
        return xyz.to(self.device), None if rgb is None else rgb.to(self.device)

    def _sparse_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        rng = np.random.default_rng(self.config.seed)
        counts = self._with_clouds(self._reached(self.adapter.config.counts))
        for n_points in counts or self.curriculum.counts:
            chosen = self._chosen(n_points, ESTIMATE_WITH, rng)
            for start in range(0, len(chosen), 64):
                yield self._batch(chosen[start : start + 64], n_points, rng)

    # What is kept of an unfinished run. -----------------------------------------------------------

    def _settings(self) -> str:
        """A digest of everything that the result depends on."""
        about = json.dumps(
            [
                dataclasses.asdict(self.config),
                dataclasses.asdict(self.config.resolved),
                identity(self.adapter.encoder),
                None if self.texts is None else self.texts.labels,
            ],
            default=str,
            sort_keys=True,
        )
        digest = hashlib.sha256(about.encode())
        if self.texts is not None:
            digest.update(self.texts.vectors.numpy().tobytes())
        for part in itertools.chain(*self.clouds):
            digest.update(b"" if part is None else part.numpy().tobytes())
        return digest.hexdigest()

    def _save(self) -> None:
        if self.folder is None or self.optim is None:
            return
        state = {
            "settings": self.settings,
            "step": self.step,
            "adapter": self.adapter.state_dict(),
            "optim": self.optim.state_dict(),
        }
        part = self.folder / f".part-{STATE}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, part)
            part.replace(self.folder / STATE)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder / STATE}: {error}") from None

    def _resume(self) -> bool:
        if self.folder is None or self.optim is None or not (self.folder / STATE).exists():
            return False
        path = self.folder / STATE
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # torch raises what its readers happen to
            raise InputError(f"{path} is damaged, delete it: {first_line(error)}") from None
        if state.get("settings") != self.settings:
            raise OutputError(
                f"{path} is of a run with other settings or clouds; delete it or choose another "
                "folder"
            )
        self.adapter.load_state_dict(state["adapter"])
        self.optim.load_state_dict(state["optim"])
        self.step = state["step"]
        return True


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: linear warm-up, then a cosine."""
    warm_up = min(WARM_UP, steps)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
