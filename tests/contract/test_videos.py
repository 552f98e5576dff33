"""Videos, alone and beside images: one budget for all frames, timestamps and coordinates kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from budwood.errors import BudgetError, InputError
from budwood.prune import attach, encode
from budwood.prune.families import family_of
from tests.contract import oracle
from tests.contract.models import EOS, IMAGE, VIDEO, WITH_VIDEOS, Video, words

GREEDY = {"max_new_tokens": 5, "do_sample": False}
ROWS = [
    [words(3, 1), Video(0), words(5, 2), 1, words(4, 3)],
    [words(9, 4)],
    [2, words(2, 7), Video(1), Video(2), words(6, 5), [EOS], words(3, 6)],
    [words(2, 8), 0, words(5, 9)],
]
IMAGES = [slice(0, 1), slice(1, 1), slice(1, 2), slice(2, 3)]
VIDEOS = [slice(0, 1), slice(1, 1), slice(1, 3), slice(3, 3)]
KINDS = [["video", "image"], [], ["image", "video", "video"], ["image"]]
CASES = WITH_VIDEOS
"""The families that these tests run on; see conftest."""
WAYS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 7},
}


@pytest.fixture
def batch(case):
    """Images and videos in one call and in one row, padded on the left."""
    return case.batch(*ROWS)


def test_every_family_with_videos_is_tested(cases):
    for name, case in cases.items():
        has_videos = family_of(case.model).videos is not None
        assert has_videos == (case.video is not None) == (name in WITH_VIDEOS), name


def reports_of(report, row):
    return [image for image in report if image.row == row]


def test_keeping_everything_changes_nothing(case, batch):
    before = case.model.generate(**batch, **GREEDY)
    with attach(case.model, keep=1.0, forward=True) as session:
        after = case.model.generate(**batch, **GREEDY)
        logits = case.model(**batch).logits
    assert torch.equal(before, after)
    assert all(image.kept_all for image in session.report)
    seen = batch["attention_mask"].bool()
    expected = case.model(**batch).logits
    torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_pruned_equals_oracle(case, batch, way):
    options = {"output_logits": True, "return_dict_in_generate": True}
    with attach(case.model, keep=7) as session:
        output = case.model.generate(**batch, **GREEDY, **WAYS[way], **options)
    logits = torch.stack(output.logits, dim=1)
    n_prompt = batch["input_ids"].shape[1]
    for row, (images, videos) in enumerate(zip(IMAGES, VIDEOS)):
        single = oracle.row_of(batch, case, row, images, videos)
        kept = oracle.kept_positions(case, single, reports_of(session.report, row))
        origin = session.origin[row]
        n_pad = n_prompt - single["input_ids"].shape[1]
        assert torch.equal(origin[origin >= 0] - n_pad, kept)
        answer, expected = oracle.greedy(case, single, kept, 5)
        assert torch.equal(output.sequences[row, n_prompt:], answer)
        torch.testing.assert_close(logits[row], expected, rtol=1e-3, atol=1e-3)


def test_rows_of_a_batch_equal_single_rows(case, batch):
    with attach(case.model, keep=7, forward=True) as session:
        together = case.model.generate(**batch, **GREEDY)
        report = session.report
        for row, (images, videos) in enumerate(zip(IMAGES, VIDEOS)):
            single = oracle.row_of(batch, case, row, images, videos)
            alone = case.model.generate(**single, **GREEDY)
            assert torch.equal(together[row, -5:], alone[0, -5:])
            for one, other in zip(reports_of(report, row), session.report):
                assert torch.equal(one.kept, other.kept)


def test_a_video_has_one_budget_for_all_its_frames(case, batch):
    with attach(case.model, keep=[7, 0.5, 3, 4, 2, 0.25], method="fastervlm") as session:
        case.model.generate(**batch, **GREEDY)
    report = session.report
    assert [[one.kind for one in reports_of(report, row)] for row in range(4)] == KINDS
    assert [one.image for one in report] == list(range(6))
    counts = [one.n_after for one in report]
    assert counts == [
        7,
        round(report[1].n_before / 2 + 1e-9),
        3,
        4,
        2,
        (report[5].n_before + 2) // 4,
    ]
    for one in report:
        assert one.grid is None or one.n_before == one.frames * one.grid[0] * one.grid[1]
        assert one.boxes.shape == (one.n_before, 4)
        assert one.saliency.shape == (one.n_before,)
        best = one.saliency.topk(one.n_after).indices.sort().values
        assert torch.equal(one.kept, best)
        assert sum(map(len, one.kept_by_frame)) == one.n_after
        for frame, some in enumerate(one.kept_by_frame):
            again = some + frame * one.n_before // one.frames
            assert set(again.tolist()) <= set(one.kept.tolist())
    frames = [one.frames for one in report if one.kind == "video"]
    if "video_grid_thw" in batch:
        assert frames == batch["video_grid_thw"][:, 0].tolist() == [3, 2, 4]
    else:
        assert frames == [batch["pixel_values_videos"].shape[1]] * 3
    with (
        attach(case.model, keep=[7, 3]),
        pytest.raises(BudgetError, match="2 budgets and the call has 6"),
    ):
        case.model.generate(**batch, **GREEDY)


def test_only_placeholders_of_a_video_are_dropped(case):
    batch = case.batch([words(3, 1), Video(0), words(5, 2)])
    with attach(case.model, keep=2) as session:
        case.model.generate(**batch, **GREEDY)
    ids = batch["input_ids"][0]
    left = ids[session.origin[0]]
    assert torch.equal(left[left != VIDEO], ids[ids != VIDEO])
    assert (left == VIDEO).sum() == 2 + session.report[0].n_fixed
    question = ids[list(session.report[0].question)]
    assert question.tolist() == words(5, 2)


@pytest.mark.parametrize("rule", ["current", "turn", "all"])
def test_the_words_inside_a_video_are_no_question(case, rule):
    batch = case.batch([0, Video(0), words(5, 2)], [Video(1), 0, Video(2), words(5, 3)])
    with attach(case.model, keep=2, question=rule) as session:
        case.model.generate(**batch, **GREEDY)
    assert len(session.report) == 5
    for one in session.report:
        asked = batch["input_ids"][one.row, list(one.question)]
        assert asked.tolist() == words(5, 2 + one.row)


def test_loss_equals_oracle(case):
    batch = case.batch(ROWS[0], ROWS[2], side="right")
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    batch["labels"][:, :-5] = -100
    rows = [(IMAGES[0], VIDEOS[0]), (IMAGES[2], VIDEOS[2])]
    with attach(case.model, keep=6, forward=True) as session, torch.no_grad():
        output = case.model(**batch)
    total, count = 0.0, 0
    for row, (images, videos) in enumerate(rows):
        single = oracle.row_of(batch, case, row, images, videos)
        kept = oracle.kept_positions(case, single, reports_of(session.report, row))
        logits, labels = oracle.logits(case, single, kept), single["labels"][0][kept]
        seen = session.origin[row] >= 0
        torch.testing.assert_close(output.logits[row, seen], logits, rtol=1e-3, atol=1e-3)
        total += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    torch.testing.assert_close(output.loss, total / count, rtol=1e-4, atol=1e-4)


def test_beams_give_the_answer_of_single_rows(case, batch):
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with attach(case.model, keep=7):
        together = case.model.generate(**batch, **options)
        for row, (images, videos) in enumerate(zip(IMAGES, VIDEOS)):
            single = oracle.row_of(batch, case, row, images, videos)
            alone = case.model.generate(**single, **options)
            assert torch.equal(together[row, -4:], alone[0, -4:])


def test_a_second_turn_goes_on_with_the_cache(case):
    batch = case.batch([words(3, 1), Video(0), words(5, 2)])
    with attach(case.model, keep=5, method="fastervlm") as session:
        first = case.model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        kept = session.report
        ids = torch.cat((first.sequences, torch.tensor([words(4, 9)])), 1)
        second = case.model.generate(ids, past_key_values=first.past_key_values, **GREEDY)
    whole = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in batch:
        whole["mm_token_type_ids"] = 2 * (ids == VIDEO).int()
    places = oracle.kept_positions(case, whole, kept)
    expected, _ = oracle.greedy(case, whole, places, 5)
    assert torch.equal(second[0, ids.shape[1] :], expected)


@pytest.mark.parametrize("given", ["all", "new"])
def test_a_new_video_and_a_new_image_in_a_later_turn(case, given):
    """Behind a cache with both; as recomputed from the start."""
    start, turn = [0, words(3, 1), Video(0), words(5, 2)], [Video(1), words(2, 4), 2, words(3, 5)]
    batch = case.batch(start)
    with attach(case.model, keep=5, method="fastervlm") as session:
        first = case.model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        kept = session.report
        ids = torch.cat((first.sequences, case.batch(turn)["input_ids"][:, 1:]), 1)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in batch:
            prompt["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        whole = case.batch(start, turn) | prompt  # one row of images a turn
        inputs = whole if given == "all" else case.batch(turn) | prompt
        cache = first.past_key_values
        second = case.model.generate(**inputs, past_key_values=cache, **GREEDY)
        assert session.call_of(second).n_cached_images == 2
        kept += session.report
    assert [one.kind for one in kept] == ["image", "video", "video", "image"]
    expected, _ = oracle.greedy(case, whole, oracle.kept_positions(case, whole, kept), 5)
    assert torch.equal(second[0, ids.shape[1] :], expected)


def test_threads_do_not_mix(case):
    prompts = [case.batch([words(2 + i, i), Video(i), 1, words(5 - i, i + 9)]) for i in range(4)]
    with attach(case.model, keep=5) as session:
        expected = [case.model.generate(**prompt, **GREEDY) for prompt in prompts]
        kept = [[one.kept for one in session.call_of(output).report] for output in expected]
        with ThreadPoolExecutor(4) as pool:
            calls = [
                pool.submit(case.model.generate, **prompts[i % 4], **GREEDY) for i in range(60)
            ]
            for number, call in enumerate(calls):
                assert torch.equal(call.result(), expected[number % 4])
                mine = [one.kept for one in session.call_of(call.result()).report]
                assert all(map(torch.equal, mine, kept[number % 4]))


def test_videos_encoded_before(case, batch, monkeypatch):
    with attach(case.model, keep=5) as session:
        expected = case.model.generate(**batch, **GREEDY)
        kept = [one.kept for one in session.report]
    pictures = encode(case.model, batch)
    assert len(pictures) == 6
    for name in ("get_image_features", "get_video_features"):
        monkeypatch.setattr(type(case.model.model), name, None)
    with attach(case.model, keep=5, encoded=pictures) as session:
        assert torch.equal(case.model.generate(**batch, **GREEDY), expected)
        assert all(map(torch.equal, kept, [one.kept for one in session.report]))
        other = case.batch([Video(0), words(3, 2)])
        with pytest.raises(InputError, match="1 pictures are not the 6 encoded ones"):
            case.model.generate(**other, **GREEDY)


def test_inputs_that_do_not_fit_say_so(case):
    batch = case.batch([words(3, 1), Video(0), words(2, 3), 1, words(5, 2)])
    if "mm_token_type_ids" not in batch:
        pytest.skip("takes neither grids nor token types")
    types = batch["mm_token_type_ids"]
    for kind in ("image", "video"):
        grids = batch[f"{kind}_grid_thw"]
        for changes, message in (
            ({f"{kind}_grid_thw": None}, f"{kind}_grid_thw is missing, pixel_values"),
            ({f"{kind}_grid_thw": grids + 2}, f"{kind}_grid_thw has .* patches, pixel_values"),
            ({"mm_token_type_ids": None}, "mm_token_type_ids is missing"),
            ({"mm_token_type_ids": types.clamp(max=1)}, "mm_token_type_ids disagrees"),
        ):
            with attach(case.model, keep=5), pytest.raises(InputError, match=message):
                case.model.generate(**{**batch, **changes}, **GREEDY)


def test_placeholders_that_do_not_match_say_so(case):
    batch = case.batch([words(3, 1), Video(0), words(5, 2)])
    ids = batch["input_ids"].clone()
    ids[0, (ids[0] == VIDEO).nonzero()[0]] = words(1, 3)[0]
    with (
        attach(case.model, keep=5),
        pytest.raises(InputError, match="video placeholders, the 1 videos need"),
    ):
        case.model.generate(**{**batch, "input_ids": ids}, **GREEDY)
