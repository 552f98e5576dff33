"""FastV and PyramidDrop against layers run by hand, without a cache."""

from __future__ import annotations

import copy

import pytest
import torch

from budwood.errors import (
    AttachError,
    BudgetError,
    InputError,
    UnknownNameError,
    UnsupportedModelError,
)
from budwood.prune import attach
from budwood.prune.inside import FastV, PyramidDrop, attach_inside
from budwood.prune.inside.schedules import per_layer
from tests.contract import oracle
from tests.contract.models import IMAGE, words

GREEDY = {"max_new_tokens": 4, "do_sample": False}
SCHEDULES = [
    (FastV(layer=1), 0.6),
    (FastV(layer=2), 0.7),
    (FastV(layer=1, average=False), 5),
    (PyramidDrop(stages=3), 0.6),
    (PyramidDrop(stages=3, average=False), 3),
]


@pytest.fixture(params=["llava", "llava_next"])
def prompt(request, cases):
    case = cases[request.param]
    return case, case.batch([words(3, 1), 2, words(5, 2), 0, words(4, 3)])


def rotated(x, position):
    """Rotary embedding of one vector, in pairs of its halves."""
    half = len(x) // 2
    result = x.clone()
    for i in range(half):
        angle = torch.tensor(position * 10000.0 ** (-i / half))
        low, high = x[i], x[half + i]
        result[i] = low * angle.cos() - high * angle.sin()
        result[half + i] = high * angle.cos() + low * angle.sin()
    return result


def last_attention(layer, config, hidden, places):
    """The last token's attention, head by head and key by key."""
    attention, x = layer.self_attn, layer.input_layernorm(hidden)
    n_heads, n_key_heads = config.num_attention_heads, config.num_key_value_heads
    query = attention.q_proj(x[-1]).view(n_heads, -1)
    keys = attention.k_proj(x).view(len(x), n_key_heads, -1)
    total = torch.zeros(len(x))
    for head in range(n_heads):
        q = rotated(query[head], int(places[-1]))
        kv = head * n_key_heads // n_heads
        logits = [q @ rotated(k[kv], int(p)) / len(q) ** 0.5 for k, p in zip(keys, places)]
        total += torch.stack(logits).softmax(0)
    return total / n_heads


@torch.no_grad()
def by_hand(case, single, drops, n_new):
    """Greedy answer and logits. Each step runs all layers on the prompt and what was answered."""
    model, embed = case.model, case.model.get_input_embeddings()
    llm = model.model.language_model
    prompt = oracle.embeddings(case, single)
    is_visual = (single["input_ids"][0] == IMAGE).tolist()
    columns, answer, all_logits = {}, [], []
    for _ in range(n_new):
        hidden = torch.cat((prompt, embed(torch.tensor(answer, dtype=torch.long))))
        places = list(range(len(hidden)))
        before = hidden
        for number, layer in enumerate(llm.layers):
            if number in drops and number not in columns:
                row = last_attention(llm.layers[number - 1], llm.config, before, places)
                visual = [i for i, p in enumerate(places) if is_visual[p]]
                best = sorted(visual, key=lambda i: (-float(row[i]), i))[: drops[number]]
                stays = [i for i in range(len(places)) if not is_visual[places[i]] or i in best]
                columns[number] = {places[i] for i in stays}
            if number in drops:
                seen = {*columns[number], *range(len(prompt), len(prompt) + len(answer))}
                stays = [i for i, p in enumerate(places) if p in seen]
                hidden, places = hidden[stays], [places[i] for i in stays]
            before = hidden
            positions = torch.tensor([places])
            mask = torch.full((len(places), len(places)), -torch.inf).triu(1)[None, None]
            hidden = layer(
                hidden[None],
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=llm.rotary_emb(hidden[None], positions),
            )[0]
        all_logits.append(model.lm_head(llm.norm(hidden[-1:])))
        answer.append(int(all_logits[-1].argmax()))
    return torch.tensor(answer), torch.cat(all_logits), columns


def test_keeping_everything_changes_nothing(prompt):
    case, batch = prompt
    before = case.model.generate(**batch, **GREEDY)
    for method in ("fastv", "pyramiddrop"):
        if method == "pyramiddrop":
            method = PyramidDrop(stages=3)
        with attach_inside(case.model, method=method, keep=1.0) as session:
            assert torch.equal(case.model.generate(**batch, **GREEDY), before)
        assert set(session.report.per_layer) == {session.report.n_visual}


