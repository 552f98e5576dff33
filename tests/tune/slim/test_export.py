"""The approximate LoRA, and the speed benchmark at a tiny size."""

from __future__ import annotations

import json

import peft
import pytest
import torch

from budwood.bench.tune.speed import METHODS, TARGETS, SpeedConfig, measure_speed
from budwood.errors import InputError, OutputError
from budwood.tune import export_lora
from budwood.tune.slim.export import reduce_rank
from tests import tiny_llm as tiny
from tests.tiny_llm import logits


@pytest.fixture(scope="module")
def model():
    return tiny.trained(steps=12, modules_to_save=["lm_head"])


def test_export_is_a_plain_lora_with_its_measured_loss(model, tmp_path):
    data = [tiny.batch(seed=i) for i in range(3)]
    before = logits(model)
    report = export_lora(model, data, tmp_path / "lora", held_out=[tiny.batch(seed=50)])
    assert torch.equal(logits(model), before)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora").eval()
    assert isinstance(loaded.peft_config["default"], peft.LoraConfig)
    loss = loaded(**tiny.batch(seed=50)).loss.item()
    assert report.loss_lora == pytest.approx(loss, abs=1e-5)
    base = tiny.llama()(**tiny.batch(seed=50)).loss.item()
    assert report.loss_base == pytest.approx(base, abs=1e-5)  # whose head is not the trained one
    assert report.loss_slim == pytest.approx(model(**tiny.batch(seed=50)).loss.item(), abs=1e-5)
    assert report.rank == 12 and report.held_out
    learnt = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data)
    assert report.n_calibration_tokens == learnt < sum(b["attention_mask"].sum() for b in data)
    facts = json.loads((tmp_path / "lora" / "approximation.json").read_text())
    assert facts["approximate"] and facts["loss_lora"] == report.loss_lora
    assert "approximation" in (tmp_path / "lora" / "README.md").read_text()
    merged = loaded.merge_and_unload()
    assert torch.allclose(logits(merged), logits(loaded), atol=1e-5)


