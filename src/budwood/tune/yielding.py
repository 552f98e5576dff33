"""Weight yielding: far from what was trained on, LoRA experts give way to identity experts."""

from __future__ import annotations

import torch
from torch import Tensor

from budwood.tune.router import widest_gap


def standardised_distance(raw: Tensor, mean: Tensor, var: Tensor, margin: float) -> Tensor:
    """Distance in standard deviations of the distances met in training.

    Source: SLIM, weight yielding. Deviation: the paper's raw distance grows with width and heavy
    tails, so that training data yields too; running training statistics set it right.

    Args:
        raw: distance of each token, shape (n_tokens,), unitless.
        mean: running mean of raw in training, shape ().
        var: running variance of raw in training, shape ().
        margin: standard deviations that count as inside the training distribution; ours.

    Returns:
        Distances, shape (n_tokens,): about mean −margin and variance 1 on training data.
    """
    return (raw - mean) * (var + 1e-12).rsqrt() - margin


def yield_scores(scores: Tensor, distance: Tensor | None, n_lora: int, beta: float) -> Tensor:
    """Scores after yielding: z − β·d for LoRA experts, z + β·d for identity experts.

    Source: SLIM, weight yielding. Open reading: the exact form.

    Args:
        scores: standardised logits, shape (n_tokens, n_experts), LoRA experts first.
        distance: standardised distance, shape (n_tokens,); None yields nothing.
        n_lora: number of LoRA experts.
        beta: strength, ≥ 0, unitless.

    Returns:
        Scores of the same shape.
    """
    if distance is None or beta == 0:
        return scores
    shift = (beta * distance).unsqueeze(-1)
    n_identity = scores.shape[-1] - n_lora
    side = torch.cat([-scores.new_ones(n_lora), scores.new_ones(n_identity)])
    return scores + shift * side


def surely_bypassed(
    distance: Tensor, n_lora: int, n_identity: int, top_k: int, beta: float
) -> Tensor | None:
    """Tokens that no router output could bring back to a LoRA expert.

    No two standardised scores of a token are further apart than :func:`router.widest_gap`, so a
    token with 2·β·d above it has all identity experts ahead of all LoRA experts.

    Args:
        distance: standardised distance, shape (n_tokens,).
        n_lora: number of LoRA experts.
        n_identity: number of identity experts.
        top_k: experts kept.
        beta: strength of yielding.

    Returns:
        bool of shape (n_tokens,); None where it can't happen, since top K reaches past identity.
    """
    if top_k > n_identity or beta == 0:
        return None
    return distance > widest_gap(n_lora + n_identity) * 1.001 / (2 * beta)
