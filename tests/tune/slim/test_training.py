"""Training: statistics counted once, padding left out, masks, penalty, checkpointing, resuming."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import budwood.tune.slim.keeper as steps_module
from budwood.errors import AttachError, DivergedError
from budwood.tune import SlimCallback, SlimLinear, commit, observe, tell_labels
from budwood.tune.evaluate.suite import by_layer, routing_rows
from budwood.tune.slim.state import make_statistics
from tests import tiny_chat
from tests import tiny_llm as tiny
from tests.reference import slim_reference as slow
from tests.tiny_llm import logits, states


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def near(one, other, atol=1e-5):
    return one.keys() == other.keys() and all(
        torch.allclose(v.float(), other[k].float(), atol=atol, rtol=1e-4) for k, v in one.items()
    )


def saved_statistics(found):
    return {key: value for key, value in found.items() if "slim_clusters" in key}


def inputs_of(model, data, index=0):
    """What a layer reads, without padding."""
    seen = []
    hook = layers(model)[index].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits(model, data)
    hook.remove()
    return seen[0][data["attention_mask"] > 0]


def n_counted(model, index=0):
    """Tokens in the moments that a layer has gathered."""
    return int(layers(model)[index].slim_clusters["default"].gathered().count.sum())


# --- statistics ---------------------------------------------------------------------------------


def test_the_first_two_steps_start_the_statistics():
    model = tiny.slim(distance="rms", fit_on="all")
    data = tiny.batch()
    x = inputs_of(model.eval(), data)
    tiny.train(model, 1, lr=0.0)
    statistics = layers(model)[0].slim_clusters["default"]
    assert int(statistics.n_steps) == 1
    assert torch.allclose(statistics.var[0], x.var(0, correction=0), rtol=1e-2, atol=1e-6)
    centre, var = statistics.centre.clone(), statistics.var.clone()
    model(**data).loss.backward()
    commit(model)
    raw = [
        slow.raw_distance(row, centre[k].tolist(), var[k].tolist(), "rms")
        for row in x.tolist()
        for k in [slow.nearest(row, centre.tolist())]
    ]
    assert int(statistics.n_steps) == 2
    assert statistics.distance_mean.item() == pytest.approx(sum(raw) / len(raw), rel=1e-3)
    expected = slow.slide(x.tolist(), centre.tolist(), var.tolist(), 0.05)
    assert torch.allclose(statistics.centre, torch.tensor(expected[0]), atol=1e-5)
    assert torch.allclose(statistics.var, torch.tensor(expected[1]), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_not_in_the_statistics(padding):
    found = []
    for extra in (0, 5):
        model = tiny.slim()
        data = tiny.batch(padding=padding)
        filler = torch.zeros(4, extra, dtype=torch.long)
        order = (lambda a, b: (b, a)) if padding == "left" else (lambda a, b: (a, b))
        data = {
            key: torch.cat(order(value, filler + (-100 if key == "labels" else 0)), 1)
            for key, value in data.items()
        }
        if padding == "left":  # the same positions with more padding before them
            data["position_ids"] = (data["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model.train()
        for _ in range(3):
            model(**data).loss.backward()
            commit(model)
        statistics = layers(model)[0].slim_clusters["default"]
        found.append(saved_statistics(states(model)))
        assert statistics.n_steps == 3
    assert near(*found)


def test_without_a_mask_every_token_counts():
    model = tiny.slim(fit_on="all").train()
    data = tiny.batch(padding=None)
    del data["attention_mask"]
    model(**data).loss.backward()
    assert n_counted(model) == data["input_ids"].numel()


def test_a_mask_of_the_pass_before_is_not_used():
    model = tiny.slim(fit_on="all").train()
    model(**tiny.batch()).loss.backward()
    commit(model)
    data = tiny.batch()
    del data["attention_mask"]
    model(**data).loss.backward()
    assert n_counted(model) == 36


def test_accumulated_parts_are_one_batch():
    found = []
    for parts in (1, 2, 4):
        model = tiny.slim(l1=0.5)
        optim = tiny.optimiser(model)
        model.train()
        for step in range(3):
            optim.zero_grad()
            data = tiny.batch(seed=step, padding=None)
            for i in range(parts):
                part = {key: value.chunk(parts)[i] for key, value in data.items()}
                (model(**part).loss / parts).backward()
            optim.step()
        found.append(states(model))
    assert near(found[0], found[1], 1e-4) and near(found[0], found[2], 1e-4)


def test_evaluation_and_forward_passes_without_backward_change_nothing():
    model = tiny.trained()
    logits(model)
    before = states(model)
    model.train()
    logits(model)
    model(**tiny.batch())
    model.eval()
    model(**tiny.batch())
    assert same(before, states(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once_and_changes_nothing(reentrant):
    found = []
    for checkpointing in (False, True):
        model = tiny.slim(l1=0.5, margin=1.0, margin_inference=-1.0)
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        tiny.train(model, 5)
        model.eval()
        logits(model)
        found.append(states(model))
    assert same(*found)


def test_nan_stops_and_leaves_the_statistics():
    model = tiny.trained()
    logits(model)
    before = saved_statistics(states(model))
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.weight[5, 0] = float("nan")
    data = tiny.batch()
    data["input_ids"][0, 0] = 5
    optim = tiny.optimiser(model)
    model.train()(**data).loss.backward()
    with pytest.raises(DivergedError, match="NaN or infinite") as error:
        optim.step()
    assert "\n" not in str(error.value)
    assert same(before, saved_statistics(states(model)))


def test_commit_needs_a_slim_model():
    with pytest.raises(AttachError, match="no SLIM layers"):
        commit(tiny.llama())


def test_an_optimiser_that_hides_its_steps_gives_one_warning(monkeypatch):
    monkeypatch.setattr(steps_module, "PATIENCE", 3)
    model = tiny.slim().train()

    def passes(n):
        for _ in range(n):
            model(**tiny.batch()).loss.backward()

    passes(3)
    with pytest.warns(UserWarning, match="no optimiser step was noticed.*SlimCallback") as caught:
        passes(5)
    assert len(caught) == 1


@pytest.mark.parametrize("kind", [{}, {"fused": True}, {"foreach": True}])
def test_every_optimiser_of_torch_is_noticed(kind):
    model = tiny.slim().train()
    other = torch.optim.SGD(tiny.llama().parameters(), lr=0.1)
    optim = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **kind)
    model(**tiny.batch()).loss.backward()
    other.step()
    assert layers(model)[0].keeper.pending
    optim.step()
    assert int(layers(model)[0].slim_clusters["default"].n_steps) == 1
    optim.step()
    assert int(layers(model)[0].slim_clusters["default"].n_steps) == 1


def test_yielding_off_keeps_no_statistics_and_still_draws_masks():
    model = tiny.trained(yielding=False)
    logits(model)
    layer = layers(model)[0]
    assert not saved_statistics(states(model))
    assert int(layer.slim_mask["default"].n_steps) == 4


# --- every part can be switched off -------------------------------------------------------------

PARTS = [
    {"n_identity": 0},
    {"router": False},
    {"clustering": False},
    {"yielding": False},
    {"merging": False},
    {"l1": 0.0},
    {"distance": "max"},
    {"merge_inference": "mask"},
    {"merge_rescale": True},
    {"n_experts": 1, "n_identity": 0, "top_k": 1, "merging": False, "yielding": False},
]


@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_each_part_can_be_switched_off(changes, tmp_path):
    import peft

    model = tiny.slim(**changes)
    losses = tiny.train(model, 12)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_one_expert_with_all_else_off_is_plain_lora():
    model = tiny.trained(
        n_experts=1, n_identity=0, top_k=1, merging=False, yielding=False, l1=0.0, alpha=6.0
    )
    layer = layers(model)[0]
    x = torch.randn(2, 5, tiny.D_MODEL)
    a, b = layer.slim_in["default"].weight[:3], layer.slim_out["default"].weight
    expected = layer.base_layer(x) + 2.0 * F.linear(F.linear(x, a), b)
    assert torch.allclose(layer(x), expected, atol=1e-6)


# --- masks and penalty --------------------------------------------------------------------------


@pytest.mark.parametrize("inference", ["mask", "expectation"])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_layer_is_the_reference(inference, rescale):
    options = {"merge_inference": inference, "merge_rescale": rescale, "yielding": False}
    model = tiny.trained(alpha=6.0, merge_p=0.4, **options)
    layer = layers(model)[0]
    slim_in, b = layer.slim_in["default"].weight.detach(), layer.slim_out["default"].weight.detach()
    a, router, mask = slim_in[:12], slim_in[12:], layer.slim_mask["default"]
    x = torch.randn(6, tiny.D_MODEL)
    found = layer(x).detach() - layer.base_layer(x).detach()
    whole = inference == "expectation"
    rows = [True] * len(b) if whole else mask.rows.tolist()
    columns = [True] * a.shape[1] if whole else mask.columns.tolist()
    scale = 2.0 * (1 / 0.6 if rescale else 1.0) * (0.6 if whole else 1.0)
    for i in range(6):
        scores = slow.standardise((router @ x[i]).tolist())
        weights = slow.route(scores, 2)[:4]
        delta = slow.merged(a.tolist(), b.tolist(), rows, columns, weights, 3)
        assert torch.allclose(found[i], scale * torch.tensor(delta) @ x[i], atol=1e-5)


def test_masked_weights_get_no_gradient_in_that_step():
    model = tiny.slim(l1=0.0)
    tiny.train(model, 2)
    model.zero_grad()
    model(**tiny.batch()).loss.backward()
    layer = layers(model)[0]
    mask = layer.slim_mask["default"]
    grad_a, grad_b = (
        layer.slim_in["default"].weight.grad[:12],
        layer.slim_out["default"].weight.grad,
    )
    assert (grad_a[:, ~mask.columns] == 0).all() and (grad_b[~mask.rows] == 0).all()
    assert (grad_a[:, mask.columns] != 0).any() and (grad_b[mask.rows] != 0).any()


def test_masks_change_with_every_step_and_with_nothing_else():
    model = tiny.slim()
    mask = layers(model)[0].slim_mask["default"]
    seen = [mask.rows.clone()]
    optim = tiny.optimiser(model)
    for _ in range(3):
        tiny.train(model, 1, optim=optim)
        seen.append(mask.rows.clone())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model(**tiny.batch())
    assert torch.equal(torch.rand(3), expected)  # no global random state is read


def test_the_penalty_is_in_the_gradient_once_a_step():
    grads = []
    for l1 in (0.0, 0.7):
        model = tiny.slim(l1=l1, merging=False)
        for _ in range(3):
            model.train()(**tiny.batch()).loss.backward()
        layer = layers(model)[0]
        grads.append((layer.slim_in["default"].weight.grad, layer.slim_out["default"].weight.grad))
    a, b = layer.slim_in["default"].weight, layer.slim_out["default"].weight
    slope = 0.7 / (3 * tiny.D_MODEL)
    assert torch.allclose(grads[1][0][:12] - grads[0][0][:12], slope * a[:12].sign(), atol=1e-6)
    assert torch.allclose(grads[1][0][12:], grads[0][0][12:], atol=1e-7)  # the router has none
    assert torch.allclose(grads[1][1] - grads[0][1], 0.7 / (3 * tiny.D_MLP) * b.sign(), atol=1e-6)


# --- observing ----------------------------------------------------------------------------------


def test_observed_routing_of_supervised_tokens():
    model, data = tiny.trained(), tiny.batch()
    data["labels"][:, :-3] = -100
    chosen = int((data["labels"][:, 1:] != -100).sum())
    with observe(model) as every:
        model(**data)
    with observe(model, supervised=True) as seen:
        model(**data)
    assert {row["n_tokens"] for row in seen.rows()} == {chosen}
    assert seen.rows()[0]["weights"] != every.rows()[0]["weights"]
    del data["labels"]
    with observe(model, supervised=True) as unlabelled:
        model(**data)
    assert unlabelled.rows() == every.rows()


def test_labels_pass_a_model_that_the_head_skips():
    """OPT's head calls the decoder inside its model, and that alone."""
    sizes = {"vocab_size": tiny.N_WORDS, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 24}
    model, data = tiny.slim(OPTForCausalLM(OPTConfig(**sizes))), tiny.batch()
    data["labels"][:, :-3] = -100
    with observe(model, supervised=True) as seen:
        model(**data)
    chosen = int((data["labels"][:, 1:] != -100).sum())
    assert {row["n_tokens"] for row in seen.rows()} == {chosen}


