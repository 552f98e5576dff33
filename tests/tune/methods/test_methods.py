"""Tuning methods by name: their options, and what they ask of training."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, Phi3Config, Phi3ForCausalLM

from budwood.bench.tune.plan import fit_rank
from budwood.errors import InputError, UnknownNameError, UnsupportedModelError
from budwood.tune import SlimConfig
from budwood.tune.methods import attach, parse_tuner
from budwood.tune.methods.base import n_trainable
from budwood.tune.methods.slim import FEWER_TEXTS
from budwood.tune.slim.architectures import with_attention
from budwood.tune.slim.fitting import N_TEXTS
from budwood.tune.training.strength import rewound
from tests import tiny_chat


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("lora", {"weight_decay": 0.0, "kl": 0.0}),
        ("lora-wd:weight_decay=3", {"weight_decay": 3}),
        ("lora-kl:kl=0.5+alpha=1", {"kl": 0.5, "alpha": 1}),
        ("slim:distance=max+beta=2", {"extra": {"distance": "max", "beta": 2}}),
    ],
)
def test_parse_tuner(text, fields):
    tuner = parse_tuner(text)
    assert {name: getattr(tuner, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("text", "n"),
    [
        *(("slim", N_TEXTS), ("slim:texts=3", 3), ("slim:texts=0", 0)),
        *(
            ("slim-no-yielding", 0),
            ("slim-whitened", 0),
            ("slim-rms", 0),
            ("slim-paper", 0),
            ("moe", 0),
        ),
        *(("lora", 0), ("lora-kl", 0), ("lora-own", N_TEXTS), ("lora-own:texts=3", 3)),
    ],
)
def test_only_methods_that_take_it_have_text_written(text, n):
    assert parse_tuner(text).n_texts == n


@pytest.mark.parametrize(
    ("n_learnt", "n", "distance"),
    [
        (31, 0, "whitened"),
        (32, FEWER_TEXTS, "discriminant"),
        (1279, FEWER_TEXTS, "discriminant"),
        (1280, N_TEXTS, "discriminant"),
    ],
)
def test_slim_follows_the_amount_of_data(n_learnt, n, distance):
    found = parse_tuner("slim").fitted_to(n_learnt)
    assert found.n_texts == n and found.config(1, None, 0).distance == distance
    assert parse_tuner("slim:texts=8").fitted_to(n_learnt).n_texts == 8
    assert parse_tuner("slim:texts=0").fitted_to(n_learnt).config(1, None, 0).distance == "whitened"
    asked = parse_tuner("slim:distance=discriminant").fitted_to(n_learnt)
    assert (
        asked.n_texts == (n or FEWER_TEXTS) and asked.config(1, None, 0).distance == "discriminant"
    )


def test_few_examples_of_a_model_that_cannot_write_take_the_whitened_distance():
    writes, plain, cannot = (tiny_chat.tokenizer() for _ in range(3))
    plain.chat_template = None
    cannot.chat_template = "{% for message in messages %}nothing{% endfor %}"
    few = parse_tuner("slim").fitted_to(100)
    assert few.suited_to(writes) == few.suited_to(plain) == few
    with pytest.warns(UserWarning, match="whitened distance, .* since the chat template does not"):
        found = few.suited_to(cannot)
    assert found.n_texts == 0 and found.config(1, None, 0).distance == "whitened"
    for text in ("slim:texts=8", "slim:distance=discriminant", "slim-whitened", "lora"):
        tuner = parse_tuner(text).fitted_to(100)
        assert tuner.suited_to(cannot) == tuner


@pytest.mark.parametrize(
    ("text", "margin"),
    [("slim", 1.0), ("slim:texts=0", 1.5), ("slim:margin=0", 0), ("slim-rms", 1.5)],
)
def test_the_margin_goes_with_the_distance(text, margin):
    config = parse_tuner(text).config(1, None, 0)
    assert config.margin_of(training=False) == config.margin_of(training=True) == margin


@pytest.mark.parametrize("n_tokens", [40, 1279, 1280, 10**6])
def test_slim_is_the_recommended_config(n_tokens):
    """The method that the command, ``finetune`` and the benchmark's ``slim`` row train."""
    config = parse_tuner("slim").fitted_to(n_tokens).config(4, None, 0)
    assert config == SlimConfig.recommended(n_tokens, r=4, seed=0)


def test_the_plain_reading_has_nothing_of_ours():
    plain = parse_tuner("slim-paper")
    config = plain.config(1, None, 0)
    assert (config.distance, config.fit_on, config.yield_at) == ("max", "all", "module")
    assert config.margin_of(training=True) == config.margin_of(training=False) == 0
    assert config.skip_first == 0 and plain.n_texts == 0
    assert all(parse_tuner(name).strength == 1 for name in ("slim", "slim-paper", "moe", "lora"))
    assert parse_tuner("slim:strength=0.4").training(())["strength"] == 0.4
    assert plain.fitted_to(100).config(1, None, 0).merging


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora-wd:weight_decay=3", {"weight_decay": 3, "kl": 0, "texts": (), "strength": 1}),
        ("lora-kl", {"weight_decay": 0, "kl": 1, "texts": (), "strength": 1}),
        (
            "lora-mask",
            {"weight_decay": 0, "kl": 1, "texts": (), "strength": 1, "kl_on_others": True},
        ),
        ("lora-own:kl=2", {"weight_decay": 0, "kl": 2, "texts": ["text"], "strength": 1}),
        ("slim", {"weight_decay": 0, "kl": 0, "texts": (), "strength": 1}),
    ],
)
def test_what_training_gets(text, expected):
    assert parse_tuner(text).training(["text"]) == expected


