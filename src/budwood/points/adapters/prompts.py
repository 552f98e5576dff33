"""Adapters that add learnable tokens: fused cross-attention (ESP-Zero) and visual prompt tuning.

Fused cross-attention (FCA), source: ESP-Zero (arXiv 2404.19639), a reconstruction from its abstract
and public reviews. In each block, learnable tokens T pass through a learnable block of their own
and join the point tokens X in the frozen block; only the point tokens leave it:
[X′; _] = Block([X; Block_learned(T)]). So only the keys and values of the new tokens in the frozen
attention matter. They do not depend on the input and can be computed once: :meth:`DeepTokens.fuse`.

Prompt tuning, source: Visual Prompt Tuning (arXiv 2203.12119), VPT-Shallow and VPT-Deep.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.points.adapters.base import Adapter, AdapterConfig
from budwood.points.encoders.base import Around, PointEncoder
from budwood.points.encoders.blocks import Attention, Block, Context, Mlp


@dataclass(frozen=True)
class VptConfig(AdapterConfig):
    """Options of prompt tuning.

    Attributes:
        n_tokens: learnable tokens, in each block for the deep kinds.
        std: standard deviation of the tokens at the start.
    """

    n_tokens: int = 8
    std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(1, n_tokens=self.n_tokens)
        if self.std <= 0:
            raise InputError(f"std={self.std} must be above 0")


@dataclass(frozen=True)
class FcaConfig(VptConfig):
    """Options of fused cross-attention.

    Attributes:
        init: ``"random"``, the paper's; or ``"closed"``, ours: a learnable gate starts every head's
            attention to the new tokens at 0, so that step 0 equals the frozen encoder to rounding.
        mlp_ratio: hidden width of the learnable block's MLP, in units of the encoder's width.
    """

    init: str = "random"
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("random", "closed"):
            raise InputError(f"init={self.init!r} is unknown; give 'random' or 'closed'")
        if self.mlp_ratio <= 0:
            raise InputError(f"mlp_ratio={self.mlp_ratio} must be above 0")


class DeepTokens(Adapter):
    """An adapter with new tokens in every block, which are dropped after it."""

    @abstractmethod
    def contexts(self) -> list[Context]:
        """What each block of the encoder attends to besides the points."""

    def around(self, strength: float) -> Around:
        contexts: Sequence[Context] = self.contexts()
        if strength < 1:
            contexts = [_weakened(context, strength) for context in contexts]
        return lambda index, block, x: block(x, contexts[index])

    def fuse(self) -> Fused:
        """Compute keys and values once: the same function, faster, not for training.

        Returns:
            A new adapter, which saves and loads like any other.
        """
        return Fused.of(self, self.contexts())


class FusedCrossAttention(DeepTokens):
    """Fused cross-attention; see the head of this file."""

    name: ClassVar[str] = "fca"
    Config: ClassVar[type[AdapterConfig]] = FcaConfig
    config: FcaConfig

    def __init__(self, encoder: PointEncoder, config: FcaConfig | None = None) -> None:
        super().__init__(encoder, config)
        options, dim = self.config, encoder.dim
        n_heads = [block.attn.n_heads for block in self.blocks]
        self.tokens = nn.Parameter(torch.randn(len(n_heads), options.n_tokens, dim) * options.std)
        hidden = max(1, round(options.mlp_ratio * dim))
        self.learned = nn.ModuleList(
            Block(dim, Attention(dim, n if dim % n == 0 else 1, bias=True), Mlp(dim, hidden))
            for n in n_heads
        )
        closed = options.init == "closed"
        self.gates = nn.ParameterList(
            [nn.Parameter(torch.zeros(n)) for n in n_heads] if closed else []
        )

    def contexts(self) -> list[Context]:
        contexts = []
        for index, block in enumerate(self.blocks):
            learned = cast(Block, self.learned[index])
            tokens = learned(self.tokens[index : index + 1])[0]
            gate = self.gates[index] if len(self.gates) else None
            contexts.append(block.context(tokens, gate))
        return contexts


class DeepPrompts(DeepTokens):
    """VPT-Deep: new prompts in every block."""

    name: ClassVar[str] = "vpt-deep"
    Config: ClassVar[type[AdapterConfig]] = VptConfig
    config: VptConfig

    def __init__(self, encoder: PointEncoder, config: VptConfig | None = None) -> None:
        super().__init__(encoder, config)
        size = (len(self.blocks), self.config.n_tokens, encoder.dim)
        self.tokens = nn.Parameter(torch.randn(size) * self.config.std)

    def contexts(self) -> list[Context]:
        return [block.context(tokens) for block, tokens in zip(self.blocks, self.tokens)]


class Fused(DeepTokens):
    """Keys and values that the frozen blocks attend to: what ``fuse()`` returns."""

    name: ClassVar[str] = "fused"

    @classmethod
    def of(cls, adapter: Adapter, contexts: list[Context]) -> Fused:
        """Make one from an adapter and what its blocks attend to."""
        config = adapter.config
        fused = cls(adapter.encoder, AdapterConfig(config.batch_norm, config.counts, config.fade))
        for index, context in enumerate(contexts):
            fused._put(index, context.keys, context.values, context.gate)
        if fused.statistics is not None and adapter.statistics is not None:
            fused.statistics.load_state_dict(adapter.statistics.state_dict())
        return fused

    @classmethod
    def restore(
        cls, encoder: PointEncoder, config: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> Fused:
        fused = cls(encoder, cls.make_config(config))
        for index in range(len(encoder.blocks)):
            gate = state.get(f"gate_{index}")
            fused._put(index, state[f"keys_{index}"], state[f"values_{index}"], gate)
        fused.load_state_dict(dict(state))
        return fused

    def contexts(self) -> list[Context]:
        return [
            Context(
                getattr(self, f"keys_{i}"), getattr(self, f"values_{i}"), getattr(self, f"gate_{i}")
            )
            for i in range(len(self.blocks))
        ]

    def _put(self, index: int, keys: Tensor, values: Tensor, gate: Tensor | None) -> None:
        gate = None if gate is None else gate.detach().clone()
        self.register_buffer(f"keys_{index}", keys.detach().clone())
        self.register_buffer(f"values_{index}", values.detach().clone())
        self.register_buffer(f"gate_{index}", gate)


class ShallowPrompts(Adapter):
    """VPT-Shallow: prompts enter before the first block and pass through all of them.

    Pooling does not see them.
    """

    name: ClassVar[str] = "vpt-shallow"
    Config: ClassVar[type[AdapterConfig]] = VptConfig
    config: VptConfig

    def __init__(self, encoder: PointEncoder, config: VptConfig | None = None) -> None:
        super().__init__(encoder, config)
        self.tokens = nn.Parameter(torch.randn(self.config.n_tokens, encoder.dim) * self.config.std)

    def around(self, strength: float) -> Around:
        prompts: Tensor = self.tokens

        def run_block(index: int, block: Block, x: Tensor) -> Tensor:
            nonlocal prompts
            joined = block(torch.cat([x, prompts.expand(len(x), -1, -1)], dim=1))
            points, prompts = joined[:, : x.shape[1]], joined[:, x.shape[1] :]
            return points if strength == 1 else torch.lerp(block(x), points, strength)

        return run_block


def _weakened(context: Context, strength: float) -> Context:
    """The context with its weight in the softmax scaled by ``strength``."""
    n_heads = context.keys.shape[1]
    gate = context.keys.new_ones(n_heads) if context.gate is None else context.gate
    return replace(context, gate=strength * gate)
