"""What a layer remembers besides its weights: statistics of its inputs, and masks.

Both are modules, so that PEFT saves and deletes them with the adapter. They keep their dtype
whatever the model is cast to, and change only between optimiser steps.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.tune.config import SlimConfig
from budwood.tune.equations import draw_keep, standardised_distance
from budwood.tune.slim.clustering import (
    Moments,
    channel_scale,
    scatter,
    seed_centres,
    slide,
    slide_distance,
    slide_whitened,
)
from budwood.tune.slim.compiled import new_handle
from budwood.tune.slim.distance import (
    measure,
    measure_along,
    measure_whitened,
    no_centres,
    random_directions,
    whitener,
)
from budwood.tune.slim.latest import Latest

_Measured = tuple[Callable[[], Tensor | None], tuple[Any, ...], Tensor | float | None]
"""The input, if it still lives; what its distances depend on; the distances."""


class _Kept(nn.Module):
    """A module whose buffers move between devices and are never cast."""

    n_steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))
        self._memo: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def derived(self, name: str, compute: Callable[[], Any], *sources: Tensor) -> Any:
        """Compute a value from buffers, and reuse it until one of them changes or is replaced."""
        entry = self._memo.get(name)
        if entry is None or not _unchanged(entry[0], sources):
            marks = tuple((source, _mark(source)) for source in sources)
            self._memo[name] = entry = (marks, compute())
        return entry[1]

    @property
    def steps(self) -> int:
        """``n_steps`` as an int; waits for the device only after a change."""
        n_steps: Any = self._buffers["n_steps"]
        return self.derived("steps", n_steps.item, n_steps)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": {}}


class InputStatistics(_Kept):
    """Where one layer's inputs lie, and the distribution of their distances.

    Step 0 gathers the moments that centres start from, step 1 those of the distances. Until then
    nothing yields, unless the boundary is fixed.

    Args:
        config: of the adapter.
        d_in: input channels.
        key: name of the layer; a seed of what is random.
    """

    distance_mean: Tensor
    distance_var: Tensor

    def __init__(self, config: SlimConfig, d_in: int, key: str) -> None:
        super().__init__()
        self.config, self.d_in, self.key = config, d_in, key
        self.register_buffer("distance_mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("distance_var", torch.ones((), dtype=torch.float32))
        self._gathered: Tensor | None = None
        self._last: Latest[_Measured] = Latest()
        self.handle = new_handle(self)
        self.in_graph: Latest[Tensor] = Latest()  # distances of a pass in a compiled graph

    @property
    def is_fixed(self) -> bool:
        """Whether the boundary was set before training and stays."""
        return False

    @property
    def yields(self) -> bool:
        """Whether distances are known well enough for tokens to yield."""
        return self.steps >= 2 or self.is_fixed

    def distance(
        self, x: Tensor, keep: Callable[[], Tensor | None], *, gather: bool, training: bool
    ) -> tuple[Tensor | None, Moments | None]:
        """Measure the standardised distance of each token, once for layers that share an input.

        Args:
            x: the layer's input, shape (…, d_in).
            keep: returns the tokens that count, bool of shape (n_tokens,), or None for all.
            gather: also return moments; None if another layer has taken those of this input.
            training: use the margin of training.

        Returns:
            Distances, shape (n_tokens,), or None while nothing yields; and moments or None.
        """
        if not gather and not self.yields:
            return None, None
        place = (_version(x), gather, training, self.steps)
        if self._has_measured(x, place):
            return self.last_distance(x.shape[:-1].numel()), None
        flat = x.detach().reshape(-1, x.shape[-1])
        kept = keep() if gather else None
        distance, moments = self.measured(flat, kept, gather=gather, training=training)
        self._last.set((weakref.ref(x), place, distance))
        return distance, moments

    def distance_of_one(self, x: Tensor) -> float | None:
        """Measure the distance of a single token outside training, as a number.

        Args:
            x: the layer's input, shape (…, d_in).

        Returns:
            d; None while nothing yields.
        """
        place = (_version(x), False, False, self.steps)
        if not self._has_measured(x, place):
            # A single token may be kept, which takes less time than a weak reference.
            self._last.set((lambda: x, place, self._measured_one(x)))
        return self.last_of_one()

    def _measured_one(self, x: Tensor) -> Tensor | float | None:
        """Measure a single token, whatever was measured before."""
        flat = x.detach().reshape(1, -1)
        return self.measured(flat, None, gather=False, training=False)[0]

    def _has_measured(self, x: Tensor, place: tuple[Any, ...]) -> bool:
        """Whether the latest distances are those of an input."""
        last = self._last.get()
        if last is None or last[0]() is not x or last[1] != place:
            return False
        # In inference mode a tensor counts no changes: the same x may hold other tokens by now.
        return not x.is_inference()

    def measured(
        self, x: Tensor, keep: Tensor | None, *, gather: bool, training: bool
    ) -> tuple[Tensor | None, Moments | None]:
        """Measure as :meth:`distance` does, whatever was measured before.

        Args:
            x: shape (n_tokens, d_in), without gradients.
            keep: tokens that count, bool, shape (n_tokens,); None for all.
            gather: also return moments.
            training: use the margin of training.
        """
        if not gather and not self.yields:
            return None, None
        # To enter the context takes longer than to measure one token.
        casts = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if casts else nullcontext():
            raw, moments = self._measure(x, gather, keep)
        if not self.yields:
            return None, moments
        margin = self.config.margin_of(training)
        return standardised_distance(raw, self.distance_mean, self.distance_var, margin), moments

    def last_distance(self, n_tokens: int) -> Tensor | None:
        """Return the distances that the first layer of the block has just measured.

        Args:
            n_tokens: tokens of the layer that asks.

        Returns:
            Shape (n_tokens,); None where there are none for as many tokens.
        """
        distance = self._latest()
        if distance is None:
            return None
        if not isinstance(distance, Tensor):
            distance = self.distance_mean.new_full((1,), distance)
        return distance if len(distance) == n_tokens else None

    def last_of_one(self) -> float | None:
        """Return the distance that the first layer has just measured for a single token."""
        distance = self._latest()
        if isinstance(distance, Tensor):
            return distance.item() if len(distance) == 1 else None
        return distance

    def _latest(self) -> Tensor | float | None:
        """The latest distances of this thread, unless they are those of an earlier step."""
        last = self._last.get()
        return None if last is None or last[1][-1] != self.steps else last[2]

    @property
    def most_moments(self) -> int:
        """Most values that the moments of a step have, by the shapes of the buffers alone."""
        raise NotImplementedError

    def add(self, flat: Tensor) -> None:
        """Note the moments of one backward pass, for the next :meth:`commit`.

        Args:
            flat: :meth:`Moments.flat`, with or without zeros behind it.
        """
        flat = flat[: len(self._no_moments().flat())]
        self._gathered = flat if self._gathered is None else self._gathered + flat

    def gathered(self) -> Moments:
        """Return the moments noted since the last commit."""
        empty = self._no_moments()
        return empty if self._gathered is None else empty.filled(self._gathered)

    def take(self) -> Tensor:
        """Return the noted moments as one vector, and forget them."""
        flat = self.gathered().flat()
        self.forget()
        return flat

    def forget(self) -> None:
        """Drop the moments noted since the last commit."""
        self._gathered = None

    def reset(self) -> None:
        """Go back to how a fresh adapter starts."""
        self.load_state_dict(type(self)(self.config, self.d_in, self.key).state_dict())

    @torch.no_grad()
    def commit(self, flat: Tensor) -> None:
        """Move the statistics by the moments of one optimiser step.

        Args:
            flat: what :meth:`take` returned, summed over ranks; finite.
        """
        moments = self._no_moments().filled(flat.to(self.distance_mean.device))
        if self.steps < 2 and not bool(moments.count.sum() > 0):
            return  # without a token there is nothing to start from
        if self.steps == 0:
            seed = zlib.crc32(f"{self.config.seed}/{self.key}/centres".encode())
            self._start(moments, torch.Generator().manual_seed(seed))
        elif not self.is_fixed:
            self._slide(moments)
            momentum = 1.0 if self.steps == 1 else self._momentum()
            mean, var = slide_distance(self.distance_mean, self.distance_var, moments, momentum)
            self.distance_mean.copy_(mean)
            self.distance_var.copy_(var)
        self.n_steps.add_(1)

    def _momentum(self) -> float:
        """Fraction that a running distribution of distances moves by, from the third step on."""
        return self.config.momentum

    def _measure(
        self, x: Tensor, gather: bool, keep: Tensor | None
    ) -> tuple[Tensor, Moments | None]:
        """Measure the raw distances of tokens of shape (n_tokens, d_in), and their moments."""
        raise NotImplementedError

    def _no_moments(self) -> Moments:
        """Make moments of no tokens, in the shapes of this step."""
        raise NotImplementedError

    def _start(self, moments: Moments, generator: torch.Generator) -> None:
        """Start the statistics from the moments of the first step."""

    def _slide(self, moments: Moments) -> None:
        """Move them by the moments of a later step."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = new_handle(self)


