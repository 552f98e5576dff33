"""How many visual tokens each layer of the LLM sees, under FastV and PyramidDrop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from budwood.checks import need_bool, need_int
from budwood.errors import BudgetError, InputError


@dataclass(frozen=True)
class Schedule(ABC):
    """When visual tokens are dropped inside the LLM, and how many.

    The budget is the mean over all layers by default, so that it costs about what a method costs
    that keeps as many before the LLM: linear layers dominate, and their work is proportional to
    tokens times layers. With ``average=False`` it is the number after the last drop, as papers
    often count.

    Args:
        average: whether the budget is a mean over layers.
    """

    average: bool = True

    name: ClassVar[str]
    source: ClassVar[str]

    def __post_init__(self) -> None:
        need_bool(average=self.average)

    @abstractmethod
    def drops(self, n_layers: int, n_visual: int, keep: int) -> dict[int, int]:
        """Number of visual tokens from a layer on, in the order of the layers.

        Args:
            n_layers: of the LLM.
            n_visual: visual tokens of the prompt.
            keep: the budget, 1 ≤ keep ≤ n_visual.

        Returns:
            Layer (at least 1) → tokens that it and later ones see; empty if nothing is dropped.

        Raises:
            BudgetError: the layers that see all tokens cost more than the budget.
            InputError: the LLM has too few layers.
        """


@dataclass(frozen=True)
class FastV(Schedule):
    """Drop visual tokens once, after the first layers.

    Source: FastV, ECCV 2024, arXiv 2403.06764.

    Args:
        average: whether the budget is a mean over layers, or the number after the drop.
        layer: layers that see all tokens, at least 1; 2 in the paper.

    Raises:
        InputError: ``layer`` is out of range.
    """

    layer: int = 2

    name: ClassVar[str] = "fastv"
    source: ClassVar[str] = "FastV, ECCV 2024, arXiv 2403.06764"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_int(1, layer=self.layer)

    def drops(self, n_layers: int, n_visual: int, keep: int) -> dict[int, int]:
        if self.layer >= n_layers:
            raise InputError(
                f"layer={self.layer} leaves none of the LLM's {n_layers} layers to prune; give at "
                f"most {n_layers - 1}"
            )
        if keep == n_visual:
            return {}
        if not self.average:
            return {self.layer: keep}
        left = (keep * n_layers - self.layer * n_visual) // (n_layers - self.layer)
        if left < 1:
            least = -(-(self.layer * n_visual + n_layers - self.layer) // n_layers)
            raise BudgetError(
                f"keep={keep} of {n_visual} visual tokens, as a mean over {n_layers} layers, is "
                f"less than {self.layer} full layers take; keep at least {least}, or give "
                f"FastV(layer=...) a lower number or average=False"
            )
        return {self.layer: left}


@dataclass(frozen=True)
class PyramidDrop(Schedule):
    """Keep the same fraction of visual tokens at the end of each stage of layers but the last.

    Source: PyramidDrop, CVPR 2025, arXiv 2410.17247. Deviation: the fraction follows from the
    budget, where the paper fixes it at 0.5.

    Args:
        average: whether the budget is a mean over layers, or the number in the last stage.
        stages: stages of about equal depth, at least 2; 4 in the paper.

    Raises:
        InputError: ``stages`` is out of range.
    """

    stages: int = 4

    name: ClassVar[str] = "pyramiddrop"
    source: ClassVar[str] = "PyramidDrop, CVPR 2025, arXiv 2410.17247"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_int(2, stages=self.stages)

    def drops(self, n_layers: int, n_visual: int, keep: int) -> dict[int, int]:
        if self.stages > n_layers:
            raise InputError(
                f"stages={self.stages} exceed the LLM's {n_layers} layers; give at most {n_layers}"
            )
        if keep == n_visual:
            return {}
        starts = [n_layers * stage // self.stages for stage in range(1, self.stages)]
        if not self.average:
            fraction = (keep / n_visual) ** (1 / len(starts))
            return dict(zip(starts, _counts(fraction, n_visual, len(starts))))
        least = _mean(dict.fromkeys(starts, 1), n_layers, n_visual)
        if keep < least:
            raise BudgetError(
                f"keep={keep} of {n_visual} visual tokens, as a mean over {n_layers} layers, is "
                f"less than the first of {self.stages} stages takes; keep at least "
                f"{-int(-least // 1)}, or give PyramidDrop more stages or average=False"
            )
        low, high = 0.0, 1.0
        for _ in range(50):  # the mean grows with the fraction
            middle = (low + high) / 2
            counts = dict(zip(starts, _counts(middle, n_visual, len(starts))))
            low, high = (
                (middle, high) if _mean(counts, n_layers, n_visual) <= keep else (low, middle)
            )
        return dict(zip(starts, _counts(low, n_visual, len(starts))))


def _counts(fraction: float, n_visual: int, n_drops: int) -> list[int]:
    return [max(1, round(n_visual * fraction**drop)) for drop in range(1, n_drops + 1)]


def _mean(drops: dict[int, int], n_layers: int, n_visual: int) -> float:
    return sum(per_layer(drops, n_layers, n_visual)) / n_layers


def per_layer(drops: dict[int, int], n_layers: int, n_visual: int) -> list[int]:
    """Visual tokens that each layer sees."""
    counts, now = [], n_visual
    for layer in range(n_layers):
        now = drops.get(layer, now)
        counts.append(now)
    return counts
