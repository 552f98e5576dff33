"""The parts of all encoders: attention, MLP, transformer block, and the network of a group.

One implementation serves every published layout; the encoder files map its names to theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budwood.errors import InputError


@dataclass(frozen=True)
class Context:
    """Extra keys and values that the tokens of one block attend to.

    Attributes:
        keys: shape (1 or batch, n_heads, n_context, d_head).
        values: same shape.
        gate: weight of their exponentials in the softmax of each head, shape (n_heads,). At 0 and
            below, the block is the same as without them; at 1, or None, they count like tokens.
    """

    keys: Tensor
    values: Tensor
    gate: Tensor | None = None


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection.

    Args:
        dim: width of the tokens.
        n_heads: number of heads.
        d_head: width of a head; default ``dim / n_heads``.
        bias: whether queries, keys and values have one.
    """

    def __init__(self, dim: int, n_heads: int, d_head: int | None = None, bias: bool = False):
        super().__init__()
        if d_head is None and dim % n_heads:
            raise InputError(f"dim={dim} does not divide into n_heads={n_heads}")
        self.n_heads = n_heads
        self.d_head = d_head or dim // n_heads
        self.qkv = nn.Linear(dim, 3 * n_heads * self.d_head, bias=bias)
        self.proj = nn.Linear(n_heads * self.d_head, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens, each of shape (batch, n_heads, n, d_head)."""
        batch, n, _ = x.shape
        qkv = self.qkv(x).view(batch, n, 3, self.n_heads, self.d_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Attend.

        Args:
            x: shape (batch, n, dim).
            context: extra keys and values to attend to.
        """
        q, k, v = self.split(x)
        n_tokens = k.shape[2]
        if context is not None:
            k = torch.cat([k, context.keys.expand(len(k), -1, -1, -1)], dim=2)
            v = torch.cat([v, context.values.expand(len(v), -1, -1, -1)], dim=2)
        if context is None or context.gate is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = _gated(q, k, v, n_tokens, context.gate)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU, or SwiGLU whose gate is the first half, between them.

    Args:
        dim: width of the tokens.
        hidden: width between the layers.
        swiglu: SwiGLU instead of GELU; the first layer is then twice as wide.
        norm: a layer norm before the second layer.
        eps: of that norm.
    """

    def __init__(
        self, dim: int, hidden: int, swiglu: bool = False, norm: bool = False, eps: float = 1e-5
    ):
        super().__init__()
        self.swiglu = swiglu
        self.fc1 = nn.Linear(dim, hidden * (2 if swiglu else 1))
        self.norm = nn.LayerNorm(hidden, eps=eps) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.swiglu:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x)
        return self.fc2(self.norm(x))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, attn: Attention, mlp: Mlp, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Tokens in and out, shape (batch, n, dim)."""
        x = x + self.attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))

    def context(self, tokens: Tensor, gate: Tensor | None = None) -> Context:
        """Keys and values of extra tokens, for attention in this block.

        Args:
            tokens: shape (n, dim).
            gate: shape (n_heads,).
        """
        _, k, v = self.attn.split(self.norm1(tokens)[None])
        return Context(k, v, gate)


class PointConv(nn.Conv1d):
    """A convolution of width 1, as the product of matrices that it is.

    On a CPU this is about twice as fast in training. Weights have the published shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n_points, in_channels) to (n_points, out_channels)."""
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class GroupNet(nn.Module):
    """The token of a group of points: PointNet twice, the group's maximum in between.

    Source: Point-BERT's mini-PointNet, as in ULIP and Uni3D.

    Args:
        channels: of a point: 3 offsets, or these and 3 colours.
        out: width of the token.
        width: of the first layer; the next ones are 2, 4 and 4 times as wide.
    """

    def __init__(self, channels: int, out: int, width: int = 128):
        super().__init__()
        self.first_conv = nn.Sequential(
            PointConv(channels, width, 1),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            PointConv(width, 2 * width, 1),
        )
        self.second_conv = nn.Sequential(
            PointConv(4 * width, 4 * width, 1),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(),
            PointConv(4 * width, out, 1),
        )

    def forward(self, groups: Tensor) -> Tensor:
        """Shape (batch, n_groups, k, channels) to (batch, n_groups, out)."""
        k = groups.shape[2]
        x = self.first_conv(groups.flatten(0, 2)).unflatten(0, (-1, k))
        top = x.amax(dim=1, keepdim=True).expand_as(x)
        x = self.second_conv(torch.cat([top, x], dim=2).flatten(0, 1))
        return x.unflatten(0, (*groups.shape[:2], k)).amax(dim=2)


def position_net(dim: int, width: int = 128) -> nn.Sequential:
    """The network that turns the coordinates of a centre into its position embedding."""
    return nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, dim))


def _gated(q: Tensor, k: Tensor, v: Tensor, n_tokens: int, gate: Tensor) -> Tensor:
    """Attention in which the gate weights the exponentials of the context.

    Args:
        q: shape (batch, n_heads, n_tokens, d_head).
        k: keys of the tokens, then of the context, shape (batch, n_heads, n, d_head).
        v: their values, same shape.
        n_tokens: number of tokens.
        gate: shape (n_heads,).

    Returns:
        Shape (batch, n_heads, n_tokens, d_head).
    """
    if not torch.is_grad_enabled():
        bias = gate.clamp(min=0).log().view(-1, 1, 1)  # −∞ where it is closed
        bias = F.pad(bias.expand(-1, 1, k.shape[2] - n_tokens), (n_tokens, 0))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    # The same with a gradient at a closed gate, where the logarithm has none. A gate below 0 stays
    # closed, but its gradient passes, so that it can open again.
    gate = (gate + (gate.clamp(min=0) - gate).detach()).view(-1, 1, 1)
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    tokens, context = logits[..., :n_tokens], logits[..., n_tokens:]
    odds = context.logsumexp(-1, keepdim=True) - tokens.logsumexp(-1, keepdim=True)
    weighted = gate * odds.sigmoid()
    mass = weighted / (weighted + (-odds).sigmoid())
    weights = torch.cat([tokens.softmax(-1) * (1 - mass), context.softmax(-1) * mass], dim=-1)
    return weights @ v
