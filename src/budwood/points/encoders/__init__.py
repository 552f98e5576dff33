"""Point encoders, one file each. A new encoder is a new file and an entry in ``catalogue``."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from budwood import catalogue
from budwood.checks import need_kind
from budwood.errors import InputError, first_line
from budwood.hub import hub_or_cache
from budwood.loading import device_of
from budwood.points.encoders.base import EncoderSpec, Hub, PointEncoder, Preparation
from budwood.points.encoders.checkpoints import fit, read_checkpoint, state_of
from budwood.registry import Registry

ENCODERS = Registry("encoder", catalogue.ENCODERS)

__all__ = [
    "ENCODERS",
    "EncoderSpec",
    "Hub",
    "PointEncoder",
    "Preparation",
    "as_encoder",
    "load_encoder",
    "load_weights",
]


def load_encoder(
    name: str = "sprout",
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> PointEncoder:
    """Load an encoder with its weights, frozen and in evaluation mode.

    Args:
        name: a name in ``ENCODERS``.
        checkpoint: a local file with the published layout; by default the one that ships, or the
            published one from the Hugging Face hub.
        device: where to put it; ``"auto"`` is the first GPU, else the CPU.

    Raises:
        UnknownNameError: no such encoder.
        InputError: no such device; a file that is missing or truncated or would run code; or the
            hub does not answer.
        UnsupportedModelError: a checkpoint of another architecture; the message says which keys
            differ.
    """
    spec: EncoderSpec = ENCODERS.get(name)
    need_kind((str, os.PathLike), "file", checkpoint=checkpoint)
    where = device if isinstance(device, torch.device) else device_of(device)
    if spec.hub is None:
        from budwood.points.encoders.sprout import DENSE, WEIGHTS, load_sprout

        ships = WEIGHTS if name == "sprout" else DENSE
        encoder: PointEncoder = load_sprout(ships if checkpoint is None else checkpoint, name)
    else:
        path = Path(checkpoint) if checkpoint is not None else download(spec.hub)
        with torch.device("meta"):
            encoder = spec.make()
        load_weights(encoder, path)
    return encoder.to(where).eval().requires_grad_(False)


def as_encoder(
    encoder: str | PointEncoder,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> PointEncoder:
    """Load an encoder given by its name; an encoder stays as it is.

    Args:
        encoder: a name in ``ENCODERS``, or an encoder.
        checkpoint: a local file for a named encoder.
        device: where a named encoder runs; default the CPU.

    Raises:
        InputError: a checkpoint or device for an encoder that is not given by its name, or as
            :func:`load_encoder`.
    """
    if isinstance(encoder, str):
        return load_encoder(encoder, checkpoint, device=device or "cpu")
    if checkpoint is not None or device is not None:
        raise InputError("checkpoint and device are for an encoder given by its name")
    need_kind(PointEncoder, "name or an encoder", encoder=encoder)
    return encoder


def load_weights(encoder: PointEncoder, path: str | os.PathLike[str]) -> None:
    """Load a published checkpoint into an encoder, which may be on the meta device.

    Raises:
        InputError: the file is missing or truncated or would run code, or its ``logit_scale`` is
            NaN.
        UnsupportedModelError: a checkpoint of another architecture.
    """
    state, scale = state_of(read_checkpoint(path), str(path))
    encoder.load_state_dict(fit(encoder, state, str(path)), assign=True)
    encoder.checkpoint = Path(path)
    if scale is not None:
        encoder.logit_scale = scale


def download(hub: Hub) -> Path:
    """Get a file from the Hugging Face hub or its cache.

    Raises:
        InputError: the hub does not answer or does not have it, and neither does the cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    instead = "give a local file as checkpoint"
    with hub_or_cache(hub.repo, hub.file, kind=hub.kind, what="checkpoint", instead=instead):
        try:
            return Path(hf_hub_download(hub.repo, hub.file, repo_type=hub.kind))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise InputError(
                f"cannot download {hub.file} of {hub.repo}: {first_line(error)}; {instead}"
            ) from None
