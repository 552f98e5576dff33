"""Real use: several threads, later turns of a chat, padding on both sides, copies of the model."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
import torch

from budwood.caches import takes_new_name
from budwood.errors import AttachError, BudgetError, InputError
from budwood.prune import attach, encode
from budwood.prune.methods.scores import Common
from tests.contract import oracle
from tests.contract.models import BUILDERS, IMAGE, PAD, VIDEO, words

GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def prompts(case):
    """Four prompts that share nothing: pictures and texts of several sizes."""
    return [case.batch([words(2 + i, i), i, words(5 - i, i + 9)]) for i in range(4)]


# Threads


@pytest.fixture
def hasty():
    """Threads take turns a hundred times as often as they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


def test_threads_do_not_mix(case, prompts, hasty):
    """Answers are short: what calls could mix, they could mix while they read the prompt."""
    short = GREEDY | {"max_new_tokens": 2}
    with attach(case.model, keep=5) as session:
        expected = [case.model.generate(**prompt, **short) for prompt in prompts]
        kept = [session.call_of(output).report[0].kept for output in expected]

        def ask(number):
            output = case.model.generate(**prompts[number % 4], **short)
            mine = session.report[0].kept
            return output, mine, session.call_of(output).report[0].kept

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(ask, range(48)))
    for number, (output, mine, by_output) in enumerate(results):
        assert torch.equal(output, expected[number % 4])
        assert torch.equal(mine, kept[number % 4])
        assert torch.equal(by_output, kept[number % 4])


