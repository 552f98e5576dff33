"""The base of all adapters: parameters beside a frozen encoder, and their use in its forward pass.

The encoder is neither patched nor written to. An adapter runs around its blocks, or replaces some
of its parameters for the length of one call, in modules of the calling thread's own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import threading
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from budwood.errors import InputError, OutputError, UnsupportedModelError, first_line
from budwood.files import need_parent, write_whole
from budwood.points.adapters.statistics import BatchStatistics
from budwood.points.encoders.base import Around, PointEncoder
from budwood.points.encoders.blocks import Block
from budwood.points.grouping import check_points
from budwood.points.io.cloud import Assumed
from budwood.points.logits import cosine_logits

FILE = "adapter.safetensors"
_RENAMED = {"72fc0b6f0ccd09e2": "sprout-dense"}
"""Weights that were called otherwise when adapters for them were saved, by their digest."""
FORMAT = 1
FULLY_AT = 128
"""With ``fade``, strength is full on clouds this many times sparser than the encoder's."""
Scorer: TypeAlias = Callable[[Tensor], Tensor]
"""From descriptions of clouds, shape (n_clouds, width), to logits, shape (n_clouds, n_labels)."""
SEES = ("one", "earlier", "all")
"""What the label of a cloud depends on; see :attr:`Adapter.sees`."""


@dataclass(frozen=True)
class AdapterConfig:
    """Options that all adapters have.

    Attributes:
        batch_norm: keep separate BatchNorm statistics, which :meth:`Adapter.estimate` fills.
        counts: numbers of points with separate BatchNorm statistics; a cloud uses those of the
            nearest count. Empty: one set for all clouds. Ours.
        fade: how many times fewer points than in the encoder's training a cloud has where the
            adapter sets in; its strength then grows as points get fewer, see
            :meth:`Adapter.strength`. 0: full strength everywhere. Training always uses full
            strength. Ours, after WiSE-FT (arXiv 2109.01903).
    """

    batch_norm: bool = False
    counts: tuple[int, ...] = ()
    fade: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(self.counts))
        if any(count < 1 for count in self.counts):
            raise InputError(f"counts={self.counts} must each be 1 or more")
        is_number = isinstance(self.fade, int | float) and not isinstance(self.fade, bool)
        if not is_number or not (self.fade == 0 or 1 <= self.fade < FULLY_AT):
            raise InputError(f"fade={self.fade} must be 0, or from 1 to below {FULLY_AT}")


@dataclass(frozen=True)
class Usage:
    """The clouds that an adapter was adapted with.

    Attributes:
        n_clouds: usable clouds that were given.
        n_used: those with enough points for some step.
        by_count: number of points of a step → clouds that have as many, or nearly.
        assumed: what was assumed about each cloud, by its name.
    """

    n_clouds: int
    n_used: int
    by_count: Mapping[int, int]
    assumed: Mapping[str, Assumed]


