"""Where the MLP projections of an architecture are.

SLIM adapts the MLP and leaves attention alone, since that forgets less. The table covers every
architecture for which PEFT has default targets, and a few more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from budwood.errors import UnsupportedModelError

_GATED = r"(gate_proj|up_proj|down_proj)"
_BERT = r"(intermediate\.dense|(?<!attention\.)output\.dense)"
_FALCON = r"(dense_h_to_4h|dense_4h_to_h)"
_FC = r"(fc1|fc2)"
_FC_IN_OUT = r"(fc_in|fc_out)"
_GPT2 = r"mlp\.(c_fc|c_fc2|c_proj)"
_T5 = r"(wi|wi_0|wi_1|wo)"

_NAMES = {
    _BERT: "bert deberta deberta-v2 electra layoutlm roberta xlm-roberta",
    _FALCON: "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    _FC: "bart dinov2 opt phi vit",
    _FC_IN_OUT: "codegen gptj",
    _GPT2: "btlm gpt2 gpt_bigcode gpt_neo starcoder2",
    _T5: "mt5 t5",
    _GATED: "cohere cohere2 gemma gemma2 gemma3_text gemma4_text granite llama llama4 llama4_text "
    "mistral olmo olmo2 olmo3 qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_vl_text smollm3 "
    "stablelm",
    r"(gate_up_proj|down_proj)": "glm glm4 phi3",
    r"ffn\.(up_proj|down_proj)": "mpt",
    r"mixer\.(shared_experts\.)?(up_proj|down_proj)": "nemotron_h",
    r"(w1|w2|w3)": "mixtral",
    r"feed_forward\.(key|receptance|value)": "rwkv",
    r"ffn\.(key|value)": "rwkv7",
}
_TEXT = {kind: names for names, kinds in _NAMES.items() for kind in kinds.split()}
_VLM = r"(.*\.)?(language_model|text_model)\..*"
MLP_TARGETS = {
    **{kind: rf"(.*\.)?{names}" for kind, names in _TEXT.items()},
    "blip-2": rf"{_VLM}\.(fc1|fc2|wi|wi_0|wi_1|wo)",
    "gemma4": rf"{_VLM}\.{_GATED}",
}
"""``model_type`` of a transformers config → regular expression of full module names."""


def default_targets(model_config: Mapping[str, Any], linear: Iterable[str] = ()) -> str:
    """Return a regular expression that matches the MLP projections of a model.

    Args:
        model_config: the model's config as a dict. For a vision-language model the expression
            matches the projections of its language model.
        linear: names of the linear layers in the model's decoder, for architectures that are not
            in the table.

    Raises:
        UnsupportedModelError: the architecture is unknown; name the target modules.
    """
    kind = model_config.get("model_type")
    text = model_config.get("text_config")
    known = None
    if kind in MLP_TARGETS:
        known = MLP_TARGETS[str(kind)]
    elif isinstance(text, Mapping) and text.get("model_type") in _TEXT:
        known = rf"{_VLM}\.{_TEXT[text['model_type']]}"
    linear = list(linear)
    if known is not None and (not linear or any(re.fullmatch(known, name) for name in linear)):
        return known
    found = mlp_targets(linear)
    if found is None:
        raise UnsupportedModelError(
            f"no default target modules are known for model_type {kind!r}; name the linear layers "
            "of its MLP: SlimConfig(target_modules=[...])"
        )
    return found


_MLP_NAMES = "|".join(
    (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out"),
        *("c_fc", "c_fc2", "c_proj", "w1", "w2", "w3", "w_0", "w_1", "w_out", "wi", "wi_0", "wi_1"),
        *("wo", "Wi", "Wo", "lin1", "lin2", "dense_h_to_4h", "dense_4h_to_h", "layer_1", "layer_2"),
        *("input_linear", "output_linear", "proj_up", "proj_up_gate", "proj_down"),
        r"(intermediate|output|feed_forward\.dense)\.dense",
        r"(feed_forward|ffn)\.(key|value|receptance|intermediate|output|\d+)",
    )
)
_ELSEWHERE = r"(?!.*(att|router|indexer|compressor|norm))(?!(.*\.)?gate\.)"
_MLP = re.compile(rf"{_ELSEWHERE}(.*\.)?({_MLP_NAMES})", re.IGNORECASE)
"""Where the name of a linear layer, after its block's number, says that it is in an MLP."""
_WITHOUT_MLP = re.compile(r"mixer\.in_proj")
"""The layer to adapt in Mamba's blocks, which have no MLP and do not call their other layers."""


