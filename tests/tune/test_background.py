"""Distances relative to the base model's own text, and that text."""

from __future__ import annotations

import pytest
import torch

from budwood.errors import AttachError, InputError, UnsupportedModelError
from budwood.tune import SlimLinear, fit_background, observe
from budwood.tune.clustering import channel_scale
from budwood.tune.encoding import IGNORED, prompt_tokens, tokens_before_request
from budwood.tune.own_text import own_text, replies
from budwood.tune.whitening import project, random_directions
from tests import tiny_chat
from tests import tiny_llm as tiny
from tests.reference import slim_reference as slow

TOKENS = tiny_chat.tokenizer()


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


def rows_of(n=6, length=12, n_prompt=3, seed=0):
    """Rows whose first tokens do not count; their lengths differ."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        ids = torch.randint(3, tiny.N_WORDS, (length + i,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": [IGNORED] * n_prompt + ids[n_prompt:]})
    return found


def counted(model, rows, index=0):
    """What a layer reads at the tokens that count: those whose next one is labelled."""
    seen = []
    hook = layers(model)[index].register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    hook.remove()
    at = [[x != IGNORED for x in row["labels"][1:]] + [False] for row in rows]
    return torch.cat([x[torch.tensor(keep)] for x, keep in zip(seen, at)])


def fitted(rows=None, batch=4, **changes):
    model = tiny.slim(**{"n_directions": 5, **changes}).train()
    fit_background(model, TOKENS, rows or rows_of(), batch=batch)
    return model


# --- fitting --------------------------------------------------------------------------------------


def test_what_is_remembered_is_mean_and_covariance_of_the_tokens_that_count():
    rows = rows_of()
    model = fitted(rows)
    for index, layer in enumerate(layers(model)):
        if "default" not in layer.slim_clusters:
            continue
        clusters = layer.slim_clusters["default"]
        x = counted(model, rows, index)
        scale = channel_scale(x.var(0, correction=0))
        signs = random_directions(x.shape[1], 5, seed=0, key=layer.slim_key)
        z = ((x - x.mean(0)) * scale) @ signs
        assert int(clusters.n_background) == len(x) == sum(9 + i for i in range(6))
        assert torch.allclose(clusters.background_mean, z.mean(0), atol=1e-4)
        assert torch.allclose(clusters.background_covariance, z.T.cov(correction=0), atol=1e-4)


def test_fitting_changes_nothing_else():
    model = tiny.slim(n_directions=5).train()
    before = tiny.states(model)
    random_before = torch.get_rng_state()
    assert fit_background(model, TOKENS, rows_of()) == 69
    after = tiny.states(model)
    changed = {key.rsplit(".", 1)[-1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {
        *("mean", "scale", "n_background", "background_mean", "background_covariance")
    }
    assert model.training and torch.equal(torch.get_rng_state(), random_before)
    keeper = layers(model)[0].keeper
    assert keeper.survey is None and keeper.labels is None and not keeper.pending
    assert torch.equal(tiny.logits(model.eval()), tiny.logits(tiny.llama()))


def test_rows_at_a_time_do_not_matter():
    one, other = tiny.states(fitted(batch=1)), tiny.states(fitted(batch=6))
    for key, value in one.items():
        assert torch.allclose(value.float(), other[key].float(), rtol=1e-4, atol=1e-5), key


def test_what_counts_does_not_depend_on_what_counts_as_training_data():
    one, other = tiny.states(fitted()), tiny.states(fitted(fit_on="all"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_label_that_nothing_predicts_does_not_count():
    rows = rows_of()
    rows[0]["labels"] = list(rows[0]["input_ids"])  # the first has none before it
    model = tiny.slim(n_directions=5)
    n = fit_background(model, TOKENS, rows)
    assert n == 69 - 9 + 11 == int(layers(model)[0].slim_clusters["default"].n_background)


def test_a_trained_adapter_beside_a_fresh_one_stays_as_it_was():
    model = tiny.trained(n_directions=5)
    before = tiny.states(model)
    model.add_adapter("fresh", tiny.config(n_directions=5))
    model.base_model.set_adapter(["default", "fresh"])
    for layer in layers(model):
        for weights in (layer.slim_in, layer.slim_out):
            weights["default"].requires_grad_(False)
    fit_background(model, TOKENS, rows_of())
    after = tiny.states(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert layers(model)[0].slim_clusters["fresh"].has_background


def test_layers_that_see_their_tokens_in_one_row():
    """OPT's MLPs read (batch · length, d_in)."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.N_WORDS, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 24}
    base = OPTForCausalLM(OPTConfig(**sizes, do_layer_norm_before=True)).eval()
    model = tiny.slim(base, n_directions=5)
    assert fit_background(model, TOKENS, rows_of(), batch=4) == 69
    for layer in layers(model):
        for clusters in layer.slim_clusters.values():
            assert int(clusters.n_background) == 69


