"""SLIM as a PEFT tuner: it replaces the target modules, and is registered with PEFT."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import resolve_quantization_backend
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from budwood.errors import InputError, MergeError, UnsupportedModelError
from budwood.tune.base_model import check_base, describe_base
from budwood.tune.config import FORMAT, SLIM, SlimConfig
from budwood.tune.layer import REFUSAL, SharedStatistics, SlimLinear
from budwood.tune.saved import check_state, present_names, register_old_names
from budwood.tune.steps import TENSORS, SlimLayer, StepKeeper, forget, layers_of
from budwood.tune.targets import (
    LEADERS,
    default_targets,
    in_layers,
    later_layers,
    siblings,
)
from budwood.tune.tokens import unwatch_tokens, watch_tokens

HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task → names of the heads that ``peft.PeftModelFor…`` trains and saves whole."""


class SlimModel(BaseTuner):
    """Puts SLIM layers into a model; ``peft.get_peft_model`` makes it."""

    prefix = "slim_"
    tuner_layer_cls = SlimLayer

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter's layers, and the hooks that tell them about tokens.

        An adapter that is given the config object of another one in the model, as in
        ``model.add_adapter("ref", model.peft_config["default"])``, starts with its statistics and
        masks. Who copies the weights by their names, as TRL does for the reference of DPO, has the
        whole adapter.

        Raises:
            InputError: target modules match nothing, or the adapter was made for another base
                model.
            UnsupportedModelError: no target modules are known, or one is not a linear layer.
        """
        # A copy, since it is changed for this model, and the user may use it for others.
        given: Any = self.peft_config[adapter_name]
        source = next(
            (n for n, c in self.peft_config.items() if c is given and n != adapter_name), None
        )
        self.peft_config[adapter_name] = config = _for_this_model(given)
        base = describe_base(self.get_model_config(model), model)
        check_base(config.base, base)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError:
            raise InputError(_no_match(model, config)) from None
        config.base_at_hand = base
        for layer, watch in watch_tokens(model, SlimLinear).items():
            layer.watch = watch  # type: ignore[assignment]
        self._keeper().inherit(source, adapter_name)

    def unload(self) -> Any:
        """Remove layers and hooks; return the base model as it was."""
        for layer in layers_of(self.model):
            forget(layer.keeper)
        unwatch_tokens(self.model)
        return super().unload()

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None:
            pattern, layers = default_targets(model_config), peft_config.layers_to_transform
            if layers is None or layers == []:  # for PEFT, both mean all
                names = (name for name, _ in self.model.named_modules())
                pattern = later_layers(pattern, names, peft_config.skip_first)
            else:
                pattern = in_layers(pattern, [layers] if isinstance(layers, int) else layers)
            peft_config.target_modules, peft_config.layers_to_transform = pattern, None
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        shared = _shared_statistics(parent, target_name, adapter_name, peft_config)
        if isinstance(target, SlimLinear):
            target.update_layer(adapter_name, peft_config, shared)
            return
        if not is_linear(target):
            raise UnsupportedModelError(
                f"target module {current_key!r} is a {type(target).__name__}; SLIM takes linear "
                "layers: name other modules in target_modules"
            )
        layer = SlimLinear(target, self._keeper(), current_key)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, shared)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise MergeError(REFUSAL)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        mapped = super()._remap_adapter_state_dict_for_load(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=present_names(state_dict),
        )
        marks = tuple(f".{name}.{adapter_name}." for name in TENSORS)
        expected = {
            key: value
            for key, value in model.state_dict(keep_vars=True).items()
            if any(mark in key for mark in marks)
        }
        # A module that stands in two places is in the file once.
        saved = {id(expected[key]): value for key, value in mapped.items() if key in expected}
        repeated = {key: saved[id(v)] for key, v in expected.items() if id(v) in saved}
        check_state(repeated | mapped, expected)
        return repeated | mapped

    def _keeper(self) -> StepKeeper:
        layers = layers_of(self.model)
        return layers[0].keeper if layers else StepKeeper(self.model)


def register() -> None:
    """Register SLIM with PEFT, so that adapters of type SLIM can be made and loaded.

    It adds to PEFT's tables, since ``peft.register_peft_method`` refuses names outside PEFT's enum.
    """
    if SLIM in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_old_names()
    PEFT_TYPE_TO_CONFIG_MAPPING[SLIM] = SlimConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[SLIM] = SlimModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[SLIM] = SlimModel.prefix  # type: ignore[index]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"


def _shared_statistics(
    parent: nn.Module, name: str, adapter: str, config: SlimConfig
) -> SharedStatistics | None:
    """Find a module beside this one that holds statistics of the same input, or of the MLP's."""
    if not config.yielding:
        return None
    leaders = LEADERS.get(name, ()) if config.yield_at == "block" else ()
    for other in (*siblings(name), *leaders):
        layer = getattr(parent, other, None)
        if isinstance(layer, SlimLinear) and adapter in layer.slim_clusters:
            statistics: Any = layer.slim_clusters[adapter]
            return SharedStatistics(statistics, follows=other in leaders)
    return None


def _for_this_model(given: Any) -> Any:
    """A copy of a config, with the new heads that PEFT trains beside adapters of its task.

    PEFT adds the heads of these two tasks to the config that it was given, when the adapter has
    been made from it.
    """
    config = copy.copy(given)
    heads = HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    if config.modules_to_save is not None or heads:
        saved = list(config.modules_to_save or ())
        config.modules_to_save = saved + [head for head in heads if head not in saved]
    config.slim_version = FORMAT
    return config


def _no_match(model: nn.Module, config: SlimConfig) -> str:
    """Explain in one line that target modules match nothing."""
    known = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if is_linear(module)}
    )
    wanted = config.target_modules
    shown = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted or ()))
    near = difflib.get_close_matches(str(shown).split(", ")[0], known, n=1)
    start = ".*[.]" if isinstance(wanted, str) else ""  # a regular expression of full names
    hint = f"did you mean {start + near[0]!r}? " if near else ""
    return f"target_modules={shown!r} match no layer; {hint}linear layers: {', '.join(known)}"