def mlp_targets(linear: Iterable[str]) -> str | None:
    """Find the MLP projections of a model by the names of its linear layers.

    Args:
        linear: full names.

    Returns:
        A regular expression of full module names; None if no name is that of an MLP's layer.
    """
    numbered = [found for name in linear if (found := re.match(rf"({_PLAIN})\d+\.(.+)", name))]
    for rule in (_MLP, _WITHOUT_MLP):
        fitting = [part for part in numbered if rule.fullmatch(part[2])]
        if fitting:
            stacks = sorted({re.escape(part[1]) for part in fitting})
            names = sorted({_of_all_numbers(part[2]) for part in fitting})
            return rf"({'|'.join(stacks)})\d+\.({'|'.join(names)})"
    return None


def _of_all_numbers(name: str) -> str:
    """A regular expression of a name, whatever the numbers of the modules around it."""
    *around, last = name.split(".")
    parts = [r"\d+" if part.isdigit() else re.escape(part) for part in around]
    return r"\.".join([*parts, re.escape(last)])


def is_mlp(name: str) -> bool:
    """Whether the full name of a module says that it is in an MLP."""
    return _MLP.fullmatch(name) is not None


def with_modules(pattern: str | None, names: Iterable[str]) -> str:
    """Extend a regular expression of full module names by modules of numbered blocks.

    Args:
        pattern: None for nothing.
        names: full names of the modules, the same in every block that has them.
    """
    more = "|".join(sorted({_of_all_numbers(name) for name in names}))
    return f"({more})" if pattern is None else f"({pattern}|{more})"


_PLAIN = r"(?:(?!\d+\.)[^.]+\.)*"
"""Parts of a module's name before the first number."""


def layer_number(name: str) -> int | None:
    """Return the first number in a module's name, its layer; None without one."""
    found = re.match(rf"{_PLAIN}(\d+)\.", name)
    return None if found is None else int(found[1])


def n_blocks(names: Iterable[str], adapted: Iterable[str]) -> int:
    """How many numbered blocks a model has where some of its modules are adapted.

    >>> n_blocks(["tower.9.mlp", "layers.0.mlp", "layers.5.mlp"], ["layers.0.mlp"])
    6

    Args:
        names: full names of all modules of the model.
        adapted: those of the adapted ones. Blocks under other names, such as those of a vision
            tower, do not count.
    """
    lists = {found[1] for name in adapted if (found := re.match(rf"({_PLAIN})\d+\.", name))}
    found = (re.match(rf"({_PLAIN})(\d+)\.", name) for name in names)
    return 1 + max((int(one[2]) for one in found if one and one[1] in lists), default=0)


def in_layers(pattern: str, layers: Iterable[int]) -> str:
    """Restrict a regular expression of full module names to some layers."""
    numbers = "|".join(str(layer) for layer in sorted(set(layers)))
    return rf"(?={_PLAIN}({numbers})\.){pattern}"


def later_layers(pattern: str, names: Iterable[str], skip_first: float) -> str:
    """Restrict a regular expression of full module names to all but the first layers.

    Args:
        pattern: a regular expression of full module names.
        names: of all modules of a model.
        skip_first: fraction of the layers to leave out, in [0, 1); at least one layer stays.
    """
    numbers = {layer_number(name) for name in names if re.fullmatch(pattern, name)} - {None}
    n_skipped = int(skip_first * len(numbers) + 1e-9)
    if not n_skipped:
        return pattern
    return in_layers(pattern, sorted(numbers)[n_skipped:])  # type: ignore[arg-type,type-var]


def with_attention(pattern: str, linear: Iterable[str]) -> str:
    """Extend a regular expression of MLP projections to the attention layers beside them.

    Args:
        pattern: matches full names of MLP projections.
        linear: names of all linear layers of a model.

    Raises:
        UnsupportedModelError: no name of a linear layer beside them contains "att".
    """
    parts = [found for name in linear if (found := re.match(rf"({_PLAIN})\d+\.(.+)", name))]
    stacks = {part[1] for part in parts if re.fullmatch(pattern, part[0])}
    beside = [part for part in parts if part[1] in stacks and "att" in part[2].lower()]
    if not beside:
        raise UnsupportedModelError("no attention layers were found beside the MLPs of this model")
    stack, names = ("|".join(sorted({re.escape(part[i]) for part in beside})) for i in (1, 2))
    return rf"({pattern}|({stack})\d+\.({names}))"


SHARED_INPUT = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))
"""Names of modules of one MLP that read the same input, so that its distance is measured once."""
LEADERS = {
    "down_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "w2": ("w1", "w3"),
    "wo": ("wi", "wi_0", "wi_1"),
    "fc2": ("fc1",),
    "fc_out": ("fc_in",),
    "c_proj": ("c_fc",),
    "dense_4h_to_h": ("dense_h_to_4h",),
}
"""Last module of an MLP → modules that the MLP may begin with."""


def siblings(name: str) -> tuple[str, ...]:
    """List the other modules of an MLP that read the same input as ``name``."""
    for group in SHARED_INPUT:
        if name in group:
            return tuple(other for other in group if other != name)
    return ()