def test_routing_by_layer_is_that_of_what_has_labels():
    model, data = tiny.trained().eval(), tiny.batch(padding=None)
    data["labels"][:, :-3] = -100
    rows = [
        {"input_ids": ids.tolist(), "labels": labels.tolist()}
        for ids, labels in zip(data["input_ids"], data["labels"])
    ]
    with torch.no_grad(), observe(model, supervised=True) as seen:
        model(**data)
    got = routing_rows(model, tiny_chat.tokenizer(), {"one": rows, "two": rows}, batch=2)
    expected = by_layer(seen.rows())
    for text in ("one", "two"):
        for row, wanted in zip((r for r in got if r["text"] == text), expected, strict=True):
            assert row == pytest.approx({"text": text, **wanted}, abs=1e-5)
    assert steps_module.keeper_of(model).labels is None


def test_observed_routing_leaves_padding_out():
    model = tiny.trained()
    data = tiny.batch()
    plain = logits(model, data)
    with observe(model) as seen:
        assert torch.equal(logits(model, data), plain)
        with pytest.raises(AttachError, match="already"), observe(model):
            pass
    rows = seen.rows()
    assert len(rows) == 9
    assert all(row["n_tokens"] == data["attention_mask"].sum() for row in rows)
    assert all(sum(row["weights"]) == pytest.approx(1, abs=1e-4) for row in rows)
    for row in rows:
        assert row["identity_share"] == pytest.approx(sum(row["weights"][4:]), abs=1e-4)


