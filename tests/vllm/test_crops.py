"""Models that see a picture in several crops keep the tokens that `attach` keeps."""

from __future__ import annotations

from functools import partial

import pytest
from transformers import AutoProcessor

from tests.vllm import tiny
from tests.vllm.tiny import answer, attached, chat, engine, picture, recorded, request, settings

ASKED = ["what is on the left ?", "how many red ?", "is there a green"]
SAVED = {
    "llava-next": ("LlavaNextForConditionalGeneration", tiny.save_llava_next),
    "llava-onevision": ("LlavaOnevisionForConditionalGeneration", tiny.save_onevision),
    "internvl": ("InternVLForConditionalGeneration", tiny.save_internvl),
    "internvl-6b": (
        "InternVLForConditionalGeneration",
        partial(tiny.save_internvl, use_qk_norm=True, norm_type="rms_norm"),
    ),
}


def chats(processor):
    """One crop, several, and in the last one as many as LLaVA-OneVision shrinks."""
    return [
        request(chat(processor, ASKED[0]), picture(0, 48, 24)),
        request(chat(processor, ASKED[1], n_images=2), picture(1, 40, 48), picture(2, 20, 48)),
        request(chat(processor, ASKED[2]), picture(0, 48, 24)),
        request(chat(processor, ASKED[0], "yes", ASKED[2]), picture(0, 48, 24)),
        request(chat(processor, ASKED[2]), picture(3, 90, 96)),
    ]


@pytest.mark.parametrize("kind", SAVED)
def test_same_tokens_and_answers(tmp_path, kind):
    architecture, save = SAVED[kind]
    folder = save(tmp_path)
    processor = AutoProcessor.from_pretrained(folder)
    requests = chats(processor)
    kept, answers = attached(folder, requests, keep=0.2)
    assert kept[0] != kept[3], "questions must matter"
    with engine(folder, settings(architecture, keep=0.2), max_num_batched_tokens=64) as llm:
        noted = recorded(llm)
        assert [answer(llm, [one])[0] for one in requests] == answers
        # The image of the fourth chat has the question of the third, so it is known already.
        assert sorted(noted) == sorted([*kept[:4], kept[5]])
        llm.reset_prefix_cache()
        assert answer(llm, requests) == answers  # in one batch

        # The negative control: scores in the encoder's order choose other tokens.
        model = tiny.model_of(llm)
        saliency = model.saliency
        model.saliency = lambda *args: [scores.flip(0) for scores in saliency(*args)]
        n_noted = len(noted)
        again = {"mm_processor_kwargs": {"budwood_keep": 0.2000001}}  # the same count, another hash
        answer(llm, [requests[0] | again])
        assert len(noted) == n_noted + 1 and noted[-1] != kept[0]
