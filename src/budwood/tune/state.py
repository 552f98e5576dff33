"""What a layer remembers besides its weights: cluster statistics and masks.

Both are modules, so that PEFT saves and deletes them with the adapter. They keep their dtype
whatever the model is cast to, and change only between optimiser steps.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import DivergedError, InputError
from budwood.tune.config import SlimConfig
from budwood.tune.distance import (
    measure,
    measure_along,
    measure_whitened,
    no_centres,
    random_directions,
    whitener,
)
from budwood.tune.equations import draw_keep, standardised_distance
from budwood.tune.moments import (
    Moments,
    channel_scale,
    scatter,
    seed_centres,
    slide,
    slide_distance,
    slide_whitened,
)


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; always 0 in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


class _Kept(nn.Module):
    """A module whose buffers move between devices but are never cast."""

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
        """A value computed from buffers, kept until one of them changes or is replaced."""
        key = tuple((source, version(source)) for source in sources)
        found = self._memo.get(name)
        if found is None or not _same(found[0], key):
            self._memo[name] = found = (key, compute())
        return found[1]

    @property
    def steps(self) -> int:
        """``n_steps`` as an int; waits for the device only after a change."""
        return self.derived("steps", lambda: int(self.n_steps), self.n_steps)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": {}}


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(a is b and v == w for (a, v), (b, w) in zip(one, other))


class Clusters(_Kept):
    """Where one layer's inputs lie, and the distribution of their distances.

    Step 0 only gathers the moments that the centres start from, and step 1 those of the distance:
    until then nothing yields.

    Args:
        config: of the adapter.
        d_in: input channels.
        key: name of the layer, for what is random.
    """

    distance_mean: Tensor
    distance_var: Tensor

    def __init__(self, config: SlimConfig, d_in: int, key: str) -> None:
        super().__init__()
        self.config, self.d_in, self.key = config, d_in, key
        self.register_buffer("distance_mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("distance_var", torch.ones((), dtype=torch.float32))
        self.pending: Tensor | None = None
        self._last: tuple[Any, ...] | None = None

    def distance(
        self, x: Tensor, keep: Callable[[], Tensor | None], *, gather: bool, training: bool
    ) -> tuple[Tensor | None, Moments | None]:
        """Standardised distance of each token, computed once for layers that share an input.

        Args:
            x: the layer's input, shape (…, d_in).
            keep: gives the tokens that count, bool of shape (n_tokens,), or None for all.
            gather: also return moments; None if another layer has got those of this input.
            training: which margin holds.

        Returns:
            Distances, shape (n_tokens,), None in the first two steps; and moments or None.
        """
        if not gather and self.steps < 2:
            return None, None
        place = (version(x), gather, training, self.steps)
        if self._last is not None and self._last[0]() is x and self._last[1] == place:
            return self._last[2], None
        flat = x.detach().reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            raw, moments = self._measure(flat, gather, keep() if gather else None)
        found = None
        if self.steps >= 2:
            margin = self.config.margin_of(training)
            found = standardised_distance(raw, self.distance_mean, self.distance_var, margin)
        self._last = weakref.ref(x), place, found
        return found, moments

    def measured(self, n_tokens: int) -> Tensor | None:
        """The distances that the layer at the beginning of the block was given just now.

        Args:
            n_tokens: tokens of the layer that asks.
        """
        if self._last is None or self._last[1][-1] != self.steps:
            return None
        found = self._last[2]
        return found if found is not None and len(found) == n_tokens else None

    def add(self, moments: Moments) -> None:
        """Note the moments of one backward pass, for the next :meth:`commit`."""
        flat = moments.flat()
        self.pending = flat if self.pending is None else self.pending + flat

    def taken(self) -> Tensor:
        """The noted moments as one vector, zeros if there are none; they are forgotten."""
        flat, self.pending = self.pending, None
        return self._no_moments().flat() if flat is None else flat

    @torch.no_grad()
    def commit(self, flat: Tensor) -> None:
        """Move centres and distances by the moments of one optimiser step.

        Args:
            flat: the sum over ranks of what :meth:`taken` gave, finite.
        """
        moments = self._no_moments().filled(flat.to(self.distance_mean.device))
        if self.steps < 2 and not bool(moments.count.sum() > 0):
            return  # no token came by: there is nothing to start from
        if self.steps == 0:
            seed = zlib.crc32(f"{self.config.seed}/{self.key}/centres".encode())
            self._start(moments, torch.Generator().manual_seed(seed))
        else:
            self._slide(moments)
            momentum = 1.0 if self.steps == 1 else self._momentum()
            mean, spread = slide_distance(self.distance_mean, self.distance_var, moments, momentum)
            self.distance_mean.copy_(mean)
            self.distance_var.copy_(spread)
        self.n_steps.add_(1)

    def _momentum(self) -> float:
        """Share that the distribution of distances moves by, from the third step on."""
        return self.config.momentum

    def _measure(
        self, x: Tensor, gather: bool, keep: Tensor | None
    ) -> tuple[Tensor, Moments | None]:
        """Raw distances of tokens of shape (n_tokens, d_in), and their moments if asked for."""
        raise NotImplementedError

    def _no_moments(self) -> Moments:
        """Moments of no tokens, of the shapes that this step has."""
        raise NotImplementedError

    def _start(self, moments: Moments, generator: torch.Generator) -> None:
        """Take up the moments of the first step."""
        raise NotImplementedError

    def _slide(self, moments: Moments) -> None:
        """Take up those of a later step."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}  # type: ignore[dict-item]


