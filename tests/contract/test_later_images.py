"""New images in a later turn of a chat, whose cache holds a pruned prompt."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from budwood.errors import AttachError, InputError
from budwood.prune import attach
from tests.contract import oracle
from tests.contract.models import IMAGE, PAD, pad, words

READS_BACKWARDS = ("paligemma",)
WITH_WINDOWS = ("gemma3",)
GREEDY = {"max_new_tokens": 4, "do_sample": False}
KEPT = {**GREEDY, "return_dict_in_generate": True}


def turn(case, *rows):
    """Ids of each row's new text and images, without a first token."""
    return [case.batch(row)["input_ids"][0, 1:].tolist() for row in rows]


def pictures(case, *turns):
    """The encoder's inputs of images, given turn by turn."""
    batch = case.batch(*map(list, turns))
    ids = ("input_ids", "attention_mask", case.types)
    return {name: value for name, value in batch.items() if name not in ids}


def asked(case, ids, mask, images):
    """Inputs of a conversation."""
    return {"input_ids": ids, "attention_mask": mask, **case.typed(ids), **images}


def encoded(case, monkeypatch):
    """How many features each run of the encoder gives, noted as it runs."""
    seen, kind = [], type(case.model.model)
    original = kind.get_image_features

    def counted(self, *args, **kwargs):
        features = original(self, *args, **kwargs)
        width = case.model.get_input_embeddings().weight.shape[1]
        seen.append(sum(x.numel() for x in features.pooler_output) // width)
        return features

    counted.__signature__ = inspect.signature(original)  # transformers reads it
    monkeypatch.setattr(kind, "get_image_features", counted)
    return seen


@pytest.fixture
def case(case):
    """Families that take new images behind a cache."""
    if case.model.config.model_type in READS_BACKWARDS:
        pytest.skip("reads the whole prompt backwards, too")
    return case


@pytest.fixture
def no_windows(case):
    """Families that do so in batches."""
    if case.model.config.model_type in WITH_WINDOWS:
        pytest.skip("sliding windows count padding")


@pytest.mark.parametrize("model_type", [*READS_BACKWARDS, *WITH_WINDOWS])
def test_families_that_cannot_say_so(cases, model_type):
    case = cases[model_type]
    batch = case.batch([0, words(3, 1)], [0, words(3, 2)])
    with attach(case.model, keep=5):
        first = case.model.generate(**batch, **KEPT)
        new = torch.tensor(turn(case, [1, words(2, 3)], [1, words(2, 4)]))
        ids = torch.cat((first.sequences, new), 1)
        inputs = asked(case, ids, torch.ones_like(ids), pictures(case, (1,), (1,)))
        with pytest.raises(AttachError, match="start from an empty cache"):
            case.model.generate(**inputs, past_key_values=first.past_key_values, **GREEDY)


@pytest.mark.parametrize("given", ["all", "new"])
@pytest.mark.parametrize("chosen_by", ["fastervlm", "adav"])
def test_new_images_in_two_later_turns(case, given, chosen_by, monkeypatch):
    """Two more images in the second turn and one in the third, as recomputed from the start."""
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    later = [([1, words(2, 3), 2, words(4, 4)], (1, 2)), ([words(2, 5), 0, words(3, 6)], (0,))]
    n_encoded = encoded(case, monkeypatch)
    with attach(case.model, keep=5, method=chosen_by) as session:
        answer = case.model.generate(**batch, **KEPT)
        reports, shown = list(session.report), [(0,)]
        for parts, new in later:
            n_before, shown = sum(map(len, shown)), [*shown, new]
            ids = torch.cat((answer.sequences, torch.tensor(turn(case, parts))), 1)
            images = pictures(case, *(shown if given == "all" else [new]))
            inputs = asked(case, ids, torch.ones_like(ids), images)
            cache = answer.past_key_values
            n_encoded.clear()
            answer = case.model.generate(**inputs, past_key_values=cache, **KEPT)
            # What the cache holds is not encoded again.
            assert n_encoded[-1] == turn(case, parts)[0].count(IMAGE)
            assert len(n_encoded) == 1 or given == "new"  # one more may be tried
            assert len(session.report) == len(new)
            assert session.call_of(answer).n_cached_images == n_before
            reports += session.report
            whole = asked(case, ids, torch.ones_like(ids), pictures(case, *shown))
            places = oracle.kept_positions(case, whole, reports)
            expected, _ = oracle.greedy(case, whole, places, 4)
            assert torch.equal(answer.sequences[0, : ids.shape[1]], ids[0])
            assert torch.equal(answer.sequences[0, ids.shape[1] :], expected)
            fed = session.origin[0]  # what the cache did not hold: the last token of the answer, …
            assert torch.equal(fed, places[places >= ids.shape[1] - len(turn(case, parts)[0]) - 1])


@pytest.mark.parametrize("given", ["all", "new"])
def test_new_images_in_a_batch(case, no_windows, batch, given):
    """Rows that get an image, text alone and another image, of unequal lengths."""
    rows = [[1, words(2, 40)], [words(4, 41)], [words(3, 42), 2, words(3, 43)]]
    tails = turn(case, *rows)
    longest = max(map(len, tails))
    new = torch.tensor([pad(tail, longest, PAD, "left") for tail in tails])
    seen = torch.tensor([pad([1] * len(tail), longest, 0, "left") for tail in tails])
    with attach(case.model, keep=5, method="fastervlm") as session:
        first = case.model.generate(**batch, **KEPT)
        before = session.report
        ids = torch.cat((first.sequences, new), 1)
        answered = torch.ones(3, first.sequences.shape[1] - batch["input_ids"].shape[1])
        mask = torch.cat((batch["attention_mask"], answered.long(), seen), 1)
        every = [(0, 1), (1,), (2,), (2,)]  # row by row, turn by turn
        images = pictures(case, *(every if given == "all" else every[1::2]))
        second = case.model.generate(
            **asked(case, ids, mask, images), past_key_values=first.past_key_values, **KEPT
        )
        after = session.report
        assert [image.row for image in after] == [0, 2]
        third_ids = torch.cat(
            (second.sequences, torch.tensor([words(2, 50 + row) for row in range(3)])), 1
        )
        third_mask = torch.cat((mask, torch.ones(3, 6, dtype=torch.long)), 1)
        third = case.model.generate(
            third_ids,
            attention_mask=third_mask,
            past_key_values=second.past_key_values,
            **GREEDY,
        )
    reports = [[*before[:2], after[0]], [], [before[2], after[1]]]
    of_rows = [[(0, 1), (1,)], [], [(2,), (2,)]]
    for given_ids, given_mask, output in (
        (ids, mask, second.sequences),
        (third_ids, third_mask, third),
    ):
        for row, turns in enumerate(of_rows):
            seen = given_ids[row, given_mask[row].bool()][None]
            images = pictures(case, *turns) if turns else {}
            single = asked(case, seen, torch.ones_like(seen), images)
            places = oracle.kept_positions(case, single, reports[row])
            expected, _ = oracle.greedy(case, single, places, 4)
            assert torch.equal(output[row, given_ids.shape[1] :], expected)


@pytest.mark.parametrize("is_attached", [True, False])
def test_an_image_after_a_turn_of_text(case, is_attached):
    """The cache is not pruned, whoever filled it."""
    text = case.batch([words(6, 1)])
    session = attach(case.model, keep=5, method="fastervlm") if is_attached else None
    first = case.model.generate(**text, **KEPT)
    with session or attach(case.model, keep=5, method="fastervlm") as session:
        ids = torch.cat((first.sequences, torch.tensor(turn(case, [2, words(3, 2)]))), 1)
        inputs = asked(case, ids, torch.ones_like(ids), pictures(case, (2,)))
        second = case.model.generate(**inputs, past_key_values=first.past_key_values, **GREEDY)
        places = oracle.kept_positions(case, inputs, session.report)
    expected, _ = oracle.greedy(case, inputs, places, 4)
    assert torch.equal(second[0, ids.shape[1] :], expected)


def test_a_later_question_is_about_the_new_image(case):
    """The question is found in the whole conversation; its positions are those of the prompt."""
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    with attach(case.model, keep=5) as session:
        first = case.model.generate(**batch, **KEPT)
        ids = torch.cat((first.sequences, torch.tensor(turn(case, [1, words(4, 9)]))), 1)
        inputs = asked(case, ids, torch.ones_like(ids), pictures(case, (1,)))
        case.model.generate(**inputs, past_key_values=first.past_key_values, **GREEDY)
        question = session.report[0].question
    assert ids[0, list(question)].tolist() == words(4, 9)


def test_forward_with_a_new_image(case, no_windows):
    """By hand: new tokens alone, behind a cache, in a batch; then steps of one token."""
    rows = [[words(3, 1), 0, words(5, 2)], [words(4, 3)]]
    batch = case.batch(*rows)
    tails = turn(case, [1, words(2, 4)], [words(3, 5), 2, words(6, 6)])
    longest = max(map(len, tails))
    new = torch.tensor([pad(tail, longest, PAD, "left") for tail in tails])
    seen = torch.tensor([pad([1] * len(tail), longest, 0, "left") for tail in tails])
    with torch.no_grad(), attach(case.model, keep=5, forward=True, method="fastervlm") as session:
        output = case.model(**batch, use_cache=True)
        before = session.report
        answer = output.logits[:, -1].argmax(-1)[:, None]
        mask = torch.cat((batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
        output = case.model(
            input_ids=answer, attention_mask=mask, past_key_values=output.past_key_values
        )
        ids, mask = torch.cat((batch["input_ids"], answer, new), 1), torch.cat((mask, seen), 1)
        kinds = case.typed(new)
        output = case.model(
            input_ids=new,
            attention_mask=mask,
            past_key_values=output.past_key_values,
            **pictures(case, (1,), (2,)),
            **kinds,
        )
        after, origin = session.report, session.origin
        assert output.logits.shape[:2] == origin.shape
        steps = [output.logits[:, -1]]
        for _ in range(3):
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
            output = case.model(
                input_ids=steps[-1].argmax(-1)[:, None],
                attention_mask=mask,
                past_key_values=output.past_key_values,
            )
            steps.append(output.logits[:, -1])
    reports = [[before[0], after[0]], [after[1]]]
    for row, turns in enumerate(([(0,), (1,)], [(2,)])):
        seen = ids[row, mask[row, : ids.shape[1]].bool()][None]
        single = asked(case, seen, torch.ones_like(seen), pictures(case, *turns))
        places = oracle.kept_positions(case, single, reports[row])
        _, expected = oracle.greedy(case, single, places, 4)
        logits = torch.stack([step[row] for step in steps])
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def second_turn(case, images, parts):
    """Ask a second turn with these images, after a first about image 0."""
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=5):
        first = case.model.generate(**batch, **KEPT)
        ids = torch.cat((first.sequences, torch.tensor(turn(case, parts))), 1)
        inputs = asked(case, ids, torch.ones_like(ids), pictures(case, *images) if images else {})
        return case.model.generate(**inputs, past_key_values=first.past_key_values, **GREEDY)


def test_images_that_do_not_fit_say_so(case):
    for images in ([(0,), (1, 1, 1)], [(1,)]):
        with pytest.raises(InputError, match="placeholders"):
            second_turn(case, images, [1, words(3, 3), 1, words(2, 4)])
    with pytest.raises(InputError, match="no image is given"):
        second_turn(case, (), [1, words(3, 3)])


def test_a_cache_with_unpruned_images_says_so(case):
    batch = case.batch([0, words(5, 2)])
    first = case.model.generate(**batch, **KEPT)
    ids = torch.cat((first.sequences, torch.tensor(turn(case, [1, words(2, 4)]))), 1)
    inputs = asked(case, ids, torch.ones_like(ids), pictures(case, (0,), (1,)))
    with (
        attach(case.model, keep=5),
        pytest.raises(AttachError, match="images that this session has not pruned"),
    ):
        case.model.generate(**inputs, past_key_values=first.past_key_values, **GREEDY)


def test_a_cropped_cache_says_so(case, no_windows):
    batch = case.batch([words(4, 1), 0, words(5, 2)])
    with attach(case.model, keep=5):
        first = case.model.generate(**batch, **KEPT)
        cache = first.past_key_values
        cache.crop(5 - cache.get_seq_length())
        with pytest.raises(AttachError, match="cropped to 5 tokens"):
            case.model.generate(first.sequences, past_key_values=cache, **GREEDY)


# Caches of other sessions and models


def test_a_cache_goes_on_in_another_session_of_the_model(case):
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=5, method="fastervlm"):
        first = case.model.generate(**batch, **KEPT)
        twin = copy.deepcopy(first.past_key_values)
        ids = torch.cat((first.sequences, torch.tensor([words(4, 9)])), 1)
        expected = case.model.generate(ids, past_key_values=twin, **GREEDY)
    with attach(case.model, keep=2):  # what the cache holds stays as it was pruned
        again = case.model.generate(ids, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(again, expected)


def test_a_cache_after_detaching_says_so(case):
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=5):
        first = case.model.generate(**batch, **KEPT)
        early = copy.deepcopy(first.past_key_values)
        earlier = copy.deepcopy({"prefix": early})["prefix"]
    ids = torch.cat((first.sequences, torch.tensor([words(4, 9)])), 1)
    late = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, early, earlier, late):
        with pytest.raises(AttachError, match="its session is detached"):
            case.model.generate(ids, past_key_values=cache, **GREEDY)
    assert pickle.loads(pickle.dumps(first.past_key_values)).layers


def test_a_cache_of_another_model_says_so(case):
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=5):
        first = case.model.generate(**batch, **KEPT)
    ids = torch.cat((first.sequences, torch.tensor([words(4, 9)])), 1)
    twin = copy.deepcopy(case.model)
    with attach(twin, keep=5), pytest.raises(AttachError, match="another model"):
        twin.generate(ids, past_key_values=first.past_key_values, **GREEDY)
