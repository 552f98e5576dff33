"""Routing: which experts a token goes to, and with what weight. Pure tensor functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-6
"""Keeps a row of equal logits from dividing by zero; unit: that of the logits."""


def standardise(logits: Tensor) -> Tensor:
    """Logits of each token with mean 0 and variance 1 over the experts: R_norm.

    Source: SLIM, weight yielding. Open reading: the summaries say "normalised" only; over the
    experts of one token is causal and keeps β in the same unit for every token.

    Args:
        logits: shape (n_tokens, n_experts), unitless.

    Returns:
        Scores of the same shape; 0 in a row of equal logits.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS**2).sqrt()


def route(scores: Tensor, top_k: int) -> Tensor:
    """Softmax of the scores, the top K kept and divided by their sum.

    Source: SLIM, router. Never divided by the sum over the LoRA experts alone: the identity
    experts would lose their effect.

    Args:
        scores: shape (n_tokens, n_experts), LoRA experts first, unitless.
        top_k: experts kept, 1 ≤ top_k ≤ n_experts; ties go to whichever ``topk`` returns.

    Returns:
        Weights of the same shape, each row summing to 1, exactly 0 for experts not kept.
    """
    if top_k == scores.shape[-1]:
        return scores.softmax(-1)
    # The softmax over the K kept scores is the softmax over all, renormalised over the kept.
    kept = scores.topk(top_k, dim=-1, sorted=False)
    return torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1))


def widest_gap(n_experts: int) -> float:
    """The largest difference that two standardised scores of one token can have.

    With n scores of mean 0 and variance 1 it is √(2n): two extremes at ±√(n/2), the rest at 0.

    Args:
        n_experts: scores a token.
    """
    return math.sqrt(2 * n_experts)
