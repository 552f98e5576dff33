"""Pack many short contexts about one picture into one prefill: layout and attention."""

from __future__ import annotations

import torch
from exercises import LOGGED, Item, Segment
from pictures import NEWLINE, PATCHES
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BIN = 64  # tokens; segments are packed into bins of this length
QUERIES_AT_ONCE = 328


def length(segment: Segment) -> int:
    """Tokens."""
    return sum(len(turn.tokens) for turn in segment)


def fill_bins(segments: list[Segment]) -> list[list[Segment]]:
    """Pack into bins of at most `BIN` tokens, the longest first, each into the first that fits."""
    bins: list[list[Segment]] = []
    free: list[int] = []
    for segment in sorted(segments, key=length, reverse=True):
        place = next((i for i, room in enumerate(free) if room >= length(segment)), None)
        if place is None:
            bins.append([])
            free.append(BIN)
            place = len(bins) - 1
        bins[place].append(segment)
        free[place] -= length(segment)
    return bins


def collate(items: list[Item]) -> dict[str, Tensor]:
    """Lay out each picture as its shared part, then bins; positions as if each segment stood alone.

    Returns:
        `pixels` (crops, 3, 336, 336); `ids`, `positions`, `labels`, `kinds` (B, P + bins · BIN),
        where an id below zero is a visual token; `patches`, which of the crops · 256 these are, in
        order, a newline being the one behind the last; `own` (B, bins, BIN, BIN): which token of
        its bin a token sees.
    """
    packed = [fill_bins(item.segments) for item in items]
    n_bins, shared = max(map(len, packed)), len(items[0].shared)
    width = shared + n_bins * BIN
    ids, positions = torch.zeros(len(items), width).long(), torch.zeros(len(items), width).long()
    labels, kinds = torch.full_like(ids, -100), torch.full_like(ids, -1)
    part = torch.full_like(ids, -1)
    for b, (item, bins) in enumerate(zip(items, packed, strict=True)):
        ids[b, :shared] = torch.tensor(item.shared)
        positions[b, :shared] = torch.arange(shared)
        for k, segments in enumerate(bins):
            start = shared + k * BIN
            for n, segment in enumerate(segments):
                first = start
                for turn in segment:
                    answer, end = start + len(turn.given), start + len(turn.tokens)
                    ids[b, start:end] = torch.tensor(turn.tokens)
                    labels[b, answer:end] = ids[b, answer:end]
                    kinds[b, answer] = LOGGED.index(turn.kind)
                    start = end
                positions[b, first:end] = torch.arange(shared, shared + end - first)
                part[b, first:end] = n
    visual = ids < 0
    n_patches = torch.tensor([PATCHES * len(item.pixels) for item in items])
    offset = (n_patches.cumsum(0) - n_patches)[:, None]
    patches = torch.where(~ids == NEWLINE, n_patches.sum(), ~ids + offset)[visual]
    part = part[:, shared:].unflatten(1, (n_bins, BIN))
    return {
        "pixels": torch.cat([item.pixels for item in items]),
        "ids": ids,
        "positions": positions,
        "labels": labels,
        "kinds": kinds,
        "patches": patches,
        "own": (part[..., :, None] == part[..., None, :]) & torch.ones(BIN, BIN).tril().bool(),
    }


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend in `collate`'s layout: the shared part is causal, bins see it and their own.

    Half the price of one masked attention over everything. Registered with transformers.

    Args:
        module: unused.
        query: (B, H, P + bins · BIN, d).
        key: (B, H / g, P + bins · BIN, d).
        value: as `key`.
        attention_mask: (B, bins, BIN, BIN), additive.
        scaling: of the scores.

    Returns:
        (B, P + bins · BIN, H, d), and no weights.
    """
    heads, n_bins = key.shape[1], attention_mask.shape[1]
    shared = key.shape[2] - n_bins * BIN
    query = (query * scaling).unflatten(1, (heads, -1))  # (B, H / g, g, L, d)
    q0, q = query.split((shared, n_bins * BIN), -2)
    (k0, k), (v0, v) = (x.split((shared, n_bins * BIN), -2) for x in (key, value))
    q_own, k_own, v_own = (
        x.unflatten(-2, (n_bins, BIN)) for x in (q, k[:, :, None], v[:, :, None])
    )
    own = q_own @ k_own.mT + attention_mask[:, None, None]
    weights = torch.cat((_by_group(q, k0.mT), own.flatten(-3, -2)), -1).softmax(-1)
    from_own = weights[..., shared:].unflatten(-2, (n_bins, BIN)) @ v_own
    rest = _by_group(weights[..., :shared], v0) + from_own.flatten(-3, -2)
    return torch.cat((_causal(q0, k0, v0), rest), -2).flatten(1, 2).transpose(1, 2), None


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, some queries at a time, so that most of what is masked is not computed."""
    outputs = []
    for start in range(0, key.shape[2], QUERIES_AT_ONCE):
        some = query[..., start : start + QUERIES_AT_ONCE, :]
        end = start + some.shape[-2]
        future = torch.full((some.shape[-2], end), -torch.inf, dtype=query.dtype).triu(1 + start)
        weights = (_by_group(some, key[..., :end, :].mT) + future).softmax(-1)
        outputs.append(_by_group(weights, value[..., :end, :]))
    return torch.cat(outputs, -2)


def _by_group(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y` for all heads of a group at once: (B, H / g, g, m, n) and (B, H / g, n, p)."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)
