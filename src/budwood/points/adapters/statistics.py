"""BatchNorm statistics that replace an encoder's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.points.encoders.base import PointEncoder

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class BatchStatistics(nn.Module):
    """Mean and variance of each BatchNorm; they start as those of the encoder.

    Source: AdaBN (arXiv 1603.04779). Ours: one set for each of several numbers of points, since
    groups of points look different at each density.

    Args:
        encoder: whose statistics they replace.
        counts: numbers of points with a set each; empty: one set for all.
    """

    def __init__(self, encoder: PointEncoder, counts: Sequence[int] = ()) -> None:
        super().__init__()
        self.counts = tuple(counts)
        n_sets = max(1, len(self.counts))
        norms = {n: m for n, m in encoder.named_modules() if isinstance(m, BATCH_NORMS)}
        self.names = tuple(norms)
        for index, norm in enumerate(norms.values()):
            assert norm.running_mean is not None and norm.running_var is not None
            self.register_buffer(f"mean_{index}", norm.running_mean.detach().repeat(n_sets, 1))
            self.register_buffer(f"var_{index}", norm.running_var.detach().repeat(n_sets, 1))

    def nearest(self, n_points: int) -> int:
        """Index of the set for clouds of ``n_points`` points: the nearest count, by ratio."""
        gaps = [abs(math.log(n_points / count)) for count in self.counts]
        return gaps.index(min(gaps)) if gaps else 0

    def replaced(self, encoder: PointEncoder, n_points: int, strength: float) -> dict[str, Tensor]:
        """Statistics for clouds of ``n_points`` points, by the names of the encoder's buffers.

        Args:
            encoder: whose statistics they replace.
            n_points: of the clouds.
            strength: 0 gives the encoder's statistics, 1 these, values between a mixture.
        """
        row, values = self.nearest(n_points), {}
        for index, name in enumerate(self.names):
            for kind, buffer in (("mean", "running_mean"), ("var", "running_var")):
                sparse, key = getattr(self, f"{kind}_{index}")[row], f"{name}.{buffer}"
                if strength != 1:
                    sparse = encoder.get_buffer(key).lerp(sparse, strength)
                values[key] = sparse
        return values

    @torch.no_grad()
    def estimate(
        self, encoder: PointEncoder, batches: Iterable[tuple[Tensor, Tensor | None]]
    ) -> None:
        """Estimate the statistics from clouds, over all clouds of a set together.

        Later layers see inputs that are normalised by their batch, as in training. A set without
        clouds stays as it is.

        Args:
            encoder: left as it was.
            batches: xyz and rgb (or None), as for the encoder; large batches are better.

        Raises:
            InputError: there are no batches.
        """
        totals: dict[tuple[int, str], list[Tensor]] = {}
        row = 0

        def make_hook(name: str):
            def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                x = inputs[0].transpose(0, 1).flatten(1).double()  # (channels, values)
                count = torch.tensor(float(x.shape[1]), device=x.device)
                sums = [count, x.sum(1), x.square().sum(1)]
                old = totals.get((row, name))
                totals[row, name] = sums if old is None else [a + b for a, b in zip(old, sums)]
                assert isinstance(norm, BATCH_NORMS)
                return nn.functional.batch_norm(
                    inputs[0], None, None, norm.weight, norm.bias, training=True, eps=norm.eps
                )

            return hook

        modules = dict(encoder.named_modules())
        handles = [modules[n].register_forward_hook(make_hook(n)) for n in self.names]
        n_batches = 0
        try:
            for xyz, rgb in batches:
                row = self.nearest(xyz.shape[1])
                encoder(xyz, rgb)
                n_batches += 1
        finally:
            for handle in handles:
                handle.remove()
        if not n_batches:
            raise InputError(
                "there are no clouds to estimate statistics from; give at least one batch"
            )
        for (row, name), (count, total, squares) in totals.items():
            index = self.names.index(name)
            mean = total / count
            getattr(self, f"mean_{index}")[row] = mean.float()
            getattr(self, f"var_{index}")[row] = (squares / count - mean.square()).clamp(min=0)
