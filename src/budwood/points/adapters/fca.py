"""Fused cross-attention: learnable tokens that the frozen blocks attend to.

Source: ESP-Zero (arXiv 2404.19639), a reconstruction from its abstract and public reviews. In each
block, tokens T pass through a learnable block of their own and are joined with the point tokens X
in the frozen block; only the point tokens leave it: [X′; _] = Block([X; Block_learned(T)]). So of
the new tokens only their keys and values in the frozen attention matter, and as these do not depend
on the input, they can be computed once: :meth:`FusedCrossAttention.fuse`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.points.adapters.base import Adapter, AdapterConfig
from budwood.points.encoders.base import Around, PointEncoder
from budwood.points.encoders.blocks import Attention, Block, Context, Mlp


@dataclass(frozen=True)
class FcaConfig(AdapterConfig):
    """Options of fused cross-attention.

    Attributes:
        n_tokens: learnable tokens in each block.
        init: ``"random"``, the paper's, or ``"closed"``, ours: every head's way to the new tokens
            starts shut by a learnable gate, so that step 0 equals the frozen encoder to rounding.
        mlp_ratio: width inside the MLP of the learnable block, in units of the encoder's.
        std: spread of the tokens at the start.
    """

    n_tokens: int = 8
    init: str = "random"
    mlp_ratio: float = 4.0
    std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_tokens < 1:
            raise InputError(f"n_tokens={self.n_tokens} must be 1 or more")
        if self.init not in ("random", "closed"):
            raise InputError(f"init={self.init!r} is unknown; give 'random' or 'closed'")
        if self.mlp_ratio <= 0 or self.std <= 0:
            raise InputError("mlp_ratio and std must be above 0")


def attending(contexts: Sequence[Context], share: float) -> Around:
    """Blocks that attend to a context each, its weight in the softmax scaled by ``share``."""
    if share < 1:
        contexts = [
            replace(
                c, gate=share * (c.keys.new_ones(c.keys.shape[1]) if c.gate is None else c.gate)
            )
            for c in contexts
        ]
    return lambda index, block, x: block(x, contexts[index])


class FusedCrossAttention(Adapter):
    """See the head of this file."""

    name: ClassVar[str] = "fca"
    Config: ClassVar[type[AdapterConfig]] = FcaConfig
    config: FcaConfig

    def __init__(self, encoder: PointEncoder, config: FcaConfig | None = None) -> None:
        super().__init__(encoder, config)
        options, dim, blocks = self.config, encoder.dim, self.blocks
        size = (len(blocks), options.n_tokens, dim)
        self.tokens = nn.Parameter(torch.randn(size) * options.std)
        hidden = max(1, round(options.mlp_ratio * dim))
        heads = [block.attn.n_heads for block in blocks]
        own = [n if dim % n == 0 else 1 for n in heads]
        self.learned = nn.ModuleList(
            Block(dim, Attention(dim, n, bias=True), Mlp(dim, hidden)) for n in own
        )
        closed = options.init == "closed"
        gates = [nn.Parameter(torch.zeros(n)) for n in heads] if closed else []
        self.gates = nn.ParameterList(gates)

    def contexts(self) -> list[Context]:
        """What each block of the encoder attends to besides the points."""
        made = []
        for index, block in enumerate(self.blocks):
            learned = cast(Block, self.learned[index])
            tokens = learned(self.tokens[index : index + 1])[0]
            made.append(block.context(tokens, self.gates[index] if len(self.gates) else None))
        return made

    def around(self, share: float) -> Around:
        return attending(self.contexts(), share)

    def fuse(self) -> Fused:
        """The same function with keys and values computed once; not for training.

        Returns:
            An adapter of its own, which saves and loads like any other.
        """
        return Fused.of(self, self.contexts())


class Fused(Adapter):
    """Keys and values that the frozen blocks attend to: what FCA or deep prompts come down to."""

    name: ClassVar[str] = "fused"

    @classmethod
    def of(cls, adapter: Adapter, contexts: list[Context]) -> Fused:
        """From an adapter, and what its blocks attend to."""
        own = adapter.config
        made = cls(adapter.encoder, AdapterConfig(own.batch_norm, own.counts, own.fade))
        for index, context in enumerate(contexts):
            made._put(index, context.keys, context.values, context.gate)
        if made.statistics is not None and adapter.statistics is not None:
            made.statistics.load_state_dict(adapter.statistics.state_dict())
        return made

    @classmethod
    def restore(
        cls, encoder: PointEncoder, config: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> Fused:
        made = cls(encoder, cls.make_config(config))
        for index in range(len(encoder.blocks)):
            gate = state.get(f"gate_{index}")
            made._put(index, state[f"keys_{index}"], state[f"values_{index}"], gate)
        made.load_state_dict(dict(state))
        return made

    def around(self, share: float) -> Around:
        contexts = [
            Context(
                getattr(self, f"keys_{i}"), getattr(self, f"values_{i}"), getattr(self, f"gate_{i}")
            )
            for i in range(len(self.blocks))
        ]
        return attending(contexts, share)

    def _put(self, index: int, keys: Tensor, values: Tensor, gate: Tensor | None) -> None:
        gate = None if gate is None else gate.detach().clone()
        self.register_buffer(f"keys_{index}", keys.detach().clone())
        self.register_buffer(f"values_{index}", values.detach().clone())
        self.register_buffer(f"gate_{index}", gate)
