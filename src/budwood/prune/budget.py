"""How many visual tokens to keep: a count per image, or a fraction of them."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from budwood.errors import BudgetError

_ALLOWED = "keep must be a count ≥ 1 (int) or a fraction in (0, 1] (float)"


@dataclass(frozen=True)
class Budget:
    """A validated ``keep``.

    Attributes:
        keep: tokens per image if an int, a fraction of the image's tokens if a float.
    """

    keep: int | float

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float):
            raise BudgetError(f"keep={self.keep!r} is a {type(self.keep).__name__}; {_ALLOWED}")
        if isinstance(self.keep, int):
            if self.keep < 1:
                raise BudgetError(f"keep={self.keep} is below 1; {_ALLOWED}")
        elif not 0.0 < self.keep <= 1.0:  # also False for NaN
            hint = f"; for a count write keep={int(self.keep)}" if _is_count(self.keep) else ""
            raise BudgetError(f"keep={self.keep} is outside (0, 1]; {_ALLOWED}{hint}")

    @classmethod
    def parse(cls, keep: Budget | int | float) -> Budget:
        """Make a budget from what a user gives; numpy numbers count as Python ones.

        Raises:
            BudgetError: ``keep`` is neither a count of at least 1 nor a fraction in (0, 1].
        """
        if isinstance(keep, Budget):
            return keep
        if isinstance(keep, numbers.Integral) and not isinstance(keep, bool):
            return cls(int(keep))
        if isinstance(keep, numbers.Real) and not isinstance(keep, bool):
            return cls(float(keep))
        return cls(keep)

    def count(self, n_visual: int, *, clamp: bool = False) -> int:
        """Tokens to keep out of ``n_visual``.

        A fraction is rounded to the nearest count, halves up, and is at least 1.

        Args:
            n_visual: candidate tokens of the image, at least 1.
            clamp: keep all tokens, instead of raising, where the image has fewer than the count.

        Raises:
            BudgetError: there are no tokens, or fewer than the count and ``clamp`` is off.
        """
        if n_visual < 1:
            raise BudgetError(f"nothing to choose from: the image has {n_visual} visual tokens")
        if isinstance(self.keep, float):
            return max(1, math.floor(self.keep * n_visual + 0.5))
        if self.keep > n_visual and not clamp:
            raise BudgetError(
                f"keep={self.keep} exceeds the {n_visual} visual tokens; give at most {n_visual}, "
                "or a fraction in (0, 1]"
            )
        return min(self.keep, n_visual)


@dataclass(frozen=True)
class Budgets:
    """The ``keep`` of an attached model: one budget for every image, or a list with one an image.

    Attributes:
        keep: as it was given.
        each: one budget for all images and videos, or one for each of a call, in prompt order.
    """

    keep: Any
    each: tuple[Budget, ...]

    @classmethod
    def parse(cls, keep: Any) -> Budgets:
        """Read what a user gives.

        Raises:
            BudgetError: a budget is neither a count nor a fraction, or the list is empty.
        """
        if isinstance(keep, list | tuple):
            if not keep:
                raise BudgetError(f"keep={keep!r} is empty; {_ALLOWED}, or a list of these")
            return cls(keep, tuple(map(Budget.parse, keep)))
        return cls(keep, (Budget.parse(keep),))

    def of_images(self, n_images: int) -> list[Budget]:
        """The budget of each image or video of a call.

        Raises:
            BudgetError: the list has another length.
        """
        if not isinstance(self.keep, list | tuple):
            return list(self.each) * n_images
        if len(self.each) != n_images:
            raise BudgetError(
                f"keep has {len(self.each)} budgets and the call has {n_images} images to prune; "
                "give one budget an image (in a later turn, the new ones), or a single one for all"
            )
        return list(self.each)


def _is_count(keep: float) -> bool:
    return math.isfinite(keep) and keep >= 1 and keep == int(keep)