def test_trained_tokens_are_exported(tmp_path):
    words = sorted(set(tiny.batch()["input_ids"].flatten().tolist()) - {0})
    model = tiny.slim(trainable_token_indices=words)
    tiny.train(model, 8, same=True, lr=5e-2)
    report = export_lora(model.eval(), [tiny.batch()], tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora").eval()
    assert loaded(**tiny.batch()).loss.item() == pytest.approx(report.loss_lora, abs=1e-5)
    with loaded.disable_adapter():
        assert loaded(**tiny.batch()).loss.item() != pytest.approx(report.loss_lora, abs=1e-2)


def test_resized_embeddings_are_exported(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    base = tiny.llama().from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(tiny.N_WORDS + 6)
    report = export_lora(tiny.trained(model=base), [tiny.batch()], tmp_path / "lora")
    other = tiny.llama().from_pretrained(tmp_path / "base")
    torch.manual_seed(7)  # the new rows are drawn
    other.resize_token_embeddings(tiny.N_WORDS + 6)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path / "lora").eval()
    assert torch.equal(loaded.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert loaded(**tiny.batch()).loss.item() == pytest.approx(report.loss_lora, abs=1e-5)


def test_what_cannot_be_exported_is_said(tmp_path):
    model = tiny.trained()
    with pytest.raises(InputError, match="there is no SLIM adapter 'zz'; there is default"):
        export_lora(model, [tiny.batch()], tmp_path / "lora", adapter="zz")
    off = pytest.raises(InputError, match="the adapters are off; leave the block")
    with model.disable_adapter(), off:
        export_lora(model, [tiny.batch()], tmp_path / "lora")


@pytest.mark.parametrize("inference", ["mask", "expectation"])
def test_export_of_even_routing_is_exact(inference, tmp_path):
    model = tiny.trained(router=False, yielding=False, merge_inference=inference)
    report = export_lora(model, [tiny.batch()], tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora").eval()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert report.loss_lora == pytest.approx(report.loss_slim, abs=1e-5)


@pytest.mark.parametrize(("full", "rank"), [(6, 6), (6, 2), (12, 9)])
def test_reduced_rank_is_the_best_of_its_rank(full, rank):
    a, b = torch.randn(full, 7), torch.randn(8, full)
    short_a, short_b = reduce_rank(a, b, rank)
    assert short_a.shape == (rank, 7) and short_b.shape == (8, rank)
    s = torch.linalg.svdvals(b @ a)
    error = torch.linalg.matrix_norm(b @ a - short_b @ short_a)
    assert error == pytest.approx(s[rank:].square().sum().sqrt().item(), abs=1e-4)


def test_export_refuses(model, tmp_path):
    data = [tiny.batch()]
    with pytest.raises(InputError, match="'other'"):
        export_lora(model, data, tmp_path / "a", adapter="other")
    both = tiny.slim()
    both.add_adapter("second", tiny.config())
    both.base_model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match=r"are \['default', 'second'\].*set_adapter\('default'\)"):
        export_lora(both, data, tmp_path / "a")
    with pytest.raises(InputError, match="rank=13"):
        export_lora(model, data, tmp_path / "a", rank=13)
    silent = tiny.batch()
    silent["labels"] = torch.full_like(silent["labels"], -100)
    with pytest.raises(InputError, match="calibration has no token that counts"):
        export_lora(model, [silent], tmp_path / "a", held_out=data)
    with pytest.raises(InputError, match="calibration has no token that counts"):
        export_lora(model, [], tmp_path / "a")
    with pytest.raises(InputError, match="no labels"):
        export_lora(model, [{k: v for k, v in data[0].items() if k != "labels"}], tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").touch()
    with pytest.raises(OutputError, match="not an empty directory"):
        export_lora(model, data, tmp_path / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("low", [None, "over_lora_narrow", "memory_over_lora", "decode_over_lora"])
def test_all_targets_of_speed_are_to_be_met(low, monkeypatch):
    for name in ("over_lora_narrow", "memory_over_lora", "decode_over_lora"):
        monkeypatch.setitem(TARGETS, name, 0.0 if name == low else 1e6)
    methods = ("frozen", "lora", "slim")
    rows = measure_speed(SpeedConfig((24,), n_tokens=(8,), methods=methods, r=2, repeats=1))
    assert [row["within_target"] for row in rows if row["method"] == "slim"] == [low is None]


@pytest.mark.parametrize("distance", ["whitened", "discriminant"])
def test_speed_rows(distance):
    said = []
    config = SpeedConfig(widths=(24,), n_tokens=(8, 40), r=2, repeats=2, distance=distance)
    rows = measure_speed(config, lambda done, total, note="": said.append((done, total)))
    assert [row["method"] for row in rows] == [*METHODS, *METHODS]
    assert said == [(0, 2), (0, 2), (1, 2), (2, 2)]
    by_name = {row["method"]: row for row in rows[5:]}
    assert by_name["lora"]["over_lora"] == 1 and by_name["frozen"]["n_params"] == 0
    assert by_name["bypass"]["bypassed_share"] == 1
    assert by_name["slim"]["bypassed_share"] < 1
    router = 10 * (24 * 2 + 64)
    assert by_name["slim"]["n_params"] == by_name["lora"]["n_params"] + router
    slim = by_name["slim"]
    quick = slim["over_lora"] <= TARGETS["over_lora_narrow"]
    quick = quick and slim["decode_over_lora"] <= TARGETS["decode_over_lora"]
    assert slim["within_target"] == (quick and slim["memory_over_lora"] <= 1.1)
    assert all(row["peak_mib"] > 0 and row["ms"] > 0 and row["decode_ms"] > 0 for row in rows)
    assert by_name["lora"]["decode_over_lora"] == by_name["frozen"]["decode_over_frozen"] == 1
    assert by_name["bypass"]["decode_bypassed_share"] == 1 > slim["decode_bypassed_share"]
    assert rows[1]["decode_ms"] == by_name["lora"]["decode_ms"]  # one measurement a width
    json.dumps(rows)


def test_speed_refuses():
    with pytest.raises(InputError, match="unknown method 'qlora'"):
        SpeedConfig(methods=("frozen", "lora", "qlora"))
    with pytest.raises(InputError, match="need the methods"):
        SpeedConfig(methods=("slim",))
    with pytest.raises(InputError, match="repeats=0"):
        SpeedConfig(repeats=0)