def test_parse_tuner_refuses():
    with pytest.raises(UnknownNameError, match="did you mean 'dora'"):
        parse_tuner("dara")
    for wrong in ("lora:alpha", "lora:=3"):
        with pytest.raises(InputError, match="is not an option; write key=value"):
            parse_tuner(wrong)


@pytest.mark.parametrize("method", ["lora", "lora-kl", "dora", "slim", "slim-paper"])
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        *((f"strength={wrong}", "above 0 and up to 1") for wrong in ("0", "1.1", "nan", "half")),
        *((f"kl={wrong}", "give a number of at least 0") for wrong in ("-1", "x", "inf", "true")),
        ("weight_decay=none", "weight_decay=None; give a number of at least 0"),
        ("r=4", "r=4 is not an option of a method; give --rank"),
        ("seed=1", "seed=1 is not an option of a method; give --seed"),
        ("alpha=x", "alpha='x'; (give a number|it takes)"),
        ("rank_pattern=3", "rank_pattern"),
        ("layers_to_transform=x", r"layers_to_transform='x'; it takes .*int"),
        ("use_rslora=1", "use_rslora=1; "),
        ("task_type=SEQ_CLS", "task_type is set by budwood; leave it out"),
        ("inference_mode=true", "inference_mode is set by budwood"),
        ("rank=8", "rank=8 is not an option of a method; give --rank"),
        ("lr=0.1", "lr=0.1 is not an option of a method; give --lr"),
        (
            "foo=1",
            "(LoRA|SLIM) has no option 'foo'; known: weight_decay, .*target_modules",
        ),
        ("strenght=1", "did you mean 'strength'"),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(method, option, reason):
    with pytest.raises(InputError, match=reason):
        parse_tuner(f"{method}:{option}")


CHANGING = ("pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "3")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((f"slim:texts={wrong}", "at least 0") for wrong in ("1.5", "-1", "true")),
        *((f"lora-own:texts={wrong}", "at least 1") for wrong in ("0", "2.5", "true")),
        ("slim:texts=0+distance=discriminant", "texts=0 and distance='discriminant', which needs"),
        ("slim-max:texts=8", "texts=8 and distance='max', which takes no self"),
        ("slim:texts=8+distance=whitened", "leave texts out, or take distance=discriminant"),
        ("lora:alpha=0", "alpha=0; give a number above 0"),
        ("lora:dropout=1", r"dropout=1; give a fraction in \[0, 1\)"),
        ("lora:strength=none", "strength=None; give a number above 0"),
        ("lora:lora_alpha=8", "lora_alpha=8 is not an option of a method; give alpha \\(for LoRA"),
        ("oft:oft_block_size=4", "give --rank"),
        ("osf:effective_rank=4", "give --rank"),
        ("oft:eps=true", "eps=True; it takes float"),
        *((f"lora:init_lora_weights={name}", "change the base model") for name in CHANGING),
        ("lora-late:skip_first=half", r"skip_first='half'; give a fraction in \[0, 1\)"),
    ],
)
def test_options_of_one_method_are_refused(text, reason):
    with pytest.raises(InputError, match=reason):
        parse_tuner(text)


def test_options_of_peft_replace_what_a_method_gives():
    config = parse_tuner("lora:target_modules=up+use_rslora=true").config(3, tiny_chat.model(), 0)
    assert (config.r, config.target_modules, config.use_rslora) == (3, "up", True)
    assert parse_tuner("slim-no-yielding:texts=0+distance=discriminant").n_texts == 0


@pytest.mark.parametrize(("alpha", "rank", "expected"), [(0.3, 1, 0.3), (0.5, 4, 2), (2, 8, 16)])
def test_alpha_is_that_of_lora_times_the_rank(alpha, rank, expected):
    config = parse_tuner(f"lora:alpha={alpha}").config(rank, tiny_chat.model(), 0)
    assert config.lora_alpha == expected and isinstance(config.lora_alpha, type(expected))


def test_fit_rank():
    assert fit_rank(lambda rank: 100 * rank, 720) == 7
    assert fit_rank(lambda rank: 50 + 100 * rank, 1040) == 10
    with pytest.raises(InputError, match="no rank gives"):
        fit_rank(lambda rank: 100 * rank, 150)


