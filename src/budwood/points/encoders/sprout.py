"""Sprout points: a small PointBERT-like encoder aligned with MiniLM sentence embeddings.

Ours. It is smaller than the published ones, has no colour, and the size and number of its groups
follow the number of points. ``recipes/points`` trains it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood.errors import InputError, OutputError, UnsupportedModelError
from budwood.points.encoders.base import (
    LOGIT_SCALE,
    EncoderSpec,
    PointEncoder,
    Preparation,
    Published,
    check_scale,
)
from budwood.points.encoders.blocks import Attention, Block, GroupNet, Mlp, position_net
from budwood.points.encoders.checkpoints import check_layout
from budwood.points.grouping import Grouping, gather
from budwood.points.label_file import labels_beside, stamp_in

WEIGHTS = Path(__file__).parents[1] / "weights" / "sprout.safetensors"
DENSE = WEIGHTS.with_name("sprout-dense.safetensors")
"""Weights that were trained on dense clouds of objects indoors alone."""


@dataclass(frozen=True)
class SproutConfig:
    """Sizes of sprout.

    Attributes:
        dim: width of the tokens.
        depth: number of blocks.
        n_heads: heads of each.
        mlp_ratio: width inside the MLPs, in units of ``dim``.
        group_width: width of the first layer on a group.
        embed_dim: width of the features; 384 is MiniLM's.
        n_points: points of a dense cloud.
        n_groups: groups of a dense cloud.
        k: points in each.
        k_min: smallest k for sparse clouds.
        scale_token: whether positions include the width of the group, which varies with density.
    """

    dim: int = 128
    depth: int = 6
    n_heads: int = 4
    mlp_ratio: int = 2
    group_width: int = 32
    embed_dim: int = 384
    n_points: int = 1024
    n_groups: int = 128
    k: int = 16
    k_min: int = 4
    scale_token: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "scale_token" else 1
            if not isinstance(value, int) or value < least:
                raise InputError(f"{field.name}={value!r} must be an integer of 1 or more")
        if self.dim % self.n_heads:
            raise InputError(f"dim={self.dim} does not divide into n_heads={self.n_heads}")


class Sprout(PointEncoder):
    """See the head of this file.

    Attributes:
        text_center: mean text embedding in training, subtracted from those of labels, shape
            (embed_dim,).
    """

    stem = ("group_net", "scale_net", "pos_embed")
    text_center: Tensor

    def __init__(self, config: SproutConfig | None = None, name: str = "sprout") -> None:
        config = config or SproutConfig()
        grouping = Grouping(config.n_groups, config.k, config.n_points, k_min=config.k_min)
        prep = Preparation(config.n_points)
        super().__init__(name, "minilm", config.dim, config.embed_dim, grouping, prep)
        self.config = config
        dim = config.dim
        self.group_net = GroupNet(3, dim, config.group_width)
        self.scale_net = nn.Linear(1, dim) if config.scale_token else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_pos = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = position_net(dim)
        self.blocks = nn.ModuleList(
            Block(dim, Attention(dim, config.n_heads, bias=True), Mlp(dim, config.mlp_ratio * dim))
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(2 * dim, config.embed_dim)
        self.register_buffer("text_center", torch.zeros(config.embed_dim))

    def embed(self, xyz: Tensor, rgb: Tensor | None) -> tuple[Tensor, Tensor]:
        centers, members = self.grouping(xyz)
        middle = gather(xyz, centers)
        offsets = gather(xyz, members) - middle[:, :, None]
        # Scale groups to one size, so that dense and sparse ones look alike.
        width = offsets.norm(dim=-1).amax(dim=-1)[..., None, None]
        if self.scale_net is not None:
            offsets = offsets / width.clamp(min=1e-6)
        tokens = self.group_net(offsets)
        pos = self.pos_embed(middle)
        if self.scale_net is not None:
            pos = pos + self.scale_net(width.squeeze(-1))
        rows = len(xyz)
        x = torch.cat([self.cls_token.expand(rows, -1, -1), tokens], dim=1)
        return x, torch.cat([self.cls_pos.expand(rows, -1, -1), pos], dim=1)

    def pool(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.projection(torch.cat([x[:, 0], x[:, 1:].amax(dim=1)], dim=-1))

    def text_stamp(self) -> str:
        """Digest of ``text_center``: weights have the same if their labels of training are."""
        center = self.text_center.detach().cpu().bfloat16()  # as in the file that ships
        return hashlib.sha256(center.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    def published(self) -> Published:
        return {}


def save_sprout(
    encoder: Sprout, path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write an encoder with its sizes.

    Args:
        encoder: what to write.
        path: a .safetensors file; replaced if it exists.
        dtype: of the floating-point tensors in the file; default: unchanged.

    Raises:
        OutputError: the file cannot be written.
    """
    state = {
        key: value.detach().to(dtype if value.is_floating_point() else None).contiguous()
        for key, value in encoder.state_dict().items()
    }
    sizes = json.dumps(dataclasses.asdict(encoder.config))
    metadata = {"format": "pt", "sprout": sizes, "logit_scale": repr(encoder.logit_scale)}
    try:
        save_file(state, path, metadata)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from None


