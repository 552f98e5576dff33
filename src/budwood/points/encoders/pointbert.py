"""PointBERT as in ULIP and ULIP-2.

Source: ULIP (arXiv 2212.05171), ULIP-2 (arXiv 2305.08275); layout of the checkpoints of
github.com/salesforce/ULIP (BSD-3-Clause). Groups of nearest neighbours become tokens; position
embeddings are added again in every block; [CLS] and the maximum over the tokens are projected.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from budwood.points.encoders.base import EncoderSpec, Hub, PointEncoder, Preparation, Published
from budwood.points.encoders.blocks import Attention, Block, GroupNet, Mlp, position_net
from budwood.points.grouping import Grouping, gather


class PointBert(PointEncoder):
    """See the head of this file.

    Args:
        name: name of the encoder.
        text: text tower whose space the features are in.
        color: whether tokens see colours.
        dim: width of the tokens.
        depth: number of blocks.
        n_heads: heads of each.
        group_dim: width of a group's feature, from which its token is made.
        embed_dim: width of the features.
        grouping: how clouds are cut.
        n_points: points of a cloud in training.
    """

    pos_in_every_block = True
    stem = ("group_net", "reduce", "pos_embed")

    def __init__(
        self,
        name: str = "ulip",
        text: str = "ulip",
        *,
        color: bool = False,
        dim: int = 384,
        depth: int = 12,
        n_heads: int = 6,
        group_dim: int = 256,
        embed_dim: int = 512,
        grouping: Grouping | None = None,
        n_points: int = 8192,
    ) -> None:
        grouping = grouping or Grouping(512, 32, n_points, pointnet2=True)
        super().__init__(name, text, dim, embed_dim, grouping, Preparation(n_points, color))
        self.group_net = GroupNet(6 if color else 3, group_dim)
        self.reduce = nn.Linear(group_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_pos = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = position_net(dim)
        self.blocks = nn.ModuleList(
            Block(dim, Attention(dim, n_heads), Mlp(dim, 4 * dim)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Parameter(torch.randn(2 * dim, embed_dim) * embed_dim**-0.5)

    def embed(self, xyz: Tensor, rgb: Tensor | None) -> tuple[Tensor, Tensor]:
        centers, members = self.grouping(xyz)
        middle = gather(xyz, centers)
        groups = gather(xyz, members) - middle[:, :, None]
        if rgb is not None:
            groups = torch.cat([groups, gather(rgb, members)], dim=-1)
        tokens = self.reduce(self.group_net(groups))
        rows = len(xyz)
        x = torch.cat([self.cls_token.expand(rows, -1, -1), tokens], dim=1)
        pos = torch.cat([self.cls_pos.expand(rows, -1, -1), self.pos_embed(middle)], dim=1)
        return x, pos

    def pool(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].amax(dim=1)], dim=-1) @ self.projection

    def published(self) -> Published:
        names = {"projection": ("pc_projection",)}
        renamed = (
            ("group_net.", "encoder."),
            ("reduce.", "reduce_dim."),
            ("blocks.", "blocks.blocks."),
        )
        for key in self.state_dict():
            if key == "projection":
                continue
            name = key
            for ours, theirs in renamed:
                if key.startswith(ours):
                    name = theirs + key[len(ours) :]
            names[key] = (f"point_encoder.{name}",)
        return names


_REPO = "SFXX/ulip"
_ULIP2 = "ULIP-2/pretrained_models/ULIP-2-PointBERT-"

ULIP = EncoderSpec(
    PointBert,
    Hub(_REPO, f"{_ULIP2}8k-xyz-pc-slip_vit_b-objaverse-pretrained.pt", "dataset", "BSD-3-Clause"),
)
ULIP2 = EncoderSpec(
    PointBert,
    Hub(
        _REPO,
        f"{_ULIP2}10k-xyzrgb-pc-vit_g-objaverse_shapenet-pretrained.pt",
        "dataset",
        "BSD-3-Clause",
    ),
    {
        "name": "ulip2",
        "text": "bigg",
        "color": True,
        "depth": 18,
        "embed_dim": 1280,
        "n_points": 10_000,
    },
)
