"""T2I: relevance to the text alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.checks import need_scale
from budwood.prune.methods.base import Method, Selection, Split
from budwood.prune.methods.scores import descending, evenly_spaced, log_relevance


@dataclass(frozen=True)
class T2I(Method):
    """Keep the tokens nearest to the question in the LLM's embedding space, whatever the saliency.

    Source: the text-only ablation of AdaV (2025.findings-acl.258). Deviation: a question without
    tokens keeps evenly spaced tokens, as relevance is then flat.

    Args:
        temperature: factor on the cosine of text and visual tokens.

    Raises:
        InputError: the temperature is not above 0.
    """

    temperature: float = 100.0

    name: ClassVar[str] = "t2i"
    needs_text: ClassVar[bool] = True
    needs_saliency: ClassVar[bool] = False
    source: ClassVar[str] = "AdaV (text-to-image attention alone), 2025.findings-acl.258"

    def __post_init__(self) -> None:
        need_scale(temperature=self.temperature)

    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Selection:
        assert text is not None  # select() has checked
        log_t = log_relevance(visual, text, self.temperature)
        if len(text) == 0:
            return Selection(evenly_spaced(len(visual), keep, visual.device), log_t.exp())
        return Selection(descending(log_t)[:keep], log_t.exp(), split=Split((0, keep, 0)))
