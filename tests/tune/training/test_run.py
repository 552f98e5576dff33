"""`budwood.tune.training.run`: what it leaves behind."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file

from budwood.errors import DivergedError, InputError, OutputError
from budwood.runs import RunFolder
from budwood.tune.data.encoding import encode
from budwood.tune.data.examples import example_of
from budwood.tune.methods import attach, parse_tuner
from budwood.tune.slim import state
from budwood.tune.slim.keeper import keeper_of
from budwood.tune.training.run import check_trainable, run_identity, train
from budwood.tune.training.settings import Settings, default_lr
from budwood.tune.training.strength import weaken
from tests import tiny_chat

TOKENS = tiny_chat.tokenizer()
QUESTIONS = [{"question": f"Is {i} even?", "answer": "yes, indeed"} for i in range(16)]
ROWS = encode([example_of(one, "cloze") for one in QUESTIONS], TOKENS, 200).rows


def trained(folder, method="slim-whitened", base=None, **settings):
    tuner = parse_tuner(method)
    model = attach(tuner, base or tiny_chat.model(), 2, 0)
    chosen = Settings(**{"steps": 6, "batch": 4, "lr": 1e-2, **settings})
    train(model, TOKENS, ROWS, chosen, RunFolder(folder, {}), **tuner.training(()))
    return model.eval()


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_over(tmp_path):
    model, ours = attach(parse_tuner("lora"), tiny_chat.model(), 2, 0), RunFolder(tmp_path, {})
    trained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert not ours.is_complete  # as it was when it was opened
    with pytest.raises(OutputError, match="another process has just finished the run in"):
        train(model, TOKENS, ROWS, Settings(steps=1, batch=4), ours)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_the_number_of_processes_makes_a_run_what_it_is(monkeypatch):
    def about():
        return run_identity("tiny", tiny_chat.model(), "lora", Settings(), 2, "data")

    alone = about()
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("budwood.tune.training.run.processes", lambda model: two)
    assert about() == alone | {"processes": 2} != alone


def test_nothing_watches_a_run_that_was_broken_off(tmp_path, monkeypatch):
    def broken_off(model, step):
        raise DivergedError("a gradient is NaN")

    seen = []
    monkeypatch.setattr("budwood.tune.training.trainer.check_gradients", broken_off)
    monkeypatch.setattr("budwood.tune.training.run.check_trainable", seen.append)
    with pytest.raises(DivergedError) as kept:  # and with it the frames of the run
        trained(tmp_path, log_every=1)
    assert keeper_of(seen[0]).recorder is None and kept.tb


def test_no_labels_stay_in_force(tmp_path):
    assert keeper_of(trained(tmp_path)).labels is None


@pytest.mark.parametrize("method", ["slim-whitened", "lora"])
def test_in_bfloat16_what_was_trained_is_what_is_loaded(tmp_path, method):
    base = tiny_chat.model().to(torch.bfloat16)
    inputs = {"input_ids": torch.tensor([ROWS[0]["input_ids"]])}
    model = trained(tmp_path, method, base)
    with torch.no_grad():
        fresh = model(**inputs).logits
        again = peft.PeftModel.from_pretrained(
            tiny_chat.model().to(torch.bfloat16), str(tmp_path)
        ).eval()(**inputs)
    assert torch.equal(fresh, again.logits)


@pytest.mark.parametrize("method", ["lora", "slim-whitened:skip_first=0.0"])
def test_a_part_of_what_was_learnt_is_kept(tmp_path, method):
    joint = "+" if ":" in method else ":"
    files = {}
    for strength in (1, 0.5):
        folder = tmp_path / str(strength)
        trained(folder, f"{method}{joint}strength={strength}")
        files[strength] = load_file(folder / "adapter_model.safetensors")
    halved = [key for key in files[1] if "lora_B" in key or "slim_out" in key]
    assert halved and all(float(files[1][key].abs().sum()) > 0 for key in halved)
    for key, value in files[1].items():
        assert torch.equal(files[0.5][key], value * 0.5 if key in halved else value), key


def test_what_is_kept_of_a_loaded_adapter(tmp_path):
    trained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_chat.model(), str(tmp_path))  # nothing to train
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    weaken(loaded, 0.5)
    changed = [key for key, value in loaded.state_dict().items() if not value.equal(before[key])]
    assert changed == [key for key in before if ".slim_out." in key]
    for strength in (0, -1, 1.5, float("nan")):
        with pytest.raises(InputError, match="strength="):
            weaken(loaded, strength)
    with pytest.raises(InputError, match="no LoRA or SLIM adapter is active"):
        weaken(tiny_chat.model(), 0.5)


@pytest.mark.parametrize("rest", ["dora", "lora:use_dora=true", "lora:init_lora_weights=pissa"])
def test_a_part_of_what_is_no_product_is_refused(rest):
    with pytest.raises(InputError, match="give strength=1"):
        parse_tuner(f"{rest}{'+' if ':' in rest else ':'}strength=0.5")


def test_an_infinite_input_names_the_last_checkpoint(tmp_path, monkeypatch):
    inner, steps = state.InputStatistics.take, []

    def taken(self):
        found = inner(self)
        steps.append(1)
        return found if len(steps) < 100 else found.fill_(float("inf"))

    monkeypatch.setattr(state.InputStatistics, "take", taken)
    with pytest.raises(DivergedError, match=r"inputs of layer .*checkpoint-\d+; try a lower"):
        trained(tmp_path, steps=200, save_every=1)


def test_a_broken_base_model_is_told_from_a_rate_that_is_too_high(tmp_path):
    base = tiny_chat.model()
    base.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="loss is nan at step 1.*look at the base model's"):
        trained(tmp_path, "lora", base)


@pytest.mark.parametrize(("width", "rate"), [(64, 3e-3), (576, 3e-3), (1152, 1.5e-3)])
def test_the_default_rate_falls_with_the_width(width, rate):
    text = SimpleNamespace(hidden_size=width)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert default_lr(model) == pytest.approx(rate)


def test_without_a_rate_a_model_is_trained_at_its_default(tmp_path):
    base = tiny_chat.model()
    trained(tmp_path, "lora", base, lr=None, schedule="constant_with_warmup", warmup=0, log_every=6)
    assert RunFolder(tmp_path, {}).history()[-1]["lr"] == pytest.approx(default_lr(base))


def test_another_gpu_than_the_first_is_refused_without_a_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    on = {n: SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", n)) for n in (0, 1)}
    with pytest.raises(InputError, match="on cuda:1.*set CUDA_VISIBLE_DEVICES=1"):
        check_trainable(on[1])
    check_trainable(on[0])
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_trainable(on[1])


def test_a_run_that_has_nothing_to_keep_makes_room_for_another(tmp_path):
    for i in range(2):  # the first one diverges before its first checkpoint
        folder = RunFolder(tmp_path, {"lr": i}, remade=["own.json"])
        assert not folder.is_complete and not folder.history()
        assert not (tmp_path / "own.json").exists()
        folder.note({"step": 1})
        (tmp_path / "own.json").write_text("texts")
    (tmp_path / "own.json").unlink()
    refusal = pytest.raises(OutputError, match="another process works on the run")
    with RunFolder(tmp_path, {"lr": 1}).claimed(), refusal:
        RunFolder(tmp_path, {"lr": 2})
    assert RunFolder(tmp_path, {"lr": 1}).history()
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(OutputError, match="holds another run .lr 1 there and 2 here"):
        RunFolder(tmp_path, {"lr": 2})


def test_a_run_whose_folder_another_one_took_over_does_not_go_on(tmp_path):
    first = RunFolder(tmp_path, {"lr": 1})
    RunFolder(tmp_path, {"lr": 2})
    refusal = pytest.raises(OutputError, match="holds another run .lr 2 there and 1 here")
    with refusal, first.claimed():
        pass
