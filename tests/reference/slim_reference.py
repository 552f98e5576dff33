"""SLIM written token by token from its equations, in float64 and plain loops."""

from __future__ import annotations

import math


def standardise(logits):
    mean = sum(logits) / len(logits)
    var = sum((z - mean) ** 2 for z in logits) / len(logits)
    return [(z - mean) / math.sqrt(var + 1e-12) for z in logits]


def yield_scores(scores, distance, n_lora, beta):
    return [
        z - beta * distance if i < n_lora else z + beta * distance for i, z in enumerate(scores)
    ]


def route(scores, top_k):
    """Softmax, top K, division by their sum."""
    top = max(scores)
    soft = [math.exp(z - top) for z in scores]
    soft = [s / sum(soft) for s in soft]
    order = sorted(range(len(soft)), key=lambda i: -soft[i])[:top_k]
    total = sum(soft[i] for i in order)
    return [soft[i] / total if i in order else 0.0 for i in range(len(soft))]


def nearest(token, centres):
    squares = [sum((x - c) ** 2 for x, c in zip(token, centre)) for centre in centres]
    return squares.index(min(squares))


def raw_distance(token, centre, var, kind):
    floor = 1e-6 * sum(var) / len(var) + 1e-12
    parts = [abs(x - c) / math.sqrt(v + floor) for x, c, v in zip(token, centre, var)]
    if kind == "max":
        return max(parts) - 1
    return math.sqrt(sum(part**2 for part in parts) / len(parts)) - 1


def solve(matrix, vector):
    """The solution of a linear system, by elimination with pivots."""
    rows = [[*row, v] for row, v in zip(matrix, vector)]
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(n):
            if k != i:
                factor = rows[k][i] / rows[i][i]
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i])]
    return [row[n] / row[i] for i, row in enumerate(rows)]


def whitened_distance(z, centre, covariance, ridge=1e-3):
    """√((z − c)ᵀ·(C + ridge)⁻¹·(z − c) / n) − 1."""
    diff = [a - b for a, b in zip(z, centre)]
    matrix = [[v + ridge * (i == j) for j, v in enumerate(row)] for i, row in enumerate(covariance)]
    square = sum(a * b for a, b in zip(diff, solve(matrix, diff)))
    return math.sqrt(square / len(diff)) - 1


def discriminant(own, other, ridge=0.1):
    """Direction and offset between two samples of tokens."""

    def mean(tokens):
        return [sum(column) / len(tokens) for column in zip(*tokens)]

    d, both = len(own[0]), own + other
    middle = mean(both)
    spread = [sum((t[j] - middle[j]) ** 2 for t in both) / len(both) for j in range(d)]
    floor = 1e-6 * sum(spread) / d + 1e-12
    sd = [math.sqrt(v + floor) for v in spread]
    parts = [
        [[(x - m) / s for x, m, s in zip(t, middle, sd)] for t in side] for side in (own, other)
    ]
    centres = [mean(side) for side in parts]
    matrix = [[ridge * (i == j) for j in range(d)] for i in range(d)]
    for side, centre in zip(parts, centres):
        for t in side:
            diff = [x - c for x, c in zip(t, centre)]
            for i in range(d):
                for j in range(d):
                    matrix[i][j] += diff[i] * diff[j] / len(side) / 2
    gap = [b - a for a, b in zip(*centres)]
    direction = [w / s for w, s in zip(solve(matrix, gap), sd)]
    halfway = [m + (a + b) / 2 * s for m, a, b, s in zip(middle, *centres, sd)]
    return direction, sum(w * x for w, x in zip(direction, halfway))


def slide_covariance(tokens, centres, covariance, momentum):
    """Covariance around the nearest centres after one step over these tokens."""
    n = len(covariance)
    out = [[(1 - momentum) * v for v in row] for row in covariance]
    for token in tokens:
        diff = [a - b for a, b in zip(token, centres[nearest(token, centres)])]
        for i in range(n):
            for j in range(n):
                out[i][j] += momentum * diff[i] * diff[j] / len(tokens)
    return out


def slide(tokens, centres, variances, momentum):
    """Centres and variances after one step over these tokens."""
    groups = [[] for _ in centres]
    for token in tokens:
        groups[nearest(token, centres)].append(token)
    new_centres, new_variances = [], []
    for group, centre, var in zip(groups, centres, variances):
        m = 1 - (1 - momentum) ** (len(group) / len(tokens) * len(centres))
        out_centre, out_var = [], []
        for j, (c, v) in enumerate(zip(centre, var)):
            values = [token[j] for token in group]
            if not values:
                out_centre.append(c)
                out_var.append(v)
                continue
            mean = sum(values) / len(values)
            own = sum((x - mean) ** 2 for x in values) / len(values)
            moved = (1 - m) * c + m * mean
            # Variance of the old tokens at weight 1 − m and the new ones at m, about the new mean.
            spread = (1 - m) * (v + (c - moved) ** 2) + m * (own + (mean - moved) ** 2)
            out_centre.append(moved)
            out_var.append(spread)
        new_centres.append(out_centre)
        new_variances.append(out_var)
    return new_centres, new_variances


def merged(a, b, rows, columns, weights, r):
    """Σ_i ŵ_i · M ⊗ (B_i·A_i) as a matrix of d_out × d_in."""
    d_out, d_in = len(b), len(a[0])
    out = [[0.0] * d_in for _ in range(d_out)]
    for o in range(d_out):
        for j in range(d_in):
            if rows[o] and columns[j]:
                out[o][j] = sum(
                    w * sum(b[o][i * r + k] * a[i * r + k][j] for k in range(r))
                    for i, w in enumerate(weights)
                )
    return out


def l1(a, b, n_lora, r):
    total = 0.0
    for i in range(n_lora):
        norm_a = sum(abs(v) for row in a[i * r : (i + 1) * r] for v in row)
        norm_b = sum(abs(row[k]) for row in b for k in range(i * r, (i + 1) * r))
        total += norm_b / (r * len(b)) + norm_a / (r * len(a[0]))
    return total
