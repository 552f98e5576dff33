"""Validation while training: what is measured, what is kept, and when training ends."""

from __future__ import annotations

import json
import random

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from budwood.cli import app
from budwood.errors import InputError, OutputError
from budwood.tune import finetune
from budwood.tune.data.batches import Padded
from budwood.tune.data.encoding import encode
from budwood.tune.data.examples import example_of
from budwood.tune.training import validation
from budwood.tune.training.losses import answer_loss
from budwood.tune.training.validation import validation_loss
from tests import tiny_chat
from tests.killed import killed_at

TOKENS = tiny_chat.tokenizer()
DRAW = random.Random(0)
TRAIN, HELD = ([tiny_chat.question(DRAW, 3) for _ in range(n)] for n in (16, 7))
SLIM = "slim:n_experts=3+texts=8+strength=1.0"


def run(folder, method="lora", **options):
    given = {"rank": 2, "steps": 6, "batch": 4, "lr": 0.03, "log_every": 1, "eval_every": 1}
    given |= {"eval_data": HELD, **options}
    return finetune(tiny_chat.model(), TRAIN, folder, method=method, tokenizer=TOKENS, **given)


def measured(result):
    return {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}


def weights(result):
    return load_file(result.output / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


def held_out_loss(model):
    """One row at a time, all tokens weighed alike."""
    rows = encode([example_of(row) for row in HELD], TOKENS, 512).rows
    total = n_tokens = 0.0
    for row in rows:
        batch = Padded(0, multiple=1, trim=False)([row])
        labels = batch.pop("labels")
        n = int((labels[:, 1:] != -100).sum())
        total += n * answer_loss(model(**batch).logits, labels).item()
        n_tokens += n
    return total / n_tokens


@pytest.mark.parametrize("method", ["lora", SLIM])
def test_the_best_adapter_is_kept(tmp_path, monkeypatch, method):
    """By a loss that is lowest after step 3, whatever the model says."""
    true = {}

    def loss(model, *args):
        step = len(true)
        true[step] = validation_loss(model, *args)
        return abs(step - 3) + 1.0

    monkeypatch.setattr(validation, "validation_loss", loss)
    result = run(tmp_path / "out", method)
    assert result.best_step == 3 and measured(result) == {s: abs(s - 3) + 1.0 for s in range(7)}
    assert held_out_loss(result.model) == pytest.approx(true[3], rel=1e-5)
    assert abs(true[6] - true[3]) > 1e-3
    assert not list(result.output.glob("best*"))
    with pytest.raises(OutputError, match="holds another run .*eval_data"):
        run(tmp_path / "out", method, eval_data=None, eval_every=0)


def test_what_is_measured(tmp_path):
    result = run(tmp_path / "out")
    losses = measured(result)
    assert list(losses) == list(range(7))
    assert losses[0] == pytest.approx(held_out_loss(tiny_chat.model()), rel=1e-5)
    assert min(losses, key=losses.get) == result.best_step
    assert held_out_loss(result.model) == pytest.approx(min(losses.values()), rel=1e-5)
    assert [row["step"] for row in result.history if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_measuring_changes_no_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "validation_loss", lambda *_: -len(seen.append(0) or seen))
    seen = []
    plain = run(tmp_path / "plain", SLIM, eval_data=None, eval_every=0)
    assert same(weights(plain), weights(run(tmp_path / "out", SLIM)))


@pytest.mark.parametrize("method", ["lora", SLIM])
def test_an_interrupted_run_continues_bit_equal(tmp_path, method):
    whole = run(tmp_path / "whole", method)
    for save_every in (1, 100):
        folder = tmp_path / f"cut-{save_every}"
        with killed_at(5), pytest.raises(KeyboardInterrupt):
            run(folder, method, save_every=save_every)
        result = run(folder, method, save_every=save_every)
        assert measured(result) == measured(whole) and result.best_step == whole.best_step
        assert same(weights(result), weights(whole))


def test_training_ends_when_the_loss_no_longer_falls(tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 3.5, 2.9, 3.0, 3.0, 2.0])
    monkeypatch.setattr(validation, "validation_loss", lambda *_: next(losses))
    result = run(tmp_path / "out", steps=20, patience=2)
    assert list(measured(result)) == list(range(7)) and result.best_step == 4
    again = run(tmp_path / "out", steps=20, patience=2)
    assert again.was_complete and again.best_step == 4


def test_ten_measurements_in_a_run(tmp_path):
    result = run(tmp_path / "out", steps=0, epochs=6.0, eval_every=0)
    assert list(measured(result)) == list(range(0, 25, 2))  # 24 steps


def test_runs_of_versions_without_validation_go_on(tmp_path):
    result = run(tmp_path / "out", eval_data=None, eval_every=0)
    noted = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "eval_every" not in noted["config"] and "patience" not in noted["config"]
    assert result.best_step is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_data": None}, "eval_every=1 needs held-out examples; give eval_data"),
        ({"eval_data": None, "eval_every": 0, "patience": 2}, "patience=2 needs held-out"),
        ({"eval_data": []}, "the data are empty"),
        ({"eval_every": -1}, "eval_every=-1"),
        ({"patience": 0.5}, "patience=0.5"),
    ],
)
def test_bad_input(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", **options)


def test_the_command(tmp_path):
    folder = tiny_chat.save(tmp_path / "model")
    files = [
        tiny_chat.write_lines(tmp_path / name, rows)
        for name, rows in (("train.jsonl", TRAIN), ("held.jsonl", HELD))
    ]
    command = ["tune", str(files[0]), "--eval", str(files[1]), "--model", str(folder)]
    command += ["--output", str(tmp_path / "tuned"), "--method", "lora", "--steps", "4"]
    result = CliRunner().invoke(app, [*command, "--batch", "4", "--patience", "3"])
    assert result.exit_code == 0, result.stderr
    assert "validation loss: " in result.stderr and "whose adapter is kept" in result.stderr
