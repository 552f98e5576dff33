"""Tensor parallelism: two processes, each with half of the heads, choose what one would choose."""

from __future__ import annotations

from transformers import AutoProcessor

from budwood.serve.vllm import modeling
from tests import tiny_vlm
from tests.vllm import tiny
from tests.vllm.tiny import TEXT, answer, attached, chat, engine, picture, request, settings

TWO = TEXT | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def note(model):
    """Note every choice from here on, in the process of a rank."""
    model.noted, choose = [], model.choose

    def noting(*args):
        selection = choose(*args)
        model.noted.append(selection.indices.tolist())
        return selection

    model.choose = noting


def noted(model):
    return model.noted


def keep_ranks_apart(_model):
    modeling.mean_over_ranks = lambda scores, *_: scores


def test_two_ranks_keep_the_same_tokens(tmp_path):
    folder = tiny_vlm.save_llava(tmp_path, tiny.CLIP, TWO)
    processor = AutoProcessor.from_pretrained(folder)
    requests = [
        request(chat(processor, "what is on the left ?"), picture(0)),
        request(chat(processor, "how many red ?", n_images=2), picture(1), picture(2)),
    ]
    kept, answers = attached(folder, requests, keep=5)
    overrides = settings("LlavaForConditionalGeneration", keep=5)
    with engine(
        folder, overrides, tensor_parallel_size=2, distributed_executor_backend="mp"
    ) as llm:
        llm.apply_model(note)
        assert answer(llm, requests) == answers
        assert llm.apply_model(noted) == [kept, kept]

        # The negative control: with their own heads alone they choose otherwise.
        llm.apply_model(keep_ranks_apart)
        again = {"mm_processor_kwargs": {"budwood_keep": 5 / 16}}  # the same count, another hash
        answer(llm, [one | again for one in requests])
        first, second = llm.apply_model(noted)
        assert len(first) == 2 * len(kept) and first[len(kept) :] != second[len(kept) :]
