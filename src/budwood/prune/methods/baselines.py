"""Baselines that look at nothing: random tokens, evenly spaced ones, and the overview."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_seed
from budwood.prune.methods.base import Extras, Method, Selection
from budwood.prune.methods.scores import evenly_spaced, middle


@dataclass(frozen=True)
class Random(Method):
    """Keep a random subset of the tokens, drawn without replacement.

    Without a ``generator`` each call draws anew from ``seed``, so equal calls agree. With one the
    draws follow its stream; a CPU generator gives the same tokens whatever the model's device.
    ``attach`` adds ``seed`` to its own, so that ``random:seed=1`` is another draw than ``random``.

    Args:
        seed: seed of the draw.

    Raises:
        InputError: ``seed`` is out of range.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = False
    draws: ClassVar[bool] = True
    source: ClassVar[str] = "baseline"

    def __post_init__(self) -> None:
        need_seed(self.seed)

    @property
    def own_seed(self) -> int:
        return self.seed

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        draw = generator if generator is not None else torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(visual), generator=draw, device=draw.device)
        return Selection(order[:keep].to(visual.device, non_blocking=True))


@dataclass(frozen=True)
class Uniform(Method):
    """Keep tokens at even distances along the order in which the LLM sees them.

    The order is the raster, row by row. Distances are even along it, not in two dimensions.
    """

    name: ClassVar[str] = "uniform"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = False
    source: ClassVar[str] = "baseline"

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        return Selection(evenly_spaced(len(visual), keep, visual.device))


@dataclass(frozen=True)
class Overview(Method):
    """Keep the overview of a picture, the crop of lowest resolution, and leave its tiles out.

    With a smaller budget its tokens are evenly spaced in two dimensions; what a larger budget
    leaves goes evenly along all other tokens. This is what a smaller picture would give. A picture
    of one resolution is its own overview.
    """

    name: ClassVar[str] = "overview"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True
    source: ClassVar[str] = "baseline"

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
        extras: Extras | None = None,
    ) -> Selection:
        start, rows, columns = _overview(extras, len(visual))
        size = rows * columns
        if keep < size:
            return Selection(start + _even_grid(rows, columns, keep, visual.device))
        tokens = torch.arange(len(visual), device=visual.device)
        others = torch.cat((tokens[:start], tokens[start + size :]))
        more = others[evenly_spaced(len(others), keep - size, visual.device)]
        return Selection(torch.cat((tokens[start : start + size], more)))


def _overview(extras: Extras | None, n_visual: int) -> tuple[int, int, int]:
    """First token, rows and columns of the raster with the largest cells."""
    if extras is None or extras.boxes is None:
        return 0, 1, n_visual
    best, largest, start = (0, 1, n_visual), 0.0, 0
    for rows, columns in extras.grids:
        x0, y0, x1, y1 = extras.boxes[start].tolist()
        if (area := (x1 - x0) * (y1 - y0)) > largest:
            best, largest = (start, rows, columns), area
        start += rows * columns
    return best


def _even_grid(rows: int, columns: int, keep: int, device: torch.device) -> Tensor:
    """``keep`` of the cells of a raster, at even distances in both dimensions."""
    n_rows = max(math.ceil(keep / columns), round(math.sqrt(keep * rows / columns)))
    n_rows = min(n_rows, rows, keep)
    tokens = torch.arange(keep, device=device)
    i = ((tokens + 1) * n_rows - 1) // keep  # the row that each goes to
    begin, end = keep * i // n_rows, keep * (i + 1) // n_rows
    return middle(i, rows, n_rows) * columns + middle(tokens - begin, columns, end - begin)
