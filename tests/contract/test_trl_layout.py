"""The layout of TRL's GRPO: prompts end in one column, answers are read from the end."""

from __future__ import annotations

import functools

import pytest
import torch

from budwood.prune import attach
from tests.contract import oracle
from tests.contract.models import PAD, words

ANSWERS = [words(5, 30), words(2, 31)]


@pytest.fixture
def joined(case):
    """Prompts of the same length, with a picture and without; answers of unequal lengths."""
    prompt = case.batch([words(2, 1), 0, words(3, 2)], [words(4, 3)])
    n_prompt = prompt["input_ids"].shape[1]
    prompt = case.batch([words(2, 1), 0, words(3, 2)], [words(n_prompt - 1, 3)])
    assert prompt["attention_mask"].all()
    answers = torch.tensor([answer + [PAD] * (5 - len(answer)) for answer in ANSWERS])
    seen = (answers != PAD).long()
    batch = {
        **prompt,
        "input_ids": torch.cat((prompt["input_ids"], answers), 1),
        "attention_mask": torch.cat((prompt["attention_mask"], seen), 1),
    }
    batch |= case.typed(batch["input_ids"], suffix=prompt["input_ids"].shape[1])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :n_prompt] = -100
    return batch


@pytest.mark.parametrize("keep", [1.0, 3])
def test_answers_stay_in_the_last_columns(case, joined, keep):
    """Without padding on the left, and though rows lose different numbers of tokens."""
    n_answers = [len(answer) for answer in ANSWERS]
    with attach(case.model, keep=keep, forward=True), torch.no_grad():
        together = case.model(**joined).logits[:, -6:-1]
        for row, images in enumerate((slice(0, 1), slice(1, 1))):
            single = oracle.row_of(joined, case, row, images)
            alone = case.model(**single).logits[0, -1 - n_answers[row] : -1]
            torch.testing.assert_close(together[row, : n_answers[row]], alone, rtol=1e-3, atol=1e-3)


def test_conversations_of_unequal_lengths_are_not_padded_more_than_needed(case):
    """Supervised tokens begin anywhere: nothing is read from the end."""
    batch = case.batch([words(2, 1), 0, words(3, 2)], [words(4, 3)], side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with attach(case.model, keep=1, forward=True) as session:
        case.model(**batch)
    seen = session.origin >= 0
    assert seen.shape[1] == seen.sum(1).max()


def test_what_others_put_around_forward_outlives_the_session(case):
    """As accelerate does for mixed precision: a wrapper that holds the attached forward."""
    batch = case.batch([words(2, 1), 0, words(3, 2)])
    whole = case.model(**batch).logits
    session = attach(case.model, keep=1, forward=True)
    attached = case.model.forward
    case.model.forward = functools.wraps(attached)(
        lambda *args, **kwargs: attached(*args, **kwargs)
    )
    try:
        wrapper, fewer = case.model.forward, case.model(**batch).logits
        assert fewer.shape[1] < whole.shape[1]
        session.detach()
        assert case.model.forward is wrapper
        assert torch.equal(case.model(**batch).logits, whole)
        with attach(case.model, keep=1, forward=True):
            assert torch.equal(case.model(**batch).logits, fewer)
    finally:
        del case.model.forward
    assert "generate" not in vars(case.model)
