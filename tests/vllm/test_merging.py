"""Methods that merge tokens hand the same features to the language model in vLLM."""

from __future__ import annotations

import pytest
from transformers import AutoProcessor

from tests.vllm import tiny
from tests.vllm.tiny import answer, attached, chat, engine, picture, request, settings

SAVED = {
    "LlavaNextForConditionalGeneration": tiny.save_llava_next,  # newlines stay as they are
    "Qwen3VLForConditionalGeneration": lambda folder: tiny.save_qwen(folder, "qwen3_vl"),
}
MERGING = "adav+:merge=1.0+alike=0.0+reach=1000"


@pytest.mark.parametrize("architecture", SAVED)
def test_same_answers(tmp_path, architecture):
    folder = SAVED[architecture](tmp_path)
    prompt = chat(AutoProcessor.from_pretrained(folder), "what is on the left ?")
    one = request(prompt, picture(0, 48, 32))
    pruning = {"keep": 3, "method": MERGING}
    _, answers = attached(folder, [one], positions="compact", **pruning)
    unmerged = {"keep": 3, "method": MERGING.replace("merge=1.0", "merge=0.0")}
    assert answers != attached(folder, [one], positions="compact", **unmerged)[1]
    with engine(folder, settings(architecture, **pruning), max_num_batched_tokens=64) as llm:
        assert answer(llm, [one]) == answers
