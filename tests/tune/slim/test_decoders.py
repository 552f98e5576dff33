"""SLIM finds the MLPs of every causal language model of transformers, or refuses it by name."""

from __future__ import annotations

import re

import pytest

from budwood.errors import UnsupportedModelError
from budwood.tune.slim.fused_experts import is_fused, why_not
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
            mlp_modules(model, model.config.to_dict())
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
