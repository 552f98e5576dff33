"""Losses of self-distillation, and how many points the student sees.

The teacher is the frozen encoder on the dense cloud, the student the adapted one on few points.
Source: ESP-Zero (arXiv 2404.19639), a reconstruction; parts of ours are marked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.checks import need_int, need_kind
from budwood.errors import InputError
from budwood.points.logits import cosine_logits, entropies

RULES = ("outside_top_k", "threshold", "all_but_argmax")


def negatives(
    teacher: Tensor, rule: str = "outside_top_k", *, k: int = 5, threshold: float = 0.01
) -> Tensor:
    """Mark the labels that the teacher finds irrelevant.

    The paper leaves the rule open; the default is ours. The teacher's best label is never marked.

    Args:
        teacher: logits, shape (batch, n_labels).
        rule: ``"outside_top_k"``, ``"threshold"`` (probability below ``threshold``) or
            ``"all_but_argmax"``.
        k: for the first rule, 1 or more; at most half of the labels are spared, so that short
            lists have negatives too.
        threshold: for the second, in (0, 1).

    Returns:
        Booleans, shape (batch, n_labels).

    Raises:
        InputError: unknown rule or a parameter outside its range.
    """
    if rule not in RULES:
        raise InputError(f"rule={rule!r} is unknown; give one of {', '.join(RULES)}")
    if k < 1 or not 0 < threshold < 1:
        raise InputError(f"k={k} must be 1 or more, threshold={threshold} in (0, 1)")
    best = F.one_hot(teacher.argmax(-1), teacher.shape[-1]).bool()
    if rule == "threshold":
        return (teacher.softmax(-1) < threshold) & ~best
    n_positive = 1 if rule == "all_but_argmax" else max(1, min(k, teacher.shape[-1] // 2))
    kept = torch.zeros_like(best).scatter(-1, teacher.topk(n_positive, dim=-1).indices, True)
    return ~kept & ~best


def complementary(student: Tensor, negative: Tensor) -> Tensor:
    """Complementary learning: L = −1/|N| · Σ_{c∈N} log(1 − p_c), the mean over the batch.

    Computed as log Σ_{j≠c} exp(s_j) − log Σ_j exp(s_j), which stays finite where p_c is 1 in
    float32. A row without negatives counts as 0.

    Args:
        student: logits, shape (batch, n_labels).
        negative: from :func:`negatives`, same shape.

    Returns:
        Shape ().
    """
    if student.shape[-1] == 1:
        return student.sum() * 0.0  # a single label has no others
    log_all = student.logsumexp(-1, keepdim=True)
    # All but the top label have p ≤ 1/2; for the top one, the others are summed instead.
    small = torch.log1p(-(student - log_all).clamp(max=-0.5).exp())
    top = student.argmax(-1, keepdim=True)
    others = student.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True) - log_all
    is_top = torch.zeros_like(negative).scatter(-1, top, True)
    log_not = torch.where(is_top, others.expand_as(small), small)
    log_not = log_not * negative
    return -(log_not.sum(-1) / negative.sum(-1).clamp(min=1)).mean()


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """A positive term: 1 − cosine of the features, the mean over the batch.

    Ours. Arguments are features, shape (batch, d).
    """
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """A positive term: KL(teacher ‖ student) of the predictions, the mean over the batch.

    Ours, after Hinton et al. 2015. Arguments are logits, shape (batch, n_labels).
    """
    p = (teacher / temperature).log_softmax(-1)
    q = (student / temperature).log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def entropy(student: Tensor) -> Tensor:
    """Tent's objective: the entropy of the predictions, the mean over the batch.

    Source: Tent (arXiv 2006.10726).
    """
    return entropies(student).mean()


@dataclass(frozen=True)
class Objective:
    """A weighted sum of the terms.

    Attributes:
        complementary: weight of :func:`complementary`, the paper's only term.
        cosine: weight of :func:`cosine`. Ours.
        kl: weight of :func:`divergence`. Ours.
        entropy: weight of :func:`entropy`, Tent's only term.
        rule: which labels are negatives; see :func:`negatives`.
        k: for ``"outside_top_k"``.
        threshold: for ``"threshold"``.
        temperature: of the divergence.
    """

    complementary: float = 1.0
    cosine: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    rule: str = "outside_top_k"
    k: int = 5
    threshold: float = 0.01
    temperature: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.complementary, self.cosine, self.kl, self.entropy)
        if any(not 0 <= weight < math.inf for weight in weights) or not any(weights):
            raise InputError(f"weights {weights} must be 0 or more, and one above 0")
        if self.temperature <= 0:
            raise InputError(f"temperature={self.temperature} must be above 0")
        negatives(torch.zeros(1, 2), self.rule, k=self.k, threshold=self.threshold)

    @property
    def compares_labels(self) -> bool:
        """Whether a term compares clouds with labels, and not features alone."""
        return bool(self.complementary or self.kl or self.entropy)

    def __call__(
        self, student: Tensor, teacher: Tensor, texts: Tensor | None, logit_scale: float
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student: features, shape (batch, d).
            teacher: features, same shape; no gradient goes there.
            texts: embeddings of length 1, shape (n_labels, d); None if no term compares labels.
            logit_scale: factor on cosines.

        Returns:
            Shape ().
        """
        teacher = teacher.detach()
        total = student.new_zeros(())
        if self.cosine:
            total = total + self.cosine * cosine(student, teacher)
        if texts is None or not self.compares_labels:
            return total
        student_logits = cosine_logits(student, texts, logit_scale)
        teacher_logits = cosine_logits(teacher, texts, logit_scale)
        if self.complementary:
            negative = negatives(teacher_logits, self.rule, k=self.k, threshold=self.threshold)
            total = total + self.complementary * complementary(student_logits, negative)
        if self.kl:
            total = total + self.kl * divergence(student_logits, teacher_logits, self.temperature)
        if self.entropy:
            total = total + self.entropy * entropy(student_logits)
        return total


@dataclass(frozen=True)
class Curriculum:
    """How many points the student sees. Ours: one adapter for all densities.

    Attributes:
        counts: numbers of points.
        order: ``"mixed"``: each step draws one of them; ``"falling"``: smaller counts are added
            one after the other, and each step draws one of those added so far.
    """

    counts: tuple[int, ...] = (1024, 256, 128, 64, 32)
    order: str = "mixed"

    def __post_init__(self) -> None:
        need_kind(Sequence, "list of numbers of points", counts=self.counts)
        for i, count in enumerate(self.counts):
            need_int(2, **{f"counts[{i}]": count})
        if not self.counts:
            raise InputError("counts is empty; give at least one number of points")
        if self.order not in ("mixed", "falling"):
            raise InputError(f"order={self.order!r} is unknown; give 'mixed' or 'falling'")

    def points(self, step: int, n_steps: int, generator: torch.Generator | None = None) -> int:
        """Draw the number of points for a step, 0 ≤ step < n_steps."""
        counts = sorted(self.counts, reverse=True)
        if self.order == "falling":
            counts = counts[: 1 + step * len(counts) // max(1, n_steps)]
        return counts[int(torch.randint(len(counts), (), generator=generator))]
