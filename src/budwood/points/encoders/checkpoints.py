"""Read published checkpoints without running code in them, and fit them to an encoder."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from budwood.errors import InputError, UnsupportedModelError, first_line
from budwood.points.encoders.base import PointEncoder, scale_of

_SCALAR = np.float64(0).__reduce__()[0]

# Plain containers that the published files hold besides tensors: options of the run, and scores.
HARMLESS: list[Any] = [
    argparse.Namespace,
    collections.defaultdict,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its names before and since NumPy 2
    (_SCALAR, "numpy._core.multiarray.scalar"),
]
PREFIXES = ("module.", "pc_encoder.", "_orig_mod.")
# Parts of the published models that encoding clouds does not need: text and image towers, timm's
# patch embedding and head.
UNUSED = re.compile(
    r"^(open_clip_model|visual|transformer\.resblocks|token_embedding|positional_embedding|ln_final"
    r"|image_projection|text_projection|logit_scale|cls_head_finetune)(\.|$)"
    r"|^point_encoder\.visual\.(cls_token|pos_embed|patch_embed|head|rope)(\.|$)"
    r"|^point_encoder\.cls_head_finetune\."
)


def read_checkpoint(path: str | os.PathLike[str], *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint, with its tensors on the CPU, without running any code in it.

    Args:
        path: a .safetensors file, or a torch file of tensors and plain containers.
        mapped: leave the tensors in the file until they are used, where its layout allows that, so
            that a part of a large one fits into memory.

    Raises:
        InputError: there is no such file, it is truncated, or reading it could run code.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"checkpoint {file} does not exist")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(HARMLESS):
            mapped = mapped and zipfile.is_zipfile(file)  # older ones are pickles
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it needs {wanted[1]}, and loading that could run code" if wanted else "damaged"
        raise InputError(f"{file} is refused: {reason}") from None
    except Exception as error:  # torch's unpickler raises errors of any kind
        raise InputError(f"{file} is truncated or no checkpoint: {first_line(error)}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{file} holds a {type(content).__name__}, expected a state dict")
    return dict(content)


def state_of(content: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], float | None]:
    """Find the tensors of a checkpoint by bare name, and its ``logit_scale`` as a factor.

    Looks under ``state_dict``, ``module`` and ``model``, and strips the prefixes of wrappers.

    Args:
        content: from :func:`read_checkpoint`.
        source: its file, for messages.

    Raises:
        InputError: ``logit_scale`` is NaN or infinite.
    """
    inner: Mapping[str, Any] = content
    for name in ("state_dict", "module", "model"):
        if isinstance(inner.get(name), Mapping):
            inner = inner[name]
    state = {_bare(k): v for k, v in inner.items() if isinstance(k, str) and isinstance(v, Tensor)}
    scale = state.get("logit_scale")
    outside = content.get("logit_scale")
    if isinstance(outside, Mapping):
        outside = next(iter(outside.values()), None)
    if scale is None and isinstance(outside, Tensor):
        scale = outside
    usable = scale is not None and scale.numel() == 1
    return state, scale_of(float(scale), source) if usable else None  # type: ignore[arg-type]


def fit(encoder: PointEncoder, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename published tensors to those of an encoder, and convert them to float32.

    Args:
        encoder: whose layout is wanted.
        state: from :func:`state_of`.
        source: for messages.

    Raises:
        UnsupportedModelError: another architecture; the message says which keys differ.
    """
    wanted = layout(encoder)
    used = {key: value for key, value in state.items() if key in wanted or not UNUSED.search(key)}
    check_layout(wanted, used, f"{source} is not a checkpoint of {encoder.name}")
    fitted = {}
    ours = encoder.state_dict()
    for key, parts in encoder.published().items():
        size = ours[key].shape[0] // len(parts) if ours[key].ndim else 0
        pieces = [torch.zeros(size) if part is None else state[part] for part in parts]
        value = pieces[0] if len(pieces) == 1 else torch.cat([piece.float() for piece in pieces])
        fitted[key] = value.float() if value.is_floating_point() else value
    return fitted


def check_layout(
    wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], problem: str
) -> None:
    """Compare names and shapes of tensors.

    Args:
        wanted: expected shapes by name.
        state: the tensors; other names are an error too.
        problem: beginning of the message.

    Raises:
        UnsupportedModelError: they differ; the message says which keys.
    """
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {tuple(state[key].shape)} ≠ {shape}"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if missing or extra or shapes:
        parts = [("missing", missing), ("unexpected", extra), ("of another shape", shapes)]
        details = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in parts if keys)
        raise UnsupportedModelError(f"{problem}: {details}")


def layout(encoder: PointEncoder) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a published checkpoint must have."""
    ours = encoder.state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for key, parts in encoder.published().items():
        shape = tuple(ours[key].shape)
        for part in parts:
            if part is not None:
                shapes[part] = (shape[0] // len(parts), *shape[1:]) if len(parts) > 1 else shape
    return shapes


def _bare(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _some(keys: list[str], n: int = 3) -> str:
    return ", ".join(keys[:n]) + (", …" if len(keys) > n else "")
