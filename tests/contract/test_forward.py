"""model(**inputs) under attach(..., forward=True): loss and log-likelihood of the pruned prompt."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from budwood.errors import AttachError, InputError
from budwood.prune import attach
from budwood.prune.selection import resolve_method
from tests.contract import oracle
from tests.contract.models import EOS, ROW_IMAGES, words


@pytest.fixture(params=["left", "right"])
def labelled(request, case):
    """As `batch`, padded on either side; the last words of each row are the answer."""
    batch = case.batch(
        [words(3, 1), 0, words(5, 2), 1, words(4, 3), [EOS], words(2, 8)],
        [words(9, 4)],
        [2, words(6, 5), [EOS], words(3, 6)],
        side=request.param,
    )
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for row, n_answer in enumerate((2, 4, 3)):
        seen = batch["attention_mask"][row].nonzero().flatten()[-n_answer:]
        batch["labels"][row, seen] = batch["input_ids"][row, seen]
    return batch | case.typed(batch["input_ids"], batch["labels"] != -100)


@pytest.mark.versions
def test_keeping_everything_changes_nothing(case, labelled):
    before = case.model(**labelled)
    with attach(case.model, keep=1.0, forward=True):
        after = case.model(**labelled)
    torch.testing.assert_close(before.loss, after.loss)
    seen = labelled["attention_mask"].bool()
    torch.testing.assert_close(before.logits[seen], after.logits[seen], rtol=1e-3, atol=1e-3)


def test_loss_and_logits_equal_oracle(case, labelled, method):
    with attach(case.model, keep=6, method=method, forward=True) as session:
        output = case.model(**labelled)
    total, count = 0.0, 0
    for row, images in enumerate(ROW_IMAGES):
        single = oracle.row_of(labelled, case, row, images)
        kept = oracle.kept_positions(case, single, session.report[images])
        in_place = resolve_method(method).positions == "original"
        logits, labels = oracle.logits(case, single, kept, in_place), single["labels"][0][kept]
        seen = session.origin[row] >= 0
        torch.testing.assert_close(output.logits[row, seen], logits, rtol=1e-3, atol=1e-3)
        total += cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    torch.testing.assert_close(output.loss, total / count, rtol=1e-4, atol=1e-4)


def test_answers_are_no_part_of_the_question(case, labelled):
    """What is supervised is not there when the model is asked, so choosing must not see it."""
    with attach(case.model, keep=6, forward=True, question="all") as session:
        case.model(**labelled)
    for image in session.report:
        assert image.question
        assert labelled["attention_mask"][image.row, list(image.question)].all()
        assert (labelled["labels"][image.row, list(image.question)] == -100).all()


@pytest.mark.versions
def test_generate_and_forward_choose_the_same(case, batch):
    with attach(case.model, keep=6, forward=True) as session:
        case.model.generate(**batch, max_new_tokens=2)
        generated = [image.kept for image in session.report]
        case.model(**batch)
        assert all(map(torch.equal, generated, [image.kept for image in session.report]))


def test_without_forward_a_call_is_untouched(case, batch):
    before = case.model(**batch).logits
    with attach(case.model, keep=3) as session:
        assert torch.equal(case.model(**batch).logits, before)
        assert session.report == []


@pytest.mark.versions
def test_decoding_by_hand_continues_from_the_pruned_cache(case):
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    with attach(case.model, keep=6, forward=True):
        expected = case.model.generate(**batch, max_new_tokens=4, do_sample=False)[0, -4:]
        output = case.model(**batch, use_cache=True)
        answer = [output.logits[:, -1].argmax(-1)]
        for _ in range(3):
            cache = output.past_key_values
            output = case.model(input_ids=answer[-1][:, None], past_key_values=cache)
            answer.append(output.logits[:, -1].argmax(-1))
    assert torch.equal(torch.cat(answer), expected)


def test_gradients_reach_the_projector(case, batch):
    """Choosing is not differentiated through; what was chosen is."""
    batch["labels"] = batch["input_ids"].clone()
    with attach(case.model, keep=3, forward=True):
        case.model(**batch).loss.backward()
    llm = case.model.get_input_embeddings().weight.grad
    encoder = [
        p
        for n, p in case.model.named_parameters()
        if any(part in n for part in ("multi_modal", "merger", "connector"))
    ]
    assert llm.abs().sum() > 0
    assert all(p.grad is not None for p in encoder)
    case.model.zero_grad(set_to_none=True)


def test_positional_arguments(case):
    batch = case.batch([0, words(4, 1)])
    ids = batch.pop("input_ids")
    with attach(case.model, keep=3, forward=True):
        named = case.model(input_ids=ids, **batch).logits
        assert torch.equal(case.model(ids, **batch).logits, named)


def test_a_video_beside_images_says_so(cases):
    case = cases["qwen2_5_vl"]
    batch = case.batch([0, words(4, 1)])
    batch["pixel_values_videos"] = batch["pixel_values"]
    with attach(case.model, keep=3, forward=True) as session:
        session.pruner.family.videos = None  # as in a family that does not prune videos
        with pytest.raises(AttachError, match="video"):
            case.model(**batch)


@pytest.mark.parametrize("name", ["labels", "attention_mask"])
@pytest.mark.parametrize("columns", [-1, 1])
def test_an_input_of_another_length_says_so(cases, name, columns):
    case = cases["llava"]
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    n_rows, n_tokens = batch["input_ids"].shape
    batch[name] = torch.ones(n_rows, n_tokens + columns, dtype=torch.long)
    with attach(case.model, keep=3, forward=True), pytest.raises(InputError, match=f"{name} is of"):
        case.model(**batch)
