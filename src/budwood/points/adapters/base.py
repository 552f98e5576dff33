"""What an adapter is: parameters beside a frozen encoder, and how they come into its forward pass.

Nothing of the encoder is patched or written: an adapter stands around its blocks, or lends it other
values for the length of one call.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from budwood.errors import InputError, OutputError, UnsupportedModelError, first_line
from budwood.files import write_whole
from budwood.points.adapters.statistics import BatchStatistics
from budwood.points.encoders.base import Around, PointEncoder
from budwood.points.encoders.blocks import Block
from budwood.points.grouping import check_points

FILE = "adapter.safetensors"
FORMAT = 1
FULLY_AT = 128
"""With ``fade``, how many times sparser than in training clouds are where an adapter is whole."""


@dataclass(frozen=True)
class AdapterConfig:
    """Options that all adapters have.

    Attributes:
        batch_norm: hold BatchNorm statistics of their own, filled by :meth:`Adapter.estimate`.
        counts: numbers of points, each with statistics of its own; a cloud gets those of the
            nearest. Empty: one set for all. Ours.
        fade: come in by degrees as points get fewer, though trained as a whole, from where they are
            so many times fewer than the encoder was made for: 4 for not at all down to a quarter,
            0 for whole everywhere; see :meth:`Adapter.share`. Ours, after WiSE-FT (arXiv
            2109.01903).
    """

    batch_norm: bool = False
    counts: tuple[int, ...] = ()
    fade: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(self.counts))
        if any(count < 1 for count in self.counts):
            raise InputError(f"counts={self.counts} must be 1 or more each")
        is_number = isinstance(self.fade, int | float) and not isinstance(self.fade, bool)
        if not is_number or not (self.fade == 0 or 1 <= self.fade < FULLY_AT):
            raise InputError(f"fade={self.fade} must be 0, or from 1 to below {FULLY_AT}")


class Adapter(nn.Module, ABC):
    """Parameters beside a frozen encoder.

    ``parameters()`` are what is trained; the encoder is not among them, nor in ``state_dict()``.

    Attributes:
        name: the name in ``ADAPTERS``.
        Config: class of its options.
        encoder: what it adapts.
        transductive: what a cloud is named depends on the other clouds of the call.

    Args:
        encoder: kept in evaluation mode and never written to.
        config: options; default ``Config()``.
    """

    name: ClassVar[str]
    Config: ClassVar[type[AdapterConfig]] = AdapterConfig
    transductive: ClassVar[bool] = False
    encoder: PointEncoder

    def __init__(self, encoder: PointEncoder, config: AdapterConfig | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "encoder", encoder)  # not a child: its state is not ours
        self.config = config or self.Config()
        counts = self.config.counts
        self.statistics = BatchStatistics(encoder, counts) if self.config.batch_norm else None

    def around(self, share: float) -> Around | None:
        """What stands in place of each block during one call; None for the block itself.

        Args:
            share: how far the adapter comes in, in (0, 1].
        """
        return None

    def replaced(self, share: float) -> dict[str, Tensor]:
        """Values that stand in for those of the encoder during one call, by their names there.

        Args:
            share: how far the adapter comes in, in (0, 1].
        """
        return {}

    def adjusted_names(self, vectors: Tensor, features: Tensor) -> Tensor:
        """Embeddings of names as clouds are compared with them.

        Args:
            vectors: of the names, of length 1, shape (n_names, d).
            features: of all clouds to be named, shape (n_clouds, d).

        Returns:
            Of length 1, shape (n_names, d).
        """
        return vectors

    def share(self, n_points: int) -> float:
        """How far the adapter comes in on clouds of so many points, in [0, 1]; see ``fade``."""
        if not self.config.fade:
            return 1.0
        begins = self.config.fade
        sparser = math.log(self.encoder.grouping.n_dense / (begins * n_points))
        return min(max(sparser / math.log(FULLY_AT / begins), 0.0), 1.0)

    def forward(self, xyz: Tensor, rgb: Tensor | None = None, share: float | None = None) -> Tensor:
        """Features, as :meth:`PointEncoder.forward`.

        Args:
            xyz: shape (batch, n_points, 3).
            rgb: of the same shape, or None.
            share: how far the adapter comes in, in [0, 1]; None for what :meth:`share` says.
        """
        check_points(xyz)
        if share is None:
            share = self.share(xyz.shape[1])
        if share == 0:
            return self.encoder(xyz, rgb)
        lent = self.replaced(share)
        if self.statistics is not None:
            lent = {**self.statistics.replaced(self.encoder, xyz.shape[1], share), **lent}
        if not lent:
            return self.encoder(xyz, rgb, self.around(share))
        return functional_call(self.encoder, lent, (xyz, rgb, self.around(share)))

    @torch.no_grad()
    def estimate(self, batches: Any) -> None:
        """Re-estimate BatchNorm statistics; see :meth:`BatchStatistics.estimate`.

        Raises:
            InputError: this adapter has none, or there are no batches.
        """
        if self.statistics is None:
            raise InputError(f"adapter {self.name!r} has no statistics; set batch_norm=True")
        self.statistics.estimate(self.encoder, batches)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of the encoder."""
        return cast("list[Block]", list(self.encoder.blocks))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write to a folder of its own, beside the encoder.

        Args:
            folder: made if need be.
            overwrite: replace an adapter that is there.

        Returns:
            The file.

        Raises:
            OutputError: there is one already, or it cannot be written.
        """
        target = Path(folder) / FILE
        if target.exists() and not overwrite:
            raise OutputError(f"{target} exists; choose another folder, or overwrite it on purpose")
        about = {
            "format": FORMAT,
            "adapter": self.name,
            "config": asdict(self.config),
            "encoder": identity(self.encoder),
        }
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        if not state:
            state = {"nothing": torch.zeros(0)}
        metadata = {"budwood": json.dumps(about)}
        write_whole(target, lambda part: save_file(state, part, metadata))
        return target

    @classmethod
    def restore(
        cls, encoder: PointEncoder, config: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> Adapter:
        """An adapter from what :meth:`save` wrote."""
        adapter = cls(encoder, cls.make_config(config))
        adapter.load_state_dict(dict(state))
        return adapter

    @classmethod
    def make_config(cls, options: Mapping[str, Any]) -> AdapterConfig:
        """Options by name.

        Raises:
            InputError: an option that the adapter does not have.
        """
        known = [field.name for field in fields(cls.Config)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(
                f"adapter {cls.name!r} has no option {unknown[0]!r}; it has {', '.join(known)}"
            )
        return cls.Config(**options)


def identity(encoder: PointEncoder) -> dict[str, Any]:
    """What tells encoders apart: name, sizes, and a digest of the weights."""
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    sizes = {"dim": encoder.dim, "depth": len(encoder.blocks)}
    return {"name": encoder.name, **sizes, "digest": digest.hexdigest()[:16]}


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :meth:`Adapter.save` wrote: its description and its tensors.

    Raises:
        InputError: there is no adapter, it is truncated, or of a newer version.
    """
    path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise InputError(f"there is no adapter at {folder}: {FILE} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["budwood"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is truncated or no adapter: {first_line(error)}") from None
    if isinstance(about, dict) and about.get("format") != FORMAT:
        raise InputError(f"{path} has format {about.get('format')}; this version reads {FORMAT}")
    parts = [about[key] for key in ("encoder", "config") if key in about]
    if len(parts) < 2 or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path} is truncated or no adapter: its description is damaged")
    state.pop("nothing", None)
    return about, state


def check_identity(made_for: Mapping[str, Any], encoder: PointEncoder, source: str) -> None:
    """Refuse an adapter that was made for another encoder.

    Raises:
        UnsupportedModelError: it was; the message says in what they differ.
    """
    ours = identity(encoder)
    for key in ("name", "dim", "depth", "digest"):
        if made_for.get(key) != ours[key]:
            what = "weights" if key == "digest" else key
            raise UnsupportedModelError(
                f"{source} was made for another encoder: {what} {made_for.get(key)!r}, here "
                f"{ours[key]!r}"
            )
