"""Scores and rankings that methods share. Nothing here syncs with the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_N_WORDS = 1024
"""Words of a vocabulary that :meth:`Common.of_model` looks at."""


_COMMON: WeakKeyDictionary[Any, tuple[Any, Common]] = WeakKeyDictionary()
"""Embedding module → the state of its weight, and what was computed from it."""


@dataclass(frozen=True, eq=False)
class Common:
    """What all words of a vocabulary share: their mean and first principal directions.

    Frequent words ("the", "is") lie far out along the first direction. They resemble each other
    more than anything they name.

    Source: Mu and Viswanath, All-but-the-Top, ICLR 2018.

    Attributes:
        mean: float32, shape (d_model,).
        directions: orthonormal, float32, shape (n_directions, d_model).
    """

    mean: Tensor
    directions: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, words: Tensor, n_directions: int = 1) -> Common:
        """Compute it from a sample of word embeddings.

        Args:
            words: embeddings, shape (n_words, d_model), n_words > n_directions.
            n_directions: principal directions to take.
        """
        mean = words.float().mean(0)
        centred = words.float() - mean
        # The eigenvectors of the (n_words, n_words) products are cheap for any d_model.
        along = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -n_directions:]
        return cls(mean, torch.linalg.qr(centred.T @ along).Q.T)

    @classmethod
    @torch.no_grad()
    def of_model(cls, model: Any) -> Common:
        """Compute it from words spread evenly over the vocabulary of a transformers model.

        It is computed once for a model, and again only after its embeddings have changed.
        """
        embed = model.get_input_embeddings()
        state = (embed.weight.data_ptr(), tuple(embed.weight.shape), _version(embed.weight))
        before = _COMMON.get(embed)
        if before is not None and before[0] == state:
            return before[1]
        common = cls._of_embeddings(embed)
        _COMMON[embed] = state, common
        return common

    @classmethod
    def _of_embeddings(cls, embed: Any) -> Common:
        device = embed.weight.device
        # Offloaded weights are "meta": accelerate moves the input.
        return cls.of_vocabulary(
            embed, embed.num_embeddings, "cpu" if device.type == "meta" else device
        )

    @classmethod
    @torch.no_grad()
    def of_vocabulary(
        cls, embed: Callable[[Tensor], Tensor], n_words: int, device: torch.device | str
    ) -> Common:
        """Compute it from words spread evenly over a vocabulary.

        Args:
            embed: token ids → input embeddings.
            n_words: words of the vocabulary.
            device: where the ids go.
        """
        ids = torch.linspace(0, n_words - 1, min(_N_WORDS, n_words))
        return cls.of(embed(ids.long().to(device)))

    def without(self, x: Tensor) -> Tensor:
        """Remove from embeddings (n, d_model) their parts along the directions."""
        return x - (x @ self.directions.T) @ self.directions

    def to(self, device: torch.device) -> Common:
        """The same on another device."""
        return Common(self.mean.to(device), self.directions.to(device))


def log_relevance(visual: Tensor, text: Tensor, temperature: float) -> Tensor:
    """Text-to-image attention in the LLM's embedding space, as a logarithm.

    ``log max_m softmax_n(temperature · cos(T_m, V_n))``. The logarithm keeps the order of tokens
    whose probability is below what float32 holds.

    Source: AdaV, text-to-image attention. Deviation: with no text every token scores 1 / n_visual.

    Args:
        visual: projected visual tokens, shape (n_visual, d_model).
        text: embeddings of the question, shape (n_text, d_model), n_text ≥ 0.
        temperature: factor on the cosine, unitless.

    Returns:
        Log-probabilities, float32, shape (n_visual,).
    """
    return _log_best(temperature * _cosines(text.float(), visual.float()))


def log_contrast(
    visual: Tensor, text: Tensor, temperature: float, common: Common | None = None
) -> Tensor:
    """Text-to-image attention of each word beyond that of the whole question, as a logarithm.

    ``log max_m softmax_n(temperature · (c_mn − Σ_m' c_m'n / (M + 1)))``, where c is the cosine of
    word and visual token after what all of their kind share is removed: the mean of the visual
    tokens, the mean of the vocabulary, and the vocabulary's first principal directions from both.
    The sum is a mean over the question and one more word that resembles nothing, so that a question
    of a single word still points somewhere.

    Source: ours, not AdaV's. Removing mean and first directions is the all-but-the-top of Mu and
    Viswanath, ICLR 2018.

    Args:
        visual: projected visual tokens, shape (n_visual, d_model).
        text: embeddings of the question, shape (n_text, d_model), n_text ≥ 0.
        temperature: factor on the contrast, unitless.
        common: what all words share; None removes nothing from them.

    Returns:
        Log-probabilities, float32, shape (n_visual,).
    """
    query, key = text.float(), visual.float()
    key = key - key.mean(0)
    if common is not None:
        query, key = common.without(query - common.mean), common.without(key)
    cosines = _cosines(query, key)
    return _log_best(temperature * (cosines - cosines.sum(0) / (len(query) + 1)))


def descending(scores: Tensor) -> Tensor:
    """Indices of scores (n,) from best to worst, int64, shape (n,); ties go to the lower index."""
    return torch.argsort(scores, descending=True, stable=True)


def relative(saliency: Tensor) -> Tensor:
    """Saliency as a fraction of its largest value, float32; 1 everywhere if all of it is 0."""
    s = saliency.float()
    highest = s.max()
    return torch.where(highest > 0, s / highest, torch.ones_like(s)).nan_to_num(0.0, 0.0, 0.0)


def ranks(order: Tensor) -> Tensor:
    """Position of each item in an ordering (n,) of all items, int64, shape (n,)."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def evenly_spaced(n: int, keep: int, device: torch.device) -> Tensor:
    """The middles of ``keep`` equal stretches of 0…n−1: sorted, distinct, int64, shape (keep,)."""
    return middle(torch.arange(keep, device=device), n, keep)