def load_sprout(path: str | os.PathLike[str] = WEIGHTS, name: str = "sprout") -> Sprout:
    """Read what :func:`save_sprout` wrote, as float32.

    Raises:
        InputError: there is no such file, it is truncated, or the file of labels beside it is of
            other weights.
        UnsupportedModelError: the file holds something else; the message says which keys differ.
    """
    if not Path(path).exists():
        hint = "run its recipe" if Path(path) == WEIGHTS else "check the path"
        raise InputError(f"{path}, the weights of sprout's point encoder, does not exist: {hint}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is truncated or no safetensors file: {error}") from None
    if "sprout" not in metadata:
        raise UnsupportedModelError(f"{path} is not a sprout encoder: its metadata has no sizes")
    config, scale = _read_sizes(metadata, str(path))
    encoder = Sprout(config, name)
    encoder.logit_scale = scale
    wanted = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    check_layout(wanted, state, f"{path} does not fit the sizes in its metadata")
    encoder.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    )
    encoder.labels_file = _labels_of(encoder, Path(path))
    return encoder


def _labels_of(encoder: Sprout, weights: Path) -> Path | None:
    """The file of labels beside weights, if there is one and they were trained on them."""
    known = labels_beside(weights)
    if not known.is_file():
        return None
    if stamp_in(known) not in (None, encoder.text_stamp()):
        raise InputError(
            f"{known} has the labels of other weights than {weights}; copy both files from one run "
            "of the recipe, or delete the labels"
        )
    return known


def _read_sizes(metadata: dict[str, str], source: str) -> tuple[SproutConfig, float]:
    """Sizes and ``logit_scale`` in the metadata of a file."""
    known = [field.name for field in dataclasses.fields(SproutConfig)]
    try:
        sizes = json.loads(metadata["sprout"])
        scale = float(metadata.get("logit_scale", LOGIT_SCALE))
    except ValueError as error:
        raise InputError(f"{source} has damaged metadata: {error}") from None
    check_scale(scale, source)
    if not isinstance(sizes, dict):
        raise InputError(f"{source} has sprout sizes {str(sizes)[:60]!r}; expected name and number")
    unknown = [key for key in sizes if key not in known]
    if unknown:
        raise UnsupportedModelError(
            f"{source} is not a sprout checkpoint: unknown sizes {', '.join(unknown)[:60]}; known: "
            + ", ".join(known)
        )
    try:
        return SproutConfig(**sizes), scale
    except InputError as error:
        raise InputError(f"{source} has damaged sizes: {error}") from None


SPROUT = EncoderSpec(Sprout)
SPROUT_DENSE = EncoderSpec(Sprout, options={"name": "sprout-dense"})