def test_adapters_leave_the_base_as_it_was():
    model = tiny_chat.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in ("lora", "dora", "lora-attn", "oft:use_cayley_neumann=false", "osf", "corda"):
        adapted = attach(parse_tuner(name), model, 4, seed=0)
        assert n_trainable(adapted) > 0
        adapted.unload()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_lora_on_attention_as_well_whatever_its_projections_are_called():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16))
    phi = Phi3ForCausalLM(Phi3Config(**sizes, intermediate_size=32, pad_token_id=0))
    expected = {
        opt: "fc1 fc2 k_proj out_proj q_proj v_proj",
        phi: "down_proj gate_up_proj o_proj qkv_proj",
    }
    for model, names in expected.items():
        adapted = attach(parse_tuner("lora-attn"), model, 2, seed=0)
        found = {name.split(".")[-3] for name, _ in adapted.named_modules() if ".lora_A." in name}
        assert " ".join(sorted(found)) == names
    with pytest.raises(UnsupportedModelError, match="no attention"):
        with_attention(r".*\.fc1", ["layers.0.fc1", "tower.0.self_attn.q_proj"])


@pytest.mark.parametrize(("n_learnt", "expected"), [(0, 8), (160, 16), (1_000_000, 128)])
def test_directions_follow_the_amount_of_data(n_learnt, expected):
    assert parse_tuner("slim").fitted_to(n_learnt).config(2, None, 0).n_directions == expected
    given = parse_tuner("slim-paper:n_directions=5").fitted_to(n_learnt)
    assert given.config(2, None, 0).n_directions == 5
    assert parse_tuner("lora").fitted_to(n_learnt) == parse_tuner("lora")


PEERS = ("lora-mask", "lora-r10", "oft", "osf", "corda")


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_starts_at_the_base_model_and_learns(name):
    model, tuner = tiny_chat.model(), parse_tuner(name)
    tokens = torch.arange(3, 15)[None]
    texts = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens.repeat(4, 1)]
    base = model(tokens).logits.detach()
    adapted = attach(tuner, model, 4, seed=0)
    tuner.prepare(adapted, tiny_chat.tokenizer(), texts, texts)
    assert torch.allclose(adapted(tokens).logits, base, atol=1e-4)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(8):
        loss = adapted(tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    with adapted.disable_adapter():
        assert torch.equal(adapted(tokens).logits, base)


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "osf", "corda", "slim-whitened"])
def test_rewinding_goes_back_to_the_base_model_for_a_while(name):
    model, tuner = tiny_chat.model(), parse_tuner(name)
    tokens = torch.arange(3, 15)[None]
    texts = [{"input_ids": tokens[0].tolist(), "labels": tokens[0].tolist()}]
    base = model(tokens).logits.detach()
    adapted = attach(tuner, model, 4, seed=0)
    named = dict(adapted.named_parameters())
    start = {key: p.detach().clone() for key, p in named.items() if p.requires_grad}
    tuner.prepare(adapted, tiny_chat.tokenizer(), texts, texts if tuner.n_texts else ())
    trained = {key: named[key] for key in start}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(4):
        adapted(tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.eval()
    end = {key: p.detach().clone() for key, p in trained.items()}
    gaps = []
    for strength in (0.999999, 0.5, 1e-6):
        with rewound(adapted, strength, start), torch.no_grad():
            gaps.append(float((adapted(tokens).logits - base).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3 < gaps[0]
    assert all(torch.equal(end[key], p) for key, p in trained.items())


def test_corda_trains_half_of_its_adapter_and_starts_with_something():
    model, tuner = tiny_chat.model(), parse_tuner("corda")
    texts = [{"input_ids": list(range(3, 15)), "labels": list(range(3, 15))}]
    adapted = attach(tuner, model, 4, seed=0)
    tuner.prepare(adapted, tiny_chat.tokenizer(), texts, texts)
    weights = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(bool(p.any()) for p in weights.values())
    before = {name: p.detach().clone() for name, p in weights.items()}
    tokens = torch.arange(3, 15)[None]
    adapted(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(weights.values(), lr=1.0).step()
    for name, weight in weights.items():
        axis = 0 if ".lora_A." in name else 1
        first, second = ((weight - before[name]) != 0).chunk(2, axis)
        assert bool(first.any()) and not bool(second.any())
    assert tuner.n_trained(adapted) == sum(p.numel() for p in weights.values()) // 2


def test_the_size_of_a_block_is_the_nearest_that_divides_all_inputs():
    assert fit_rank(lambda rank: 10 * (rank - 1), 620, [2, 4, 32, 64]) == 64
    sizes = parse_tuner("oft").ranks(tiny_chat.model())
    assert sizes and all(
        layer.weight.shape[1] % size == 0
        for size in sizes
        for layer in (tiny_chat.model().model.layers[0].mlp.down_proj,)
    )
    assert parse_tuner("lora-r10").own_rank == 10


def test_methods_without_a_strength_refuse_one():
    for name in ("oft", "osf", "corda"):
        with pytest.raises(InputError, match="strength=0.5"):
            parse_tuner(f"{name}:strength=0.5")
