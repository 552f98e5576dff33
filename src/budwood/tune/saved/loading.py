"""Saved adapters on their base models."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from budwood.errors import BudwoodError, InputError, first_line
from budwood.hub import hub_or_cache
from budwood.loading import (
    NO_CODE,
    SMOLLM2_ID,
    Loaded,
    check_adapter_source,
    is_path,
    load_language_model,
    third_party_warnings_off,
)
from budwood.tune.saved.files import embeddings_in


def load_adapted(
    adapter: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Loaded:
    """Load a saved PEFT adapter and its base model.

    Args:
        adapter: its folder, or hub id.
        model: the base model, as in :func:`budwood.loading.load_language_model`; None for the one
            that the adapter names.
        device: a torch device, or ``"auto"``.
        dtype: of the base model, or ``"auto"``.

    Raises:
        InputError: there is no such adapter or model, or they do not fit each other.
    """
    adapter = os.fspath(adapter)
    need_adapter(adapter)
    with _access(adapter):
        base = os.fspath(model) if model else base_of(adapter)
    return load_adapter(load_language_model(base, device, dtype), adapter)


def load_adapter(
    base: Loaded, adapter: str | os.PathLike[str], *, trainable: bool = False
) -> Loaded:
    """Put a saved PEFT adapter on its base model.

    The tokenizer is that of the adapter's folder, with its chat template and added tokens, if there
    is one. A base model whose embeddings the adapter replaces gets as many of them.

    Args:
        base: the base model; the adapter's modules go into it.
        adapter: its folder, or hub id.
        trainable: whether its weights can be trained further.

    Raises:
        InputError: it is damaged, or does not fit the model.
    """
    from peft import PeftModel

    adapter = os.fspath(adapter)
    try:
        with _access(adapter), third_party_warnings_off():
            if n_tokens := embeddings_in(Path(adapter)):
                base.model.resize_token_embeddings(n_tokens, mean_resizing=False)
            model = PeftModel.from_pretrained(base.model, adapter, is_trainable=trainable)
    except BudwoodError:
        raise
    except Exception as error:  # peft, safetensors and torch have no common error for bad files
        raise InputError(f"cannot load adapter {adapter}: {first_line(error)}") from error
    return Loaded(base.name, model.eval(), _tokenizer_in(Path(adapter)) or base.processor)


def _tokenizer_in(folder: Path) -> Any:
    """The tokenizer that was saved with an adapter; None if there is none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # as above
        raise InputError(f"cannot load the tokenizer in {folder}: {first_line(error)}") from error


def need_adapter(folder: str | os.PathLike[str]) -> None:
    """Check the files of an adapter before its base model is loaded; hub ids are left alone.

    Raises:
        InputError: there is no adapter, or its files are malformed or truncated.
    """
    from budwood.tune.saved.files import check_adapter_files

    folder = os.fspath(folder)
    if _is_hub_id(folder):
        return
    check_adapter_source(folder)
    check_adapter_files(Path(folder))


def base_of(adapter: str | os.PathLike[str]) -> str | None:
    """The base model that an adapter's config names; None for the embedded one.

    Raises:
        InputError: the config is damaged, or names a directory that is not there.
    """
    from peft import PeftConfig

    adapter = os.fspath(adapter)
    try:
        name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except Exception as error:  # those of PEFT and of the hub's client have no common base
        raise InputError(f"cannot load adapter {adapter}: {first_line(error)}") from error
    if not name or name == SMOLLM2_ID:
        return None
    if is_path(name) and not Path(name).is_dir():
        raise InputError(f"{adapter} was made for {name}, which is not there; give --model")
    return str(name)


def _access(adapter: str) -> AbstractContextManager[None]:
    """Bounds the wait for the hub, where the adapter is on the hub."""
    if not _is_hub_id(adapter):
        return nullcontext()
    return hub_or_cache(adapter, "adapter_config.json", what="adapter", instead="give a folder")


def _is_hub_id(adapter: str) -> bool:
    return not is_path(adapter) and "/" in adapter
