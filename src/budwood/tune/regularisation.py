"""L1 regularisation of the experts' A and B, normalised by their sizes."""

from __future__ import annotations


def l1_slopes(l1: float, r: int, d_in: int, d_out: int) -> tuple[float, float]:
    """Size of the gradient of the penalty with respect to each entry of A and of B.

    Source: SLIM, regularisation: l1 · Σ_k ‖B_k‖₁/(r·d_out) + ‖A_k‖₁/(r·d_in). Training adds the
    gradient, and never computes the penalty.

    Args:
        l1: coefficient, ≥ 0.
        r: rank of one expert.
        d_in: input channels.
        d_out: output channels.

    Returns:
        Slopes for A and for B.
    """
    return l1 / (r * d_in), l1 / (r * d_out)
