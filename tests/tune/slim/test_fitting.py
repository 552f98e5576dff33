"""The direction from training data to text that must not change, and that text."""

from __future__ import annotations

import pytest
import torch

from budwood.errors import AttachError, InputError, UnsupportedModelError
from budwood.tune import SlimLinear, fit_discriminant, observe
from budwood.tune.data.encoding import IGNORED, encode, n_supervised, told_labels
from budwood.tune.data.examples import example_of
from budwood.tune.data.self_generated import in_forms_of, replies, self_generate
from budwood.tune.data.template import prompt_tokens, tokens_before_request
from budwood.tune.methods import attach, parse_tuner
from budwood.tune.slim.architectures import layer_number
from budwood.tune.slim.distance import discriminant, gap_to_other
from budwood.tune.slim.fitting import Survey, _reading_content, most_tokens
from tests import tiny_chat
from tests import tiny_llm as tiny

TOKENS = tiny_chat.tokenizer()


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


def owned(model, name="default"):
    """Layers with statistics of their own, and these."""
    return [(x, x.slim_clusters[name]) for x in layers(model) if name in x.slim_clusters]


def rows_of(n=6, length=12, n_prompt=3, seed=0, words=(3, tiny.N_WORDS)):
    """Rows whose first tokens do not count; their lengths differ."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        ids = torch.randint(*words, (length + i,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": [IGNORED] * n_prompt + ids[n_prompt:]})
    return found


def read(model, rows, layer, every=False):
    """What a layer reads at the tokens that count: those whose next one is labelled, or all."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    hook.remove()
    at = [[every or x != IGNORED for x in row["labels"][1:]] + [every] for row in rows]
    return torch.cat([x[torch.tensor(keep)] for x, keep in zip(seen, at)])


def fresh(base=None, **changes):
    return tiny.slim(base, **{"distance": "discriminant", **changes}).train()


def fitted(rows=None, other=None, batch=4, **changes):
    model = fresh(**changes)
    fit_discriminant(model, TOKENS, rows or rows_of(), other or rows_of(seed=1), batch=batch)
    return model


def keep_at_most(monkeypatch, n_tokens, n_examples):
    monkeypatch.setattr("budwood.tune.slim.fitting.N_EXAMPLES", n_examples)
    monkeypatch.setattr("budwood.tune.slim.fitting.MOST_TOKENS", n_tokens)
    monkeypatch.setattr("budwood.tune.slim.fitting.MOST_VALUES", 1)


def after(steps):
    model = fitted()
    tiny.train(model, steps)
    return model


# --- fitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_on", ["supervised", "all"])
def test_the_direction_is_that_of_the_tokens_that_count(fit_on):
    rows, other = rows_of(), rows_of(4, seed=1)
    model = fitted(rows, other, fit_on=fit_on)
    for layer, statistics in owned(model):
        own, rest = (read(model, text, layer, fit_on == "all") for text in (rows, other))
        direction, offset = discriminant(own, rest)
        assert int(statistics.n_fitted) == len(own) + len(rest)
        assert torch.allclose(statistics.direction, direction, rtol=1e-3, atol=1e-4)
        assert torch.allclose(statistics.offset, offset, rtol=1e-3, atol=1e-3)


def test_what_the_user_wrote_counts_as_well():
    def chats(words):
        rows = [{"question": f"Is {word} wet?", "answer": f"{word}, yes indeed"} for word in words]
        return encode([example_of(row) for row in rows], TOKENS, 200).rows

    rows, other = chats(["ice", "fog", "dew", "rain"]), chats(["fire", "sand", "dust"])
    bare = [
        [{key: row[key] for key in ("input_ids", "labels")} for row in text]
        for text in (rows, other)
    ]
    config = {"distance": "discriminant", "boundary": "fixed", "fit_on": "content"}
    model, same = (tiny.slim(tiny_chat.model(), **config).train() for _ in range(2))
    fit_discriminant(model, TOKENS, rows, bare[1])
    fit_discriminant(same, TOKENS, *bare)
    for (_, one), (_, two) in zip(owned(model), owned(same)):
        assert torch.equal(one.direction, two.direction)
    told = [[{**row, "labels": told_labels(row)} for row in text] for text in (rows, other)]
    assert sum(map(n_supervised, told)) > n_supervised(rows + other) + 60
    for layer, statistics in owned(model):
        own, rest = (read(model, text, layer) for text in told)
        assert int(statistics.n_fitted) == len(own) + len(rest)
        direction, _ = discriminant(own, rest)
        assert torch.allclose(statistics.direction, direction, rtol=1e-3, atol=1e-4)


