"""generate() under attach: the same inputs, the same shape of output, a shorter prompt inside."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import utils as generation_utils
from transformers.modeling_outputs import BaseModelOutputWithPooling

from budwood.errors import AttachError, InputError
from budwood.prune import attach
from budwood.prune.selection import resolve_method
from tests.contract import oracle
from tests.contract.models import IMAGE, ROW_IMAGES, words

GREEDY = {"max_new_tokens": 5, "do_sample": False}
WAYS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beam": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 7},
}
CHUNKS = hasattr(generation_utils, "_slice_mm_encoder_output")


@pytest.fixture
def way(request):
    if request.param == "chunked prefill" and not CHUNKS:
        pytest.skip("this version of transformers loses images between chunks")
    return request.param


def test_keeping_everything_changes_nothing(case, batch, method):
    before = case.model.generate(**batch, **GREEDY)
    with attach(case.model, keep=1.0, method=method) as session:
        after = case.model.generate(**batch, **GREEDY)
    assert torch.equal(before, after)
    assert all(image.kept_all for image in session.report)


@pytest.mark.versions
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_every_way_of_decoding_keeps_the_answer(case, batch, way):
    before = case.model.generate(**batch, **GREEDY | WAYS[way])
    with attach(case.model, keep=1.0):
        after = case.model.generate(**batch, **GREEDY | WAYS[way])
    assert torch.equal(before, after)


def test_pruned_equals_oracle(case, batch, method):
    in_place = resolve_method(method).positions == "original"
    compare_with_oracle(case, batch, {"method": method}, "greedy", in_place)


@pytest.mark.versions
@pytest.mark.parametrize(
    "way", ["greedy", "no cache", "static cache", "chunked prefill"], indirect=True
)
@pytest.mark.parametrize("options", [{}, {"positions": "original"}], ids=["own", "original"])
def test_pruned_equals_oracle_in_every_way_of_decoding(case, batch, options, way):
    """A method has chosen before a way begins, so one method stands for all."""
    if way == "chunked prefill" and case.bidirectional:
        pytest.skip("chunks of transformers do not see each other, so they cut such masks")
    compare_with_oracle(case, batch, {"method": "adav", **options}, way, bool(options))


def compare_with_oracle(case, batch, options, way, in_place):
    """Each padded row agrees, logits included, with a hand-gathered row on its own, uncached."""
    scored = {"output_logits": True, "return_dict_in_generate": True}
    with attach(case.model, keep=6, **options) as session:
        output = case.model.generate(**batch, **GREEDY, **WAYS[way], **scored)
    logits = torch.stack(output.logits, dim=1)
    n_prompt = batch["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :n_prompt], batch["input_ids"])
    for row, images in enumerate(ROW_IMAGES):
        single = oracle.row_of(batch, case, row, images)
        kept = oracle.kept_positions(case, single, session.report[images])
        n_pad = n_prompt - single["input_ids"].shape[1]
        origin = session.origin[row]
        assert torch.equal(origin[origin >= 0] - n_pad, kept)
        answer, expected = oracle.greedy(case, single, kept, GREEDY["max_new_tokens"], in_place)
        assert torch.equal(output.sequences[row, n_prompt:], answer)
        torch.testing.assert_close(logits[row], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.versions
def test_without_cache_nor_padding_every_token_sees_the_others(case):
    """Gaps in positions, if they reached the mask, would pass for several packed sequences."""
    batch = case.batch([words(3, 1), 0, words(5, 2), 1, words(4, 3)])
    with attach(case.model, keep=6):
        cached = case.model.generate(**batch, **GREEDY)
        assert torch.equal(case.model.generate(**batch, **GREEDY, use_cache=False), cached)


def test_rows_of_a_batch_equal_single_rows(case, batch, method):
    with attach(case.model, keep=6, method=method, seed=3) as session:
        together = case.model.generate(**batch, **GREEDY)
        report = session.report
        for row, images in enumerate(ROW_IMAGES):
            if method == "random" and row == 2:
                continue  # its image is number 2 of the batch, and number 0 alone
            single = oracle.row_of(batch, case, row, images)
            alone = case.model.generate(**single, **GREEDY)
            assert torch.equal(together[row, -5:], alone[0, -5:])
            for one, other in zip(report[images], session.report):
                assert torch.equal(one.kept, other.kept)


@pytest.mark.versions
def test_sampling_needs_only_the_seed(case, batch):
    options = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 2}
    with attach(case.model, keep=1.0):
        torch.manual_seed(5)
        after = case.model.generate(**batch, **options)
    torch.manual_seed(5)
    before = case.model.generate(**batch, **options)
    assert torch.equal(before, after)
    with attach(case.model, keep=4):
        drawn = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            drawn.append(case.model.generate(**batch, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.versions
def test_prompt_lookup_gives_the_greedy_answer(case):
    # The repeated words are not followed by an image: transformers would propose its placeholders.
    batch = case.batch([words(4, 2), 0, words(4, 1), words(7, 2), words(4, 1)])
    with attach(case.model, keep=5):
        plain = case.model.generate(**batch, **GREEDY)
        lookup = case.model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, lookup)


def takes_embeddings(model):
    return "inputs_embeds" in signature(model.prepare_inputs_for_generation).parameters


@pytest.mark.versions
def test_beams_equal_a_prompt_without_the_dropped_tokens(case, monkeypatch):
    """Beams of a pruned row, with several returned, against the same features fed by hand."""
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 5, "do_sample": False}
    with attach(case.model, keep=6) as session:
        pruned = case.model.generate(**batch, **options)
    kept = oracle.kept_positions(case, batch, session.report)
    positions = oracle.coordinates(case, batch, kept)
    if positions.ndim == 3:
        positions = torch.cat((torch.arange(len(kept)).view(1, 1, -1), positions))
    if takes_embeddings(case.model):
        by_hand = case.model.generate(
            **oracle.pruned_inputs(case, batch, kept),
            attention_mask=torch.ones(1, len(kept), dtype=torch.long),
            position_ids=positions,
            **options,
        )
    else:  # then the encoder gives what was kept, and no more
        given = {name: batch[name][:, kept] for name in ("input_ids", "attention_mask", case.types)}
        features = oracle.embeddings(case, batch)[kept][given["input_ids"][0] == IMAGE][None]
        encoded = BaseModelOutputWithPooling(pooler_output=features)
        monkeypatch.setattr(
            case.model.model, "get_image_features", lambda pixel_values, **_: encoded
        )
        by_hand = case.model.generate(**given, pixel_values=batch["pixel_values"], **options)
    assert pruned.shape == (3, batch["input_ids"].shape[1] + 5)
    assert torch.equal(pruned[:, -5:], by_hand[:, -5:])


@pytest.mark.versions
def test_static_cache_object(case):
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=5):
        plain = case.model.generate(**batch, **GREEDY)
        cache = StaticCache(case.model.config.get_text_config(), max_cache_len=90)
        cached = case.model.generate(**batch, **GREEDY, past_key_values=cache)
    assert torch.equal(plain, cached)


def test_text_alone_passes_through(case):
    batch = case.batch([words(9, 4)], [words(5, 3)])
    batch.pop(case.types, None)
    before = case.model.generate(**batch, **GREEDY)
    with attach(case.model, keep=3) as session:
        assert torch.equal(before, case.model.generate(**batch, **GREEDY))
        assert session.report == []
        case.model.generate(**case.batch([0, words(2, 1)]), **GREEDY)
        assert len(session.report) == 1
        case.model.generate(**batch, **GREEDY)  # and nothing is left of the call before
        assert session.report == []
        assert session.timing.encode_ms == 0
        assert session.origin is None


@pytest.mark.versions
def test_given_embeddings_pass_through(case):
    if not takes_embeddings(case.model):
        pytest.skip("its generate() takes no embeddings")
    batch = case.batch([0, words(5, 2)])
    given = {
        "inputs_embeds": oracle.embeddings(case, batch)[None],
        "attention_mask": batch["attention_mask"],
    }
    before = case.model.generate(**given, **GREEDY)
    with attach(case.model, keep=3) as session:
        assert torch.equal(before, case.model.generate(**given, **GREEDY))
    assert session.report == []


def test_ids_as_positional_argument(case):
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=3):
        named = case.model.generate(**batch, **GREEDY)
        ids = batch.pop("input_ids")
        assert torch.equal(named, case.model.generate(ids, **batch, **GREEDY))


def test_missing_mask_is_inferred_from_padding(case, batch):
    with attach(case.model, keep=3):
        given = case.model.generate(**batch, **GREEDY)
        batch.pop("attention_mask")
        assert torch.equal(given, case.model.generate(**batch, **GREEDY))


class Watch(StoppingCriteria):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class WatchScores(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids)
        return scores


class WatchStream:
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.seen.append("end")


def test_a_users_own_criteria_see_the_whole_prompt(case, batch):
    criteria, processor, allowed = Watch(), WatchScores(), []
    with attach(case.model, keep=3):
        output = case.model.generate(
            **batch,
            max_new_tokens=3,
            num_beams=2,
            stopping_criteria=StoppingCriteriaList([criteria]),
            logits_processor=LogitsProcessorList([processor]),
            prefix_allowed_tokens_fn=lambda row, ids: allowed.append((row, ids)) or list(range(60)),
        )
    n_prompt = batch["input_ids"].shape[1]
    for seen, n_new in ((criteria.seen, (1, 2, 3)), (processor.seen, (0, 1, 2))):
        assert [ids.shape[1] - n_prompt for ids in seen] == list(n_new)
        for ids in seen:
            prompts = batch["input_ids"].repeat_interleave(len(ids) // 3, dim=0)
            assert torch.equal(ids[:, :n_prompt], prompts)
    assert all(torch.equal(ids[:n_prompt], batch["input_ids"][row]) for row, ids in allowed)
    assert {row for row, _ in allowed} == {0, 1, 2}
    assert output.shape[1] == n_prompt + 3


@pytest.mark.versions
def test_a_streamer_gets_the_whole_prompt_then_the_answer(case):
    batch = case.batch([0, words(5, 2)])
    streamer = WatchStream()
    with attach(case.model, keep=3):
        output = case.model.generate(**batch, **GREEDY, streamer=streamer)
    assert torch.equal(streamer.seen[0], batch["input_ids"])
    assert torch.equal(torch.cat(streamer.seen[1:-1]), output[0, -5:])


@pytest.mark.versions
@pytest.mark.parametrize("where", ["keyword", "config", "model"])
def test_max_length_counts_the_prompt_as_given(case, batch, where):
    n_prompt = batch["input_ids"].shape[1]
    config = case.model.generation_config
    with attach(case.model, keep=3):
        if where == "keyword":
            output = case.model.generate(**batch, max_length=n_prompt + 4)
        elif where == "config":
            given = type(config)(max_length=n_prompt + 4, pad_token_id=0)
            output = case.model.generate(**batch, generation_config=given)
            assert given.max_length == n_prompt + 4
        else:
            config.max_length = n_prompt + 4
            try:
                output = case.model.generate(**batch)
            finally:
                config.max_length = None
    assert output.shape[1] == n_prompt + 4


def test_min_length_counts_the_prompt_as_given(case):
    """With every token but one banned and that one ending, only min_length keeps it going."""
    batch = case.batch([0, words(5, 2)])
    n_prompt = batch["input_ids"].shape[1]
    end = int(case.model.generate(**batch, max_new_tokens=1)[0, -1])
    options = {"max_new_tokens": 9, "eos_token_id": end, "do_sample": False}
    with attach(case.model, keep=1.0, question="all"):
        assert case.model.generate(**batch, **options).shape[1] == n_prompt + 1
    with attach(case.model, keep=3):
        output = case.model.generate(**batch, **options, min_length=n_prompt + 4)
    assert n_prompt + 4 <= output.shape[1]
    assert end not in output[0, n_prompt : n_prompt + 3]


def test_an_image_with_fewer_tokens_keeps_them_all(case):
    batch = case.batch([0, words(5, 2)], [1, words(4, 3)])
    with attach(case.model, keep=20) as session:
        case.model.generate(**batch, **GREEDY)
    for image in session.report:
        assert image.n_after == min(20, image.n_before)
        assert image.kept_all == (image.n_before <= 20)


def test_ratio_is_per_image(case, batch):
    with attach(case.model, keep=0.25) as session:
        case.model.generate(**batch, **GREEDY)
    assert [image.n_after for image in session.report] == [
        int(0.25 * image.n_before + 0.5) for image in session.report
    ]


def test_random_draws_are_set_by_the_seed(case, batch):
    def kept(seed):
        with attach(case.model, keep=4, method="random", seed=seed) as session:
            case.model.generate(**batch, **GREEDY)
            first = [image.kept for image in session.report]
            case.model.generate(**batch, **GREEDY)
            again = [image.kept for image in session.report]
        assert all(map(torch.equal, first, again))
        return first

    assert all(map(torch.equal, kept(1), kept(1)))
    assert not all(map(torch.equal, kept(1), kept(2)))
    with attach(case.model, keep=4, method="random") as session:
        case.model.generate(**case.batch([0, 0, words(3, 1)]), **GREEDY)
    assert not torch.equal(session.report[0].kept, session.report[1].kept)


def test_the_report_places_every_image(case, batch):
    with attach(case.model, keep=4) as session:
        case.model.generate(**batch, **GREEDY)
    assert [(image.row, image.image) for image in session.report] == [(0, 0), (0, 1), (2, 2)]
    for image in session.report:
        assert image.boxes.shape == (image.n_before, 4)
        assert image.saliency.shape == image.relevance.shape == (image.n_before,)
        assert image.kept.tolist() == sorted(set(image.kept.tolist()))
        split = image.split
        assert split.reserved + split.by_text + split.by_saliency == 4
        if image.grid is not None:
            assert image.grid[0] * image.grid[1] == image.n_before
    assert session.timing.encode_ms > 0
    assert session.timing.select_ms > 0


def test_only_chosen_features_reach_the_llm(case):
    """What the LLM sees at placeholders are exactly the encoder's features, nothing else."""
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    seen = []
    handle = case.llm.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with attach(case.model, keep=4) as session:
        case.model.generate(**batch, **GREEDY)
    handle.remove()
    expected = oracle.embeddings(case, batch)[oracle.kept_positions(case, batch, session.report)]
    assert torch.equal(seen[0][0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": object()}, "prompt_lookup_num_tokens"),
        ({"custom_generate": "somewhere/else"}, "custom_generate"),
        ({"cache_implementation": "paged"}, "paged"),
    ],
)
def test_options_that_cannot_work_say_so(case, options, message):
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=3), pytest.raises(AttachError, match=message):
        case.model.generate(**batch, **options)


