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


class Line:
    """`budwood tune` on a tiny model, on several ranks."""

    def __init__(self, place):
        self.place = place
        self.model = tiny_chat.save(place / "lm")
        self.data = tiny_chat.save_data(place / "nlp") / "boolq_train.jsonl"

    def run(self, name, n=2, **how):
        """The adapter that a run leaves in a folder, None where it leaves none."""
        out, results = self.place / name, self.place / f"results-{name}"
        line = ["tune", self.data, "--output", out, "--model", self.model, "--save-every", 2]
        line += ["--steps", 4, "--log-every", 1, "--lr", "1e-2", "--batch", 4 // n, "--rank", 2]
        line += ["--method", "slim:n_experts=3+n_clusters=2"]
        results.mkdir(exist_ok=True)
        ranks.run(ranks.command, results, n, line=[str(word) for word in line], **how)
        file = out / "adapter_model.safetensors"
        return load_file(file) if file.exists() else None

    def history(self, name):
        lines = (self.place / name / "history.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def test_command_line_on_two_ranks_is_one(tmp_path):
    line = Line(tmp_path)
    near(line.run("one", 1), line.run("two"))
    history, again = line.history("one"), line.history("two")
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in history], 1e-3)


def test_command_line_under_fsdp_saves_and_resumes(tmp_path):
    line = Line(tmp_path)
    expected = line.run("ddp")
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        cut = tmp_path / f"cut-{kind}"
        assert line.run(cut.name, fsdp=kind, stop=3) is None
        assert [path.name for path in cut.glob("checkpoint-*")] == ["checkpoint-2"]
        whole = line.run(f"whole-{kind}", fsdp=kind)
        near(expected, whole)
        assert same(whole, line.run(cut.name, fsdp=kind))
        assert not list(cut.glob("checkpoint-*"))


def test_fsdp1_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="FSDP1 was not tried; launch with --fsdp_version 2"):
        Line(tmp_path).run("old", fsdp="FULL_STATE_DICT", version="1")
