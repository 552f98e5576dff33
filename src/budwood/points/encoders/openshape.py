"""PointBERT as in OpenShape: the point patch transformer (PPAT).

Source: OpenShape (arXiv 2305.10764); layout of the checkpoints of github.com/Colin97/OpenShape_code
(Apache-2.0). Balls of points become tokens, which contain their centre instead of a position
embedding; [CLS] is projected. Deviation: the published code draws the first centre at random, this
one takes the first point; sparse clouds use nearest neighbours, as balls would be empty.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budwood.points.encoders.base import EncoderSpec, Hub, PointEncoder, Preparation, Published
from budwood.points.encoders.blocks import Attention, Block, Mlp
from budwood.points.grouping import Grouping, gather


class OpenShape(PointEncoder):
    """See the head of this file.

    Args:
        name: name of the encoder.
        text: text tower whose space the features are in.
        dim: width of the tokens.
        depth: number of blocks.
        n_heads: heads of each.
        d_head: width of a head.
        mlp_dim: width inside the MLPs.
        group_dims: widths of the layers on a group.
        embed_dim: width of the features; None: [CLS] without a projection.
        swap_yz: whether y and z are swapped, as in training.
        grouping: how clouds are cut.
        n_points: points of a cloud in training.
    """

    stem = ("convs", "norms", "lift", "lift_norm")

    def __init__(
        self,
        name: str = "openshape",
        text: str = "bigg",
        *,
        dim: int = 512,
        depth: int = 12,
        n_heads: int = 8,
        d_head: int = 64,
        mlp_dim: int = 1536,
        group_dims: tuple[int, ...] = (64, 64, 256),
        embed_dim: int | None = 1280,
        swap_yz: bool = True,
        grouping: Grouping | None = None,
        n_points: int = 10_000,
    ) -> None:
        grouping = grouping or Grouping(384, 64, n_points, radius=0.2)
        prep = Preparation(n_points, color=True, swap_yz=swap_yz)
        super().__init__(name, text, dim, embed_dim or dim, grouping, prep)
        widths = (9, *group_dims)  # offset, place and colour of a point
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, group_dims))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in group_dims)
        self.lift = nn.Conv1d(group_dims[-1] + 3, dim, 1)
        self.lift_norm = nn.LayerNorm(dim)
        self.cls_token = nn.Parameter(torch.randn(dim))
        self.blocks = nn.ModuleList(
            Block(dim, Attention(dim, n_heads, d_head), Mlp(dim, mlp_dim)) for _ in range(depth)
        )
        self.proj = nn.Identity() if embed_dim is None else nn.Linear(dim, embed_dim)

    def embed(self, xyz: Tensor, rgb: Tensor | None) -> tuple[Tensor, Tensor]:
        assert rgb is not None
        centers, members = self.grouping(xyz)
        middle = gather(xyz, centers)
        places = gather(xyz, members)
        points = torch.cat([places - middle[:, :, None], places, gather(rgb, members)], dim=-1)
        x = points.permute(0, 3, 2, 1)  # (batch, channels, k, n_groups)
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
        x = torch.cat([middle.transpose(1, 2), x.amax(dim=2)], dim=1)
        x = self.lift_norm(self.lift(x).transpose(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1)
        return x, torch.zeros_like(x[:1, :1])

    def pool(self, x: Tensor) -> Tensor:
        return self.proj(x[:, 0])

    def published(self) -> Published:
        inside = "" if isinstance(self.proj, nn.Identity) else "ppat."
        heads = {
            "convs.": "sa.mlp_convs.",
            "norms.": "sa.mlp_bns.",
            "lift_norm.": "lift.2.",
            "lift.": "lift.0.",
            "blocks.": "transformer.layers.",
        }
        parts = {
            "norm1.": "0.norm.",
            "attn.qkv.": "0.fn.to_qkv.",
            "attn.proj.": "0.fn.to_out.0.",
            "norm2.": "1.norm.",
            "mlp.fc1.": "1.fn.net.0.",
            "mlp.fc2.": "1.fn.net.3.",
        }
        names: dict[str, tuple[str | None, ...]] = {}
        for key in self.state_dict():
            if key.startswith("proj."):
                names[key] = (key,)
                continue
            name = key
            for ours, theirs in heads.items():
                if key.startswith(ours):
                    name = theirs + key[len(ours) :]
                    break
            for ours, theirs in parts.items():
                name = name.replace(ours, theirs) if key.startswith("blocks.") else name
            names[key] = (inside + name,)
        return names


def _spec(name: str, text: str, embed_dim: int | None, swap_yz: bool, file: str) -> EncoderSpec:
    options = {"name": name, "text": text, "embed_dim": embed_dim, "swap_yz": swap_yz}
    return EncoderSpec(
        OpenShape, Hub(f"OpenShape/{file}", "model.pt", licence="Apache-2.0"), options
    )


OPENSHAPE = _spec("openshape", "bigg", 1280, True, "openshape-pointbert-vitg14-rgb")
OPENSHAPE_L14 = _spec("openshape-l14", "clip-l14", 768, False, "openshape-pointbert-vitl14-rgb")
OPENSHAPE_B32 = _spec("openshape-b32", "clip-b32", None, False, "openshape-pointbert-vitb32-rgb")
