"""Peers of AdaV in plain Python and double precision, written from the equations; slow on purpose.

Nothing is shared with the package. As the package promises, cosines are rounded to six decimals and
ties go to the lower index. Each function returns the kept tokens, sorted, and where a method merges
also what each becomes.
"""

from __future__ import annotations

import math

import numpy as np

from tests.reference.adav_reference import log_contrast, minus, ranking

Vectors = list[list[float]]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return round(dot / norms, 6) if norms > 0 else 0.0


def table(a: Vectors, b: Vectors) -> Vectors:
    return [[cosine(x, y) for y in b] for x in a]


def mean(vectors: Vectors) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def minmax(x: list[float]) -> list[float]:
    low, high = min(x), max(x)
    return [(v - low) / (high - low) for v in x] if high > low else [1.0] * len(x)


def relative(x: list[float]) -> list[float]:
    return [v / max(x) for v in x] if max(x) > 0 else [1.0] * len(x)


def softmax(x: list[float]) -> list[float]:
    powers = [math.exp(v - max(x)) for v in x]
    return [p / sum(powers) for p in powers]


def best_of(scores: list[float], taken: list[int]) -> int:
    return next(i for i in ranking(scores) if i not in taken)


def relevance(visual: Vectors, text: Vectors) -> list[float]:
    """Mean cosine with the words."""
    return [sum(cosine(t, v) for t in text) / max(1, len(text)) for v in visual]


def unlike(visual: Vectors) -> list[float]:
    """Cen-Prune's g."""
    return minmax([-round(sum(row) / len(visual), 6) for row in exact_table(visual)])


def exact_table(visual: Vectors) -> Vectors:
    units = [[x / (math.hypot(*v) or 1.0) for x in v] for v in visual]
    return [[sum(x * y for x, y in zip(a, b, strict=True)) for b in units] for a in units]


def centre(visual: Vectors) -> Vectors:
    middle = mean(visual)
    moved = [minus(v, middle) for v in visual]
    return [
        [0.0] * len(v) if math.hypot(*m) <= 1e-5 * math.hypot(*v) else m
        for m, v in zip(moved, visual, strict=True)
    ]


def divprune(visual: Vectors, keep: int, quality: list[float] | None = None) -> list[int]:
    n = len(visual)
    q = quality or [1.0] * n
    c = table(visual, visual)
    taken: list[int] = []
    while len(taken) < keep:
        scores = []
        for i in range(n):
            others = taken or [j for j in range(n) if j != i]
            scores.append(q[i] * min((1 - c[i][j] for j in others), default=2.0))
        taken.append(best_of(scores, taken))
    return sorted(taken)


def dpp(vectors: Vectors, quality: list[float], keep: int) -> list[int]:
    """Greedy MAP by determinants: the ratio of two of them is the residual variance."""
    c = table(vectors, vectors)
    n = len(vectors)
    kernel = np.array([[quality[i] * c[i][j] * quality[j] for j in range(n)] for i in range(n)])
    floor = 1e-5 * max(kernel.diagonal())
    taken: list[int] = []
    base: list[int] = []  # without those that add nothing, whose determinant is 0
    while len(taken) < keep:
        scores = []
        for i in range(n):
            residual = kernel[i, i]
            if base:
                inside = np.linalg.inv(kernel[np.ix_(base, base)])
                residual -= kernel[i, base] @ inside @ kernel[base, i]
            scores.append(residual if residual > floor else quality[i] - 2)
        index = best_of(scores, taken)
        taken.append(index)
        if scores[index] > 0:
            base.append(index)
    return sorted(taken)


def cdpruner(visual: Vectors, text: Vectors, keep: int, negated: bool = False) -> list[int]:
    scores = relevance(visual, text)
    return dpp(visual, minmax([-x for x in scores] if negated else scores), keep)


def cen_cdpruner(visual: Vectors, text: Vectors, keep: int) -> list[int]:
    r, g = minmax(relevance(visual, text)), unlike(visual)
    return dpp(centre(visual), [x * y for x, y in zip(r, g, strict=True)], keep)


def gains(covers: Vectors, taken: list[int], weights: list[float] | None = None) -> list[float]:
    """Facility location: what each token would add to Σ_j w_j · max over taken of covers[i][j]."""
    n_targets = len(covers[0])
    w = weights or [1.0] * n_targets
    best = [max((covers[t][j] for t in taken), default=0.0) for j in range(n_targets)]
    best = [max(0.0, b) for b in best]
    return [sum(w[j] * max(0.0, row[j] - best[j]) for j in range(n_targets)) for row in covers]


def scope(
    vectors: Vectors,
    saliency: list[float],
    keep: int,
    alpha: float = 1.0,
    quality: list[float] | None = None,
) -> list[int]:
    c, s = table(vectors, vectors), relative(saliency)
    q = quality or [1.0] * len(s)
    taken: list[int] = []
    while len(taken) < keep:
        gain = gains(c, taken)
        taken.append(best_of([q[i] * s[i] ** alpha * gain[i] for i in range(len(s))], taken))
    return sorted(taken)


