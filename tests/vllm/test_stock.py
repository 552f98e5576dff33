"""With the plugin installed, a model that does not ask for it is served by vLLM's own classes."""

from __future__ import annotations

from transformers import AutoProcessor

from budwood import catalogue
from budwood.serve.vllm import served_name
from tests.vllm import tiny
from tests.vllm.tiny import answer, attached, chat, engine, picture, request


def test_a_stock_architecture_is_unchanged(tmp_path):
    from vllm import ModelRegistry, SamplingParams
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

    folder = tiny.save_qwen(tmp_path, "qwen2_vl")
    processor = AutoProcessor.from_pretrained(folder)
    requests = [
        request(chat(processor, "how many red ?"), picture(0, 48, 32)),
        request(chat(processor, "how many red ?", n_images=2), picture(1, 40, 64), picture(0)),
    ]
    kept, answers = attached(folder, requests, keep=1.0)
    with engine(folder, max_num_batched_tokens=64) as llm:
        known = ModelRegistry.get_supported_archs()
        for entry in catalogue.SERVED.values():
            name = entry.facts["architecture"]
            assert name in known and served_name(name) in known
        assert type(tiny.model_of(llm)) is Qwen2VLForConditionalGeneration
        assert answer(llm, requests) == answers
        greedy = SamplingParams(temperature=0, max_tokens=1)
        prompt = llm.generate(requests[:1], greedy, use_tqdm=False)[0].prompt_token_ids
        token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert prompt.count(token) == len(kept[0]) == 24
