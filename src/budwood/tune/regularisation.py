"""L1 regularisation of the experts' A and B, normalised by their sizes."""

from __future__ import annotations

from torch import Tensor


def l1_slopes(l1: float, r: int, d_in: int, d_out: int) -> tuple[float, float]:
    """Size of the gradient of the penalty with respect to each entry of A and of B.

    Args:
        l1: coefficient, ≥ 0.
        r: rank of one expert.
        d_in: input channels.
        d_out: output channels.

    Returns:
        Slopes for A and for B.
    """
    return l1 / (r * d_in), l1 / (r * d_out)


def l1_penalty(a: Tensor, b: Tensor, r: int) -> Tensor:
    """The penalty of one layer: Σ_k ‖B_k‖₁/(r·d_out) + ‖A_k‖₁/(r·d_in), without coefficient.

    Source: SLIM, regularisation. Training adds its gradient, not this value; it is for logging.

    Args:
        a: A of all experts, shape (n_lora · r, d_in).
        b: B of all experts, shape (d_out, n_lora · r).
        r: rank of one expert.

    Returns:
        Shape ().
    """
    slope_a, slope_b = l1_slopes(1.0, r, a.shape[1], b.shape[0])
    return b.abs().sum() * slope_b + a.abs().sum() * slope_a