def adav_plus(
    visual: Vectors,
    text: Vectors,
    saliency: list[float],
    keep: int,
    boxes: Vectors | None = None,
    text_weight: float = 0.5,
    blur: float = 1.0,
    reach: float = 3.0,
    reserve: float = 0.125,
    temperature: float = 10.0,
    focus: int = 16,
    merge: float = 0.6,
    alike: float = 0.5,
) -> dict[int, list[float]]:
    n, s, w = len(visual), relative(saliency), text_weight if text else 0.0
    log_t = log_contrast(visual, text, temperature, [0.0] * len(visual[0]), [])
    t = [math.exp(x - max(log_t)) if text else 0.0 for x in log_t]
    c = centre(visual)
    covers = [[max(0.0, x) for x in row] for row in table(c, c)]
    if boxes:
        away = squares(boxes)
        for i in range(n):
            near = [math.exp(-away[i][j] / (2 * reach**2)) for j in range(n)]
            covers[i] = [x * round(y, 6) for x, y in zip(covers[i], near, strict=True)]
        around = [[math.exp(-x / (2 * blur**2)) for x in row] for row in away]
        t = [sum(x * y for x, y in zip(row, t, strict=True)) / sum(row) for row in around]
    t = [round(x, 6) for x in relative(t)]
    q = [(1 - w) * si + w * ti for si, ti in zip(s, t, strict=True)]
    taken: list[int] = []
    n_asked = min(keep, focus or keep)
    while text and len(taken) < math.floor(reserve * n_asked):
        taken.append(best_of(t, taken))
    while len(taken) < keep:
        quality = q if len(taken) < n_asked else s
        gained = zip(quality, gains(covers, taken), strict=True)
        taken.append(best_of([x * y for x, y in gained], taken))
    own: dict[int, list[int]] = {i: [] for i in taken}
    for j in range(n):
        best = max(taken, key=lambda i: covers[i][j])  # the first of equals
        if j not in own and covers[best][j] > alike:
            own[best].append(j)
    merged = {}
    for i, group in own.items():
        total = sum(covers[i][j] for j in group)
        parts = [[covers[i][j] / total * x for x in visual[j]] for j in group]
        mean = [sum(column) for column in zip(*parts, strict=True)]
        pairs = zip(visual[i], mean, strict=True)
        merged[i] = [(1 - merge) * x + merge * y for x, y in pairs] if group else visual[i]
    return merged