class Streamer:
    """Collects ids, as TextIteratorStreamer collects text."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


def test_streamers_in_threads(case, prompts):
    with attach(case.model, keep=5) as session:
        expected = [case.model.generate(**prompt, **GREEDY)[0].tolist() for prompt in prompts]
        streamers = [Streamer() for _ in range(20)]
        threads = [
            Thread(target=case.model.generate, kwargs=prompts[i % 4] | GREEDY | {"streamer": one})
            for i, one in enumerate(streamers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [one.ids for one in streamers] == [expected[i % 4] for i in range(20)]
        for one in streamers:
            assert session.call_of(one).report[0].n_after == 5


def test_calls_without_pruning_in_other_threads_are_not_recorded(case, prompts):
    """Plain calls run the same encoder while a pruned call reads its attention."""
    with attach(case.model, keep=5) as session:
        case.model.generate(**prompts[0], **GREEDY)
        kept = session.report[0].kept
        with ThreadPoolExecutor(2) as pool, torch.no_grad():
            plain = [pool.submit(case.model, **prompts[1]) for _ in range(40)]
            for _ in range(20):
                case.model.generate(**prompts[0], **GREEDY)
                assert torch.equal(session.report[0].kept, kept)
            assert all(one.result().logits.shape[1] > 5 for one in plain)


def test_a_thread_that_called_nothing_has_no_report(case, prompts):
    with attach(case.model, keep=5) as session, ThreadPoolExecutor(1) as pool:
        output = pool.submit(case.model.generate, **prompts[0], **GREEDY).result()
        assert session.report == []
        assert len(session.call_of(output).report) == 1
        with pytest.raises(InputError, match="no call of this session"):
            session.call_of(output.clone())


# Later turns


@pytest.mark.versions
@pytest.mark.parametrize("with_pixels", [False, True])
def test_a_second_turn_goes_on_with_the_cache(case, with_pixels):
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    with attach(case.model, keep=5, method="fastervlm") as session:
        first = case.model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        kept = session.report
        ids = torch.cat((first.sequences, torch.tensor([words(4, 9)])), 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if with_pixels:
            turn = batch | turn | case.typed(ids)
        second = case.model.generate(
            **turn, past_key_values=first.past_key_values, **GREEDY, return_dict_in_generate=True
        )
        assert torch.equal(second.sequences[:, : ids.shape[1]], ids)
        third_ids = torch.cat((second.sequences, torch.tensor([words(2, 11)])), 1)
        third = case.model.generate(third_ids, past_key_values=second.past_key_values, **GREEDY)
    for given, answered in ((ids, second.sequences), (third_ids, third)):
        whole = {**batch, "input_ids": given, "attention_mask": torch.ones_like(given)}
        whole |= case.typed(given, suffix=batch["input_ids"].shape[1])
        places = oracle.kept_positions(case, whole, kept)
        expected, _ = oracle.greedy(case, whole, places, 4)
        assert torch.equal(answered[0, given.shape[1] :], expected)


@pytest.mark.versions
def test_a_second_turn_in_a_batch(case, batch):
    """Rows of unequal length, padded on the left; each continues as it does alone."""
    new = torch.tensor([words(3, 40), words(3, 41), words(3, 42)])
    with attach(case.model, keep=5, method="fastervlm") as session:
        first = case.model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        kept = session.report
        ids = torch.cat((first.sequences, new), 1)
        n_new = ids.shape[1] - batch["input_ids"].shape[1]
        mask = torch.cat((batch["attention_mask"], torch.ones(3, n_new, dtype=torch.long)), 1)
        second = case.model.generate(
            ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY
        )
    whole = {**batch, "input_ids": ids, "attention_mask": mask}
    whole |= case.typed(ids, suffix=batch["input_ids"].shape[1])
    for row, images in enumerate((slice(0, 2), slice(2, 2), slice(2, 3))):
        single = oracle.row_of(whole, case, row, images)
        places = oracle.kept_positions(case, single, kept[images])
        expected, _ = oracle.greedy(case, single, places, 4)
        assert torch.equal(second[row, ids.shape[1] :], expected)


@pytest.mark.versions
def test_both_names_of_a_cache_are_known(case):
    if not takes_new_name(case.model):
        pytest.skip("this version of transformers knows past_key_values only")
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    answers = []
    with attach(case.model, keep=5, method="fastervlm", forward=True):
        for name in ("cache", "past_key_values"):
            first = case.model.generate(**batch, **GREEDY, return_dict_in_generate=True)
            ids = torch.cat((first.sequences, torch.tensor([words(4, 9)])), 1)
            answers.append(case.model.generate(ids, **{name: first.cache}, **GREEDY))
            with pytest.raises(InputError, match="attention_mask has .* with this cache give"):
                case.model(**batch, **{name: first.cache})
    assert torch.equal(*answers)


@pytest.mark.versions
def test_a_copied_cache_knows_its_prompt(case):
    batch = case.batch([0, words(5, 2)])
    with attach(case.model, keep=5, method="fastervlm"):
        first = case.model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        twin = copy.deepcopy(first.past_key_values)
        ids = torch.cat((first.sequences, torch.tensor([words(4, 9)])), 1)
        one = case.model.generate(ids, past_key_values=first.past_key_values, **GREEDY)
        assert torch.equal(case.model.generate(ids, past_key_values=twin, **GREEDY), one)


def test_a_cache_of_another_prompt_says_so(case):
    batch, other = case.batch([0, words(5, 2)]), case.batch([0, words(5, 3)])
    with attach(case.model, keep=5):
        cache = case.model.generate(**batch, **GREEDY, return_dict_in_generate=True).past_key_values
        with pytest.raises(AttachError, match="belongs to another prompt"):
            case.model.generate(other["input_ids"], past_key_values=cache)


@pytest.mark.versions
def test_decoding_by_hand_takes_a_mask_of_the_whole_prompt(case):
    batch = case.batch([words(3, 1), 0, words(5, 2)], [words(4, 3)])
    with attach(case.model, keep=6, forward=True):
        expected = case.model.generate(**batch, **GREEDY)[:, -4:]
        output = case.model(**batch, use_cache=True)
        answer, mask = [output.logits[:, -1].argmax(-1)], batch["attention_mask"]
        for _ in range(3):
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
            output = case.model(
                input_ids=answer[-1][:, None],
                attention_mask=mask,
                past_key_values=output.past_key_values,
            )
            answer.append(output.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(answer, 1), expected)


# Detaching


class Gate:
    """A streamer that waits at the first token until it may go on."""

    def __init__(self):
        self.reached, self.open = Event(), Event()

    def put(self, value):
        self.reached.set()
        assert self.open.wait(60)

    def end(self):
        pass


@pytest.mark.parametrize("place", ["encoder", "decoding"])
@pytest.mark.parametrize("forward", [False, True])
def test_detaching_while_another_thread_runs(case, prompts, place, forward):
    """The running call ends as it began; then the model and the cache are as after any detach."""
    model = case.model
    model.generate(**prompts[0], **GREEDY)
    deltas = getattr(model.model, "rope_deltas", None)
    with attach(model, keep=5, forward=forward):
        expected = model.generate(**prompts[1], **GREEDY)
    gate, options = Gate(), GREEDY | {"return_dict_in_generate": True}
    tower = getattr(model.model, case.tower)
    if place == "encoder":
        handle = tower.register_forward_hook(lambda *_: gate.put(None))
    else:
        handle, options = None, options | {"streamer": gate}
    before = {name: vars(model).get(name) for name in ("generate", "forward")}
    session = attach(model, keep=5, forward=forward)
    try:
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(model.generate, **prompts[1], **options)
            assert gate.reached.wait(60)
            session.detach()
            assert {name: vars(model).get(name) for name in before} == before
            gate.open.set()
            output = call.result(60)
    finally:
        gate.open.set()
        if handle:
            handle.remove()
    assert torch.equal(output.sequences, expected)
    assert session.call_of(output).report[0].n_after == 5
    assert getattr(model.model, "rope_deltas", None) is deltas
    with pytest.raises(AttachError, match="its session is detached"):
        output.past_key_values.get_seq_length()


def test_a_generate_looked_up_before_detaching_does_not_prune(case, prompts):
    plain = case.model.generate(**prompts[0], **GREEDY)
    with attach(case.model, keep=2) as session:
        generate = case.model.generate
    assert torch.equal(generate(**prompts[0], **GREEDY), plain)
    assert session.report == []


# Padding on both sides


def completions(case):
    """Two prompts padded on the left, their completions padded on the right: TRL's GRPO."""
    rows = [([words(3, 1), 0, words(9, 2)], words(6, 30)), ([0, words(2, 3)], words(3, 31))]
    prompts = case.batch(*[row for row, _ in rows])
    answers = torch.tensor([answer + [PAD] * (6 - len(answer)) for _, answer in rows])
    joined = {
        **prompts,
        "input_ids": torch.cat((prompts["input_ids"], answers), 1),
        "attention_mask": torch.cat((prompts["attention_mask"], (answers != PAD).long()), 1),
    }
    singles = [(case.batch(row), torch.tensor([answer])) for row, answer in rows]
    for single, answer in singles:
        single["input_ids"] = torch.cat((single["input_ids"], answer), 1)
        single["attention_mask"] = torch.ones_like(single["input_ids"])
        single |= case.typed(single["input_ids"], single["input_ids"].shape[1] - answer.shape[1])
    joined |= case.typed(joined["input_ids"], prompts["input_ids"].shape[1])
    return joined, answers, singles