class Adapter(nn.Module, ABC):
    """Parameters beside a frozen encoder.

    ``parameters()`` and ``state_dict()`` are those of the adapter alone, without the encoder's.

    Attributes:
        name: the name in ``ADAPTERS``.
        Config: class of its options.
        encoder: what it adapts.
        sees: what the label of a cloud depends on, in ``SEES``: ``"one"``, that cloud alone;
            ``"earlier"``, the clouds before it as well; ``"all"``, every cloud of the call.
        usage: the clouds it was adapted with; None if it was loaded, or not adapted.

    Args:
        encoder: kept in evaluation mode and never written to.
        config: options; default ``Config()``.
    """

    name: ClassVar[str]
    Config: ClassVar[type[AdapterConfig]] = AdapterConfig
    sees: ClassVar[str] = "one"
    encoder: PointEncoder
    usage: Usage | None = None

    def __init__(self, encoder: PointEncoder, config: AdapterConfig | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "encoder", encoder)  # not registered as a submodule
        self.config = config or self.Config()
        counts = self.config.counts
        self.statistics = BatchStatistics(encoder, counts) if self.config.batch_norm else None

    def around(self, strength: float) -> Around | None:
        """What runs in place of each block during one call; None for the block itself.

        Args:
            strength: of the adapter, in (0, 1].
        """
        return None

    def replaced(self, strength: float) -> dict[str, Tensor]:
        """Values that replace parameters of the encoder during one call, by their names there.

        Args:
            strength: of the adapter, in (0, 1].
        """
        return {}

    @property
    def width(self) -> int:
        """Width of what :meth:`describe` returns."""
        return self.encoder.embed_dim

    def describe(self, xyz: Tensor, rgb: Tensor | None = None) -> Tensor:
        """What a scorer reads of clouds: their features, and for some adapters more.

        Args:
            xyz: shape (batch, n_points, 3).
            rgb: same shape, or None.

        Returns:
            Shape (batch, width).
        """
        return self(xyz, rgb)

    def scorer(self, vectors: Tensor) -> Scorer:
        """Start to classify clouds, with nothing remembered of earlier ones.

        Args:
            vectors: text embeddings of the labels, of length 1, shape (n_labels, d).

        Returns:
            A function from descriptions of one cloud or more, see :meth:`describe`, to logits of
            the labels. Where ``sees`` is ``"earlier"``, it remembers the clouds of its calls; where
            it is ``"all"``, it must be called once with all clouds.
        """
        return lambda features: cosine_logits(features, vectors, self.encoder.logit_scale)

    def strength(self, n_points: int) -> float:
        """Strength of the adapter on clouds of ``n_points`` points, in [0, 1]; see ``fade``."""
        if not self.config.fade:
            return 1.0
        begins = self.config.fade
        sparser = math.log(self.encoder.grouping.n_dense / (begins * n_points))
        return min(max(sparser / math.log(FULLY_AT / begins), 0.0), 1.0)

    def forward(
        self, xyz: Tensor, rgb: Tensor | None = None, strength: float | None = None
    ) -> Tensor:
        """Features, as :meth:`PointEncoder.forward`.

        Args:
            xyz: shape (batch, n_points, 3).
            rgb: same shape, or None.
            strength: of the adapter, in [0, 1]; default what :meth:`strength` returns.
        """
        check_points(xyz)
        if strength is None:
            strength = self.strength(xyz.shape[1])
        around = self.around(strength) if strength else None
        return self.encoded(xyz, rgb, strength, around)

    def encoded(
        self, xyz: Tensor, rgb: Tensor | None, strength: float, around: Around | None
    ) -> Tensor:
        """Features from the encoder with replaced parameters and statistics.

        Args:
            xyz: shape (batch, n_points, 3).
            rgb: same shape, or None.
            strength: of the adapter, in [0, 1].
            around: what runs in place of each block.
        """
        values = self.replaced(strength) if strength else {}
        if self.statistics is not None and strength:
            values = {
                **self.statistics.replaced(self.encoder, xyz.shape[1], strength),
                **values,
            }
        if not values:
            return self.encoder(xyz, rgb, around)
        own = {**dict(self.encoder.named_parameters()), **dict(self.encoder.named_buffers())}
        return functional_call(_twin(self.encoder), own | values, (xyz, rgb, around))

    @torch.no_grad()
    def estimate(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Estimate BatchNorm statistics from clouds; see :meth:`BatchStatistics.estimate`.

        Raises:
            InputError: the adapter has none (``batch_norm`` is off), or there are no batches.
        """
        if self.statistics is None:
            raise InputError(f"adapter {self.name!r} has no statistics; set batch_norm=True")
        self.statistics.estimate(self.encoder, batches)

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks of the encoder."""
        return cast("list[Block]", list(self.encoder.blocks))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the adapter, without the encoder, to a folder.

        Args:
            folder: made if it does not exist; the folder that it lies in must exist.
            overwrite: replace an adapter that is there.

        Returns:
            The file.

        Raises:
            OutputError: there is an adapter already, or it cannot be written.
        """
        target = check_folder(folder, overwrite) / FILE
        about = {
            "format": FORMAT,
            "adapter": self.name,
            "config": asdict(self.config),
            "encoder": fingerprint(self.encoder),
        }
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        if not state:
            state = {"nothing": torch.zeros(0)}  # safetensors files need a tensor
        metadata = {"budwood": json.dumps(about)}
        write_whole(target, lambda part: save_file(state, part, metadata))
        return target

    @classmethod
    def restore(
        cls, encoder: PointEncoder, config: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> Adapter:
        """Make an adapter from what :meth:`save` wrote."""
        adapter = cls(encoder, cls.make_config(config))
        adapter.load_state_dict(dict(state))
        return adapter

    @classmethod
    def make_config(cls, options: Mapping[str, Any]) -> AdapterConfig:
        """Make a ``Config`` from options by name.

        Raises:
            InputError: the adapter does not have such an option.
        """
        known = [field.name for field in fields(cls.Config)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(
                f"adapter {cls.name!r} has no option {unknown[0]!r}; it has {', '.join(known)}"
            )
        return cls.Config(**options)


def check_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Check that an adapter can be written to a folder, before slow work.

    Raises:
        OutputError: there is an adapter already, the folder it lies in does not exist, or it cannot
            be written to.
    """
    folder = Path(folder)
    if (folder / FILE).exists() and not overwrite:
        raise OutputError(f"{folder / FILE} exists; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder")
    need_parent(folder)
    existing = folder if folder.exists() else folder.absolute().parent
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {existing}; choose another folder")
    return folder


def fingerprint(encoder: PointEncoder) -> dict[str, Any]:
    """What identifies an encoder: name, sizes, and a digest of the weights."""
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    sizes = {"dim": encoder.dim, "depth": len(encoder.blocks)}
    return {"name": encoder.name, **sizes, "digest": digest.hexdigest()[:16]}


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :meth:`Adapter.save` wrote: its description and its tensors.

    Raises:
        InputError: there is no adapter, or it is truncated or of a newer version.
    """
    path, about = _file(folder), read_description(folder)
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is truncated or no adapter: {first_line(error)}") from None
    state.pop("nothing", None)
    return about, state


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what an adapter is and what it was made for, without its tensors.

    Raises:
        InputError: there is no adapter, or it is truncated or of a newer version.
    """
    path = _file(folder)
    if not path.is_file():
        raise InputError(f"there is no adapter at {folder}: {FILE} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["budwood"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is truncated or no adapter: {first_line(error)}") from None
    if isinstance(about, dict) and about.get("format") != FORMAT:
        raise InputError(f"{path} has format {about.get('format')}; this version reads {FORMAT}")
    parts = [about[key] for key in ("encoder", "config") if key in about]
    if len(parts) < 2 or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path} is truncated or no adapter: its description is damaged")
    return about