# --- Trainer ------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=24):
        self.data = tiny.batch(n=n, length=30, padding="right")

    def __len__(self):
        return len(self.data["input_ids"])

    def __getitem__(self, i):
        return {key: value[i] for key, value in self.data.items()}


def trainer(folder, model, callbacks=None, **changes):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = TrainingArguments(**{**options, **changes})
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)


@pytest.mark.parametrize("callback", [False, True])
def test_trainer_needs_nothing_else_and_resumes_bit_equal(tmp_path, callback):
    def extra():
        return [SlimCallback()] if callback else None

    whole = tiny.slim()
    trainer(tmp_path / "a", whole, extra()).train()
    expected = states(whole)
    assert all(int(v) == 6 for k, v in expected.items() if k.endswith("n_steps"))
    for step in (1, 2, 4):
        again = tiny.slim()
        torch.manual_seed(100 + step)
        checkpoint = str(tmp_path / "a" / f"checkpoint-{step}")
        trainer(tmp_path / f"b{step}", again, extra(), save_strategy="no").train(
            resume_from_checkpoint=checkpoint
        )
        assert same(states(again), expected)


def test_trainer_with_checkpointing_and_bf16(tmp_path):
    model = tiny.slim(tiny.llama(torch.bfloat16))
    options = {"activation_checkpointing": True, "bf16": True, "save_strategy": "no"}
    result = trainer(tmp_path, model, max_steps=3, **options).train()
    assert result.training_loss > 0
    assert all(v.dtype == torch.float32 for k, v in states(model).items() if "centre" in k)
    assert int(layers(model)[0].slim_clusters["default"].n_steps) == 3