@torch.no_grad()
def log_probabilities(case, inputs, answers, **wanted):
    logits = case.model(**inputs, **wanted).logits[:, -answers.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, answers[..., None])[..., 0]


@pytest.mark.versions
@pytest.mark.parametrize("keep", [1.0, 5])
@pytest.mark.parametrize("count", [True, False])
def test_padding_on_both_sides(case, keep, count):
    joined, answers, singles = completions(case)
    wanted = {"logits_to_keep": answers.shape[1] + 1} if count else {}
    with attach(case.model, keep=keep, forward=True, method="fastervlm"):
        both = log_probabilities(case, joined, answers, **wanted)
        for row, (single, answer) in enumerate(singles):
            alone = log_probabilities(case, single, answer)
            seen = both[row, : answer.shape[1]]
            torch.testing.assert_close(seen, alone[0], rtol=1e-3, atol=1e-3)


def test_the_last_logits_of_rows_padded_on_the_right(case):
    """Asked for by their distance from the end, they are of the same columns as without pruning."""
    batch = case.batch([0, words(9, 2)], [words(3, 5), 1, words(2, 3)], side="right")
    with torch.no_grad(), attach(case.model, keep=5, forward=True, method="fastervlm") as session:
        whole = case.model(**batch).logits
        origin = session.origin
        last = case.model(**batch, logits_to_keep=4).logits
    n_tokens = batch["input_ids"].shape[1]
    for row in range(2):
        for back in range(1, 5):
            place = (origin[row] == n_tokens - back).nonzero().flatten()
            if len(place):  # else padding
                expected = whole[row, place[0]]
                torch.testing.assert_close(last[row, -back], expected, rtol=1e-3, atol=1e-3)


