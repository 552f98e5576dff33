"""SLIM adapts the MLPs of every causal language model of transformers, or refuses it by name."""

from __future__ import annotations

import re

import peft
import pytest
import torch

from budwood.errors import UnsupportedModelError
from budwood.tune import SlimConfig, observe
from budwood.tune.slim.fused_experts import is_fused, why_not
from budwood.tune.slim.keeper import layers_of
from budwood.tune.slim.targets import is_linear, mlp_modules
from tests import tiny_decoders

GATED, PLAIN = "{gate_proj,up_proj,down_proj}", "{up_proj,down_proj}"
ROUTED = "mlp.experts"
FOUND = {
    f"mlp.{GATED}": "bitnet blt cohere cohere2 cohere_compass_text cwm diffllama doge emu3 "
    "ernie4_5 exaone4 gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text "
    "gemma4_unified gemma4_unified_text got_ocr2 granite granite_swa helium hrm_text "
    "hunyuan_v1_dense hyperclovax internlm3 iquestcoder llama minicpm3 ministral ministral3 "
    "mistral mllama moss_transcribe_diarize olmo olmo2 olmo3 olmo_hybrid qwen2 qwen3 qwen3_5 "
    "qwen3_5_text seed_oss smollm3 stablelm vaultgemma youtu",
    "{intermediate,output}.dense": "bert bert-generation big_bird camembert data2vec-text electra "
    "ernie git megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta "
    "xlm-roberta-xl xmod",
    f"{ROUTED} mlp.{GATED} mlp.shared_experts.{GATED}": "afmoe axk1 axk2 bailing_hybrid "
    "deepseek_v3 deepseek_v32 dots1 dots3_note dots3_note_text ernie4_5_moe exaone_moe glm4_moe "
    "glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 kimi_linear laguna",
    "{fc1,fc2}": "bart bigbird_pegasus biogpt blenderbot blenderbot-small marian mbart mvp opt "
    "pegasus plbart trocr whisper xglm",
    ROUTED: "cohere2_moe flex_olmo gpt_oss inkling2_text mellum minimax minimax_m2 mixtral olmoe "
    "phimoe qwen3_moe zaya",
    "mlp.{dense_4h_to_h,dense_h_to_4h}": "bloom falcon fuyu gpt_neox gpt_neox_japanese persimmon",
    "mlp.{c_fc,c_proj}": "gpt-sw3 gpt2 gpt_bigcode gpt_neo openai-gpt starcoder2",
    f"{ROUTED} mlp.shared_experts.{GATED}": "aria_text deepseek_v2 deepseek_v4 kolibri1 solar_open",
    f"{ROUTED} mlp.shared_expert.{GATED}": "qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_next "
    "qwen4_exp_text",
    f"{ROUTED} mlp.shared_mlp.{GATED}": "hunyuan_v1_moe",
    f"{ROUTED} mlp.{GATED} mlp.shared_expert.{GATED}": "flint",
    f"{ROUTED} mlp.{GATED}": "beam mimo_v2_flash",
    f"{ROUTED} mlp.shared_experts.{{gate_up_proj,down_proj}}": "minimax_m3_vl_text",
    f"mlp.{PLAIN}": "apertus arcee jais2 nemotron",
    "mixer.in_proj": "falcon_mamba mamba mamba2",
    "mlp.{gate_up_proj,down_proj}": "glm glm4 phi3 phi4_multimodal",
    "block_sparse_moe.experts": "granitemoe granitemoe_swa granitemoeshared",
    "block_sparse_moe.experts shared_mlp.{input_linear,output_linear}": "granitemoehybrid",
    "mlp.{fc1,fc2}": "moshi nanochat phi",
    "mlp.{Wi,Wo}": "modernbert-decoder",
    f"feed_forward.{GATED}": "bamba falcon_h1",
    f"feed_forward.experts feed_forward.{GATED}": "jamba",
    "feed_forward.{w1,w2,w3}": "lfm2",
    "feed_forward.experts feed_forward.{w1,w2,w3}": "lfm2_moe",
    "mlp.{fc_in,fc_out}": "codegen gptj",
    "ffn.ffn.{w_in.w_0,w_in.w_1,w_out}": "cpmant",
    "ffn.{0,2}": "ctrl",
    f"ffn.{PLAIN}": "mpt",
    f"mixer.experts mixer.{PLAIN} mixer.shared_experts.{PLAIN}": "nemotron_h",
    "feed_forward.{intermediate,output}": "prophetnet",
    f"mlp_block.{GATED}": "recurrent_gemma",
    "feed_forward.{dense,output}.dense": "reformer",
    "feed_forward.{key,receptance,value}": "rwkv",
    "{lin1,lin2}": "xlm",
    "ff.{layer_1,layer_2}": "xlnet",
    "ffn.{proj_down,proj_up,proj_up_gate}": "xlstm",
    f"shared_transf.feed_forward.{GATED}": "zamba",
    "shared_transformer.feed_forward.{gate_up_proj,down_proj}": "zamba2",
}
"""Names below a block's number → architectures."""
BY_KIND = {kind: names for names, kinds in FOUND.items() for kind in kinds.split()}
BY_KIND["lfm3"] = BY_KIND["lfm2"]
REFUSED = {
    "dbrx": "DbrxExpertGLU",
    "inkling_text": "InklingSharedExperts",
    "jetmoe": "JetMoeParallelExperts",
    "llama4": "Llama4TextExperts",
    "llama4_text": "Llama4TextExperts",
    "longcat_flash": "LongcatFlashExperts",
}
"""Architecture → the class of the fused experts that SLIM does not adapt."""