class ChannelStatistics(InputStatistics):
    """Centres with a variance per channel, for ``"max"`` and ``"rms"``."""

    centre: Tensor
    var: Tensor

    def __init__(self, config: SlimConfig, d_in: int, key: str) -> None:
        super().__init__(config, d_in, key)
        self.register_buffer("centre", torch.zeros(config.n_centres, d_in, dtype=torch.float32))
        self.register_buffer("var", torch.ones_like(self.centre))

    def _measure(
        self, x: Tensor, gather: bool, keep: Tensor | None
    ) -> tuple[Tensor, Moments | None]:
        scale = self.derived("scale", lambda: channel_scale(self.var), self.var)
        return measure(x, self.centre, scale, self.config.distance, gather=gather, keep=keep)

    @property
    def most_moments(self) -> int:
        return Moments.n_values(self.centre.shape, self.var.shape)

    def _no_moments(self) -> Moments:
        return Moments.zeros(self.centre, self.var)

    def _start(self, moments: Moments, generator: torch.Generator) -> None:
        centre, var = seed_centres(moments, generator)
        self.centre.copy_(centre)
        self.var.copy_(var)

    def _slide(self, moments: Moments) -> None:
        centre, var = slide(self.centre, self.var, moments, self.config.momentum)
        self.centre.copy_(centre)
        self.var.copy_(var)


