"""The interface of a pruning method: a choice of visual tokens, as a pure tensor function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from budwood.prune.methods.scores import Common


@dataclass(frozen=True)
class Split:
    """How a method divides its budget between the question and the saliency.

    The first read of a number waits for the device. Creating and passing on a split does not.

    Attributes:
        counts: reserved, by text, by saliency; ints, or an int64 tensor of shape (3,) on any
            device.
    """

    counts: Tensor | tuple[int, int, int] = (0, 0, 0)

    @cached_property
    def _ints(self) -> tuple[int, int, int]:
        counts = self.counts.tolist() if isinstance(self.counts, Tensor) else self.counts
        reserved, by_text, by_saliency = counts
        return reserved, by_text, by_saliency

    @property
    def reserved(self) -> int:
        """Tokens that the two lists keep outright, both lists together."""
        return self._ints[0]

    @property
    def by_text(self) -> int:
        """Further tokens chosen by relevance to the text."""
        return self._ints[1]

    @property
    def by_saliency(self) -> int:
        """Further tokens chosen by saliency."""
        return self._ints[2]

    def __repr__(self) -> str:
        reserved, by_text, by_saliency = self._ints
        return f"Split(reserved={reserved}, by_text={by_text}, by_saliency={by_saliency})"


@dataclass(frozen=True, eq=False)
class Extras:
    """What some methods read of one image beside tokens, text and saliency.

    Attributes:
        boxes: x0, y0, x1, y1 of each visual token in the picture, in the order of the tokens,
            float32, on the CPU, shape (n_visual, 4); None if unknown.
        keys: of the attention layer from which saliency is read, floating point, shape
            (n_visual, n_heads, d_head); None if not at hand. Projected features then stand in.
    """

    boxes: Tensor | None = None
    keys: Tensor | None = None

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the rasters that follow each other in the tokens; () if unknown.

        An overview and tiles, or the frames of a video, are one raster each. Tiles that continue
        each other downwards are one raster together.
        """
        return () if self.boxes is None else rasters(self.boxes)


def rasters(boxes: Tensor) -> tuple[tuple[int, int], ...]:
    """Find the rasters that boxes form, in their order.

    A row ends where the next box is not further right at the same height. A row belongs to the
    raster of the row before if it lies below it and has the same columns.

    Args:
        boxes: x0, y0, x1, y1, on the CPU, shape (n, 4).

    Returns:
        Rows and columns of each; the products sum to n.
    """
    corners = boxes[:, :2].tolist()
    rows: list[list[list[float]]] = []
    for corner in corners:
        if not rows or corner[1] != rows[-1][-1][1] or corner[0] <= rows[-1][-1][0]:
            rows.append([])
        rows[-1].append(corner)
    grids: list[list[int]] = []
    above: tuple[float, list[float]] | None = None
    for row in rows:
        y, columns = row[0][1], [x for x, _ in row]
        if above is not None and y > above[0] and columns == above[1]:
            grids[-1][0] += 1
        else:
            grids.append([1, len(columns)])
        above = y, columns
    return tuple((n_rows, n_columns) for n_rows, n_columns in grids)


@dataclass(frozen=True, eq=False)
class Selection:
    """The visual tokens that a method keeps of one image.

    Attributes:
        indices: kept tokens, int64, shape (n_kept,). A method may return them in any order;
            :func:`budwood.prune.select` sorts them into the order in which the LLM sees them.
            Exactly ``keep`` distinct ones, unless the method is not :attr:`Method.exact`.
        relevance: text-to-image score per token, float32, shape (n_visual,); None if the method
            does not compute it.
        saliency: saliency per token, float32, shape (n_visual,); None if the method does not use
            it.
        split: reserved, by text and by saliency, before overlaps are refilled; zeros for a method
            that scores nothing.
        features: what the LLM gets in place of the kept tokens, shape (n_kept, d_model), in the
            order of ``indices``; None if they go to it as they are. Only methods that merge give
            it. Per-layer features of an encoder, such as Qwen3-VL's deepstack, are never merged.
    """

    indices: Tensor
    relevance: Tensor | None = None
    saliency: Tensor | None = None
    split: Split = field(default_factory=Split)
    features: Tensor | None = None


class Method(ABC):
    """A pruning method. Subclass it as a frozen dataclass whose fields are its parameters.

    A subclass sets the class variables and :meth:`choose`. With an entry in
    ``budwood.prune.methods.METHODS`` it has a name, and the contract tests run on it.

    Attributes:
        name: its name in the registry.
        needs_text: ``choose`` reads ``text``.
        needs_saliency: ``choose`` reads ``saliency``.
        needs_vocabulary: ``attach`` calls :meth:`fitted`.
        needs_keys: ``choose`` takes ``extras`` and reads their keys.
        needs_grid: ``choose`` takes ``extras`` and reads their grids.
        merges: it gives :attr:`Selection.features`.
        draws: ``choose`` reads ``generator``.
        whole_crops: it chooses from whole crops in the encoder's order, without unpadding or
            newlines, as published LLaVA code does; :meth:`for_crops` gets their number.
        positions: where the LLM sees what is kept, if ``attach`` is not told: one of ``POSITIONS``.
        exact: it keeps exactly ``keep`` distinct tokens. False only for a method that reproduces
            published faults.
        source: the paper, for the documentation.
    """

    name: ClassVar[str]
    needs_text: ClassVar[bool]
    needs_saliency: ClassVar[bool]
    needs_vocabulary: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    whole_crops: ClassVar[bool] = False
    positions: ClassVar[str] = "compact"
    exact: ClassVar[bool] = True
    source: ClassVar[str]

    @property
    def own_seed(self) -> int:
        """Added to the seed of ``attach`` where the method draws."""
        return 0

    @abstractmethod
    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        """Choose ``keep`` of the visual tokens, without a device-to-host sync.

        :func:`budwood.prune.select` has validated the inputs. Scores are float32 whatever the dtype
        of the inputs; ties go to the lower index.

        Args:
            visual: projected visual tokens in LLM embedding space, shape (n_visual, d_model).
            text: LLM input embeddings of the question, shape (n_text, d_model), n_text ≥ 0; None
                only if the method needs no text.
            saliency: importance per visual token, shape (n_visual,), non-negative; None only if the
                method needs no saliency.
            keep: tokens to keep, 1 ≤ keep ≤ n_visual.
            generator: source of randomness, for methods that draw.

        A method that needs keys or a grid takes one argument more, ``extras``, an :class:`Extras`
        or None.
        """

    def fitted(self, common: Common) -> Method:
        """The same method with what the words of the LLM have in common."""
        return self

    def for_crops(self, n_crops: int) -> Method:
        """The same method for an image of this many crops; only ``whole_crops`` methods differ."""
        return self
