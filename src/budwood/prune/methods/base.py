"""What a pruning method is: scores and a choice, as pure functions on tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.errors import UnknownNameError
from budwood.prune.methods.vocabulary import Common


@dataclass(frozen=True)
class Choice:
    """What a method chose.

    Attributes:
        indices: chosen visual tokens, int64, shape (keep,), in any order, distinct (a method that
            reproduces published faults may return fewer, or repeat some; it says so).
        relevance: text-to-image score per visual token, float32, shape (n_visual,), if computed.
        saliency: saliency per visual token, float32, shape (n_visual,), if used.
        split: how the budget was divided: reserved, by text, by saliency. Plain ints where they
            follow from shapes, otherwise int64, shape (3,), left on the device: no host sync.
    """

    indices: Tensor
    relevance: Tensor | None = None
    saliency: Tensor | None = None
    split: Tensor | tuple[int, int, int] = (0, 0, 0)


class Method(ABC):
    """One pruning method: subclass as a frozen dataclass, its fields being its parameters.

    A subclass sets the class variables and :meth:`choose`, and is entered in
    ``budwood.prune.methods.METHODS``; the contract tests then pick it up.

    Attributes:
        name: its name in the registry.
        needs_text: ``choose`` reads ``text``.
        needs_saliency: ``choose`` reads ``saliency``.
        needs_vocabulary: ``attach`` calls :meth:`fitted`.
        source: the paper, for the documentation.
    """

    name: ClassVar[str]
    needs_text: ClassVar[bool]
    needs_saliency: ClassVar[bool]
    needs_vocabulary: ClassVar[bool] = False
    source: ClassVar[str]

    @abstractmethod
    def choose(
        self,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
        keep: int,
        generator: torch.Generator | None = None,
    ) -> Choice:
        """Choose ``keep`` of the visual tokens, without a device-to-host sync.

        :func:`budwood.prune.select` has validated the inputs. Scores are float32 whatever the dtype
        of the inputs; ties go to the lower index.

        Args:
            visual: projected visual tokens in LLM embedding space, shape (n_visual, d_model).
            text: LLM input embeddings of the question, shape (n_text, d_model), n_text ≥ 0; None
                only if the method needs no text.
            saliency: importance per visual token, shape (n_visual,), non-negative; None only if the
                method needs no saliency.
            keep: tokens to keep, 1 ≤ keep ≤ n_visual.
            generator: source of randomness, for the methods that draw.
        """

    def fitted(self, common: Common) -> Method:
        """The same method, told what the words of the LLM have in common."""
        return self

    def official(self, n_crops: int) -> Method:
        """The same method as its authors published it, faults included.

        Args:
            n_crops: crops of the image, whose tokens stand one crop after the other.

        Raises:
            UnknownNameError: no published behaviour that differs from this one is known.
        """
        raise UnknownNameError(
            f"compat='official' is not known for method {self.name!r}; leave compat out"
        )