def encoder_name(folder: str | os.PathLike[str]) -> str:
    """The name in ``ENCODERS`` of the encoder that a saved adapter was made for.

    Raises:
        InputError: there is no adapter, or it is truncated or of a newer version.
    """
    made_for = read_description(folder)["encoder"]
    return _RENAMED.get(str(made_for.get("digest")), str(made_for.get("name")))


def _file(folder: str | os.PathLike[str]) -> Path:
    return Path(folder) / FILE if Path(folder).is_dir() else Path(folder)


def check_fingerprint(expected: Mapping[str, Any], encoder: PointEncoder, source: str) -> None:
    """Refuse an adapter that was made for another encoder.

    Args:
        expected: :func:`fingerprint` of the encoder that the adapter was made for.
        encoder: the encoder at hand.
        source: where the adapter is from, for messages.

    Raises:
        UnsupportedModelError: they differ; the message says in what.
    """
    actual = fingerprint(encoder)
    if expected.get("digest") == actual["digest"]:
        return
    for key in ("name", "dim", "depth", "digest"):
        if expected.get(key) != actual[key]:
            what = "weights" if key == "digest" else key
            raise UnsupportedModelError(
                f"{source} was made for another encoder: {what} {expected.get(key)!r}, here "
                f"{actual[key]!r}"
            )


_TWINS = threading.local()


def _twin(encoder: PointEncoder) -> PointEncoder:
    """This thread's own modules of an encoder, with the same tensors in them.

    ``functional_call`` puts other tensors into the modules while they run. In the encoder itself
    other threads would run with these too.
    """
    twins = vars(_TWINS).setdefault("twins", WeakKeyDictionary())
    if encoder not in twins:
        tensors = [*encoder.parameters(), *encoder.buffers()]
        twins[encoder] = copy.deepcopy(encoder, {id(tensor): tensor for tensor in tensors})
    return twins[encoder]
