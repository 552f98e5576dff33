"""Saliency under tensor parallelism, without a server."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from budwood.prune.saliency import cls_attention, packed_attention
from budwood.serve.vllm.encoders import last_layer, mean_over_ranks
from tests import ranks

N_HEADS, D_HEAD = 6, 4


def heads_of(x: torch.Tensor, n_ranks: int) -> list[torch.Tensor]:
    """The heads of each rank, as a projection that is split column by column gives them."""
    return list(x.chunk(n_ranks, dim=-1))


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_the_mean_over_ranks_is_the_mean_over_heads(n_ranks):
    torch.manual_seed(0)
    query, keys = torch.randn(2, N_HEADS * D_HEAD), torch.randn(2, 7, N_HEADS * D_HEAD)
    whole = cls_attention(query, keys, N_HEADS, 0.5)
    parts = [
        cls_attention(*part, N_HEADS // n_ranks, 0.5)
        for part in zip(heads_of(query, n_ranks), heads_of(keys, n_ranks), strict=True)
    ]
    for part in parts:
        reduced = mean_over_ranks(part, n_ranks, lambda _: torch.stack(parts).sum(0))
        torch.testing.assert_close(reduced, whole)


def test_the_mean_over_two_processes(tmp_path):
    """As vLLM's own all-reduce does it: each process has some of the heads."""
    query, keys = torch.randn(2, N_HEADS * D_HEAD), torch.randn(2, 7, N_HEADS * D_HEAD)
    first, second = ranks.run(reduced, tmp_path, query=query, keys=keys)
    assert torch.equal(first, second), "both must choose the same tokens"
    torch.testing.assert_close(first, cls_attention(query, keys, N_HEADS, 0.5))
    alone = cls_attention(*(heads_of(x, 2)[0] for x in (query, keys)), N_HEADS // 2, 0.5)
    assert not torch.allclose(first, alone), "the other process must count"


def reduced(rank: int, n: int, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    dist.init_process_group("gloo")
    own = cls_attention(*(heads_of(x, n)[rank] for x in (query, keys)), N_HEADS // n, 0.5)

    def all_reduce(scores: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(scores)
        return scores

    return mean_over_ranks(own, n, all_reduce)


def test_the_mean_over_ranks_of_packed_images():
    torch.manual_seed(0)
    queries, keys = torch.randn(20, N_HEADS * D_HEAD), torch.randn(20, N_HEADS * D_HEAD)
    whole = packed_attention(queries, keys, N_HEADS, 0.5, [8, 12])
    parts = [
        packed_attention(*part, N_HEADS // 2, 0.5, [8, 12])
        for part in zip(heads_of(queries, 2), heads_of(keys, 2), strict=True)
    ]
    for image, expected in enumerate(whole):
        reduced = mean_over_ranks(parts[0][image], 2, lambda _, i=image: parts[0][i] + parts[1][i])
        torch.testing.assert_close(reduced, expected)


@pytest.mark.parametrize(("index", "layer"), [(-1, 4), (-2, 3), (3, 2), ([1, -2], 3)])
def test_the_layer_that_makes_a_hidden_state(index, layer):
    assert last_layer([*range(5)], index, 5) == layer