def squares(boxes: Vectors) -> Vectors:
    """Squared distances of centres of boxes, in units of the median box."""
    sizes = [sorted(box[axis + 2] - box[axis] for box in boxes) for axis in (0, 1)]
    width, height = (one[(len(one) - 1) // 2] for one in sizes)
    centres = [((x0 + x1) / 2 / width, (y0 + y1) / 2 / height) for x0, y0, x1, y1 in boxes]
    return [[(x - u) ** 2 + (y - v) ** 2 for u, v in centres] for x, y in centres]


def mmtok(visual: Vectors, text: Vectors, keep: int) -> list[int]:
    n, m = len(visual), len(text)
    by_word = [softmax([x / 0.01 for x in row]) for row in table(text, visual)]
    by_token = [softmax([x / 0.2 for x in row]) for row in table(visual, visual)]
    rows = [[x / m for x in row] for row in by_word] + [[0.5 * x / n for x in r] for r in by_token]
    covers = [[row[i] for row in rows] for i in range(n)]
    taken: list[int] = []
    while len(taken) < keep:
        taken.append(best_of(gains(covers, taken), taken))
    return sorted(taken)


def tops(visual: Vectors, saliency: list[float], keep: int) -> list[int]:
    c, r = table(visual, visual), minmax(saliency)
    taken = [best_of(r, [])]
    while len(taken) < keep:
        distance = minmax([1 - max(0.0, *(c[i][t] for t in taken)) for i in range(len(r))])
        gain = minmax(gains(c, taken))
        taken.append(best_of([sum(x) for x in zip(r, gain, distance, strict=True)], taken))
    return sorted(taken)


def eadp(
    visual: Vectors, text: Vectors, keep: int, grids: list[tuple[int, int]], words: float = 0.5
) -> list[int]:
    n = len(visual)
    weight = [0.0] * n
    if text:
        similar = table(text, visual)
        entropy = []
        for row in similar:
            p = softmax([100 * x for x in row])
            entropy.append(-sum(x * math.log(x) for x in p if x > 0) / max(math.log(n), 1e-6))
        order = sorted(range(len(text)), key=lambda m: (entropy[m], m))
        order = order[: max(1, round(words * len(text)))]
        share = softmax([-entropy[m] / 0.01 for m in order])
        whole = [cosine(mean(text), v) for v in visual]
        dense = [
            sum(s * similar[m][i] for s, m in zip(share, order, strict=True)) for i in range(n)
        ]
        weight = [(d + w) / 2 for d, w in zip(dense, whole, strict=True)]
    weight = [w**2 for w in smoothed(minmax(weight), grids)]
    covers = [[(1 + x) / 2 for x in row] for row in table(visual, visual)]
    taken: list[int] = []
    while len(taken) < keep:
        taken.append(best_of(gains(covers, taken, weight), taken))
    return sorted(taken)


def smoothed(scores: list[float], grids: list[tuple[int, int]]) -> list[float]:
    if not grids:
        return scores
    result, start = [], 0
    kernel = {-1: 0.25, 0: 0.5, 1: 0.25}
    for rows, columns in grids:
        for y in range(rows):
            for x in range(columns):
                total = 0.0
                for dy, a in kernel.items():
                    for dx, b in kernel.items():
                        yy = min(max(y + dy, 0), rows - 1)
                        xx = min(max(x + dx, 0), columns - 1)
                        total += a * b * scores[start + yy * columns + xx]
                result.append(total)
        start += rows * columns
    return result


def vispruner(visual: Vectors, saliency: list[float], keep: int) -> list[int]:
    order = ranking(saliency)
    n_important = math.floor(0.5 * keep + 0.5)
    rest = sorted(order[n_important:])
    while len(rest) > keep - n_important:
        first, second = rest[0::2], rest[1::2]
        surplus = len(rest) - (keep - n_important)
        n_removed = min(max(8, len(rest) // 8), len(first), surplus)
        if not second:
            rest = []
            break
        alike = {i: max(cosine(visual[i], visual[j]) for j in second) for i in first}
        stay = sorted(first, key=lambda i: (alike[i], i))[: len(first) - n_removed]
        rest = sorted(stay + second)
    return sorted(order[:n_important] + rest)


def visionzip(
    visual: Vectors, saliency: list[float], keys: Vectors, keep: int
) -> dict[int, list[float]]:
    """Kept token → its feature."""
    order = ranking(saliency)
    n_dominant = max(1, math.floor(54 / 64 * keep + 0.5))
    kept = {i: visual[i] for i in order[:n_dominant]}
    left = sorted(order[n_dominant:])
    n_contextual = keep - n_dominant
    centres = [left[(2 * k + 1) * len(left) // (2 * n_contextual)] for k in range(n_contextual)]
    groups: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for i in left:
        if i not in groups and centres:
            similar = [cosine(keys[i], keys[c]) for c in centres]
            groups[centres[similar.index(max(similar))]].append(i)
    return kept | {c: mean([visual[i] for i in group]) for c, group in groups.items()}


def prumerge_plus(
    visual: Vectors, saliency: list[float], keys: Vectors, keep: int, neighbours: int = 32
) -> dict[int, list[float]]:
    """Kept token → its feature."""
    low, high = np.quantile(saliency, 0.25), np.quantile(saliency, 0.75)
    kept = [i for i in ranking(saliency) if saliency[i] > high + 1.5 * (high - low)][:keep]
    others = [i for i in range(len(saliency)) if i not in kept]
    n_spaced = keep - len(kept)
    kept += [others[(2 * k + 1) * len(others) // (2 * n_spaced)] for k in range(n_spaced)]
    dropped = [i for i in range(len(saliency)) if i not in kept]
    result = {}
    for i in kept:
        nearest = sorted(dropped, key=lambda j: (-cosine(keys[i], keys[j]), j))[:neighbours]
        cluster = [i, *nearest]
        total = sum(saliency[j] for j in cluster)
        result[i] = visual[i]
        if total > 0 and nearest:
            parts = [[saliency[j] / total * x for x in visual[j]] for j in cluster]
            result[i] = [sum(column) for column in zip(*parts, strict=True)]
    return result


def prunesid(visual: Vectors, saliency: list[float], keep: int) -> list[int]:
    n = len(visual)
    x = 1 / (1 + np.exp(-np.array(visual)))
    x = x - x.mean(1, keepdims=True)
    n_components = min(max(1, math.floor(keep / 4)), *x.shape)
    principal = np.linalg.eigh(x @ x.T)[1][:, ::-1][:, :n_components]
    group = [int(np.abs(row).argmax()) for row in principal]
    exact = exact_table(visual)
    limit = keep / 32 * sum(map(sum, exact)) / n**2
    survivors: dict[int, list[int]] = {}
    suppressed = []
    for i in ranking(saliency):
        better = survivors.setdefault(group[i], [])
        if any(cosine(visual[i], visual[j]) > limit for j in better):
            suppressed.append(i)
        else:
            better.append(i)
    place = {i: k for k, i in enumerate(ranking(saliency))}
    queue = []
    for members in survivors.values():
        for number, i in enumerate(members):
            share = 0.0 if number == 0 else (number + 0.5) / len(members)
            queue.append((share, place[i], i))
    order = [i for _, _, i in sorted(queue)] + suppressed
    return sorted(order[:keep])
