"""Two ranks over gloo train what one rank trains, to float tolerance."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests import ranks, tiny_chat

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
    expected = ranks.trainer(0, 1, output=str(tmp_path / "one"))
    first, second = ranks.run(ranks.trainer, whole, output=str(whole / "out"))
    assert same(first, second)
    near(expected, first)
    resume = str(whole / "out" / "checkpoint-2")
    resumed, _ = ranks.run(ranks.trainer, again, output=str(again / "out"), resume=resume)
    assert same(first, resumed)


def test_command_line_on_two_ranks_is_one(tmp_path):
    model, data = tiny_chat.save(tmp_path / "lm"), tiny_chat.save_data(tmp_path / "nlp")

    def train(n: int) -> tuple[dict, list]:
        out = tmp_path / f"{n}-ranks"
        line = ["tune", data / "boolq_train.jsonl", "--output", out, "--model", model]
        line += ["--steps", 4, "--log-every", 1, "--lr", "1e-2", "--batch", 4 // n, "--rank", 2]
        line += ["--method", "slim:n_experts=3+n_clusters=2"]
        (tmp_path / f"results-{n}").mkdir()
        ranks.run(ranks.command, tmp_path / f"results-{n}", n, line=[str(word) for word in line])
        history = [json.loads(row) for row in (out / "history.jsonl").read_text().splitlines()]
        return load_file(out / "adapter_model.safetensors"), history

    (one, history), (two, again) = train(1), train(2)
    near(one, two)
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in history], 1e-3)