def test_the_distance_is_the_reference():
    model = fitted()
    tiny.train(model, 6)
    model.eval()
    layer = layers(model)[0]
    clusters = layer.slim_clusters["default"]
    x = counted(model, rows_of(3, seed=9))
    x[-3:] *= 50  # far from everything
    raw, _ = clusters._measure(x, False, None)
    signs = random_directions(x.shape[1], 5, seed=0, key=layer.slim_key)
    z = (((x - clusters.mean) * clusters.scale) @ signs).tolist()
    centres = clusters.centre.tolist()
    expected = [
        slow.relative_distance(
            row,
            centres[slow.nearest(row, centres)],
            clusters.covariance.tolist(),
            clusters.background_mean.tolist(),
            clusters.background_covariance.tolist(),
        )
        for row in z
    ]
    assert torch.allclose(raw, torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert raw[-3:].min() > raw[:-3].max()


def test_channels_keep_their_scales_and_centres_start_at_the_training_data():
    model = fitted(n_clusters=1)
    clusters = layers(model)[0].slim_clusters["default"]
    scale, mean = clusters.scale.clone(), clusters.mean.clone()
    data = tiny.batch(padding=None)
    rows = [{"input_ids": one, "labels": one} for one in data["input_ids"].tolist()]
    z = project(counted(model, rows), *clusters._projection()).mean(0)
    tiny.train(model, 1, lr=0.0, padding=None)
    assert torch.equal(clusters.scale, scale) and torch.equal(clusters.mean, mean)
    assert torch.allclose(clusters.centre[0], z, atol=1e-4) and clusters.steps == 1


def test_text_of_the_background_is_left_alone_more():
    """Training data and background differ in their words; where they meet the rest is the same."""
    rows = rows_of(24, n_prompt=1, seed=5)
    shares = []
    for background in (None, rows):
        model = tiny.slim(n_directions=8, n_clusters=1).train()
        if background:
            fit_background(model, TOKENS, background)
        optim = tiny.optimiser(model, 1e-3)
        data = tiny.batch(8, padding=None)
        data = {**data, "input_ids": data["input_ids"] % 12 + 3, "labels": data["labels"] % 12 + 3}
        for _ in range(30):
            optim.zero_grad()
            model(**data).loss.backward()
            optim.step()
        model.eval()
        with torch.no_grad(), observe(model) as near:
            model(input_ids=data["input_ids"])
        with torch.no_grad(), observe(model) as far:
            for row in rows:
                model(input_ids=torch.tensor([row["input_ids"]]))
        shares.append(far.mean("identity_share") - near.mean("identity_share"))
    assert shares[1] > shares[0] + 0.05


def test_a_background_is_saved_with_the_adapter(tmp_path):
    import peft

    model = fitted()
    tiny.train(model, 4)
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    one, other = tiny.states(model), tiny.states(loaded)
    assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
    assert torch.equal(tiny.logits(model), tiny.logits(loaded))


@pytest.mark.parametrize(
    ("model", "rows", "error", "words"),
    [
        (tiny.llama, rows_of(), AttachError, "no SLIM layers"),
        (lambda: tiny.slim(distance="rms"), rows_of(), InputError, 'distance="whitened"'),
        (lambda: tiny.slim(yielding=False), rows_of(), InputError, 'distance="whitened"'),
        (lambda: tiny.trained(3, n_directions=5), rows_of(), InputError, "trained for 3 steps"),
        (lambda: tiny.slim(n_directions=24), rows_of(), InputError, "69 tokens .* needs 120"),
        (
            lambda: tiny.slim(n_directions=5),
            [*rows_of(), {"input_ids": [3, 4], "labels": [IGNORED] * 2}],
            InputError,
            "row 6 of the background",
        ),
    ],
    ids=["plain", "rms", "no yielding", "trained", "short", "empty row"],
)
def test_refused(model, rows, error, words):
    with pytest.raises(error, match=words):
        fit_background(model(), TOKENS, rows)


def test_text_that_gives_no_numbers_is_refused():
    model = tiny.slim(n_directions=5)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[7] = float("nan")
    rows = rows_of()
    rows[5]["input_ids"][4] = 7
    with pytest.raises(InputError, match=r"layers\.0\..*NaN"):
        fit_background(model, TOKENS, rows)
    assert not layers(model)[0].slim_clusters["default"].has_background


# --- the model's own text -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.model()


def test_own_text_is_requests_and_replies(chat):
    chat.train()
    state = torch.get_rng_state()
    found = own_text(chat, TOKENS, 5, batch=2)
    assert chat.training and torch.equal(torch.get_rng_state(), state)
    assert found == own_text(chat, TOKENS, 5, batch=2) != own_text(chat, TOKENS, 5, batch=2, seed=1)
    before = tokens_before_request(TOKENS)
    assert TOKENS.decode(before) == "<|im_start|>user\n"
    for row in found:
        n_asked = row["labels"].count(IGNORED)
        assert row["labels"] == [IGNORED] * n_asked + row["input_ids"][n_asked:]
        assert row["input_ids"][: len(before)] == before
        asked = TOKENS.decode(row["input_ids"][:n_asked])
        assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n") and n_asked > len(before) + 10
    chat.eval()


def test_own_text_is_what_a_background_is_made_of_when_none_is_given(chat, monkeypatch):
    monkeypatch.setattr("budwood.tune.background.N_TEXTS", 6)
    given, own = (tiny.slim(tiny_chat.model(), n_directions=5) for _ in range(2))
    fit_background(given, TOKENS, own_text(chat, TOKENS, 6, seed=3))
    fit_background(own, TOKENS, seed=3)
    one, other = tiny.states(given), tiny.states(own)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_replies_end_where_the_turn_ends(chat, monkeypatch):
    end = TOKENS.eos_token_id
    asked = prompt_tokens(TOKENS, "Why?")
    said = torch.tensor([[5, 6, end, end]])
    monkeypatch.setattr(
        chat, "generate", lambda input_ids, **options: torch.cat([input_ids, said], 1)
    )
    rows = replies(chat, TOKENS, ["Why?"])
    assert rows == [
        {"input_ids": [*asked, 5, 6, end], "labels": [IGNORED] * len(asked) + [5, 6, end]}
    ]


@pytest.mark.parametrize(("said", "kept"), [([5, 9, 6], [5, 9]), ([5, 0, 0], [5]), ([0, 0], [0])])
def test_replies_end_at_other_ends_and_before_padding(chat, monkeypatch, said, kept):
    monkeypatch.setattr(chat.generation_config, "eos_token_id", [TOKENS.eos_token_id, 9])
    said = torch.tensor([said])
    monkeypatch.setattr(
        chat, "generate", lambda input_ids, **options: torch.cat([input_ids, said], 1)
    )
    assert replies(chat, TOKENS, ["Why?"])[0]["input_ids"][-len(kept) :] == kept
    assert sum(x != IGNORED for x in replies(chat, TOKENS, ["Why?"])[0]["labels"]) == len(kept)


def test_modes_are_as_they_were_after_an_interruption(chat, monkeypatch):
    def stops(**options):
        assert not chat.training
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "generate", stops)
    chat.train().model.layers[0].eval()
    with pytest.raises(KeyboardInterrupt):
        replies(chat, TOKENS, ["Why?"])
    assert chat.training and not chat.model.layers[0].training
    chat.eval()


def test_a_model_that_asks_nothing_is_refused(chat, monkeypatch):
    end = torch.tensor([[TOKENS.eos_token_id]])
    monkeypatch.setattr(
        chat,
        "generate",
        lambda input_ids, **options: torch.cat([input_ids, end.expand(len(input_ids), 1)], 1),
    )
    with pytest.raises(InputError, match="no requests"):
        own_text(chat, TOKENS, 3)


def test_a_template_without_a_place_for_requests_is_refused():
    silent = tiny_chat.tokenizer()
    silent.chat_template = "{% for message in messages %}nothing{% endfor %}"
    with pytest.raises(UnsupportedModelError, match="where a user's turn begins"):
        tokens_before_request(silent)
