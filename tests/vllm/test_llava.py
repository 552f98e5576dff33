"""LLaVA in vLLM keeps the tokens that `attach` keeps, and answers the same."""

from __future__ import annotations

import pytest
from transformers import AutoProcessor

from budwood.serve.vllm.processing import AskedInputs, ProcessorInputs
from tests.vllm import tiny
from tests.vllm.tiny import answer, attached, chat, engine, picture, recorded, request, settings

LLAVA = "LlavaForConditionalGeneration"
ASKED = ["what is on the left ?", "how many red ?", "is there a green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def llm(folder):
    """Small enough batches that prompts are cut, and a cache for the kept tokens of five images."""
    with engine(
        folder,
        settings(LLAVA, keep=9),
        max_num_batched_tokens=48,
        max_num_seqs=4,
        mm_processor_cache_gb=1,
    ) as started:
        yield started


def chats(processor):
    return [
        request(chat(processor, ASKED[0]), picture(0)),
        request(chat(processor, ASKED[1], n_images=2), picture(1), picture(0)),
        request(chat(processor, ASKED[2]), picture(0)),
        request(chat(processor, ASKED[0], "yes", ASKED[2]), picture(0)),
    ]


def test_same_tokens_and_answers(llm, folder, processor):
    """In one batch, one by one, and again after the prefix cache was emptied."""
    requests = chats(processor)
    kept, answers = attached(folder, requests, keep=9)
    assert kept[0] != kept[3], "questions must matter"
    noted = recorded(llm)
    assert answer(llm, requests) == answers
    # The image of the last chat has the question of the third, so it is known already.
    assert sorted(noted) == sorted(kept[:4])
    assert [answer(llm, [one])[0] for one in requests] == answers
    assert len(noted) == 4, "encoded before"
    llm.reset_prefix_cache()
    assert answer(llm, requests) == answers
    assert len(noted) == 4, "encoded before"


def test_prompts_are_short_and_their_beginning_is_cached(llm, processor):
    from vllm import SamplingParams

    one = request(chat(processor, ASKED[1]), picture(5))
    greedy = SamplingParams(temperature=0, max_tokens=1)
    first, second = (llm.generate([one], greedy, use_tqdm=False)[0] for _ in range(2))
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert first.prompt_token_ids.count(token) == 9
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_request_has_a_budget_of_its_own(llm, folder, processor):
    prompt = chat(processor, ASKED[0])
    for keep in (4, 0.75, 100):
        one = request(prompt, picture(0), mm_processor_kwargs={"budwood_keep": keep})
        kept, answers = attached(folder, [one], keep=keep)
        noted = recorded(llm)
        assert answer(llm, [one]) == answers
        assert noted == kept


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"budwood_keep": 0}, "below 1"), ({"budwood_kep": 4}, "known: budwood_keep")],
)
def test_bad_requests_are_refused(llm, processor, given, reason):
    one = request(chat(processor, ASKED[0]), picture(0), mm_processor_kwargs=given)
    with pytest.raises(ValueError, match=reason):
        answer(llm, [one])


def test_encoding_goes_in_batches(llm, processor):
    """A step may schedule more images than the encoder's budget, since it counts kept tokens."""
    model = tiny.model_of(llm)
    layouts = model._layouts({}, 5)
    assert list(model._batches(layouts)) == [slice(0, 3), slice(3, 5)]


def test_a_question_left_out_of_the_hash_is_noticed(llm, processor, monkeypatch):
    """The negative control: then the second question gets the first one's tokens."""
    monkeypatch.setattr(AskedInputs, "get_mm_hashes", hashes_without_question)
    two = [request(chat(processor, text), picture(7)) for text in ASKED[:2]]
    noted = recorded(llm)
    for one in two:
        answer(llm, [one])
    assert len(noted) == 1


def hashes_without_question(self, *args, **kwargs):
    plain = {k: v for k, v in self.hf_processor_mm_kwargs.items() if "budwood" not in k}
    self.hf_processor_mm_kwargs, asked = plain, self.hf_processor_mm_kwargs
    hashes = ProcessorInputs.get_mm_hashes(self, *args, **kwargs)
    self.hf_processor_mm_kwargs = asked
    return hashes
