"""CorDA: LoRA that starts from a part of the weights.

PEFT takes that part out of the base model. Here the base model keeps it, and the adapter adds the
difference to its start.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from budwood.progress import Progress, silent
from budwood.tune.base_model import evaluating
from budwood.tune.data.encoding import EncodedExample
from budwood.tune.methods.base import n_trainable
from budwood.tune.methods.lora import TextTuner


@dataclass(frozen=True)
class Corda(TextTuner):
    """LoRA that starts where self-generated text has least weight: CorDA, keeping knowledge.

    Source: arXiv 2406.05223, knowledge-preserved mode. B·A starts as the smallest components of
    W·C in the metric of C, the covariance of the layer's inputs on self-generated text. Deviation:
    the base weight keeps them and the adapter adds B·A − B₀·A₀, which is the same function; half
    of an adapter of twice the rank is therefore frozen. The knowledge is what that text needs.
    """

    bends: ClassVar[bool] = True

    def config(self, rank: int, model: Any, seed: int) -> Any:
        return super().config(2 * rank, model, seed)

    def n_trained(self, adapted: Any) -> int:
        return n_trainable(adapted) // 2

    def attached(self, adapted: Any) -> None:
        for a, b in _pairs(adapted):
            a.register_hook(functools.partial(_first_half, axis=0))
            b.register_hook(functools.partial(_first_half, axis=1))

    @torch.no_grad()
    def prepare(
        self,
        adapted: Any,
        tokenizer: Any,
        rows: Sequence[EncodedExample],
        texts: Sequence[EncodedExample],
        progress: Progress = silent,
    ) -> None:
        from peft.tuners.lora.corda import collect_eigens_for_layer

        with _covariances(adapted, texts) as layers:
            for layer in layers:
                base, config = layer.get_base_layer(), adapted.peft_config["default"]
                found = collect_eigens_for_layer(base, config)
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                half = len(a) // 2
                root = (found.S_WC[-half:] / layer.scaling["default"]).sqrt()
                first_a = found.V_WC[:, -half:].T * root[:, None]
                first_b = found.U_WC[:, -half:] * root
                a.copy_(torch.cat([first_a, first_a]))
                b.copy_(torch.cat([first_b, -first_b], dim=1))


def _lora_layers(adapted: Any) -> list[Any]:
    return [module for module in adapted.modules() if hasattr(module, "lora_A")]


def _pairs(adapted: Any) -> list[tuple[Tensor, Tensor]]:
    """A and B of every layer."""
    layers = _lora_layers(adapted)
    return [(one.lora_A["default"].weight, one.lora_B["default"].weight) for one in layers]


def _first_half(grad: Tensor, axis: int) -> Tensor:
    """A gradient whose second half along an axis is 0."""
    first, second = grad.chunk(2, axis)
    return torch.cat([first, torch.zeros_like(second)], axis)


@contextmanager
def _covariances(adapted: Any, texts: Sequence[EncodedExample]) -> Iterator[list[Any]]:
    """Layers whose base layers know the covariance of their inputs on some texts."""
    layers = _lora_layers(adapted)
    bases = [layer.get_base_layer() for layer in layers]

    def note(base: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        base.covariance_matrix = base.__dict__.get("covariance_matrix", 0) + x.T @ x

    hooks = [base.register_forward_pre_hook(note) for base in bases]
    try:
        with evaluating(adapted), adapted.disable_adapter():
            for text in texts:  # one at a time, without padding
                adapted(input_ids=torch.tensor([text["input_ids"]], device=adapted.device))
        yield layers
    finally:
        for hook in hooks:
            hook.remove()
        for base in bases:
            base.__dict__.pop("covariance_matrix", None)
