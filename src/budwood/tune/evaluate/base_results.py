"""Results of a base model that are kept for the next adapter on it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import InputError, OutputError
from budwood.files import cache_folder, digest, read_json, write_text

_HERE = Path(__file__).parent
_PACKAGES = ("budwood", "torch", "transformers", "lm_eval")
"""Whose version may change a result."""
_DATA = ("examples", "encoding", "template", "tokens", "batches", "self_generated")
_CODE = ("harness", "scores", "tasks", *(f"../data/{name}" for name in _DATA))
"""Modules that results come from."""
_OF_ADAPTERS = (".modules_to_save.", ".token_adapter.", ".trainable_tokens_")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kept:
    """JSON values by what they depend on, one file each.

    Args:
        folder: where they are; None keeps nothing.
        identity: what all of them depend on; see :func:`base_identity`.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.n_found = 0

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Kept:
        """Those of the base model of an adapter, in budwood's cache."""
        return cls(cache_folder() / "tune-eval", base_identity(model, tokenizer))

    def get(self, what: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """A value, made if it is not there.

        Args:
            what: all that it depends on beside the identity; JSON values.
            make: makes it.
        """
        if self.folder is None:
            return make()
        file = self.folder / f"{digest({**self.identity, **what})}.json"
        try:
            value = read_json(file)
            self.n_found += 1
        except InputError:  # not there, or damaged
            value = make()
            try:
                write_text(file, json.dumps(value))
            except OutputError:
                self.folder = None  # a cache that cannot be written is no reason to stop
        return value


def base_identity(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the results of a base model depend on: weights, tokenizer, device, versions, code.

    Args:
        model: with or without an adapter, which is left out.
        tokenizer: of the model.
    """
    return {
        "weights": digest(_sums(model)),
        "config": model.config.to_json_string(),
        "device": model.device.type,
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())),
        "template": getattr(tokenizer, "chat_template", None),
        "versions": {name: _version(name) for name in _PACKAGES},
        "code": digest([(_HERE / f"{name}.py").read_text() for name in _CODE]),
    }


def _sums(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every weight of the base model, as the sum of its bits."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    mine = (*_OF_ADAPTERS, f".{prefix}") if prefix else _OF_ADAPTERS
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        (tuple(tensor.shape), str(tensor.dtype), _bits(tensor))
        for name, tensor in tensors
        if not any(part in f".{name}" for part in mine) and tensor.device.type != "meta"
    ]


def _bits(tensor: Tensor) -> int:
    flat = tensor.detach().flatten().contiguous()
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    return int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
