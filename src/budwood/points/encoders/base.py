"""The base of all point encoders."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from budwood.errors import InputError, ShapeError
from budwood.points.axes import AUTO, to_up
from budwood.points.encoders.blocks import Block
from budwood.points.grouping import Grouping, check_points
from budwood.points.io.cloud import Cloud
from budwood.points.sampling import (
    check_draw,
    check_extent,
    normalize,
    sample,
    without_duplicates,
)

PreparedCloud = tuple[Tensor, Tensor | None]
"""xyz, and rgb or None, of one cloud: float32, shape (n_points, 3)."""

Around = Callable[[int, Block, Tensor], Tensor]
"""Called in place of each block with its number, the block and its input; returns its output."""

Published = Mapping[str, tuple[str | None, ...]]
"""Names here → published names. Several are stacked along the first axis; None is zeros."""

LOGIT_SCALE = 1 / 0.07
MOST_SCALE = 100.0
MOST_SORTED = 1 << 20
"""Larger clouds are thinned first: looking for duplicate points sorts them, which is slow."""


@dataclass(frozen=True)
class Hub:
    """Where a checkpoint is published.

    Attributes:
        repo: id on the Hugging Face hub.
        file: name in that repository.
        kind: ``"model"`` or ``"dataset"``.
        licence: of the weights.
    """

    repo: str
    file: str
    kind: str = "model"
    licence: str = ""


@dataclass(frozen=True)
class Preparation:
    """How an encoder wants its clouds.

    Attributes:
        n_points: points of a cloud in training; larger clouds are thinned, smaller ones kept.
        color: whether colours are used.
        grey: colour of clouds without colours, in [0, 1].
        swap_yz: whether y and z are swapped before encoding (a mirror image), as in training.
    """

    n_points: int
    color: bool = False
    grey: float = 0.4
    swap_yz: bool = False


class PointEncoder(nn.Module, ABC):
    """A transformer on groups of points whose features are aligned with text embeddings.

    Subclasses build ``blocks``, a list of :class:`Block`, and define ``embed``, ``pool`` and
    ``published``.

    Attributes:
        name: the name in ``ENCODERS``, or that of the family.
        text: name of the text tower in ``TOWERS`` whose space the features are in.
        embed_dim: width of the features.
        dim: width of the tokens.
        grouping: how clouds are cut into groups; can be replaced.
        preparation: how clouds are prepared.
        logit_scale: factor on cosines before softmax, from the checkpoint.
        checkpoint: the file of the weights; None for those that ship.
        labels_file: the labels that it was trained to name, where they are known (see
            ``label_file.py``).
        pos_in_every_block: whether position embeddings are added before each block, or once.
        stem: names of the modules that turn groups into tokens and positions.
    """

    blocks: nn.ModuleList
    stem: ClassVar[tuple[str, ...]]
    pos_in_every_block: ClassVar[bool] = False

    def __init__(
        self, name: str, text: str, dim: int, embed_dim: int, grouping: Grouping, prep: Preparation
    ) -> None:
        super().__init__()
        self.name = name
        self.text = text
        self.dim = dim
        self.embed_dim = embed_dim
        self.grouping = grouping
        self.preparation = prep
        self.logit_scale = LOGIT_SCALE
        self.checkpoint: Path | None = None
        self.labels_file: Path | None = None

    @abstractmethod
    def embed(self, xyz: Tensor, rgb: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return tokens and their positions, [CLS] first, shape (batch, 1 + n_groups, dim) each."""

    @abstractmethod
    def pool(self, x: Tensor) -> Tensor:
        """Turn the last block's tokens into features, shape (batch, embed_dim)."""

    @abstractmethod
    def published(self) -> Published:
        """Map entries of ``state_dict`` to published names; {} for an encoder of ours."""

    def forward(
        self, xyz: Tensor, rgb: Tensor | None = None, around: Around | None = None
    ) -> Tensor:
        """Encode clouds of equally many points.

        Args:
            xyz: prepared coordinates, y up, shape (batch, n_points, 3), n_points ≥ 1.
            rgb: colours in [0, 1], same shape. None is grey; encoders without colours ignore it.
            around: runs in place of each block; see `Around`. Adapters use it, so that they need
                not patch the encoder.

        Returns:
            Features, not normalised, shape (batch, embed_dim).

        Raises:
            ShapeError: wrong shapes.
        """
        check_points(xyz)
        if self.preparation.swap_yz:
            xyz = xyz[..., [0, 2, 1]]
        if not self.preparation.color:
            rgb = None
        elif rgb is None:
            rgb = torch.full_like(xyz, self.preparation.grey)
        elif rgb.shape != xyz.shape:
            raise ShapeError(f"rgb has shape {tuple(rgb.shape)}, xyz {tuple(xyz.shape)}")
        x, pos = self.embed(xyz, rgb)
        for index, block in enumerate(self.blocks):
            if index == 0 or self.pos_in_every_block:
                x = x + pos
            x = block(x) if around is None else around(index, block, x)  # type: ignore[arg-type]
        return self.pool(x)

    def prepare(
        self,
        cloud: Cloud,
        n_points: int | None = None,
        *,
        up: str = AUTO,
        sampler: str = "random",
        seed: int = 0,
    ) -> PreparedCloud:
        """Prepare one cloud for :meth:`forward`: drop duplicates, turn, sample, normalise.

        Deviation: clouds above `MOST_SORTED` points are thinned at random first.

        Args:
            cloud: as read.
            n_points: points to keep, 2 or more; default as many as in training, and no more than
                that are ever kept.
            up: the axis of the cloud that points up, in ``AXES``; ``"auto"``: the cloud's own.
            sampler: a name in ``SAMPLERS``.
            seed: seed of the sampling, 0 or more.

        Returns:
            xyz and rgb (or None), float32, shape (n, 3), n ≤ n_points.

        Raises:
            InputError: a single point, or all at the same place; an extent that is not a plausible
                length in any unit; or ``n_points`` or ``seed`` too small.
        """
        wanted = self.preparation.n_points if n_points is None else n_points
        check_draw(wanted, seed, least=2)
        wanted = min(wanted, self.preparation.n_points)
        cloud = without_duplicates(sample(cloud, MOST_SORTED, "random", seed))
        if len(cloud) == 1:
            raise InputError(
                f"{cloud.source} has only one point, or all at the same place: there is no shape"
            )
        check_extent(cloud)
        axis = (cloud.assumed.up or "y") if up == AUTO else up
        turned = Cloud(to_up(cloud.xyz, axis, "y"), cloud.rgb, cloud.source)
        cloud = normalize(sample(turned, wanted, sampler, seed))
        xyz = torch.from_numpy(cloud.xyz).float()
        keep_colors = self.preparation.color and cloud.rgb is not None
        return xyz, torch.from_numpy(cloud.rgb) if keep_colors else None


@dataclass(frozen=True)
class EncoderSpec:
    """An entry of ``ENCODERS``.

    Attributes:
        build: makes the encoder with random weights.
        hub: where its checkpoint is published; None if it ships.
        options: arguments of ``build``.
    """

    build: Callable[..., PointEncoder]
    hub: Hub | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> PointEncoder:
        """The encoder with random weights."""
        return self.build(**self.options)


def scale_of(logarithm: float, source: str) -> float:
    """The factor on cosines from a checkpoint's ``logit_scale``, capped at 100 as in CLIP.

    Args:
        logarithm: the checkpoint's value.
        source: its file, for messages.

    Raises:
        InputError: NaN or infinite.
    """
    check_scale(logarithm, source)
    return math.exp(logarithm) if logarithm < math.log(MOST_SCALE) else MOST_SCALE


def check_scale(scale: float, source: str) -> None:
    """Refuse a ``logit_scale`` that is not finite.

    Raises:
        InputError: NaN or infinite.
    """
    if not math.isfinite(scale):
        raise InputError(f"{source} has logit_scale {scale}; expected a finite number")