class ChannelClusters(Clusters):
    """Centres with a variance of each channel."""

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


class WhitenedClusters(Clusters):
    """Centres in a random subspace of the standardised channels, with one covariance.

    The first step gives the channels their means and scales, which then stay.
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
        # While the covariance settles, distances grow: those of the first steps soon mean nothing.
        return max(self.config.momentum, 2 / (self.steps + 1))

    def _projection(self) -> tuple[Tensor, Tensor]:
        """Standardising and projecting as one matrix, and what it makes of the mean."""

        def compute() -> tuple[Tensor, Tensor]:
            signs = random_directions(
                self.d_in, len(self.covariance), seed=self.config.seed, key=self.key
            ).to(self.scale.device)
            directions = signs * self.scale.unsqueeze(-1)
            return directions, self.mean @ directions

        return self.derived("projection", compute, self.mean, self.scale)

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


class Discriminant(Clusters):
    """A direction from the training data to other text, fitted before training, that stays."""

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

    def set_direction(self, direction: Tensor, offset: Tensor, n: int) -> None:
        """Take up what :func:`budwood.tune.discriminant.discriminant` gave for n tokens."""
        self.direction.copy_(direction)
        self.offset.copy_(offset)
        self.n_fitted.fill_(n)

    def _measure(
        self, x: Tensor, gather: bool, keep: Tensor | None
    ) -> tuple[Tensor, Moments | None]:
        if not self.is_fitted:
            raise InputError(
                'distance="discriminant" is fitted before training, and this adapter was not: call '
                "budwood.tune.fit_discriminant(model, tokenizer, rows) first"
            )
        return measure_along(x, self.direction, self.offset, gather=gather, keep=keep)

    def _no_moments(self) -> Moments:
        return no_centres(self.direction)

    def _start(self, moments: Moments, generator: torch.Generator) -> None:
        pass

    def _slide(self, moments: Moments) -> None:
        pass


def make_clusters(config: SlimConfig, d_in: int, key: str) -> Clusters:
    """The statistics that a config's distance needs; arguments as of :class:`Clusters`."""
    kinds = {"whitened": WhitenedClusters, "discriminant": Discriminant}
    return kinds.get(config.distance, ChannelClusters)(config, d_in, key)


class Mask(_Kept):
    """The mask of dynamic merging that is in force for one layer.

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

    def commit(self) -> None:
        """Draw the mask of the next step."""
        step = self.steps + 1
        # New tensors: a backward pass that is still to come masks with those of its forward pass.
        self.columns = self._draw("columns", len(self.columns), step).to(self.columns.device)
        self.rows = self._draw("rows", len(self.rows), step).to(self.rows.device)
        self.n_steps.add_(1)

    def _draw(self, axis: str, size: int, step: int) -> Tensor:
        config = self.config
        key = f"{self.key}/{axis}"
        return draw_keep(size, config.merge_p, seed=config.seed, key=key, step=step)


def check_finite(flat: Tensor, names: list[str], sizes: list[int]) -> None:
    """Raise if the moments of a step have NaN or infinite values, before they are taken up.

    Args:
        flat: moments of several layers, one after the other.
        names: of the layers.
        sizes: values of each.

    Raises:
        DivergedError: naming the first layer with bad values.
    """
    if bool(flat.sum().isfinite()) or bool(flat.isfinite().all()):
        return
    for name, part in zip(names, flat.split(sizes)):
        if not bool(part.isfinite().all()):
            raise DivergedError(
                f"inputs of layer {name!r} are NaN or infinite; the statistics keep their last "
                "good values: lower the learning rate, or train in bfloat16 or float32"
            )