def test_logits_at_positions_of_the_whole_prompt(case):
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    n_tokens = batch["input_ids"].shape[1]
    with torch.no_grad(), attach(case.model, keep=5, forward=True) as session:
        whole = case.model(**batch).logits[0]
        origin = session.origin[0].tolist()
        places = torch.tensor([2, n_tokens - 2, -1])
        some = case.model(**batch, logits_to_keep=places).logits[0]
        for number, place in enumerate((2, n_tokens - 2, n_tokens - 1)):
            torch.testing.assert_close(some[number], whole[origin.index(place)])
        dropped = next(i for i in range(n_tokens) if i not in origin)
        with pytest.raises(InputError, match=f"position {dropped}, which pruning drops"):
            case.model(**batch, logits_to_keep=torch.tensor([dropped]))
        with pytest.raises(InputError, match="1-D integer"):
            case.model(**batch, logits_to_keep=torch.ones(n_tokens, dtype=torch.bool))


# Copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_is_independent_and_not_attached(family, duplicate):
    case = BUILDERS[family]()  # called never: transformers' own hooks cannot be pickled
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    with attach(case.model, keep=5, forward=True) as session:
        twin = duplicate(case.model)
        pruned = case.model.generate(**batch, **GREEDY)
        plain = twin.generate(**batch, **GREEDY)
        assert session.report[0].n_after == 5  # of the last call of the original
        with torch.no_grad():
            for weight in twin.parameters():
                weight.zero_()
        assert torch.equal(case.model.generate(**batch, **GREEDY), pruned)
        with attach(twin, keep=3) as other:
            twin.generate(**batch, **GREEDY)
            assert other.report[0].n_after == 3
    assert torch.equal(case.model.generate(**batch, **GREEDY), plain)


def test_a_copy_made_during_a_call_records_nothing(case, prompts):
    twins = []

    def copy_once(module, args, output):
        if not twins:
            twins.append(None)
            twins[0] = copy.deepcopy(case.model)

    tower = dict(case.model.named_modules())
    name = next(name for name in tower if name.endswith(("k_proj", "attn.qkv")))
    with attach(case.model, keep=5):
        handle = tower[name].register_forward_hook(copy_once)
        case.model.generate(**prompts[0], **GREEDY)
        handle.remove()
        case.model.generate(**prompts[0], **GREEDY)
    plain = case.model.generate(**prompts[0], **GREEDY)
    assert torch.equal(twins[0].generate(**prompts[0], **GREEDY), plain)


# Compiled models, videos, budgets, vocabularies


def test_a_compiled_model_is_unwrapped(case, prompts):
    with attach(case.model, keep=5):
        expected = case.model.generate(**prompts[0], **GREEDY)
    compiled = torch.compile(case.model, backend="eager")
    with attach(compiled, keep=5) as session:
        assert session.model is case.model
        assert torch.equal(compiled.generate(**prompts[0], **GREEDY), expected)
        assert session.report[0].n_after == 5


@pytest.fixture
def compiled_tower(case):
    """The model with a compiled vision tower, and the place of that tower."""
    name, tower = case.tower, getattr(case.model.model, case.tower)
    setattr(case.model.model, name, torch.compile(tower, backend="eager"))
    yield case.model
    setattr(case.model.model, name, tower)


