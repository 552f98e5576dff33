"""SLIM on routed experts, pair by pair of token and part, from its equations."""

from __future__ import annotations

import torch

from tests.reference import slim_reference


def projection(x, weight, bias, a, b, distance, config, scale):
    """One part's linear layer with its own mixture, for one token: shape (d_out,)."""
    out = weight @ x + (0 if bias is None else bias)
    hidden, logits = (a @ x).split([config.rank, config.n_total])
    scores = slim_reference.standardise(logits.tolist())
    scores = slim_reference.yield_scores(scores, distance, config.n_experts, config.beta)
    for i, share in enumerate(slim_reference.route(scores, config.top_k)[: config.n_experts]):
        rows = slice(i * config.r, (i + 1) * config.r)
        out = out + share * scale * (b[:, rows] @ hidden[rows])
    return out


def block(x, index, shares, experts, first, last, distances, config, scale):
    """All tokens of a block.

    Args:
        x: shape (n_tokens, d).
        index: parts of each token.
        shares: their weights.
        experts: the base model's module.
        first: (A, B) of the first weight, each with a leading axis of parts.
        last: (A, B) of ``down_proj``.
        distances: of the tokens.
        config: of the adapter.
        scale: on what the experts add.
    """

    def of_part(name, part):
        weight = getattr(experts, name)[part].double()
        bias = getattr(experts, f"{name}_bias")[part].double() if experts.has_bias else None
        return (weight.T if experts.is_transposed else weight), bias

    up = "gate_up_proj" if experts.has_gate else "up_proj"
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        for part, share in zip(index[t].tolist(), shares[t]):
            a, b = (weight[part] for weight in first)
            h = projection(token, *of_part(up, part), a, b, distances[t], config, scale)
            h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
            a, b = (weight[part] for weight in last)
            y = projection(h, *of_part("down_proj", part), a, b, distances[t], config, scale)
            out[t] += share * y
    return out
