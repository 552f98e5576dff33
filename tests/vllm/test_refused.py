"""Settings that a server must not start with, as the models themselves refuse them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from budwood.serve.vllm.llava import BudwoodLlava
from budwood.serve.vllm.qwen import BudwoodQwen2VL


def refuse(kind, config, **changes):
    """Call what a model calls before it is built."""
    given = {
        "mm_encoder_tp_mode": "weights",
        "video_pruning_rate": None,
        "cudagraph_mm_encoder": False,
        "compile_mm_encoder": False,
        "pipeline_parallel_size": 1,
        "speculative_config": None,
    } | changes
    options = SimpleNamespace(**given)
    model = SimpleNamespace(hf_config=config, get_multimodal_config=lambda: options)
    kind._refuse(
        kind.__new__(kind),
        SimpleNamespace(
            model_config=model,
            compilation_config=options,
            parallel_config=options,
            speculative_config=options.speculative_config,
        ),
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_encoder_tp_mode": "data"}, "leave --mm-encoder-tp-mode out"),
        ({"cudagraph_mm_encoder": True}, "cudagraph_mm_encoder hides the attention"),
        ({"compile_mm_encoder": True}, "compile_mm_encoder hides the attention"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: later stages do not see"),
        ({"speculative_config": object()}, "leave --speculative-config out"),
        ({"video_pruning_rate": 0.5}, "leave --video-pruning-rate out"),
    ],
)
def test_settings_of_a_model_with_m_rope(changes, reason):
    config = AutoConfig.for_model("qwen2_vl")
    refuse(BudwoodQwen2VL, config)
    with pytest.raises(ValueError, match=reason):
        refuse(BudwoodQwen2VL, config, **changes)


def test_stages_of_a_model_without_it_are_fine():
    refuse(BudwoodLlava, AutoConfig.for_model("llava"), pipeline_parallel_size=2)


def test_an_unknown_tower():
    config = AutoConfig.for_model("llava", vision_config={"model_type": "pixtral"})
    with pytest.raises(ValueError, match="vision tower 'pixtral' of 'llava' is not served"):
        refuse(BudwoodLlava, config)
