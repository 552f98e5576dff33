"""Properties of what a cache holds: the pruned prompt, an answer, and the turns behind them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from budwood.prune.prompt import prune_rows
from budwood.prune.turns import CachedPrompt, position_ids
from tests.unit.test_properties import left_of, many, prompts

PLACEHOLDER = -5


class Cache:
    """As long as it says."""

    def __init__(self, n_tokens):
        self.n_tokens = n_tokens

    def get_seq_length(self):
        return self.n_tokens


@st.composite
def conversations(draw, with_coordinates=False):
    """A pruned prompt padded on the left, what it is a part of, and new tokens behind both.

    Every token has an id of its own, so that no other can pass for it.
    """
    mask, placed, kept = draw(prompts())
    mask = mask.flip(1).long().cummax(1).values.flip(1)  # no padding on the right, no gaps
    mask[:, -1] = 1
    mask = mask.cummax(1).values
    whole = torch.arange(mask.numel()).view_as(mask)
    pruned = prune_rows(mask, placed, kept, torch.device("cpu"))
    cut = {
        "input_ids": pruned.take(whole, -1),
        "attention_mask": pruned.take(mask, 0),
    }
    if with_coordinates:
        size = (2, *mask.shape)
        n = 2 * mask.numel()
        values = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
        axes = pruned.take(torch.tensor(values).view(size), 0)
        cut["position_ids"] = position_ids(axes, cut["attention_mask"])
    n_new = draw(st.integers(1, 6))
    new = 1000 + torch.arange(len(mask) * n_new).view(len(mask), n_new)
    seen = draw(st.lists(st.booleans(), min_size=new.numel(), max_size=new.numel()))
    behind = torch.tensor(seen).view_as(new).long()
    prompt = CachedPrompt.of(whole, cut, (0,) * len(mask), None)
    stays = [left_of(mask, placed, kept, row) for row in range(len(mask))]
    return prompt, whole, mask, new, behind, stays


@many
@given(conversations(), st.data())
def test_a_cache_holds_what_stayed_and_what_followed(conversation, data):
    prompt, whole, mask, new, behind, stays = conversation
    n_held = data.draw(st.integers(0, new.shape[1] - 1))
    ids, masks = torch.cat((whole, new), 1), torch.cat((mask, behind), 1)
    held = prompt.held(ids, masks, prompt.n_kept + n_held, frozenset({PLACEHOLDER}))
    assert held.n_kept == prompt.n_kept + n_held
    assert torch.equal(held.whole, ids[:, : whole.shape[1] + n_held])
    for row, places in enumerate(stays):
        tokens = held.inputs["input_ids"][row, -len(places) - n_held :].tolist()
        expected = [*whole[row, places].tolist(), *new[row, :n_held].tolist()]
        assert tokens == expected
        attended = held.inputs["attention_mask"][row].tolist()
        padding = held.n_kept - len(expected)
        assert attended == [0] * padding + [1] * len(places) + behind[row, :n_held].tolist()


@many
@given(conversations(with_coordinates=True))
def test_coordinates_go_on_behind_the_largest(conversation):
    prompt, whole, mask, new, behind, _ = conversation
    longer = prompt.extended(torch.cat((whole, new), 1), torch.cat((mask, behind), 1))
    before, after = prompt.inputs["position_ids"], longer.inputs["position_ids"]
    assert torch.equal(after[1:, :, : prompt.n_kept], before[1:])
    for row in range(len(whole)):
        largest = int(before[1:, row].max())
        n_seen = int(prompt.inputs["attention_mask"][row].sum())
        for column in range(new.shape[1]):
            n_before = int(behind[row, : column + 1].sum())
            here = after[:, row, prompt.n_kept + column].tolist()
            assert here == [n_seen + n_before - 1, largest + n_before, largest + n_before]


@many
@given(conversations(), st.booleans(), st.integers(0, 5))
def test_a_step_by_hand_is_masked_and_counted(conversation, of_whole, n_between):
    prompt, _, mask, new, behind, stays = conversation
    n_between = min(n_between, new.shape[1] - 1)
    front = mask if of_whole else prompt.inputs["attention_mask"]
    call = {
        "input_ids": new[:, n_between:],
        "attention_mask": torch.cat((front, behind), 1),
        "past_key_values": Cache(prompt.n_kept + n_between),
    }
    given = call | prompt.step(call)
    for row, places in enumerate(stays):
        padding = [0] * (prompt.n_kept - len(places))
        attended = [*padding, *[1] * len(places), *behind[row].tolist()]
        assert given["attention_mask"][row].tolist() == attended
        for column in range(n_between, new.shape[1]):
            position = int(given["position_ids"][row, column - n_between])
            assert position == len(places) + int(behind[row, : column + 1].sum()) - 1
