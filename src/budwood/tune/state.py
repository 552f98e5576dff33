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

from budwood.errors import InputError
from budwood.tune.clustering import (
    Moments,
    channel_scale,
    measure,
    seed_centres,
    slide,
    slide_distance,
)
from budwood.tune.config import SlimConfig
from budwood.tune.merging import draw_keep
from budwood.tune.yielding import standardised_distance


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
    """Centres, variances and the distribution of distances of one layer's inputs.

    Step 0 only gathers the moments that the centres start from, and step 1 those of the distance:
    until then nothing yields.

    Args:
        config: of the adapter.
        d_in: input channels.
        key: name of the layer, for the random start of the centres.
    """

    centre: Tensor
    var: Tensor
    distance_mean: Tensor
    distance_var: Tensor

    def __init__(self, config: SlimConfig, d_in: int, key: str) -> None:
        super().__init__()
        self.config = config
        self.key = key
        self.register_buffer("centre", torch.zeros(config.n_centres, d_in, dtype=torch.float32))
        self.register_buffer("var", torch.ones(config.n_centres, d_in, dtype=torch.float32))
        self.register_buffer("distance_mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("distance_var", torch.ones((), dtype=torch.float32))
        self.pending: Tensor | None = None
        self._last: tuple[Any, ...] | None = None

    def distance(
        self, x: Tensor, keep: Callable[[], Tensor | None], gather: bool
    ) -> tuple[Tensor | None, Moments | None]:
        """Standardised distance of each token, computed once for layers that share an input.

        Args:
            x: the layer's input, shape (…, d_in).
            keep: gives the tokens that are no padding, bool of shape (n_tokens,), or None for all.
            gather: also return moments; None if another layer has got those of this input.

        Returns:
            Distances, shape (n_tokens,), None in the first two steps; and moments or None.
        """
        if not gather and self.steps < 2:
            return None, None
        place = (version(x), gather, self.steps)
        if self._last is not None and self._last[0]() is x and self._last[1] == place:
            return self._last[2], None
        flat = x.detach().reshape(-1, x.shape[-1])
        scale = self.derived("scale", lambda: channel_scale(self.var), self.var)
        raw, moments = measure(
            flat,
            self.centre,
            scale,
            self.config.distance,
            gather=gather,
            keep=keep() if gather else None,
        )
        found = None
        if self.steps >= 2:
            found = standardised_distance(
                raw, self.distance_mean, self.distance_var, self.config.margin
            )
        self._last = weakref.ref(x), place, found
        return found, moments

    def add(self, moments: Moments) -> None:
        """Note the moments of one backward pass, for the next :meth:`commit`."""
        flat = moments.flat()
        self.pending = flat if self.pending is None else self.pending + flat

    def taken(self) -> Tensor:
        """The noted moments as one vector, zeros if there are none; they are forgotten."""
        flat, self.pending = self.pending, None
        n_clusters, d_in = self.centre.shape
        return self.centre.new_zeros(n_clusters * (1 + 2 * d_in) + 3) if flat is None else flat

    @torch.no_grad()
    def commit(self, flat: Tensor) -> None:
        """Move centres and distances by the moments of one optimiser step.

        Args:
            flat: the sum over ranks of what :meth:`taken` gave, finite.
        """
        n_clusters, d_in = self.centre.shape
        moments = Moments.from_flat(flat.to(self.centre.device), n_clusters, d_in)
        if self.steps < 2 and not bool(moments.count.sum() > 0):
            return  # no token came by: there is nothing to start from
        if self.steps == 0:
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{self.config.seed}/{self.key}/centres".encode())
            )
            centre, var = seed_centres(moments, generator)
        else:
            centre, var = slide(self.centre, self.var, moments, self.config.momentum)
            momentum = 1.0 if self.steps == 1 else self.config.momentum
            mean, spread = slide_distance(self.distance_mean, self.distance_var, moments, momentum)
            self.distance_mean.copy_(mean)
            self.distance_var.copy_(spread)
        self.centre.copy_(centre)
        self.var.copy_(var)
        self.n_steps.add_(1)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}  # type: ignore[dict-item]


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
        self.columns.copy_(self._draw("columns", len(self.columns), step))
        self.rows.copy_(self._draw("rows", len(self.rows), step))
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
        InputError: naming the first layer with bad values.
    """
    if bool(flat.sum().isfinite()) or bool(flat.isfinite().all()):
        return
    for name, part in zip(names, flat.split(sizes)):
        if not bool(part.isfinite().all()):
            raise InputError(
                f"inputs of layer {name!r} are NaN or infinite; the statistics keep their last "
                "good values: lower the learning rate, or train in bfloat16 or float32"
            )
