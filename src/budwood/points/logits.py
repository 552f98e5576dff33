"""Logits of labels for clouds, and how uncertain they are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosine_logits(features: Tensor, vectors: Tensor, logit_scale: float) -> Tensor:
    """Scaled cosines between clouds and labels.

    Args:
        features: shape (n_clouds, d).
        vectors: text embeddings of length 1, shape (n_labels, d).
        logit_scale: factor on the cosines.

    Returns:
        Shape (n_clouds, n_labels).
    """
    return logit_scale * F.normalize(features, dim=-1) @ vectors.to(features).T


def entropies(logits: Tensor) -> Tensor:
    """Entropy of the softmax of each row, in nats.

    Args:
        logits: shape (n_clouds, n_labels).

    Returns:
        Shape (n_clouds,).
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
