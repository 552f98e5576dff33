"""BatchNorm statistics beside an encoder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.points.encoders.base import PointEncoder

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class BatchStatistics(nn.Module):
    """Mean and variance of each BatchNorm, at first those of the encoder.

    Source: AdaBN (arXiv 1603.04779).
    """

    def __init__(self, encoder: PointEncoder) -> None:
        super().__init__()
        norms = {n: m for n, m in encoder.named_modules() if isinstance(m, BATCH_NORMS)}
        self.names = tuple(norms)
        for index, norm in enumerate(norms.values()):
            assert norm.running_mean is not None and norm.running_var is not None
            self.register_buffer(f"mean_{index}", norm.running_mean.detach().clone())
            self.register_buffer(f"var_{index}", norm.running_var.detach().clone())

    def replaced(self) -> dict[str, Tensor]:
        """By the names of the encoder's buffers."""
        lent = {}
        for index, name in enumerate(self.names):
            lent[f"{name}.running_mean"] = getattr(self, f"mean_{index}")
            lent[f"{name}.running_var"] = getattr(self, f"var_{index}")
        return lent

    @torch.no_grad()
    def estimate(
        self, encoder: PointEncoder, batches: Iterable[tuple[Tensor, Tensor | None]]
    ) -> None:
        """Take the statistics of these clouds, over all of them together.

        Later layers see inputs that were normalised by their own batch, as in training.

        Args:
            encoder: left as it was.
            batches: xyz and rgb (or None), as for the encoder; large batches are better.

        Raises:
            InputError: there are no batches.
        """
        totals: dict[str, list[Tensor]] = {}

        def make_hook(name: str):
            def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                x = inputs[0].transpose(0, 1).flatten(1).double()  # (channels, values)
                count = torch.tensor(float(x.shape[1]), device=x.device)
                sums = [count, x.sum(1), x.square().sum(1)]
                old = totals.get(name)
                totals[name] = sums if old is None else [a + b for a, b in zip(old, sums)]
                assert isinstance(norm, BATCH_NORMS)
                return nn.functional.batch_norm(
                    inputs[0], None, None, norm.weight, norm.bias, training=True, eps=norm.eps
                )

            return hook

        modules = dict(encoder.named_modules())
        handles = [modules[n].register_forward_hook(make_hook(n)) for n in self.names]
        try:
            for xyz, rgb in batches:
                encoder(xyz, rgb)
        finally:
            for handle in handles:
                handle.remove()
        if not totals:
            raise InputError("there are no clouds to take statistics of; give at least one batch")
        for index, name in enumerate(self.names):
            count, total, squares = totals[name]
            mean = total / count
            getattr(self, f"mean_{index}").copy_(mean)
            getattr(self, f"var_{index}").copy_((squares / count - mean.square()).clamp(min=0))