def middle(i: Tensor, n: int | Tensor, n_parts: int | Tensor) -> Tensor:
    """The middle of stretch ``i`` of ``n_parts`` equal stretches of 0…n−1."""
    return (2 * i + 1) * n // (2 * n_parts)


def best_split(log_text: Tensor, saliency: Tensor) -> Tensor:
    """The part of a budget to take by text, so that the geometric mean of both masses is maximal.

    ``argmax_{0≤k≤R} S_t(k) · S_s(R−k)``, where S is a prefix sum and R the length of both lists.
    The text list is scaled by its largest entry, which leaves the argmax alone and, as the list
    descends, keeps its sums within [1, R]: no product can underflow.

    Source: AdaV, self-adaptive split. Ties go to the smaller k. Deviation: a saliency list without
    any mass gets nothing (the product is then 0 for every k).

    Args:
        log_text: log-scores of the next R tokens by text, descending, float32, shape (R,).
        saliency: scores of the next R tokens by saliency, descending, float32, shape (R,).

    Returns:
        The tokens to take by text, int64, shape (), on the device.
    """
    n = len(saliency)
    if n == 0:
        return torch.zeros((), dtype=torch.int64, device=saliency.device)
    mass_t = _prefix_sums((log_text - log_text[0]).exp())
    mass_s = _prefix_sums(saliency)
    by_count = torch.arange(n + 1, dtype=torch.float32, device=saliency.device)
    return torch.where(saliency[0] > 0, mass_t * mass_s.flip(0), by_count).argmax()


def _cosines(text: Tensor, visual: Tensor) -> Tensor:
    # Dividing the (n_text, n_visual) product by the norms spares a normalised copy of `visual`.
    return (text / _norm(text) @ visual.T) / _norm(visual).T


def _log_best(logits: Tensor) -> Tensor:
    """Best log-probability of each visual token over the words (n_text, n_visual); flat without."""
    if len(logits) == 0:
        return logits.new_zeros(logits.shape[1]).log_softmax(0)
    return logits.log_softmax(-1).amax(0)


def _norm(x: Tensor) -> Tensor:
    # The floor is that of torch.nn.functional.normalize: an all-zero token has cosine 0.
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


def _prefix_sums(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(0), (1, 0))


def _version(weight: Tensor) -> int:
    """Count the changes in place; tensors of inference mode do not count them."""
    return -1 if weight.is_inference() else weight._version