@pytest.mark.versions
@pytest.mark.skipif(CHUNKS, reason="this version of transformers cuts images into chunks")
def test_chunks_that_lose_images_say_so(case):
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=3), pytest.raises(AttachError, match="prefill_chunk_size"):
        case.model.generate(**batch, **WAYS["chunked prefill"])


def test_a_filled_cache_says_so(case):
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=3):
        first = case.model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        with pytest.raises(AttachError, match="past_key_values"):
            case.model.generate(**batch, **GREEDY, past_key_values=first.past_key_values)


def test_explicit_positions_and_wide_masks_say_so(case):
    batch = case.batch([0, words(5, 2)])
    n_prompt = batch["input_ids"].shape[1]
    with attach(case.model, keep=3):
        with pytest.raises(InputError, match="position_ids"):
            case.model.generate(**batch, position_ids=torch.arange(n_prompt)[None])
        batch["attention_mask"] = torch.ones(1, 1, n_prompt, n_prompt)
        with pytest.raises(InputError, match="attention_mask"):
            case.model.generate(**batch)


def test_placeholders_that_do_not_match_say_so(case):
    batch = case.batch([0, words(5, 2), [IMAGE]])
    with attach(case.model, keep=3), pytest.raises(InputError, match="placeholders"):
        case.model.generate(**batch)


def test_nan_in_a_picture_says_so(case):
    batch = case.batch([0, words(5, 2)])
    batch["pixel_values"][0] = float("nan")
    with attach(case.model, keep=3), pytest.raises(InputError, match="NaN"):
        case.model.generate(**batch)
