"""Models whose speed is compared: a gated MLP and a small Llama, with each kind of adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from budwood.tune.config import SlimConfig
from budwood.tune.equations import route, standardise
from budwood.tune.slim.keeper import keeper_of

METHODS = ("frozen", "lora", "slim", "loop", "bypass")
"""``bypass`` is SLIM on tokens that all bypass."""
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
HIDDEN = {576: 1536, 2048: 5632, 4096: 11008}
"""MLP width by model width, of SmolLM2-135M, a 1B and a 7B Llama; elsewhere 8/3 of it."""
N_LAYERS = 4
"""Layers of the small Llama."""
N_WORDS = 256
"""Its vocabulary."""
D_HEAD = 64
FAR = 1e6
"""How far all tokens are moved from the training data, where they are to bypass."""


class GatedMLP(nn.Module):
    """The MLP of a Llama: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = hidden_of(width)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LoopedExperts(nn.Module):
    """The same mixture as a loop over experts with layers of their own, for comparison only.

    Args:
        base: the frozen layer.
        r: rank of one expert.
        n_experts: LoRA experts.
        n_identity: identity experts.
        top_k: experts kept.
        scale: factor on the experts' output.
    """

    def __init__(
        self, base: nn.Linear, r: int, n_experts: int, n_identity: int, top_k: int, scale: float
    ) -> None:
        super().__init__()
        self.base = base
        self.top_k, self.scale = top_k, scale
        d_in, d_out = base.in_features, base.out_features
        self.router = nn.Linear(d_in, n_experts + n_identity, bias=False)
        self.a = nn.ModuleList(nn.Linear(d_in, r, bias=False) for _ in range(n_experts))
        self.b = nn.ModuleList(nn.Linear(r, d_out, bias=False) for _ in range(n_experts))
        for layer in self.b:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        result = self.base(flat)
        weights = route(standardise(F.linear(flat, self.router.weight).float()), self.top_k)
        for i, (a, b) in enumerate(zip(self.a, self.b)):
            rows = (weights[:, i] > 0).nonzero().squeeze(-1)
            update = b(a(flat[rows])) * (self.scale * weights[rows, i]).unsqueeze(-1).to(x.dtype)
            result = torch.index_add(result, 0, rows, update)
        return result.view(*x.shape[:-1], -1)


def hidden_of(width: int) -> int:
    """MLP width of a model of some width."""
    return HIDDEN.get(width, -(-8 * width // 3))


def small_llama(width: int) -> LlamaModel:
    """A Llama of ``N_LAYERS`` layers without a head."""
    n_heads = max(1, width // D_HEAD)
    config = LlamaConfig(
        vocab_size=N_WORDS,
        hidden_size=width,
        intermediate_size=hidden_of(width),
        num_hidden_layers=N_LAYERS,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads // 3 if n_heads % 3 == 0 else n_heads,
        head_dim=D_HEAD,
    )
    return LlamaModel(config)


def with_shared_weights(model: nn.Module) -> Any:
    """A copy of a model that has its weights in common with it."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def adapted(name: str, base: Any, slim: SlimConfig) -> Any:
    """Put a method's adapters on the projections of all gated MLPs of a model.

    Args:
        name: of ``METHODS``.
        base: the model, which is changed.
        slim: config of SLIM; a LoRA has the rank of all of its LoRA experts together.
    """
    if name == "frozen":
        return base
    if name == "loop":
        for mlp in [module for module in base.modules() if hasattr(module, "gate_proj")]:
            _loop(mlp, slim)
        return base
    lora = LoraConfig(r=slim.rank, lora_alpha=2 * slim.rank, target_modules=PROJECTIONS)
    return get_peft_model(base, lora if name == "lora" else slim)


def start(model: PeftModel, train: Callable[[], None], *, far: bool) -> None:
    """Bring SLIM to where its tokens yield, as after some steps of training.

    Args:
        model: with a fresh SLIM adapter.
        train: runs forward and backward once.
        far: let every token bypass from now on.
    """
    keeper = keeper_of(model)
    for layer in keeper.layers():  # B = 0 would be a special case of the arithmetic
        nn.init.normal_(layer.weights("default")[1], std=1e-3)
    directed = [fitted for layer in keeper.layers() for fitted in layer.discriminants().values()]
    for fitted in directed:  # any direction takes as long
        fitted.set_direction(torch.randn_like(fitted.direction), fitted.offset, 1)
    for _ in range(3):  # yielding starts with the third step
        train()
        keeper.commit()
    if far:
        for layer in keeper.layers():
            for statistics in layer.slim_clusters.values():
                statistics.distance_mean.sub_(FAR)  # type: ignore[operator]


def _loop(mlp: nn.Module, slim: SlimConfig) -> None:
    for name in PROJECTIONS:
        base: Any = getattr(mlp, name)
        sizes = (slim.r, slim.n_experts, slim.n_identity, slim.top_k, slim.scale)
        layer = LoopedExperts(base, *sizes)
        setattr(mlp, name, layer.to(base.weight.device, base.weight.dtype))