@pytest.mark.parametrize(("schedule", "keep"), SCHEDULES, ids=repr)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pruned_equals_oracle(prompt, schedule, keep, attention):
    case, batch = prompt
    options = {"output_logits": True, "return_dict_in_generate": True}
    llm = case.model.model.language_model
    before = llm.config._attn_implementation
    llm.config._attn_implementation = attention
    try:
        with attach_inside(case.model, method=schedule, keep=keep) as session:
            output = case.model.generate(**batch, **GREEDY, **options)
    finally:
        llm.config._attn_implementation = before
    report = session.report
    drops = {layer: len(kept) for layer, kept in report.kept.items()}
    assert drops
    assert report.per_layer == tuple(per_layer(drops, 3, report.n_visual))
    answer, logits, columns = by_hand(case, batch, drops, 4)
    visual = (batch["input_ids"][0] == IMAGE).nonzero().flatten()
    for layer, kept in report.kept.items():
        assert {*visual[kept].tolist()} == {i for i in columns[layer] if i in visual}
    torch.testing.assert_close(torch.cat(output.logits), logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(output.sequences[0, -4:], answer)


def test_padding_is_not_attended_to(prompt):
    case, batch = prompt
    with attach_inside(case.model, method=FastV(layer=1), keep=0.6) as session:
        expected = case.model.generate(**batch, **GREEDY)[0, -4:]
        kept = session.report.kept[1]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        padded = batch | {
            "input_ids": torch.cat((torch.zeros_like(ids[:, :3]), ids), 1),
            "attention_mask": torch.cat((torch.zeros_like(mask[:, :3]), mask), 1),
        }
        assert torch.equal(case.model.generate(**padded, **GREEDY)[0, -4:], expected)
        assert torch.equal(session.report.kept[1], kept)


def test_a_later_turn_continues_the_pruned_cache(prompt):
    case, batch = prompt
    with attach_inside(case.model, method=FastV(layer=1), keep=0.6):
        options = {"return_dict_in_generate": True}
        first = case.model.generate(**batch, **GREEDY, **options)
        more = torch.cat((first.sequences, torch.tensor([words(3, 9)])), 1)
        short = case.model.generate(more, past_key_values=first.past_key_values, **GREEDY)
        again = case.model.generate(**batch, max_new_tokens=4, do_sample=False, **options)
        one = case.model(
            input_ids=more[:, again.past_key_values.get_seq_length() :],
            past_key_values=again.past_key_values,
        )
    assert one.logits[0, -1].argmax() == short[0, more.shape[1]]


def test_goes_together_with_pruning_before(prompt):
    case, batch = prompt
    with (
        attach(case.model, keep=6),
        attach_inside(case.model, method=FastV(layer=1), keep=0.6) as session,
    ):
        case.model.generate(**batch, **GREEDY)
    assert session.report.n_visual < (batch["input_ids"] == IMAGE).sum()


def test_detaching_leaves_nothing_and_copies_are_not_attached(prompt):
    case, batch = prompt
    plain = case.model.generate(**batch, **GREEDY)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()]
    with attach_inside(case.model, method=FastV(layer=1), keep=0.4) as session:
        twin = copy.deepcopy(case.model)
        assert torch.equal(twin.generate(**batch, **GREEDY), plain)
        assert session.report is None
        with pytest.raises(AttachError, match="detach that session"):
            attach_inside(case.model)
        attach_inside(twin, method=FastV(layer=1)).detach()
    session.detach()
    assert hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()
    ]
    assert torch.equal(case.model.generate(**batch, **GREEDY), plain)


def test_what_cannot_be_done_is_refused(prompt, cases):
    case, batch = prompt
    two = {name: torch.cat((tensor, tensor)) for name, tensor in batch.items()}
    with attach_inside(case.model, method=FastV(layer=1), keep=0.6):
        for inputs, options, message in (
            (two, {}, "one prompt at a time and got 2 rows"),
            (batch, {"num_beams": 2}, "got 2 rows"),
            (batch, {"use_cache": False}, "needs a dynamic cache and got no cache"),
            (batch, {"cache_implementation": "static"}, "got StaticCache"),
            (batch, {"prefill_chunk_size": 9}, "behind 9 cached tokens"),
        ):
            with pytest.raises(InputError, match=message):
                case.model.generate(**inputs, **GREEDY, **options)
    too_few = pytest.raises(BudgetError, match="less than 2 full layers take; keep at least")
    with attach_inside(case.model, method=FastV(layer=2), keep=3), too_few:
        case.model.generate(**batch, **GREEDY)
    with pytest.raises(UnsupportedModelError, match="'qwen2_5_vl'"):
        attach_inside(cases["qwen2_5_vl"].model)
    with pytest.raises(UnknownNameError, match="fastv, pyramiddrop"):
        attach_inside(case.model, method="fastw")
    with pytest.raises(BudgetError, match="keep=0"):
        attach_inside(case.model, keep=0)


@pytest.mark.parametrize(
    "schedule", [FastV(), FastV(layer=1), PyramidDrop(), PyramidDrop(stages=8)]
)
@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.3, 0.15])
def test_the_mean_over_layers_is_the_budget(schedule, fraction):
    keep = round(2880 * fraction)
    try:
        counts = per_layer(schedule.drops(32, 2880, keep), 32, 2880)
    except BudgetError as error:
        least = int(str(error).split("keep at least ")[1].split(",")[0])
        assert least > keep
        assert schedule.drops(32, 2880, least)
        with pytest.raises(BudgetError):
            schedule.drops(32, 2880, least - 1)
        return
    assert keep - 2 <= sum(counts) / 32 <= keep
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("schedule", [FastV(layer=3), PyramidDrop(stages=4)])
def test_too_few_layers_are_refused(schedule):
    with pytest.raises(InputError, match="LLM's 3 layers"):
        schedule.drops(3, 16, 8)
    for build in (lambda: FastV(layer=0), lambda: PyramidDrop(stages=1)):
        with pytest.raises(InputError, match="at least"):
            build()