def expanded(names: str) -> set[str]:
    """Names with the choices in braces written out."""
    found = set()
    for name in names.split():
        start, choices, end = re.fullmatch(r"([^{]*)(?:\{(.*)\})?([^}]*)", name).groups()
        found |= {f"{start}{choice}{end}" for choice in (choices or "").split(",")}
    return found


def adapted(model, **options) -> peft.PeftModel:
    """The model with an adapter on its default targets, in all layers."""
    config = SlimConfig(r=2, n_experts=2, n_identity=1, yielding=False, skip_first=0.0)
    return peft.get_peft_model(model, config, **options).eval()


@pytest.mark.parametrize(
    "kind", [k for k in tiny_decoders.KINDS if k not in tiny_decoders.NOT_BUILT]
)
@pytest.mark.filterwarnings("ignore")  # those of configs with fewer layers
def test_the_mlps_of_every_decoder_are_found(kind):
    known = kind in BY_KIND or kind in REFUSED
    try:
        model = tiny_decoders.model(kind)
    except Exception as error:
        if known:
            raise
        pytest.skip(f"{kind} is new and is not built from its defaults: {error}")
    if kind in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[kind]) as refusal:
            adapted(model)
        assert "target_modules" in str(refusal.value)
        return
    pattern = mlp_modules(model, model.config.to_dict())
    modules = {n: one for n, one in model.named_modules() if re.fullmatch(pattern, n)}
    assert modules
    for name, module in modules.items():
        assert is_linear(module) or (is_fused(module) and why_not(module) is None), name
        assert not re.search(r"att|vision|audio|image|lm_head", name), name
    if known:
        below = {re.sub(r"^(?:(?!\d+\.)[^.]+\.)*\d+\.", "", name) for name in modules}
        assert below == expanded(BY_KIND[kind])
    places = [model.get_submodule(name) for name in modules]  # before they are replaced
    found = [layer.get_base_layer() for layer in layers_of(adapted(model, low_cpu_mem_usage=True))]
    assert {id(one) for one in found} == {id(one) for one in places}


SMALL = (
    "afmoe aria_text arcee bart bert bloom ctrl flint glm gpt2 gpt_neox granitemoe hunyuan_v1_moe "
    "lfm2 llama mamba mixtral modernbert-decoder moshi mpt opt phi qwen2_moe rwkv xlm"
)
"""Architectures with as many ways to name and to call an MLP as can be small."""


@pytest.mark.parametrize("kind", SMALL.split())
@pytest.mark.filterwarnings("ignore")
def test_every_layer_that_is_adapted_is_called(kind):
    base = tiny_decoders.small(kind).requires_grad_(False)  # as an adapter leaves it
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        model = adapted(base)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
        for layer in layers_of(model):
            torch.nn.init.normal_(layer.weights("default")[1])
        with observe(model) as seen:
            found = model(input_ids=ids).logits
    assert not torch.equal(found, expected)
    assert {row["layer"] for row in seen.rows()} == {one.slim_key for one in layers_of(model)}