def test_a_compiled_tower_is_refused_where_its_attention_is_read(compiled_tower):
    with pytest.raises(AttachError, match="is compiled, which hides the attention"):
        attach(compiled_tower, keep=5)
    assert "generate" not in vars(compiled_tower)
    with attach(compiled_tower, keep=5, method="random"):
        pass


def test_a_layer_compiled_in_place_is_refused(case):
    tower = getattr(case.model.model, case.tower)
    tower.compile(backend="eager")
    try:
        with pytest.raises(AttachError, match="is compiled"):
            attach(case.model, keep=5)
    finally:
        tower._compiled_call_impl = None


def test_a_video_is_kept_whole_and_says_so(cases):
    model = cases["qwen2_5_vl"].model
    image = cases["qwen2_5_vl"].batch([0, words(4, 1)])
    ids = torch.where(image["input_ids"] == IMAGE, VIDEO, image["input_ids"])
    video = {
        "input_ids": ids,
        "attention_mask": image["attention_mask"],
        "pixel_values_videos": image["pixel_values"],
        "video_grid_thw": image["image_grid_thw"],
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
    }
    plain = model.generate(**video, **GREEDY)
    with attach(model, keep=3) as session:
        session.pruner.family.videos = None  # as in a family that does not prune videos
        with pytest.warns(UserWarning, match="videos are not pruned"):
            output = model.generate(**video, **GREEDY)
        assert torch.equal(output, plain)
        assert session.call_of(output).whole_video
        model.generate(**video, **GREEDY)  # warns once: warnings are errors here
        model.generate(**image, **GREEDY)
        assert session.report[0].n_after == 3


def test_a_video_for_a_model_of_pictures_says_so(cases):
    case = cases["llava"]
    batch = case.batch([0, words(4, 1)])
    with attach(case.model, keep=3, forward=True):
        for call in (case.model.generate, case.model):
            with pytest.raises(InputError, match="llava takes no videos"):
                call(**batch, pixel_values_videos=batch["pixel_values"])


def test_one_budget_an_image(case, batch):
    with attach(case.model, keep=[3, 0.5, 2]) as session:
        case.model.generate(**batch, **GREEDY)
        assert [image.n_after for image in session.report][::2] == [3, 2]
        assert session.report[1].n_after == round(session.report[1].n_before / 2 + 1e-9)
        with pytest.raises(BudgetError, match="3 budgets and the call has 1 images to prune"):
            case.model.generate(**case.batch([0, words(3, 1)]), **GREEDY)
    with pytest.raises(BudgetError, match="empty"):
        attach(case.model, keep=[])


def test_a_vocabulary_is_looked_at_once_a_model(case, monkeypatch):
    fitted = []
    compute = Common.of
    monkeypatch.setattr(Common, "of", lambda sample: fitted.append(1) or compute(sample))
    embed = case.model.get_input_embeddings()
    with torch.no_grad():
        embed.weight.mul_(1.0)  # counts as a change, whatever other tests did
    for _ in range(2):
        attach(case.model, keep=3, method="adav-contrast").detach()
    assert len(fitted) == 1
    with torch.no_grad():
        embed.weight.mul_(1.0)
    attach(case.model, keep=3, method="adav-contrast").detach()
    assert len(fitted) == 2


def test_pictures_encoded_before_are_those_of_the_call(case):
    one, other = case.batch([0, words(4, 1)]), case.batch([3, words(4, 1)])  # of one size
    assert one["input_ids"].shape == other["input_ids"].shape
    pictures = encode(case.model, one)
    with attach(case.model, keep=3):
        expected = case.model.generate(**one, **GREEDY)
    with attach(case.model, keep=3, encoded=pictures):
        assert torch.equal(case.model.generate(**one, **GREEDY), expected)
        with pytest.raises(InputError, match="are not the 1 encoded ones"):
            case.model.generate(**other, **GREEDY)