class WhitenedStatistics(InputStatistics):
    """Centres in a random subspace of the standardised channels, with one covariance.

    The first step sets the means and scales of the channels, which then stay.
    """

    centre: Tensor
    mean: Tensor
    scale: Tensor
    covariance: Tensor

    def __init__(self, config: SlimConfig, d_in: int, key: str) -> None:
        super().__init__(config, d_in, key)
        n, n_directions = config.n_centres, min(config.n_directions, d_in)
        self.register_buffer("centre", torch.zeros(n, n_directions, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(d_in, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(d_in, dtype=torch.float32))
        self.register_buffer("covariance", torch.eye(n_directions, dtype=torch.float32))

    def _measure(
        self, x: Tensor, gather: bool, keep: Tensor | None
    ) -> tuple[Tensor, Moments | None]:
        if self.steps == 0:  # channels have no means and scales yet
            zero = self.mean.new_zeros(1, self.d_in)
            return measure(x, zero, zero + 1, "rms", gather=gather, keep=keep)
        white = self.derived("white", lambda: whitener(self.covariance), self.covariance)
        return measure_whitened(
            x, *self._projection(), self.centre, white, gather=gather, keep=keep
        )

    def _momentum(self) -> float:
        # Distances grow while the covariance settles, so that those of the first steps soon expire.
        return max(self.config.momentum, 2 / (self.steps + 1))

    def _projection(self) -> tuple[Tensor, Tensor]:
        """Compute P and o of :func:`measure_whitened`: standardise and project in one product."""

        def compute() -> tuple[Tensor, Tensor]:
            signs = random_directions(
                self.d_in, len(self.covariance), seed=self.config.seed, key=self.key
            ).to(self.scale.device)
            directions = signs * self.scale.unsqueeze(-1)
            return directions, self.mean @ directions

        return self.derived("projection", compute, self.mean, self.scale)

    @property
    def most_moments(self) -> int:
        later = Moments.n_values(self.centre.shape, self.covariance.shape)
        return max(later, Moments.n_values((1, self.d_in), (1, self.d_in)))

    def _no_moments(self) -> Moments:
        if self.steps == 0:
            zero = self.mean.new_zeros(1, self.d_in)
            return Moments.zeros(zero, zero)
        return Moments.zeros(self.centre, self.covariance)

    def _start(self, moments: Moments, generator: torch.Generator) -> None:
        mean, var = seed_centres(moments, generator)
        self.mean.copy_(mean[0])
        self.scale.copy_(channel_scale(var)[0])
        self.centre.copy_(scatter(self.centre, generator))

    def _slide(self, moments: Moments) -> None:
        # The identity that the covariance starts from counts as one step.
        momentum = max(self.config.momentum, 1 / (self.steps + 1))
        centre, covariance = slide_whitened(self.centre, self.covariance, moments, momentum)
        self.centre.copy_(centre)
        self.covariance.copy_(covariance)


class DiscriminantStatistics(InputStatistics):
    """A direction from the training data to other text, fitted before training and then fixed."""

    direction: Tensor
    offset: Tensor
    n_fitted: Tensor

    def __init__(self, config: SlimConfig, d_in: int, key: str) -> None:
        super().__init__(config, d_in, key)
        self.register_buffer("direction", torch.zeros(d_in, dtype=torch.float32))
        self.register_buffer("offset", torch.zeros((), dtype=torch.float32))
        self.register_buffer("n_fitted", torch.zeros((), dtype=torch.int64))

    @property
    def is_fitted(self) -> bool:
        """Whether there is a direction; waits for the device only after a change."""
        return self.derived("fitted", lambda: int(self.n_fitted) > 0, self.n_fitted)

    def set_direction(self, direction: Tensor, offset: Tensor, n_tokens: int) -> None:
        """Store what :func:`budwood.tune.slim.distance.discriminant` fitted to some tokens."""
        self.direction.copy_(direction)
        self.offset.copy_(offset)
        self.n_fitted.fill_(n_tokens)

    def set_boundary(self, boundary: Tensor, std: Tensor) -> None:
        """Fix where tokens begin to yield in training: d is 0 there.

        Args:
            boundary: along the direction, shape ().
            std: the unit of d, shape ().
        """
        self.distance_mean.copy_(boundary - self.config.margin * std)
        self.distance_var.copy_(std.square())

    @property
    def is_fixed(self) -> bool:
        return self.config.boundary == "fixed" and self.is_fitted

    def _measured_one(self, x: Tensor) -> Tensor | float | None:
        numbers = self.derived("numbers", self._numbers, *self._buffers.values())  # type: ignore[arg-type]
        if numbers is None:
            return super()._measured_one(x)
        zero, scale = numbers
        flat = x.reshape(-1)
        flat = flat if flat.dtype == torch.float32 else flat.float()
        along = torch.dot(flat, self.direction).item()
        return (along - zero) * scale - self.config.margin_of(False)

    def _numbers(self) -> tuple[float, float] | None:
        """Where d is −margin along the direction, and 1 over its unit; None if nothing yields."""
        if not (self.yields and self.is_fitted):
            return None
        zero = self.offset.item() + self.distance_mean.item()
        return zero, (self.distance_var.item() + 1e-12) ** -0.5

    def _measure(
        self, x: Tensor, gather: bool, keep: Tensor | None
    ) -> tuple[Tensor, Moments | None]:
        if not self.is_fitted:
            raise InputError(
                'distance="discriminant" has to be fitted before training; call '
                "budwood.tune.fit_discriminant(model, tokenizer, rows) first"
            )
        return measure_along(x, self.direction, self.offset, gather=gather, keep=keep)

    @property
    def most_moments(self) -> int:
        return Moments.n_values((1, 0), (1, 0))

    def _no_moments(self) -> Moments:
        return no_centres(self.direction)


def make_statistics(config: SlimConfig, d_in: int, key: str) -> InputStatistics:
    """Make the statistics that a config's distance needs; arguments as of the class."""
    kinds = {"whitened": WhitenedStatistics, "discriminant": DiscriminantStatistics}
    return kinds.get(config.distance, ChannelStatistics)(config, d_in, key)


class Mask(_Kept):
    """The mask of dynamic merging that is in force in one layer.

    Args:
        config: of the adapter.
        d_in: input channels: columns of A.
        d_out: output channels: rows of B.
        key: name of the layer.
    """

    columns: Tensor
    rows: Tensor

    def __init__(self, config: SlimConfig, d_in: int, d_out: int, key: str) -> None:
        super().__init__()
        self.config = config
        self.key = key
        self.register_buffer("columns", self._draw("columns", d_in, 0))
        self.register_buffer("rows", self._draw("rows", d_out, 0))

    def reset(self) -> None:
        """Go back to how a fresh adapter starts."""
        fresh = Mask(self.config, len(self.columns), len(self.rows), self.key)
        self.load_state_dict(fresh.state_dict())

    def commit(self) -> None:
        """Draw the mask of the next step."""
        step = self.steps + 1
        # New tensors: a backward pass that is still to come uses the masks of its forward pass.
        self.columns = self._draw("columns", len(self.columns), step).to(self.columns.device)
        self.rows = self._draw("rows", len(self.rows), step).to(self.rows.device)
        self.n_steps.add_(1)

    def _draw(self, axis: str, size: int, step: int) -> Tensor:
        config = self.config
        key = f"{self.key}/{axis}"
        return draw_keep(size, config.merge_p, seed=config.seed, key=key, step=step)


def _version(tensor: Tensor) -> int:
    """Count the changes of a tensor in place; 0 in inference mode, which counts none."""
    return 0 if tensor.is_inference() else tensor._version


def _mark(tensor: Tensor) -> int | Tensor:
    """What shows whether a tensor has changed: its version, or in inference mode its values."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _unchanged(marks: tuple[tuple[Tensor, int | Tensor], ...], now: tuple[Tensor, ...]) -> bool:
    for (source, mark), tensor in zip(marks, now):
        if source is not tensor:
            return False
        if tensor.is_inference():
            if not (isinstance(mark, Tensor) and torch.equal(mark, tensor)):
                return False
        elif mark != tensor._version:
            return False
    return True
