"""Qwen-VL models in vLLM keep the tokens that `attach` keeps, at the same places."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor

from budwood.prune.families.qwen import frames_layout
from budwood.serve.vllm.qwen import _DIGIT, _PrunesGrids
from tests.vllm import tiny
from tests.vllm.tiny import answer, attached, chat, engine, picture, recorded, request, settings

ASKED = ["what is on the left ?", "how many red ?", "is there a green"]


def chats(processor):
    return [
        request(chat(processor, ASKED[0]), picture(0, 48, 32)),
        request(chat(processor, ASKED[1], n_images=2), picture(1, 40, 64), picture(0, 48, 32)),
        request(chat(processor, ASKED[2]), picture(0, 48, 32)),
        request(chat(processor, ASKED[0], "yes", ASKED[2]), picture(0, 48, 32)),
    ]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_same_tokens_and_answers(tmp_path, kind):
    folder = tiny.save_qwen(tmp_path, kind)
    processor = AutoProcessor.from_pretrained(folder)
    requests = chats(processor)
    kept, answers = attached(folder, requests, keep=7)
    architecture = tiny.QWENS[kind][2].__name__
    with engine(folder, settings(architecture, keep=7), max_num_batched_tokens=32) as llm:
        noted = recorded(llm)
        assert [answer(llm, [one])[0] for one in requests] == answers
        assert sorted(noted) == sorted(kept[:4])
        llm.reset_prefix_cache()
        assert answer(llm, requests) == answers  # in one batch, of encoded images
        model = tiny.model_of(llm)
        assert not model._offsets.any(), "a step without images must find none"

        # The negative control: without rows and columns answers differ.
        marked = model.marked
        model.marked = lambda features, layout, kept: marked(features, layout, None)
        elsewhere = [
            request(
                one["prompt"],
                *one["multi_modal_data"]["image"],
                mm_processor_kwargs={"budwood_keep": 7 / 24},
            )
            for one in requests[:1]
        ]
        assert answer(llm, elsewhere) != answers[:1]
        assert noted[-1] == kept[0]


def test_same_tokens_of_qwen3(tmp_path):
    """Its answers are not compared: stock vLLM's differ from transformers' on this model."""
    folder = tiny.save_qwen(tmp_path, "qwen3_vl")
    requests = chats(AutoProcessor.from_pretrained(folder))
    kept, answers = attached(folder, requests, keep=7)
    overrides = settings("Qwen3VLForConditionalGeneration", keep=7)
    with engine(folder, overrides, max_num_batched_tokens=32) as llm:
        noted = recorded(llm)
        assert answer(llm, requests[:1]) == answers[:1]
        assert answer(llm, requests) == [answer(llm, [one])[0] for one in requests]
        assert {*map(tuple, noted)} == {*map(tuple, kept)}
        assert not tiny.model_of(llm)._offsets.any()


def test_rows_and_columns_survive_bfloat16():
    layout = frames_layout(1, 300, 700)
    kept = torch.tensor([0, 256 * 700 + 257, 299 * 700 + 699])
    marked = _PrunesGrids.marked(None, torch.ones(3, 5, dtype=torch.bfloat16), layout, kept)
    digits = marked[:, 5:].long().unflatten(1, (2, 2))
    places = digits[..., 0] * _DIGIT + digits[..., 1]
    assert places.tolist() == [[0, 0], [256, 257], [299, 699]]
