"""Losses of fine-tuning, as functions on tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.tune.data.encoding import IGNORED


def answer_loss(logits: Tensor, labels: Tensor, n_items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the next token.

    Args:
        logits: shape (batch, length, vocabulary).
        labels: label of each token, ``IGNORED`` where it is not supervised; shape (batch, length).
        n_items: divisor of the sum; None for the number of supervised tokens.

    Returns:
        A scalar in nats per token, float32.
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return total / (n_items if n_items is not None else (labels != IGNORED).sum().clamp_min(1))


def token_kl(base: Tensor, tuned: Tensor) -> Tensor:
    """Divergence of next-token distributions, KL(base ‖ tuned).

    Args:
        base: logits, shape (..., vocabulary).
        tuned: same shape.

    Returns:
        In nats, float32, shape (...).
    """
    log_base, log_tuned = base.float().log_softmax(-1), tuned.float().log_softmax(-1)
    return (log_base.exp() * (log_base - log_tuned)).sum(-1)


def answer_kl(base: Tensor, tuned: Tensor, labels: Tensor) -> Tensor:
    """Mean divergence where supervised tokens are predicted.

    Args:
        base: logits of the base model, shape (batch, length, vocabulary).
        tuned: same shape.
        labels: ``IGNORED`` where a token does not count, shape (batch, length); one counts.

    Returns:
        A scalar in nats per token.
    """
    counts = labels[:, 1:] != IGNORED
    return token_kl(base[:, :-1][counts], tuned[:, :-1][counts]).mean()


def prompt_kl(base: Tensor, tuned: Tensor, labels: Tensor, attention: Tensor) -> Tensor:
    """Mean divergence at the prompt's tokens: those that are neither padding nor supervised.

    Args:
        base: logits of the base model at the last positions, shape (batch, length, vocabulary).
        tuned: same shape.
        labels: of those positions, shape (batch, length).
        attention: 1 for tokens and 0 for padding, shape (batch, length or more).

    Returns:
        A scalar in nats per token; 0 if there are no such tokens.
    """
    inside = attention[:, -labels.shape[1] :].bool()
    # Position i predicts token i + 1. Positions that predict the answer belong to the other loss.
    free = torch.ones_like(inside)
    free[:, :-1] = labels[:, 1:] == IGNORED
    chosen = inside & free & (labels == IGNORED)
    if not bool(chosen.any()):
        return tuned.sum() * 0.0
    return token_kl(base[chosen], tuned[chosen]).mean()


def others_kl(base: Tensor, tuned: Tensor, labels: Tensor) -> Tensor:
    """Mean divergence over the tokens beside the right one, where supervised tokens are predicted.

    Source: Mask the Target, arXiv 2605.29498: the right token is taken out of both distributions,
    and what is left is normalised. It does not work against learning the right token.

    Args:
        base: logits of the base model, shape (batch, length, vocabulary).
        tuned: same shape.
        labels: ``IGNORED`` where a token does not count, shape (batch, length); one counts.

    Returns:
        A scalar in nats per token.
    """
    counts = labels[:, 1:] != IGNORED
    right = labels[:, 1:][counts][:, None]
    without = (x[:, :-1][counts].float().scatter(-1, right, -torch.inf) for x in (base, tuned))
    log_base, log_tuned = (x.log_softmax(-1).scatter(-1, right, 0.0) for x in without)
    terms = (log_base.exp() * (log_base - log_tuned)).scatter(-1, right, 0.0)
    return terms.sum(-1).mean()