def test_a_plain_loop_resumes_bit_equal(tmp_path):
    import peft

    whole = tiny.slim()
    tiny.train(whole, 3)
    optim = tiny.optimiser(whole)
    tiny.train(whole, 2, start=3, optim=optim)
    whole.save_pretrained(tmp_path)
    torch.save(optim.state_dict(), tmp_path / "optim.pt")
    tiny.train(whole, 2, start=5, optim=optim)
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    optim = tiny.optimiser(again)
    optim.load_state_dict(torch.load(tmp_path / "optim.pt"))
    tiny.train(again, 2, start=5, optim=optim)
    assert same(states(again), states(whole))


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
        logits(tiny.trained())


# --- what counts as training data ----------------------------------------------------------------


def labelled(n_ignored: int = 4, **kinds) -> dict:
    """A batch of which the first tokens of each row have no labels."""
    data = tiny.batch(**kinds)
    data["labels"][:, :n_ignored] = -100
    return data


def test_statistics_are_those_of_tokens_whose_next_token_has_a_label():
    model = tiny.slim(distance="rms").train()
    data = labelled()
    x = []
    hook = layers(model)[0].register_forward_pre_hook(lambda m, args: x.append(args[0]))
    model(**data).loss.backward()
    hook.remove()
    supervised = torch.zeros_like(data["labels"], dtype=torch.bool)
    supervised[:, :-1] = data["labels"][:, 1:] != -100
    assert n_counted(model) == supervised.sum() < data["attention_mask"].sum()
    commit(model)
    found = layers(model)[0].slim_clusters["default"].var[0]
    assert torch.allclose(found, x[0][supervised].var(0, correction=0), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("n_kept", [5, 9])
def test_labels_can_be_told(n_kept):
    counted = []
    for told in (False, True):
        model = tiny.slim().train()
        data = labelled(5)
        labels = data.pop("labels")
        if told:
            tell_labels(model, labels[:, -n_kept:])
            model(**data).logits.sum().backward()
        else:
            model(**data, labels=labels).loss.backward()
        counted.append(n_counted(model))
    n_before = int((labels[:, -n_kept] != -100).sum())  # its place is not in what was told
    assert counted[1] == counted[0] - (n_before if n_kept < 9 else 0) > 0


T5 = T5Config(vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, decoder_start_token_id=0)
BERT = BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
OTHERS = {
    "T5": (T5ForConditionalGeneration(T5), ["wi"]),
    "BERT": (BertForMaskedLM(BERT), ["intermediate.dense"]),
}


def test_padding_of_a_decoder_is_not_in_the_statistics():
    base = T5ForConditionalGeneration(T5)
    model = tiny.slim(base, target_modules=["wi"], distance="rms", task_type=None).train()
    data = tiny.batch()
    data["labels"][0, 5:] = -100  # fewer than the encoder has
    model(**data).loss.backward()
    places = [one.slim_key.split(".")[0] for one in layers(model)]
    assert places == ["encoder"] * 2 + ["decoder"] * 2
    assert n_counted(model, 0) == data["attention_mask"].sum()
    assert n_counted(model, 2) == n_counted(model, 3) == (data["labels"] != -100).sum()


@pytest.mark.parametrize("masked", [True, False])
def test_labels_reach_layers_whose_input_is_flat(masked):
    config = Qwen2MoeConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    targets = ["shared_expert.gate_proj"]
    model = tiny.slim(Qwen2MoeForCausalLM(config), target_modules=targets).train()
    data = labelled()
    if not masked:
        data = {**tiny.batch(padding=None), "attention_mask": None}
        data["labels"][:, :6] = -100
    model(**data).loss.backward()
    assert n_counted(model) == (data["labels"][:, 1:] != -100).sum() > 0


@pytest.mark.parametrize("name", OTHERS)
def test_labels_that_are_not_of_next_tokens_leave_all_tokens_but_padding(name):
    base, targets = OTHERS[name]
    model = tiny.slim(base, target_modules=targets, distance="rms", task_type=None).train()
    data = labelled()
    model(**data).loss.backward()
    assert n_counted(model) == data["attention_mask"].sum()  # of the encoder


@pytest.mark.parametrize(
    "labels", [None, torch.zeros(3, 9), torch.zeros(4, 11), torch.zeros(36)], ids=str
)
def test_labels_that_do_not_fit_leave_all_tokens_but_padding(labels):
    model = tiny.slim().train()
    data = tiny.batch()
    del data["labels"]
    tell_labels(model, labels)
    with pytest.warns(UserWarning, match="all tokens but padding count"):
        model(**data).logits.sum().backward()
    assert n_counted(model) == data["attention_mask"].sum()


def test_a_batch_without_labels_moves_no_statistics():
    model = tiny.slim().train()
    tiny.train(model, 3)
    before = saved_statistics(states(model))
    data = labelled(99)
    (model(**data).logits.sum() * 0).backward()
    assert commit(model)
    after = {k: v for k, v in saved_statistics(states(model)).items() if not k.endswith("n_steps")}
    assert same(after, {k: before[k] for k in after})


def test_whitened_distances_soon_have_the_scale_of_training_data():
    draw = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 97).float() ** -0.75
    turn = torch.linalg.qr(torch.randn(96, 96, generator=draw))[0]

    def tokens(n):
        return torch.randn(n, 96, generator=draw) * spectrum @ turn

    statistics = make_statistics(tiny.config(n_directions=32, margin=0.0), 96, "k")
    for _ in range(10):
        _, moments = statistics.distance(tokens(200), lambda: None, gather=True, training=True)
        statistics.add(moments.flat())
        statistics.commit(statistics.take())
    found, _ = statistics.distance(tokens(2000), lambda: None, gather=False, training=False)
    assert 0.8 < found.std() < 1.2 and abs(found.mean()) < 0.5


def test_fewer_tokens_are_let_in_at_inference():
    found = []
    for changes in ({"margin": 2.0}, {"margin": 2.0, "margin_inference": 0.5}):
        model = tiny.trained(**changes)
        with observe(model) as seen:
            logits(model)
        found.append((seen.mean("distance"), states(model)))
    (wide, trained), (narrow, same) = found
    assert narrow == pytest.approx(wide + 1.5, abs=0.05)  # later layers read other inputs
    assert all(torch.equal(value, same[key]) for key, value in trained.items())
