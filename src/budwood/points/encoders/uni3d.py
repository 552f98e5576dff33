"""Uni3D, tiny to giant: an EVA vision transformer on groups of points.

Source: Uni3D (arXiv 2310.06773); layout of the checkpoints of github.com/baaivision/Uni3D (MIT),
whose blocks are timm's: tiny, small and giant with a fused ``qkv`` and biases of their own, base
and large with split projections and a normalised SwiGLU. Rotary embeddings are not used on points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.points.encoders.base import EncoderSpec, Hub, PointEncoder, Preparation, Published
from budwood.points.encoders.blocks import Attention, Block, GroupNet, Mlp, position_net
from budwood.points.grouping import Grouping, gather

EPS = 1e-6


@dataclass(frozen=True)
class Eva:
    """Sizes and variant of the transformer.

    Attributes:
        dim: width of the tokens.
        depth: number of blocks.
        n_heads: heads of each.
        hidden: width inside the MLPs.
        mlp: ``"packed"`` SwiGLU, ``"split"`` SwiGLU with a norm, or ``"gelu"``.
        fused: whether the checkpoint has ``qkv``, or ``q_proj``, ``k_proj`` and ``v_proj``.
    """

    dim: int
    depth: int
    n_heads: int
    hidden: int
    mlp: str
    fused: bool

    def __post_init__(self) -> None:
        if self.mlp not in ("packed", "split", "gelu"):
            raise InputError(f"mlp={self.mlp!r} is unknown; give 'packed', 'split' or 'gelu'")


SIZES = {
    "ti": Eva(192, 12, 3, 512, "packed", True),
    "s": Eva(384, 12, 6, 1024, "packed", True),
    "b": Eva(768, 12, 12, 2048, "split", False),
    "l": Eva(1024, 24, 16, 2730, "split", False),
    "g": Eva(1408, 40, 16, 6144, "gelu", True),
}


class Uni3D(PointEncoder):
    """See the head of this file.

    Args:
        eva: the transformer.
        name: name of the encoder.
        text: text tower whose space the features are in.
        group_dim: width of a group's feature, from which its token is made.
        embed_dim: width of the features.
        grouping: how clouds are cut.
        n_points: points of a cloud in training.
    """

    stem = ("group_net", "reduce", "pos_embed")

    def __init__(
        self,
        eva: Eva,
        name: str = "uni3d",
        text: str = "eva02-e",
        *,
        group_dim: int = 512,
        embed_dim: int = 1024,
        grouping: Grouping | None = None,
        n_points: int = 10_000,
    ) -> None:
        grouping = grouping or Grouping(512, 64, n_points, pointnet2=True)
        super().__init__(
            name, text, eva.dim, embed_dim, grouping, Preparation(n_points, color=True)
        )
        self.eva = eva
        self.group_net = GroupNet(6, group_dim)
        self.reduce = nn.Linear(group_dim, eva.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, eva.dim))
        self.cls_pos = nn.Parameter(torch.randn(1, 1, eva.dim))
        self.pos_embed = position_net(eva.dim)
        self.blocks = nn.ModuleList(_block(eva) for _ in range(eva.depth))
        self.norm = nn.LayerNorm(eva.dim, eps=EPS)
        self.projection = nn.Linear(eva.dim, embed_dim)

    def embed(self, xyz: Tensor, rgb: Tensor | None) -> tuple[Tensor, Tensor]:
        assert rgb is not None
        centers, members = self.grouping(xyz)
        middle = gather(xyz, centers)
        offsets = gather(xyz, members) - middle[:, :, None]
        groups = torch.cat([offsets, gather(rgb, members)], dim=-1)
        tokens = self.reduce(self.group_net(groups))
        rows = len(xyz)
        x = torch.cat([self.cls_token.expand(rows, -1, -1), tokens], dim=1)
        pos = torch.cat([self.cls_pos.expand(rows, -1, -1), self.pos_embed(middle)], dim=1)
        return x, pos

    def pool(self, x: Tensor) -> Tensor:
        return self.projection(self.norm(x[:, 0]))

    def published(self) -> Published:
        renamed = {
            "group_net.": "encoder.",
            "reduce.": "encoder2trans.",
            "projection.": "trans2embed.",
            "norm.": "visual.fc_norm.",
            "blocks.": "visual.blocks.",
        }
        names: dict[str, tuple[str | None, ...]] = {}
        for key in self.state_dict():
            name = key
            for ours, theirs in renamed.items():
                if key.startswith(ours):
                    name = theirs + key[len(ours) :]
            parts = self._parts(name)
            names[key] = tuple(None if p is None else f"point_encoder.{p}" for p in parts)
        return names

    def _parts(self, name: str) -> tuple[str | None, ...]:
        stem, _, last = name.rpartition(".")
        if stem.endswith("attn.qkv"):
            attn = stem.removesuffix(".qkv")
            if not self.eva.fused:
                k = None if last == "bias" else f"{attn}.k_proj.weight"
                return f"{attn}.q_proj.{last}", k, f"{attn}.v_proj.{last}"
            if last == "bias":
                return f"{attn}.q_bias", None, f"{attn}.v_bias"
        if stem.endswith("mlp.fc1") and self.eva.mlp == "split":
            return f"{stem}_g.{last}", f"{stem}_x.{last}"
        return (name,)


def _block(eva: Eva) -> Block:
    mlp = Mlp(eva.dim, eva.hidden, eva.mlp != "gelu", eva.mlp == "split", EPS)
    return Block(eva.dim, Attention(eva.dim, eva.n_heads, bias=True), mlp, EPS)


def _spec(size: str) -> EncoderSpec:
    name = f"uni3d-{size}"
    return EncoderSpec(
        Uni3D,
        Hub("BAAI/Uni3D", f"modelzoo/{name}/model.pt", licence="MIT"),
        {"eva": SIZES[size], "name": name},
    )


TINY, SMALL, BASE, LARGE, GIANT = (_spec(size) for size in SIZES)