def test_the_layers_that_read_content_are_counted_over_the_model():
    """Seven tenths of ten layers, however few of them are adapted."""
    base = tiny.llama(num_hidden_layers=10)
    options = {"distance": "discriminant", "boundary": "fixed", "fit_on": "content"}
    model = tiny.slim(base, layers_to_transform=[0, 5, 6, 7], **options)
    layers = [statistics for _, statistics in owned(model)]
    reading = {layer_number(one.key) for one in _reading_content(model, layers)}
    assert reading == {0, 5, 6}


def test_reading_is_reported():
    seen = []
    rows = rows_of(10)
    fit_discriminant(
        fresh(),
        TOKENS,
        rows,
        rows_of(5, seed=1),
        batch=4,
        progress=lambda *call: seen.append(call[:2]),
    )
    assert [done for done, _ in seen] == [4, 8, 10, 14, 15]
    assert {total for _, total in seen} == {15}


def test_the_first_token_is_no_training_data():
    rows, other = rows_of(n_prompt=0), rows_of(4, n_prompt=0, seed=1)
    for row in rows:
        row["asked"] = [1, 1] + [0] * (len(row["labels"]) - 2)
    config = {"boundary": "fixed", "fit_on": "content"}
    later = [{**row, "labels": [IGNORED] * 2 + row["labels"][2:]} for row in rows]
    for changes in ({}, config):
        for layer, statistics in owned(fitted(rows, other, **changes)):
            model = fresh()
            (layer,) = (one for one, same in owned(model) if same.key == statistics.key)
            direction, _ = discriminant(read(model, later, layer), read(model, other, layer))
            assert torch.allclose(statistics.direction, direction, rtol=1e-3, atol=1e-4)


