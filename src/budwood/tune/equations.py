"""SLIM's equations, in the order of the paper: routing, yielding, merging, L1.

For a frozen linear layer W·x + b with E_L LoRA experts and E_I identity experts::

    y   = W·x + b + Σ_i ŵ_i · (alpha / r) · B_i·A_i·x     sum over the LoRA experts
    ŵ   = route(yield_scores(standardise(R·x), d))        weights of LoRA and identity experts

Identity experts add nothing. They take weight from the LoRA experts, so that a token unlike the
training data keeps the base layer's output. R is a linear router. d is how far the token is from
the training data, in the units of :func:`standardised_distance`; :mod:`budwood.tune.slim.distance`
measures it. In training each product B_i·A_i is masked (:func:`draw_keep`) and penalised
(:func:`l1_slopes`).

Source: SLIM (NAACL 2025), rebuilt from public summaries. **Open** marks what these leave unsaid,
**deviation** what we do otherwise. All functions are pure and know no model;
:mod:`budwood.tune.slim.layer` puts them together.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
"""Keeps a row of equal logits from dividing by zero, in the unit of the logits."""

# --- Router -----------------------------------------------------------------------------------


def standardise(logits: Tensor) -> Tensor:
    """Give each token's logits mean 0 and variance 1 over the experts: R_norm.

    Source: SLIM, weight yielding. Open: the summaries say "normalised" only. Over the experts of
    one token is causal, and gives β the same unit for every token.

    Args:
        logits: shape (n_tokens, n_experts), unitless.

    Returns:
        Scores of the same shape; 0 in a row of equal logits.
    """
    return F.layer_norm(logits, logits.shape[-1:], eps=EPS**2)


def route(scores: Tensor, top_k: int) -> Tensor:
    """Turn scores into routing weights: softmax, the top K kept, divided by their sum.

    Source: SLIM, router. The sum is over all kept experts. Over the LoRA experts alone, identity
    experts would have no effect.

    Args:
        scores: shape (n_tokens, n_experts), LoRA experts first, unitless.
        top_k: experts kept, 1 ≤ top_k ≤ n_experts. ``torch.topk`` breaks ties.

    Returns:
        Weights of the same shape. Each row sums to 1; experts not kept have exactly 0.
    """
    if top_k == scores.shape[-1]:
        return scores.softmax(-1)
    # The softmax over the K kept scores is the softmax over all, renormalised over the kept.
    kept = scores.topk(top_k, dim=-1, sorted=False)
    return torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1))


def widest_gap(n_experts: int) -> float:
    """Bound the difference between two standardised scores of one token: √(2n).

    It is reached with two scores at ±√(n/2) and the rest at 0.

    Args:
        n_experts: scores of a token, n.
    """
    return math.sqrt(2 * n_experts)


# --- Weight yielding --------------------------------------------------------------------------


def standardised_distance(raw: Tensor, mean: Tensor, var: Tensor, margin: float) -> Tensor:
    """Express distances in standard deviations of the training distances, minus a margin: d.

    Source: SLIM, weight yielding. Deviation: the paper takes the raw distance. That grows with
    width and heavy tails, so that training data would yield too.

    Args:
        raw: distance of each token, shape (n_tokens,), unitless.
        mean: running mean of raw in training, shape ().
        var: running variance of raw in training, shape ().
        margin: standard deviations that still count as training data; ours.

    Returns:
        Shape (n_tokens,): mean −margin and variance 1 on training data; above 0 yields.
    """
    return (raw - mean) * (var + 1e-12).rsqrt() - margin


def yield_scores(scores: Tensor, distance: Tensor | None, n_lora: int, beta: float) -> Tensor:
    """Shift scores by the distance: z − β·d for LoRA experts, z + β·d for identity experts.

    Source: SLIM, weight yielding. Open: the exact form.

    Args:
        scores: standardised logits z, shape (n_tokens, n_experts), LoRA experts first.
        distance: d, shape (n_tokens,); None leaves the scores as they are.
        n_lora: number of LoRA experts.
        beta: strength β ≥ 0, unitless.

    Returns:
        Scores of the same shape.
    """
    if distance is None or beta == 0:
        return scores
    lora, identity = scores.split_with_sizes((n_lora, scores.shape[-1] - n_lora), -1)
    shift = distance.unsqueeze(-1)
    return torch.cat([lora.sub(shift, alpha=beta), identity.add(shift, alpha=beta)], -1)


@functools.cache
def bypass_bound(n_lora: int, n_identity: int, top_k: int, beta: float) -> float:
    """Return the distance above which no router output brings a token back to a LoRA expert.

    Two standardised scores of a token differ by at most :func:`widest_gap`. Where 2·β·d is above
    it, all identity experts are ahead of all LoRA experts.

    Args:
        n_lora: number of LoRA experts.
        n_identity: number of identity experts.
        top_k: experts kept.
        beta: strength of yielding.

    Returns:
        A bound for d; ∞ if no token can be sure, since top K exceeds the identity experts or β
        is 0.
    """
    if top_k > n_identity or beta == 0:
        return math.inf
    return widest_gap(n_lora + n_identity) * 1.001 / (2 * beta)


def surely_bypassed(
    distance: Tensor, n_lora: int, n_identity: int, top_k: int, beta: float
) -> Tensor | None:
    """Find the tokens that no router output could bring back to a LoRA expert.

    Args:
        distance: d, shape (n_tokens,).
        n_lora: as for :func:`bypass_bound`, like the others.
        n_identity: likewise.
        top_k: likewise.
        beta: likewise.

    Returns:
        bool, shape (n_tokens,). None if no token can be sure.
    """
    bound = bypass_bound(n_lora, n_identity, top_k, beta)
    return None if bound == math.inf else distance > bound


def route_one(
    logits: Sequence[float], distance: float, n_lora: int, top_k: int, beta: float
) -> dict[int, float]:
    """Route one token with plain numbers: standardise, yield, and keep the top K.

    It is ``route(yield_scores(standardise(logits), distance))`` without the cost of starting a
    dozen operations on ten numbers.

    Args:
        logits: of the router, LoRA experts first, unitless.
        distance: d; 0 without yielding.
        n_lora: number of LoRA experts.
        top_k: experts kept.
        beta: strength of yielding.

    Returns:
        LoRA expert → weight, for those that are kept.
    """
    n = len(logits)
    mean = sum(logits) / n
    var = sum([logit * logit for logit in logits]) / n - mean * mean  # exact enough in float64
    scale = 1 / math.sqrt((var if var > 0 else 0.0) + EPS**2)
    shift = beta * distance / scale  # scores over the scale: nothing else is needed of all experts
    scores = [logit - shift for logit in logits[:n_lora]]
    scores += [logit + shift for logit in logits[n_lora:]]
    kept = sorted(range(n), key=scores.__getitem__, reverse=True)[:top_k]
    highest = scores[kept[0]]
    odds = [math.exp((scores[i] - highest) * scale) for i in kept]
    total = sum(odds)
    return {i: odd / total for i, odd in zip(kept, odds) if i < n_lora}


# --- Dynamic merging --------------------------------------------------------------------------


def axis_rate(p: float) -> float:
    """Convert a fraction p of masked entries of B·A to the fraction of masked rows and columns.

    Source: SLIM, fast dynamic merging: row = col = 1 − √(1 − p).

    Args:
        p: fraction of the entries of B·A that are masked on average, in [0, 1).
    """
    return 1 - math.sqrt(1 - p)


def draw_keep(size: int, p: float, *, seed: int, key: str, step: int) -> Tensor:
    """Draw the rows of B, or columns of A, that stay in one optimiser step: the mask M.

    Source: SLIM, dynamic merging: θ + M ⊗ (B·A), with M as whole rows and columns.

    The result depends on the arguments alone and reads no global random state. So it is the same
    on every rank, in a forward pass that gradient checkpointing repeats, and after resuming.

    Args:
        size: number of rows or columns.
        p: fraction of the entries of B·A to mask, in [0, 1).
        seed: of the run.
        key: name of the layer and axis.
        step: optimiser steps made.

    Returns:
        bool, shape (size,), on the CPU; True stays.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}/{step}".encode()))
    return torch.rand(size, generator=generator) >= axis_rate(p)


def merged_scale(p: float, *, rescale: bool, masked: bool) -> float:
    """Return the factor on B·A that goes with a mask, or that replaces one.

    Source: SLIM, dynamic merging. Open: behaviour at inference, and whether M is divided by 1 − p
    as in DARE. Without a mask the factor is the expectation of M.

    Args:
        p: fraction masked.
        rescale: divide by 1 − p.
        masked: a mask is applied; otherwise its expectation is.
    """
    scale = 1 / (1 - p) if rescale else 1.0
    return scale if masked else scale * (1 - p)


# --- L1 regularisation ------------------------------------------------------------------------


def l1_slopes(l1: float, r: int, d_in: int, d_out: int) -> tuple[float, float]:
    """Return the size of the L1 penalty's gradient for each entry of A and of B.

    Source: SLIM, regularisation: l1 · Σ_i ‖B_i‖₁/(r·d_out) + ‖A_i‖₁/(r·d_in). Training adds the
    gradient and never computes the penalty itself.

    Args:
        l1: coefficient, ≥ 0.
        r: rank of one expert.
        d_in: input channels.
        d_out: output channels.

    Returns:
        Slopes for A and for B.
    """
    return l1 / (r * d_in), l1 / (r * d_out)
