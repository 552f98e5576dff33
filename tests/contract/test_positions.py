"""positions="original": what is kept stays at its position in the whole prompt.

test_generate.py compares every way of decoding with rows by hand, at these positions as well.
"""

from __future__ import annotations

import copy

import pytest
import torch

from budwood.errors import AttachError, UnknownNameError
from budwood.prune import METHODS, attach, session
from tests.contract import oracle
from tests.contract.models import ROW_IMAGES, words
from tests.contract.test_later_images import asked, pictures, turn

GREEDY = {"max_new_tokens": 4, "do_sample": False}
KEPT = {**GREEDY, "return_dict_in_generate": True}
SCORED = {**KEPT, "output_logits": True}
IN_PLACE = {"method": "fastervlm", "positions": "original"}


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_without_padding_is_one_sequence(case, use_cache):
    """Without a masked token transformers drops the mask and would take gaps for several."""
    batch = case.batch([words(3, 1), 0, words(5, 2), 1, words(4, 3)])
    with attach(case.model, keep=6, **IN_PLACE) as attached:
        output = case.model.generate(**batch, **GREEDY, use_cache=use_cache)
    kept = oracle.kept_positions(case, batch, attached.report)
    answer, _ = oracle.greedy(case, batch, kept, 4, in_place=True)
    assert torch.equal(output[0, batch["input_ids"].shape[1] :], answer)


def test_forward_equals_oracle(case, batch):
    with attach(case.model, keep=6, forward=True, **IN_PLACE) as attached:
        output = case.model(**batch, use_cache=False)
    for row, images in enumerate(ROW_IMAGES):
        single = oracle.row_of(batch, case, row, images)
        kept = oracle.kept_positions(case, single, attached.report[images])
        seen = attached.origin[row] >= 0
        expected = oracle.logits(case, single, kept, in_place=True)
        torch.testing.assert_close(output.logits[row, seen], expected, rtol=1e-3, atol=1e-3)


def test_with_flash_attention_one_token_is_masked(case, monkeypatch):
    """FlashAttention sees no mask that masks nothing, and looks at positions in its place."""
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    with attach(case.model, keep=6, forward=True, **IN_PLACE) as attached:
        plain, origin = case.model.generate(**batch, **GREEDY), attached.origin
        monkeypatch.setattr(session, "flash_attention", lambda model: True)
        monkeypatch.setattr(session, "loses_mask", lambda kwargs, model: True)
        masked = case.model.generate(**batch, **GREEDY)
        n_masked = int(not attached.pruner.family.has_coordinates)
        assert attached.origin[0].tolist() == [-1] * n_masked + origin[0].tolist()
        assert case.model(**batch).logits.shape[1] == origin.shape[1] + n_masked
    assert torch.equal(masked, plain)


@pytest.fixture
def conversation(case):
    """A family that takes more text behind a cache, and a first turn."""
    if case.bidirectional:
        pytest.skip("reads the whole prompt backwards, or each image at once")
    return case, case.batch([words(3, 1), 0, words(5, 2)])


def test_a_later_turn_goes_on_behind_the_whole_prompt(conversation):
    case, first = conversation
    with attach(case.model, keep=5, **IN_PLACE) as attached:
        begun = case.model.generate(**first, **KEPT)
        report = attached.report
        ids = torch.cat((begun.sequences, torch.tensor([words(4, 9)])), 1)
        output = case.model.generate(ids, past_key_values=begun.past_key_values, **GREEDY)
    whole = first | {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | case.typed(ids)
    kept = oracle.kept_positions(case, whole, report)
    answer, _ = oracle.greedy(case, whole, kept, 4, in_place=True)
    assert torch.equal(output[0, ids.shape[1] :], answer)


@pytest.mark.parametrize("new", [[words(4, 9)], [1, words(4, 9)]], ids=["text", "image"])
def test_a_cache_keeps_its_positions_in_another_session(conversation, new):
    case, first = conversation
    with attach(case.model, keep=5, **IN_PLACE):
        begun = case.model.generate(**first, **KEPT)
        ids = torch.cat((begun.sequences, torch.tensor(turn(case, new))), 1)
        given = pictures(case, (1,)) if 1 in new else {}
        inputs = asked(case, ids, torch.ones_like(ids), given)
        twin = copy.deepcopy(begun.past_key_values)
        expected = case.model.generate(**inputs, past_key_values=twin, **SCORED)
    with attach(case.model, keep=5, method="fastervlm"):
        again = case.model.generate(**inputs, past_key_values=begun.past_key_values, **SCORED)
    assert torch.equal(again.logits[0], expected.logits[0])


def test_keeping_everything_changes_nothing(case, batch):
    before = case.model.generate(**batch, **GREEDY)
    with attach(case.model, keep=1.0, **IN_PLACE):
        assert torch.equal(case.model.generate(**batch, **GREEDY), before)


def test_a_method_has_its_own(case):
    for name in ("adav", "adav+"):
        with attach(case.model, keep=5, method=name) as attached:
            assert attached.pruner.in_place == (METHODS.get(name).positions == "original")


def test_bad_positions_say_so(case):
    with pytest.raises(UnknownNameError, match="unknown positions 'old'; known: compact, original"):
        attach(case.model, positions="old")


def test_compact_is_not_for_models_with_coordinates(cases):
    with pytest.raises(AttachError, match="positions='compact' is not for qwen2_vl"):
        attach(cases["qwen2_vl"].model, positions="compact")