def test_fitting_changes_nothing_else():
    model = fresh()
    before = tiny.states(model)
    random_before = torch.get_rng_state()
    assert fit_discriminant(model, TOKENS, rows_of(), rows_of(4, seed=1)) == (69, 42)
    after = tiny.states(model)
    changed = {key.rsplit(".", 1)[-1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"direction", "offset", "n_fitted"}
    assert model.training and torch.equal(torch.get_rng_state(), random_before)
    keeper = layers(model)[0].keeper
    assert keeper.survey is None and keeper.labels is None and not keeper.pending
    assert torch.equal(tiny.logits(model.eval()), tiny.logits(tiny.llama()))


def test_rows_at_a_time_do_not_matter():
    one, other = tiny.states(fitted(batch=1)), tiny.states(fitted(batch=6))
    for key, value in one.items():
        assert torch.allclose(value.float(), other[key].float(), rtol=1e-3, atol=1e-4), key


def test_much_text_is_thinned_out(monkeypatch):
    keep_at_most(monkeypatch, 30, n_examples=10)
    rows, other = rows_of(40), rows_of(25, seed=1)
    one, again = (fitted(rows, other, batch=5) for _ in range(2))
    for (_, statistics), (_, same) in zip(owned(one), owned(again)):
        assert 30 <= int(statistics.n_fitted) <= 60  # 10 from 3 passes, 5 from 6
        assert torch.equal(statistics.direction, same.direction)
    lengths = sorted(9 + i for i in range(40))
    n, _ = fit_discriminant(fresh(), TOKENS, rows, other)
    assert sum(lengths[:10]) < n < sum(lengths[-10:])  # ten rows, neither first nor last
    keep_at_most(monkeypatch, 700, n_examples=10)
    n, _ = fit_discriminant(fresh(), TOKENS, rows, other)
    assert 700 <= n < 700 + lengths[-1]  # ten rows do not have as many tokens


def test_narrow_layers_keep_more_tokens():
    assert most_tokens(576) == 14_563
    assert most_tokens(4096) == most_tokens(2048) == 4096


def test_a_trained_adapter_beside_a_fresh_one_stays_as_it_was():
    model = tiny.trained(n_directions=5)
    before = tiny.states(model)
    model.add_adapter("fresh", tiny.config(distance="discriminant"))
    model.base_model.set_adapter(["default", "fresh"])
    for layer in layers(model):
        for weights in (layer.slim_in, layer.slim_out):
            weights["default"].requires_grad_(False)
    fit_discriminant(model, TOKENS, rows_of(), rows_of(seed=1))
    after = tiny.states(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert owned(model, "fresh")[0][1].is_fitted


def test_layers_that_see_their_tokens_in_one_row():
    """OPT's MLPs read (batch · length, d_in)."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.N_WORDS, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 24}
    base = OPTForCausalLM(OPTConfig(**sizes, do_layer_norm_before=True)).eval()
    model = fresh(base)
    fit_discriminant(model, TOKENS, rows_of(), rows_of(4, seed=1), batch=4)
    assert {int(statistics.n_fitted) for _, statistics in owned(model)} == {69 + 42}


def test_other_text_bypasses_and_training_data_do_not():
    """Training data and other text differ in their words."""
    rows, other = rows_of(24, seed=4, words=(3, 15)), rows_of(24, seed=5)
    model = fitted(rows, other, beta=8.0, margin=1.0)
    data = tiny.batch(8, padding=None)
    data = {**data, "input_ids": data["input_ids"] % 12 + 3, "labels": data["labels"] % 12 + 3}
    optim = tiny.optimiser(model, 1e-3)
    for _ in range(30):
        optim.zero_grad()
        model(**data).loss.backward()
        optim.step()
    model.eval()
    shares = []
    for text in (rows_of(12, seed=6, words=(3, 15)), rows_of(12, seed=7)):
        with torch.no_grad(), observe(model) as found:
            for row in text:
                model(input_ids=torch.tensor([row["input_ids"]]))
        shares.append(found.mean("bypassed_share"))
    assert shares[0] < 0.25 and shares[1] > 0.45


def test_a_direction_is_saved_with_the_adapter_and_stays(tmp_path):
    import peft

    model = fitted()
    before = [statistics.direction.clone() for _, statistics in owned(model)]
    tiny.train(model, 4)
    for old, (_, statistics) in zip(before, owned(model)):
        assert torch.equal(old, statistics.direction)
        assert statistics.steps == 4 and float(statistics.distance_var) > 0
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    one, other = tiny.states(model), tiny.states(loaded)
    assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
    assert torch.equal(tiny.logits(model), tiny.logits(loaded))


# --- a fixed boundary -----------------------------------------------------------------------------


def apart(**changes):
    """Fitted to training data and other text of different words, with a fixed boundary."""
    rows, other = rows_of(12, words=(3, 9)), rows_of(12, seed=1, words=(20, tiny.N_WORDS))
    return fitted(rows, other, boundary="fixed", **changes), rows, other


@pytest.mark.parametrize("margin", [0.5, 3.0])
def test_a_fixed_boundary_lies_half_way_to_other_text(margin):
    model, rows, other = apart(margin=margin)
    for layer, statistics in owned(model):
        own, rest = (read(model, text, layer) for text in (rows, other))
        raw = own @ statistics.direction - statistics.offset
        half_way = gap_to_other(own, rest) / 2
        expected = raw.mean() + max(margin, half_way) * raw.std(correction=0)
        at = (raw - expected) / raw.std(correction=0)
        for training in (True, False):
            d, _ = statistics.measured(own, None, gather=False, training=training)
            assert torch.allclose(d, at, rtol=1e-2, atol=1e-2)
    near = max(gap_to_other(*(read(model, t, x) for t in (rows, other))) for x, _ in owned(model))
    assert 0.5 < near / 2 < 3  # so that one margin decides and the other does not


def test_a_fixed_boundary_holds_from_the_first_step_and_stays(tmp_path):
    import peft

    model, _, other = apart()
    before = {key: value.clone() for key, value in tiny.states(model).items()}
    with torch.no_grad(), observe(model.eval()) as found:
        model(input_ids=torch.tensor([other[0]["input_ids"]]))
    assert found.mean("bypassed_share") > 0.5
    tiny.train(model.train(), 4, lr=0.05)
    for key, value in tiny.states(model).items():
        if "slim_clusters" in key and not key.endswith("n_steps"):
            assert torch.equal(value, before[key]), key
    assert all(statistics.steps == 4 for _, statistics in owned(model))
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert torch.equal(tiny.logits(model), tiny.logits(loaded))


def test_a_fixed_boundary_is_fitted_first():
    with pytest.raises(InputError, match="call budwood.tune.fit_discriminant"):
        tiny.train(fresh(boundary="fixed"), 1)


@pytest.mark.parametrize(
    ("model", "rows", "error", "words"),
    [
        (tiny.llama, rows_of(), AttachError, "no SLIM layers"),
        (tiny.slim, rows_of(), InputError, 'distance="discriminant"'),
        (lambda: fresh(yielding=False), rows_of(), InputError, 'distance="discriminant"'),
        (lambda: after(3), rows_of(), InputError, "trained for 3 steps"),
        (fresh, rows_of(2), InputError, "training data has 19 tokens .* needs 32"),
        (fresh, [], InputError, "training data has 0 tokens"),
        (
            fresh,
            [*rows_of(), {"input_ids": [3, 4], "labels": [IGNORED] * 2}],
            InputError,
            "row 6 of the training data",
        ),
    ],
    ids=["plain", "whitened", "no yielding", "trained", "short", "empty", "empty row"],
)
def test_refused(model, rows, error, words):
    with pytest.raises(error, match=words):
        fit_discriminant(model(), TOKENS, rows, rows_of(seed=1))


def test_a_bad_row_is_the_users_row(monkeypatch):
    """Also where few rows are drawn."""
    keep_at_most(monkeypatch, 4, n_examples=4)
    rows = rows_of(40)
    rows[33]["labels"] = [IGNORED] * len(rows[33]["labels"])
    for seed in range(3):
        with pytest.raises(InputError, match="row 33 of the training data has no token"):
            fit_discriminant(fresh(), TOKENS, rows, rows_of(seed=1), seed=seed)


@pytest.mark.parametrize("n_seen", [0, 1], ids=["never", "by one text"])
def test_a_layer_that_the_text_does_not_reach_is_named(monkeypatch, n_seen):
    model = fresh()
    _, unreached = owned(model)[1]
    see, passes = Survey.see, []

    def without_one(self, statistics, x):
        if statistics is unreached:
            passes.append(self)
            x = x if len(passes) <= n_seen else x[:0]  # as an expert that no token is routed to
        see(self, statistics, x)

    monkeypatch.setattr(Survey, "see", without_one)
    with pytest.raises(InputError, match=f"layer '{unreached.key}' reads no token"):
        fit_discriminant(model, TOKENS, rows_of(), rows_of(seed=1))
    assert not any(statistics.is_fitted for _, statistics in owned(model))


def test_a_layer_beside_the_path_of_text_is_named():
    base = tiny.llama()
    base.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(InputError, match=r"layers\.1\..* reads no token"):
        fit_discriminant(fresh(base), TOKENS, rows_of(), rows_of(seed=1))


def test_rows_at_a_time_are_one_or_more():
    with pytest.raises(InputError, match="batch=0 is below 1"):
        fit_discriminant(fresh(), TOKENS, rows_of(), rows_of(seed=1), batch=0)


def test_too_little_other_text_is_refused():
    with pytest.raises(InputError, match="other text has 19 tokens"):
        fit_discriminant(fresh(), TOKENS, rows_of(), rows_of(2))


def test_training_without_fitting_is_refused():
    with pytest.raises(InputError, match="call budwood.tune.fit_discriminant"):
        tiny.train(fresh(), 1)


def test_text_that_gives_no_numbers_is_refused():
    model = fresh()
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[7] = float("nan")
    rows = rows_of()
    rows[5]["input_ids"][4] = 7
    with pytest.raises(InputError, match=r"layers\.0\..*NaN"):
        fit_discriminant(model, TOKENS, rows, rows_of(seed=1))
    assert not any(statistics.is_fitted for _, statistics in owned(model))


# --- self-generated text -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.model()


def test_own_text_is_requests_and_replies(chat):
    chat.train()
    state = torch.get_rng_state()
    found = self_generate(chat, TOKENS, 5, batch=2)
    assert chat.training and torch.equal(torch.get_rng_state(), state)
    assert (
        found
        == self_generate(chat, TOKENS, 5, batch=2)
        != self_generate(chat, TOKENS, 5, batch=2, seed=1)
    )
    before = tokens_before_request(TOKENS)
    assert TOKENS.decode(before) == "<|im_start|>user\n"
    for row in found:
        n_asked = row["labels"].count(IGNORED)
        assert row["labels"] == [IGNORED] * n_asked + row["input_ids"][n_asked:]
        assert row["input_ids"][: len(before)] == before
        asked = TOKENS.decode(row["input_ids"][:n_asked])
        assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n") and n_asked > len(before) + 10
    chat.eval()


def test_what_a_checkpoint_asks_of_sampling_is_left_out():
    plain, chat = tiny_chat.model(), tiny_chat.model()
    asked = {"repetition_penalty": 5.0, "temperature": 0.1, "min_p": 0.5, "top_k": 3}
    chat.generation_config.update(**asked)
    assert self_generate(chat, TOKENS, 5) == self_generate(plain, TOKENS, 5)
    adapted = attach(parse_tuner("lora"), chat, 2, 0)
    assert replies(adapted, TOKENS, ["a"]) == replies(plain, TOKENS, ["a"])
    assert {key: getattr(chat.generation_config, key) for key in asked} == asked


def test_own_text_is_the_other_text_when_none_is_given(chat, monkeypatch):
    monkeypatch.setattr("budwood.tune.slim.fitting.N_TEXTS", 6)
    given, own = (tiny.slim(tiny_chat.model(), distance="discriminant") for _ in range(2))
    texts = in_forms_of(rows_of(), self_generate(chat, TOKENS, 6, seed=3), TOKENS)
    fit_discriminant(given, TOKENS, rows_of(), texts, seed=3)
    fit_discriminant(own, TOKENS, rows_of(), seed=3)
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
        self_generate(chat, TOKENS, 3)


def test_a_model_without_a_chat_template_writes_plain_text(chat):
    plain = tiny_chat.tokenizer()
    plain.chat_template = None
    rows = self_generate(chat, plain, 3, batch=2)
    assert rows != self_generate(chat, plain, 3, batch=2, seed=1) and len(rows) == 3
    for row in rows:
        assert row["input_ids"][0] == plain.bos_token_id and row["labels"][0] == IGNORED
        assert row["labels"][1:] == row["input_ids"][1:] and len(row["labels"]) <= 57
    plain.bos_token = None
    assert self_generate(chat, plain, 1)[0]["input_ids"][0] == plain.eos_token_id
    plain.eos_token = None
    with pytest.raises(UnsupportedModelError, match="neither a chat template nor a token"):
        self_generate(chat, plain, 1)


def test_texts_have_the_forms_of_the_training_data(chat):
    texts = self_generate(chat, TOKENS, 3)
    plain = {"prompt": "Is it wet?", "completion": " yes"}
    chats, joined = (
        encode([example_of(one)], TOKENS, 300).rows
        for one in ({"question": "Is it wet?", "answer": "yes"}, plain)
    )
    assert in_forms_of(chats, texts, TOKENS) == texts
    for rows in (joined, chats + joined, encode([example_of({"text": "a"})], TOKENS, 9).rows):
        found = in_forms_of(rows, texts, TOKENS)
        assert found[:3] == texts and len(found) == 6
    for row, bare in zip(texts, found[3:]):
        prompt, reply = TOKENS.decode(row["input_ids"]).split("<|im_start|>assistant\n")
        request = prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n")
        assert TOKENS.decode(bare["input_ids"]) == f"{request}\n{reply.removesuffix('<|im_end|>')}"
    bare = tiny_chat.tokenizer()
    bare.chat_template = None
    assert in_forms_of(joined, texts, bare) == texts


def test_a_template_without_a_place_for_requests_is_refused():
    silent = tiny_chat.tokenizer()
    silent.chat_template = "{% for message in messages %}nothing{% endfor %}"
    with pytest.raises(UnsupportedModelError, match="where a user's turn begins"):
        tokens_before_request(silent)
