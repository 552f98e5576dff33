"""What there is to adapt in a model: the MLPs of its decoder, linear or fused."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from budwood.tune.config import SlimConfig
from budwood.tune.slim.architectures import default_targets, is_mlp, mlp_targets, with_modules
from budwood.tune.slim.fused_experts import FIRST, LAST, SlimExperts, check_fused, is_fused
from budwood.tune.slim.keeper import layers_of

_OTHER_INPUTS = re.compile(r"(^|[._])(vision|visual|image|audio|speech|patcher)")


def decoder_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name the modules of a model's text decoder, or of the whole model where it has none.

    What reads pictures or sound is left out, also inside the decoder. What is inside an adapter's
    layer is left out as well; the layer counts as the one that it is around.
    """
    decoder: Any = model
    if isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder:
        decoder = model.get_decoder()
        decoder = decoder if isinstance(decoder, PreTrainedModel) else model
    within = next((name for name, one in model.named_modules() if one is decoder), "")
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) or not name.startswith(f"{within}." if within else ""):
            continue
        if _OTHER_INPUTS.search(name):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
            if not isinstance(module, SlimExperts):
                module = module.get_base_layer()
        yield name, module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"


def mlp_modules(model: nn.Module, model_config: Mapping[str, Any]) -> str:
    """Return a regular expression of the MLPs of a model's decoder, fused experts included.

    Args:
        model: a transformers model.
        model_config: its config as a dict.

    Raises:
        UnsupportedModelError: it has none that are known, or experts that SLIM cannot adapt.
    """
    modules = dict(decoder_modules(model))
    fused = [name for name, module in modules.items() if is_fused(module)]
    for name in fused:
        check_fused(modules[name], name)
    linear = [name for name, module in modules.items() if is_linear(module)]
    pattern = None
    if not fused or mlp_targets(linear) is not None:
        pattern = default_targets(model_config, linear)
    return with_modules(pattern, fused) if fused else str(pattern)


def no_match(model: nn.Module, config: SlimConfig) -> str:
    """Explain in one line that target modules match nothing."""
    known = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if is_linear(module)}
    )
    fused = sorted({_last(name) for name, module in model.named_modules() if is_fused(module)})
    if config.target_parameters and not config.target_modules:
        weights = ", ".join(f"{name}.{weight}" for name in fused for weight in (FIRST[0], LAST))
        return (
            f"target_parameters={config.target_parameters!r} match no fused weight; this model has "
            f"{weights or 'none'}"
        )
    wanted = config.target_modules
    shown = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted or ()))
    near = difflib.get_close_matches(str(shown).split(", ")[0], known, n=1)
    start = ".*[.]" if isinstance(wanted, str) else ""  # a regular expression of full names
    hint = f"did you mean {start + near[0]!r}? " if near else ""
    others = f"; fused experts: {', '.join(fused)}" if fused else ""
    return (
        f"target_modules={shown!r} match no layer; {hint}linear layers: {', '.join(known)}{others}"
    )


def warn_of_experts_left_out(model: nn.Module, adapter_name: str, config: SlimConfig) -> None:
    """Warn if an adapter is on MLPs, and on none of those that are fused experts.

    Users who name shared experts mean these alone.
    """
    if "shared" in str(config.target_modules):
        return
    fused = {
        name: module
        for name, module in model.named_modules()
        if is_fused(module) and not name.endswith(".base_layer")
    }
    layers = [layer for layer in layers_of(model) if adapter_name in layer.slim_in]
    if not fused or any(isinstance(layer, SlimExperts) for layer in layers):
        return
    if any(is_mlp(layer.slim_key) for layer in layers):
        first = next(iter(fused))
        warnings.warn(
            f"SLIM: {adapter_name!r} adapts MLPs, but not the routed experts of {len(fused)} "
            f"blocks, which are fused weights ({first!r}, …); add {_last(first)!r} to "
            "target_modules, or leave target_modules out",
            UserWarning,
            stacklevel=2,
        )


def _last(name: str) -> str:
    return name.rpartition(".")[2]
