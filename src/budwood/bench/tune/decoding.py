"""What SLIM costs in generation: the time for a token with a KV cache, beside a plain LoRA's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.bench.tune.speed_models import (
    N_WORDS,
    adapted,
    small_llama,
    start,
    with_shared_weights,
)
from budwood.timing import seconds, side_by_side
from budwood.tune.config import SlimConfig
from budwood.tune.slim.observe import observe

N_PROMPT = 32
"""Tokens of the prompt, whose time does not count."""
N_DECODED = 16
"""Tokens that are decoded one by one in a round."""


@dataclass(frozen=True)
class Decoding:
    """What was measured of one method.

    Attributes:
        ms: milliseconds for a token, one value per round.
        bypassed: fraction of the prompt's tokens that bypass; None without SLIM.
    """

    ms: list[float]
    bypassed: float | None


def measure_decoding(
    methods: tuple[str, ...],
    width: int,
    slim: SlimConfig,
    *,
    repeats: int,
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> dict[str, Decoding]:
    """Time generation with a KV cache in a small Llama, side by side for all methods.

    One sequence, one token after the other. The models have the frozen weights in common.

    Args:
        methods: of ``speed_models.METHODS``.
        width: of the model.
        slim: config of SLIM.
        repeats: timed rounds, after a warm-up.
        dtype: of the frozen weights.
        device: where to run.
        seed: of weights and tokens.

    Returns:
        Method → what was measured.
    """
    torch.manual_seed(seed)
    base: Any = small_llama(width)
    base.to(device, dtype).requires_grad_(False).eval()
    ids = torch.randint(N_WORDS, (1, N_PROMPT + N_DECODED), device=device)
    models = {name: _model(name, base, slim, ids) for name in methods}
    times = side_by_side(
        {name: _clock(model, ids, device) for name, model in models.items()}, repeats
    )
    return {
        name: Decoding(times[name], _bypassed(model, ids) if name in ("slim", "bypass") else None)
        for name, model in models.items()
    }


def _model(name: str, base: Any, slim: SlimConfig, ids: Tensor) -> Any:
    model = adapted(name, with_shared_weights(base), slim)
    if name in ("slim", "bypass"):
        model.train()

        def train() -> None:
            model(input_ids=ids).last_hidden_state.sum().backward()

        start(model, train, far=name == "bypass")
        model.zero_grad()
    return model.eval()


def _clock(model: Any, ids: Tensor, device: str) -> Callable[[int], float]:
    """Milliseconds for a token."""

    @torch.no_grad()
    def run(_: int) -> float:
        cache = model(input_ids=ids[:, :N_PROMPT], use_cache=True).past_key_values

        def decode() -> None:
            for token in ids[:, N_PROMPT:].split(1, dim=1):
                model(input_ids=token, past_key_values=cache, use_cache=True)

        return 1e3 * seconds(decode, device) / N_DECODED

    return run


def _bypassed(model: Any, ids: Tensor) -> float | None:
    with observe(model) as seen, torch.no_grad():
        model(input_ids=ids[:, :N_PROMPT])
    return seen.mean("bypassed_share")
