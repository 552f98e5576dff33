"""What the words of a language model have in common, whatever they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_N_WORDS = 1024


@dataclass(frozen=True, eq=False)
class Common:
    """The mean of a vocabulary's embeddings and their first principal directions.

    Frequent words ("the", "is") lie far out along the first one and resemble each other more than
    anything they name.

    Source: Mu and Viswanath, All-but-the-Top, ICLR 2018.

    Attributes:
        mean: float32, shape (d_model,).
        directions: orthonormal, float32, shape (n_directions, d_model).
    """

    mean: Tensor
    directions: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, words: Tensor, n_directions: int = 1) -> Common:
        """Of a sample of word embeddings, shape (n_words, d_model), n_words > n_directions."""
        mean = words.float().mean(0)
        centred = words.float() - mean
        # The eigenvectors of the (n_words, n_words) products are cheap for any d_model.
        along = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -n_directions:]
        return cls(mean, torch.linalg.qr(centred.T @ along).Q.T)

    @classmethod
    @torch.no_grad()
    def of_model(cls, model: Any) -> Common:
        """Of a transformers model: a sample of words spread evenly over its vocabulary."""
        embed = model.get_input_embeddings()
        ids = torch.linspace(0, embed.num_embeddings - 1, min(_N_WORDS, embed.num_embeddings))
        device = embed.weight.device
        # Offloaded weights are "meta": accelerate moves the input.
        return cls.of(embed(ids.long().to("cpu" if device.type == "meta" else device)))

    def without(self, x: Tensor) -> Tensor:
        """Embeddings (n, d_model) without their parts along the directions."""
        return x - (x @ self.directions.T) @ self.directions

    def to(self, device: torch.device) -> Common:
        """The same on another device."""
        return Common(self.mean.to(device), self.directions.to(device))
