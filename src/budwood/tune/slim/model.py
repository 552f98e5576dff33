"""SLIM as a PEFT tuner: it replaces the target modules. Importing this module registers it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from budwood.errors import InputError, MergeError, UnsupportedModelError
from budwood.tune.base_model import check_base, describe_base
from budwood.tune.config import PREFIX, SLIM, SlimConfig
from budwood.tune.saved.files import check_state, present_names
from budwood.tune.slim.adapter_names import check_rows, rows_by_adapter
from budwood.tune.slim.architectures import LEADERS, in_layers, later_layers, siblings
from budwood.tune.slim.fused_experts import SlimExperts, around, check_fused, is_fused
from budwood.tune.slim.keeper import TENSORS, SlimLayer, StepKeeper, forget, layers_of
from budwood.tune.slim.layer import REFUSAL, SlimLinear
from budwood.tune.slim.passes import SharedStatistics
from budwood.tune.slim.sources import reads_weight
from budwood.tune.slim.targets import is_linear, mlp_modules, no_match, warn_of_experts_left_out
from budwood.tune.slim.token_watch import unwatch_tokens, watch_tokens

HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task → names of the heads that ``peft.PeftModelFor…`` trains and saves whole."""


class SlimModel(BaseTuner):
    """Puts SLIM layers into a model; ``peft.get_peft_model`` makes it."""

    prefix = PREFIX
    tuner_layer_cls = SlimLayer

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter's layers, and the hooks that tell them about tokens.

        An adapter that is given the config object of another one in the model, as in
        ``model.add_adapter("ref", model.peft_config["default"])``, starts with its statistics and
        masks. Code that then copies the weights by name, as TRL does for DPO's reference, has
        copied the whole adapter.

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
            raise InputError(no_match(model, config)) from None
        except UnsupportedModelError:
            self._take_back(model, adapter_name)
            raise
        config.base_at_hand = base
        warn_of_experts_left_out(model, adapter_name, given)
        for layer, watch in watch_tokens(model, SlimLinear).items():
            layer.watch = watch  # type: ignore[assignment]
        self._keeper().inherit(source, adapter_name)

    def _take_back(self, model: nn.Module, adapter_name: str) -> None:
        """Remove an adapter that has been added to some of the layers."""
        for key, layer in list(model.named_modules()):
            if not isinstance(layer, SlimLinear):
                continue
            for where in (*layer.adapter_layer_names, *layer.other_param_names):
                if adapter_name in getattr(layer, where):
                    del getattr(layer, where)[adapter_name]
            chain = layer.layers() if isinstance(layer, SlimExperts) else [layer]
            if not any(len(one.slim_in) for one in chain) and not key.endswith(".base_layer"):
                above, _, name = key.rpartition(".")
                setattr(model.get_submodule(above), name, layer.get_base_layer())

    def unload(self) -> Any:
        """Remove layers and hooks; return the base model as it was."""
        for layer in layers_of(self.model):
            forget(layer.keeper)
        unwatch_tokens(self.model)
        return super().unload()

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refuse, since no SLIM adapter stands for a weighted sum of others.

        Raises:
            MergeError: always; the message says what to do instead.
        """
        raise MergeError(
            "each SLIM adapter routes by a router and statistics of its own, which no single "
            f"adapter can stand for: add them up with model.base_model.set_adapter({adapters!r}), "
            "or give each row of a batch its own with adapter_names"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if kwargs.get("alora_offsets") is not None:
            raise InputError("alora_offsets is an option of LoRA; leave it out with SLIM")
        if names is None:
            yield
            return
        check_rows(names, args, kwargs)
        with rows_by_adapter(self, names):
            yield

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set()
        if peft_config.target_modules is None:
            pattern, layers = mlp_modules(self.model, model_config), peft_config.layers_to_transform
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
        if is_fused(target):
            self._adapt_fused(peft_config, adapter_name, target, target_name, parent, current_key)
            return
        if isinstance(target, SlimLinear):
            target.update_layer(adapter_name, peft_config, shared)
            return
        if not is_linear(target):
            raise UnsupportedModelError(
                f"target module {current_key!r} is a {type(target).__name__}; SLIM takes linear "
                "layers: name other modules in target_modules"
            )
        if reads_weight(parent, target_name):
            raise UnsupportedModelError(
                f"target module {current_key!r}: {type(parent).__name__} reads its weight instead "
                "of calling it, in all passes or in some, and an adapter there would do nothing "
                f"in these; leave it out (exclude_modules=[{target_name!r}])"
            )
        layer = SlimLinear(target, self._keeper(), current_key)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, shared)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _adapt_fused(
        self,
        config: SlimConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        key: str,
        names: Sequence[str] | None = None,
    ) -> None:
        """Add an adapter to the fused experts of a block, or to those weights that are named."""
        check_fused(target, key)
        outer = target if isinstance(target, SlimExperts) else around(target, self._keeper(), key)
        if outer is not target:
            for layer in outer.layers():
                layer._active_adapter = adapter_name
        shared: SharedStatistics | None = None
        for layer in outer.layers():
            if adapter_name in layer.slim_in or not (names is None or _ends(layer.slim_key, names)):
                continue
            layer.update_layer(adapter_name, config, shared)
            if config.yielding and shared is None:
                statistics: Any = layer.slim_clusters[adapter_name]
                shared = SharedStatistics(statistics, follows=True)
        if outer is not target:
            if adapter_name not in self.active_adapters:
                outer.requires_grad_(False)
            self._replace_module(parent, target_name, outer, target)

    def _inject_parameters(
        self,
        peft_config: Any,
        model: nn.Module,
        adapter_name: str,
        low_cpu_mem_usage: bool,
    ) -> list[str]:
        """Adapt the fused weights that are named one by one."""
        found: list[str] = []
        inside: tuple[str, ...] = ()
        for key, module in list(model.named_modules()):
            names = list(module._parameters)
            if isinstance(module, SlimExperts):
                names = [layer.parameter_name for layer in module.layers()]
            keys = [f"{key}.{name}" for name in names]
            wanted = [one for one in keys if _ends(one, peft_config.target_parameters)]
            if not wanted or key.startswith(inside):
                continue
            if not is_fused(module):
                raise UnsupportedModelError(
                    f"target parameter {wanted[0]!r} is that of a {type(module).__name__}; "
                    "target_parameters is for the fused experts of a mixture-of-experts model, "
                    "target_modules for linear layers"
                )
            found += wanted
            inside = (*inside, f"{key}.")
            place = (module, key.rpartition(".")[2], model.get_submodule(key.rpartition(".")[0]))
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._adapt_fused(peft_config, adapter_name, *place, key, names=wanted)
        return found

    def _replace_module(self, parent: Any, child_name: Any, new_module: Any, child: Any) -> None:
        if isinstance(new_module, SlimLinear) and not isinstance(new_module, SlimExperts):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # PEFT would look for a weight in the old one
            setattr(parent, child_name, new_module)

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


def _ends(key: str, names: Iterable[str]) -> bool:
    """Whether a full name is one of some names, or ends in one."""
    return any(key == name or key.endswith(f".{name}") for name in names)


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
    return config


PEFT_TYPE_TO_TUNER_MAPPING[SLIM] = SlimModel  # type: ignore[index]
