"""AdaV in plain Python and double precision, written from the equations; slow on purpose.

Nothing is shared with the package: no torch, no sorting by tensor, no prefix sums. Tolerance of
the float32 implementation against it: 1e-4 relative on relevance (the temperature of 100 multiplies
the rounding of the cosine), and the same choice wherever the compared scores differ by more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Reference:
    """The choice, and what led to it."""

    indices: list[int]
    relevance: list[float]
    n_reserved: int
    by_text: int
    by_saliency: int


def log_relevance(
    visual: list[list[float]], text: list[list[float]], temperature: float
) -> list[float]:
    """Return log max_m softmax_n(temperature · cos(T_m, V_n)), as a list over n."""
    best = [-math.inf] * len(visual)
    for t in text:
        logits = [temperature * cosine(t, v) for v in visual]
        highest = max(logits)
        log_sum = highest + math.log(sum(math.exp(x - highest) for x in logits))
        best = [max(b, x - log_sum) for b, x in zip(best, logits, strict=True)]
    return best


def log_contrast(
    visual: list[list[float]],
    text: list[list[float]],
    temperature: float,
    mean: list[float],
    directions: list[list[float]],
) -> list[float]:
    """Return log max_m softmax_n(temperature · (c_mn − Σ_m' c_m'n / (M + 1))), as a list over n."""
    centre = [sum(column) / len(visual) for column in zip(*visual, strict=True)]
    keys = [without(minus(v, centre), directions) for v in visual]
    queries = [without(minus(t, mean), directions) for t in text]
    table = [[cosine(q, k) for k in keys] for q in queries]
    usual = [sum(column) / (len(text) + 1) for column in zip(*table, strict=True)]
    best = [-math.inf] * len(visual)
    for row in table:
        powers = [math.exp(temperature * (c - u)) for c, u in zip(row, usual, strict=True)]
        best = [max(b, math.log(p / sum(powers))) for b, p in zip(best, powers, strict=True)]
    return best


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def without(a: list[float], directions: list[list[float]]) -> list[float]:
    """Take out the parts along orthonormal directions."""
    for u in directions:
        along = sum(x * y for x, y in zip(a, u, strict=True))
        a = minus(a, [along * y for y in u])
    return a


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / norms if norms > 0 else 0.0


def ranking(scores: list[float]) -> list[int]:
    """Indices from best to worst, the lower index first where scores tie."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def objective(log_text: list[float], saliency: list[float], k: int) -> float:
    """Logarithm of S_t(k) · S_s(R−k), for lists of R scores in descending order."""
    n_free = len(saliency)
    mass_s = sum(saliency[: n_free - k])
    if k == 0 or mass_s == 0:
        return -math.inf
    highest = max(log_text[:k])
    return highest + math.log(sum(math.exp(x - highest) for x in log_text[:k])) + math.log(mass_s)


def best_split(log_text: list[float], saliency: list[float]) -> int:
    """The argmax over 0 ≤ k ≤ R of S_t(k) · S_s(R−k), the smallest k where they tie."""
    best_k, best_value = 0, -math.inf
    for k in range(len(saliency) + 1):
        value = objective(log_text, saliency, k)
        if value > best_value:
            best_k, best_value = k, value
    return best_k


def adav(
    visual: list[list[float]],
    text: list[list[float]],
    saliency: list[float],
    keep: int,
    reserve: float = 0.25,
    temperature: float = 100.0,
) -> Reference:
    """The corrected selection."""
    log_t = log_relevance(visual, text, temperature)
    order_t, order_s = ranking(log_t), ranking(saliency)
    n_each = math.floor(reserve * keep)
    n_free = keep - 2 * n_each
    rest_t, rest_s = order_t[n_each:][:n_free], order_s[n_each:][:n_free]
    by_text = best_split([log_t[i] for i in rest_t], [saliency[i] for i in rest_s])

    kept = set(order_t[:n_each]) | set(order_s[:n_each])
    kept |= set(rest_t[:by_text]) | set(rest_s[: n_free - by_text])
    sum_t, sum_s = sum(math.exp(x) for x in log_t), sum(saliency)
    while len(kept) < keep:  # refill, one token at a time, from the list that scores better
        next_t = next(i for i in order_t if i not in kept)
        next_s = next(i for i in order_s if i not in kept)
        score_t, score_s = math.exp(log_t[next_t]) / sum_t, saliency[next_s] / sum_s
        kept.add(next_t if score_t > score_s else next_s)
    return Reference(
        sorted(kept), [math.exp(x) for x in log_t], 2 * n_each, by_text, n_free - by_text
    )


def adav_official(
    visual: list[list[float]],
    text: list[list[float]],
    saliency: list[float],
    keep: int,
    n_crops: int,
) -> list[int]:
    """The published selection, faults included: sorted indices that may repeat."""
    log_t = log_relevance(visual, text, 100.0)
    per_crop = 2 * (keep // 2 // n_crops)
    n_kept = per_crop * n_crops
    size = len(visual) // n_crops
    list_t = ranking(log_t)[:n_kept]
    list_s: list[tuple[float, int]] = []
    for crop in range(n_crops):
        scores = saliency[crop * size : (crop + 1) * size]
        list_s += [(scores[i], i + crop) for i in ranking(scores)[:per_crop]]

    n_each = int(n_kept * 0.25)
    n_free = n_kept - 2 * n_each
    front, back = list_s[:n_each], list_s[n_each:]
    back = [back[i] for i in ranking([score for score, _ in back])][:n_free]
    by_text = best_split(
        [log_t[i] for i in list_t[n_each : n_each + n_free]], [score for score, _ in back]
    )
    picks_s = front + back[: n_free - by_text]
    return sorted(list_t[: n_each + by_text] + [index for _, index in picks_s])
