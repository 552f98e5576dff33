"""Uni-Adapter and Point-Cache in plain Python and double precision, one cloud after the other.

Slow on purpose, written from the equations, and nothing is shared with the package.
"""

from __future__ import annotations

import math

import numpy as np

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> Vector:
    length = math.sqrt(dot(a, a))
    return [x / length for x in a]


def cosine(a: Vector, b: Vector) -> float:
    return dot(unit(a), unit(b))


def entropy(logits: Vector) -> float:
    powers = [math.exp(x - max(logits)) for x in logits]
    return -sum(p / sum(powers) * math.log(p / sum(powers)) for p in powers if p > 0)


def best(values: Vector) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def zero_shot(feature: Vector, texts: list[Vector], scale: float) -> Vector:
    return [scale * cosine(feature, text) for text in texts]


def uni_adapter(
    features: list[Vector],
    texts: list[Vector],
    scale: float,
    n_clusters: int,
    decay: float,
    threshold: float,
    smoothing: float,
) -> list[Vector]:
    """Prototypes are [label, centre, number of clouds b, mean of their α]."""
    prototypes: list[list] = []
    answers = []
    for feature in features:
        f, main = unit(feature), zero_shot(feature, texts, scale)
        k, alpha = best(main), math.exp(-decay * entropy(main))
        own = [p for p in prototypes if p[0] == k]
        if len(own) < n_clusters:
            prototypes.append([k, f, 1, alpha])
        else:
            nearest = own[best([cosine(p[1], f) for p in own])]
            _, c, b, mean = nearest
            total = alpha + b * mean
            nearest[1] = [(alpha * x + b * mean * y) / total for x, y in zip(f, c)]
            nearest[2:] = [b + 1, total / (b + 1)]
        refined = refine(prototypes, len(texts), threshold, smoothing)
        cache = []
        for label in range(len(texts)):
            n = sum(p[0] == label for p in prototypes)
            votes = sum(z[label] * cosine(p[1], f) for z, p in zip(refined, prototypes))
            cache.append(scale * votes / n if n else 0.0)
        h_main, h_cache = entropy(main), entropy(cache)
        answers.append(
            [(h_cache * m + h_main * c) / (h_cache + h_main) for m, c in zip(main, cache)]
        )
    return answers


def refine(prototypes: list[list], n_labels: int, threshold: float, smoothing: float) -> np.ndarray:
    """Z* = (I + λ L)⁻¹ Z, by inverting the matrix."""
    n = len(prototypes)
    a = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            likeness = cosine(prototypes[i][1], prototypes[j][1])
            a[i, j] = likeness if likeness >= threshold else 0.0
    root = np.diag(a.sum(1) ** -0.5)
    laplacian = np.eye(n) - root @ a @ root
    z = np.array([[float(p[0] == label) for label in range(n_labels)] for p in prototypes])
    return np.linalg.inv(np.eye(n) + smoothing * laplacian) @ z


def point_cache(
    features: list[Vector],
    parts: list[list[Vector]],
    texts: list[Vector],
    scale: float,
    n_keep: int,
    alphas: tuple[float, float],
    betas: tuple[float, float],
) -> list[Vector]:
    """The cache of a label is a list of (entropy, whole, parts); weights are (global, local)."""
    cache: list[list[tuple]] = [[] for _ in texts]
    answers = []
    for whole, own in zip(features, parts, strict=True):
        main = zero_shot(whole, texts, scale)
        entry, shelf = (entropy(main), whole, own), cache[best(main)]
        if len(shelf) < n_keep:
            shelf.append(entry)
        else:
            worst = best([held[0] for held in shelf])
            if entry[0] < shelf[worst][0]:
                shelf[worst] = entry
        answer = []
        for logit, shelf in zip(main, cache):
            for _, held, held_parts in shelf:
                logit += alphas[0] * math.exp(-betas[0] * (1 - cosine(whole, held)))
                pairs = [(a, b) for a in own for b in held_parts]
                likeness = [math.exp(-betas[1] * (1 - cosine(a, b))) for a, b in pairs]
                logit += alphas[1] * sum(likeness) / len(pairs)
            answer.append(logit)
        answers.append(answer)
    return answers


def k_means(tokens: list[Vector], n_parts: int, n_steps: int) -> list[Vector]:
    def gap(a: Vector, b: Vector) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b))

    def mean(rows: list[Vector]) -> Vector:
        return [sum(column) / len(rows) for column in zip(*rows)]

    middle = mean(tokens)
    means = [tokens[best([gap(t, middle) for t in tokens])]]
    while len(means) < n_parts:
        means.append(tokens[best([min(gap(t, m) for m in means) for t in tokens])])
    for _ in range(n_steps):
        nearest = [best([-gap(t, m) for m in means]) for t in tokens]
        members = [[t for t, i in zip(tokens, nearest) if i == part] for part in range(n_parts)]
        means = [mean(rows) if rows else old for rows, old in zip(members, means)]
    return means
