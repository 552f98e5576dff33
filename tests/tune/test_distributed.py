"""Two ranks over gloo train what one rank trains, to float tolerance."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests import ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch without gloo")


def near(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.allclose(value.float(), other[key].float(), atol=2e-5, rtol=1e-3), key


def same(one, other):
    return all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(("kind", "parts"), [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)])
def test_two_ranks_are_one(kind, parts, tmp_path):
    expected = ranks.loop(0, 1, kind="one")
    first, second = ranks.run(ranks.loop, tmp_path, kind=kind, parts=parts)
    assert same(first, second)
    near(expected, first)
    assert all(int(value) == 4 for key, value in first.items() if key.endswith("n_steps"))
    assert any(value.abs().max() > 1e-3 for key, value in first.items() if "slim_out" in key)


def test_trainer_on_two_ranks_is_one_and_resumes_bit_equal(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    again.mkdir()
    expected = ranks.trainer(0, 1, folder=str(tmp_path / "one"))
    first, second = ranks.run(ranks.trainer, whole, folder=str(whole / "out"))
    assert same(first, second)
    near(expected, first)
    resume = str(whole / "out" / "checkpoint-2")
    resumed, _ = ranks.run(ranks.trainer, again, folder=str(again / "out"), resume=resume)
    assert same(first, resumed)
