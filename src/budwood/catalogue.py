"""Everything that has a name: methods, model families, encoders, with what `budwood ls` shows.

A new method is a new file and an entry here. The registries, such as ``budwood.prune.METHODS``, are
made from these tables. Nothing is imported here, so that lists and ``--help`` need no torch.
"""

from __future__ import annotations

from budwood.registry import Entry


def _method(target: str, reads: str, summary: str, source: str, merges: str = "no") -> Entry:
    facts = {"reads": reads, "merges": merges}
    return Entry(summary, source, facts, f"budwood.prune.methods.{target}")


PRUNING_METHODS = {
    "adav": _method(
        "adav:AdaV",
        "text, saliency",
        "Keep tokens by question and by saliency, split anew for each image and question.",
        "AdaV, Findings of ACL 2025 (2025.findings-acl.258); arXiv 2501.09532",
    ),
    "adav-official": _method(
        "adav_official:AdaVOfficial",
        "text, saliency",
        "AdaV with its authors' selection, including its faults. For LLaVA and LLaVA-NeXT.",
        "the public code of AdaV, JiayiV/AdaV",
    ),
    "adav-contrast": _method(
        "adav_contrast:AdaVContrast",
        "text, saliency",
        'AdaV with a relevance score that ignores words like "the". Ours, not the paper\'s.',
        "ours, after AdaV; all-but-the-top by Mu and Viswanath, ICLR 2018",
    ),
    "adav+": _method(
        "adav_plus:AdaVPlus",
        "text, saliency, grid",
        "Keep salient or relevant tokens that show what no kept token nearby shows yet. Ours.",
        "ours, after AdaV, SCOPE, Cen-Prune, EADP and PruMerge",
        merges="yes",
    ),
    "fastervlm": _method(
        "fastervlm:FasterVLM",
        "saliency",
        "Keep the tokens that the vision encoder's [CLS] attends to most, whatever the question.",
        "FasterVLM, arXiv 2412.01818",
    ),
    "t2i": _method(
        "t2i:T2I",
        "text",
        "Keep the tokens nearest to the question in the LLM's embedding space, whatever the "
        "saliency.",
        "AdaV (text-to-image attention alone), 2025.findings-acl.258",
    ),
    "divprune": _method(
        "divprune:DivPrune",
        "nothing",
        "Keep tokens that differ from each other as much as possible, whatever the question.",
        "DivPrune, CVPR 2025, arXiv 2503.02175",
    ),
    "cdpruner": _method(
        "cdpruner:CDPruner",
        "text",
        "Keep the tokens that a conditional determinantal point process finds most probable.",
        "CDPruner, NeurIPS 2025, arXiv 2506.10967",
    ),
    "scope": _method(
        "scope:Scope",
        "saliency",
        "Keep salient tokens that cover parts of the picture which no kept token covers yet.",
        "SCOPE, NeurIPS 2025, arXiv 2510.24214",
    ),
    "mmtok": _method(
        "mmtok:MMTok",
        "text",
        "Keep the tokens that cover the words of the question and all other tokens at once.",
        "MMTok, ICLR 2026, arXiv 2508.18264",
    ),
    "tops": _method(
        "tops:Tops",
        "saliency",
        "Keep tokens by the sum of saliency, coverage gain and distance, each scaled to [0, 1].",
        "TOPS (stage 1), arXiv 2606.27161",
    ),
    "eadp": _method(
        "eadp:EADP",
        "text, grid",
        "Keep the tokens that represent what the sharpest words of the question point to.",
        "EADP, ECCV 2026",
    ),
    "prunesid": _method(
        "prunesid:PruneSID",
        "saliency",
        "Keep the most salient tokens of each semantic group that do not resemble each other.",
        "PruneSID, ICLR 2026, arXiv 2603.09480",
    ),
    "vispruner": _method(
        "vispruner:VisPruner",
        "saliency",
        "Keep some tokens by saliency, and others by removing near duplicates from the rest.",
        "VisPruner, ICCV 2025, arXiv 2412.01818",
    ),
    "visionzip": _method(
        "visionzip:VisionZip",
        "saliency, keys",
        "Keep the most salient tokens, and merge all others into a few contextual ones.",
        "VisionZip, CVPR 2025, arXiv 2412.04467",
        merges="yes",
    ),
    "prumerge-plus": _method(
        "prumerge:PruMergePlus",
        "saliency, keys",
        "Keep outliers of saliency and evenly spaced tokens, and merge dropped ones into them.",
        "LLaVA-PruMerge, ICCV 2025, arXiv 2403.15388",
        merges="yes",
    ),
    "cen-divprune": _method(
        "cen_prune:CenDivPrune",
        "nothing",
        "DivPrune on centred tokens; tokens unlike the rest of the picture come first.",
        "Cen-Prune, around DivPrune, CVPR 2025, arXiv 2503.02175",
    ),
    "cen-cdpruner": _method(
        "cen_prune:CenCDPruner",
        "text",
        "CDPruner on centred tokens; tokens unlike the rest of the picture come first.",
        "Cen-Prune, around CDPruner, NeurIPS 2025, arXiv 2506.10967",
    ),
    "cen-scope": _method(
        "cen_prune:CenScope",
        "saliency",
        "SCOPE on centred tokens; tokens unlike the rest of the picture come first.",
        "Cen-Prune, around SCOPE, NeurIPS 2025, arXiv 2510.24214",
    ),
    "random": _method(
        "baselines:Random",
        "nothing",
        "Keep a random subset of the tokens, drawn without replacement.",
        "baseline",
    ),
    "uniform": _method(
        "baselines:Uniform",
        "nothing",
        "Keep tokens at even distances along the order in which the LLM sees them.",
        "baseline",
    ),
    "overview": _method(
        "baselines:Overview",
        "grid",
        "Keep the overview of a picture and drop its tiles, as for a smaller picture.",
        "baseline",
    ),
}
"""Of `budwood prune`. ``reads`` says which signals a method takes, ``merges`` whether kept tokens
take in dropped ones."""


INSIDE_METHODS = {
    "fastv": Entry(
        "Drop visual tokens once, after the first layers of the LLM.",
        "FastV, ECCV 2024, arXiv 2403.06764",
        target="budwood.prune.inside.schedules:FastV",
    ),
    "pyramiddrop": Entry(
        "Drop visual tokens in stages, as the layers of the LLM go by.",
        "PyramidDrop, CVPR 2025, arXiv 2410.17247",
        target="budwood.prune.inside.schedules:PyramidDrop",
    ),
}
"""Of :func:`budwood.prune.inside.attach_inside`, and for comparison in `budwood bench prune`."""


INSIDE_HINTS = dict.fromkeys(
    INSIDE_METHODS, "prunes inside the LLM; use attach_inside() or `budwood bench prune`"
)
"""What is said where only methods before the LLM are taken."""


QUESTIONS = ("current", "all", "turn")
"""Which text a pruning method may choose by; see :class:`budwood.prune.question.Question`."""


PATCH_SCORES = ("mean", "max", "norm")
"""How patches that become one token make its saliency; see :func:`budwood.prune.attach`."""


POSITIONS = ("compact", "original")
"""Where the LLM sees what is kept; see :func:`budwood.prune.attach`."""


def _family(module: str, name: str, summary: str) -> Entry:
    module = f"budwood.prune.families.{module}"
    return Entry(summary, module, target=f"{module}:{name}")


FAMILIES = {
    "llava": _family(
        "llava", "Llava", "LlavaForConditionalGeneration (LLaVA-1.5 and the sprout model)."
    ),
    "llava_next": _family("llava_next", "LlavaNext", "LlavaNextForConditionalGeneration."),
    "llava_onevision": _family(
        "llava_onevision",
        "LlavaOnevision",
        "LlavaOnevisionForConditionalGeneration, images and videos.",
    ),
    "llava-pixtral": _family(
        "pixtral", "Pixtral", "LlavaForConditionalGeneration with a Pixtral tower (Pixtral-12B)."
    ),
    "mistral3": _family(
        "pixtral", "Mistral3", "Mistral3ForConditionalGeneration (Mistral Small 3.1 and later)."
    ),
    "internvl": _family("internvl", "InternVL", "InternVLForConditionalGeneration (InternVL3)."),
    "idefics3": _family("idefics3", "Idefics3", "Idefics3ForConditionalGeneration."),
    "smolvlm": _family("smolvlm", "SmolVLM", "SmolVLMForConditionalGeneration (and SmolVLM2)."),
    "qwen2_vl": _family(
        "qwen2_vl", "Qwen2VL", "Qwen2VLForConditionalGeneration, images and videos."
    ),
    "qwen2_5_vl": _family(
        "qwen2_5_vl",
        "Qwen25VL",
        "Qwen2_5_VLForConditionalGeneration, images and videos.",
    ),
    "qwen3_vl": _family(
        "qwen3_vl", "Qwen3VL", "Qwen3VLForConditionalGeneration, images and videos."
    ),
    "qwen3_vl_moe": _family(
        "qwen3_vl", "Qwen3VLMoe", "Qwen3VLMoeForConditionalGeneration, images and videos."
    ),
    "gemma3": _family("gemma", "Gemma3", "Gemma3ForConditionalGeneration."),
    "paligemma": _family(
        "gemma", "PaliGemma", "PaliGemmaForConditionalGeneration (PaliGemma 1 and 2)."
    ),
}
"""Vision-language models that can be pruned, by ``config.model_type``.

A name such as ``llava-pixtral`` has the tower's ``model_type`` as well, where that makes a family.
"""


def _served(architecture: str, target: str) -> Entry:
    summary = f"{architecture} with pruned images, in vLLM."
    facts = {"architecture": architecture}
    return Entry(summary, facts=facts, target=f"budwood.serve.vllm.{target}")


SERVED = {
    "llava": _served("LlavaForConditionalGeneration", "llava:BudwoodLlava"),
    "llava_next": _served("LlavaNextForConditionalGeneration", "llava:BudwoodLlavaNext"),
    "llava_onevision": _served(
        "LlavaOnevisionForConditionalGeneration", "llava:BudwoodLlavaOnevision"
    ),
    "internvl": _served("InternVLForConditionalGeneration", "internvl:BudwoodInternVL"),
    "qwen2_vl": _served("Qwen2VLForConditionalGeneration", "qwen:BudwoodQwen2VL"),
    "qwen2_5_vl": _served("Qwen2_5_VLForConditionalGeneration", "qwen:BudwoodQwen25VL"),
    "qwen3_vl": _served("Qwen3VLForConditionalGeneration", "qwen:BudwoodQwen3VL"),
}
"""Families that the plugin for vLLM serves, by ``config.model_type``."""


def _tuner(summary: str, kind: str = "method") -> Entry:
    return Entry(summary, facts={"kind": kind})


def _ablation(summary: str) -> Entry:
    return _tuner(summary, "ablation")


TUNERS = {
    "lora": _tuner("LoRA on the MLP projections of all layers."),
    "lora-wd": _tuner("LoRA with decoupled weight decay."),
    "lora-kl": _tuner("LoRA with a KL penalty to the base model on the training prompts."),
    "lora-own": _tuner("LoRA with a KL penalty to the base model on self-generated text."),
    "lora-late": _tuner("LoRA on the later layers only, those that SLIM adapts."),
    "lora-attn": _tuner("LoRA on attention as well, at a lower rank."),
    "lora-mask": _tuner(
        "LoRA with a KL penalty over all tokens but the right one (Mask the Target)."
    ),
    "lora-r10": _tuner("LoRA at rank 10, the best balance in PEFT's method_comparison."),
    "dora": _tuner("LoRA with a separate magnitude for each column (DoRA, arXiv 2402.09353)."),
    "oft": _tuner("Orthogonal fine-tuning of PEFT: rotations of blocks of the input."),
    "osf": _tuner("OSF of PEFT: the smallest singular directions of each weight are trained."),
    "corda": _tuner("LoRA that starts away from self-generated text (CorDA, knowledge-preserved)."),
    "moe": _tuner("Top-2 mixture of LoRA experts without SLIM's other parts, as MixLoRA."),
    "slim": _tuner("Soft LoRA and identity mixture (SLIM, NAACL 2025), our reconstruction."),
    "slim-no-identity": _ablation("SLIM without identity experts, and so without yielding."),
    "slim-no-router": _ablation("SLIM without a router: all experts weigh the same."),
    "slim-no-clustering": _ablation("SLIM with the whitened distance to one running mean."),
    "slim-no-yielding": _ablation("SLIM whose experts do not yield far from the training data."),
    "slim-merging": _ablation("SLIM with random masks on B·A (dynamic merging)."),
    "slim-answers": _ablation("SLIM for which answers alone count as training data."),
    "slim-no-l1": _ablation("SLIM without its L1 penalty."),
    "slim-whitened": _ablation("SLIM with the distance to the training data alone."),
    "slim-paper": _ablation(
        "SLIM as the paper reads, in all layers, but for a standardised distance and our β."
    ),
    "slim-max": _ablation("SLIM with the paper's distance, the largest over channels."),
    "slim-rms": _ablation("SLIM with the root mean square over channels as distance."),
    "slim-all-tokens": _ablation("SLIM whose statistics include the tokens of prompts."),
    "slim-by-module": _ablation("SLIM in which each module yields by its own input's distance."),
    "slim-all-layers": _ablation("SLIM in all layers at the same rank, so with more parameters."),
    "slim-mask": _ablation("SLIM with random masks on B·A, the last of which stays at inference."),
}
"""Of `budwood tune`. ``kind``: an ablation is SLIM with a part left out or changed."""


def _encoder(
    target: str, trained_on: str, text: str, weights: str, file: str, licence: str = "Apache-2.0"
) -> Entry:
    facts = {"text": text, "weights": weights, "file": file, "licence": licence}
    return Entry(trained_on, weights, facts, f"budwood.points.encoders.{target}")


def _sprout(name: str, file: str, trained_on: str) -> Entry:
    return _encoder(f"sprout:{name}", trained_on, "minilm", "this package", file)


_FOUR_SETS = "Objaverse, ShapeNet, ABO, 3D-FUTURE"


def _ulip(name: str, trained_on: str, text: str, file: str) -> Entry:
    path = f"ULIP-2/pretrained_models/ULIP-2-PointBERT-{file}-pretrained.pt"
    return _encoder(f"pointbert:{name}", trained_on, text, "SFXX/ulip", path, "BSD-3-Clause")


def _openshape(name: str, text: str, width: str) -> Entry:
    repository = f"OpenShape/openshape-pointbert-vit{width}-rgb"
    return _encoder(f"openshape:{name}", _FOUR_SETS, text, repository, "model.pt")


def _uni3d(size: str, name: str) -> Entry:
    file = f"modelzoo/uni3d-{size}/model.pt"
    return _encoder(f"uni3d:{name}", _FOUR_SETS, "eva02-e", "BAAI/Uni3D", file, "MIT")


ENCODERS = {
    "sprout": _sprout(
        "SPROUT", "sprout.safetensors", "indoor and road objects, dense and as sensors see them"
    ),
    "sprout-dense": _sprout(
        "SPROUT_DENSE", "sprout-dense.safetensors", "indoor objects, dense; to try adaptation on"
    ),
    "ulip": _ulip("ULIP", "Objaverse, no colours", "ulip", "8k-xyz-pc-slip_vit_b-objaverse"),
    "ulip2": _ulip(
        "ULIP2", "Objaverse, ShapeNet", "bigg", "10k-xyzrgb-pc-vit_g-objaverse_shapenet"
    ),
    "openshape": _openshape("OPENSHAPE", "bigg", "g14"),
    "openshape-l14": _openshape("OPENSHAPE_L14", "clip-l14", "l14"),
    "openshape-b32": _openshape("OPENSHAPE_B32", "clip-b32", "b32"),
    "uni3d-ti": _uni3d("ti", "TINY"),
    "uni3d-s": _uni3d("s", "SMALL"),
    "uni3d-b": _uni3d("b", "BASE"),
    "uni3d-l": _uni3d("l", "LARGE"),
    "uni3d-g": _uni3d("g", "GIANT"),
}
"""Point encoders: the shapes that each was trained on, its text tower, where its weights are."""


def _adaptation(name: str, summary: str, source: str, sees: str = "one") -> Entry:
    return Entry(summary, source, {"sees": sees}, f"budwood.points.methods:{name}")


_ESP_ZERO = "ESP-Zero, arXiv 2404.19639 (a reconstruction)"

ADAPTATIONS = {
    "frozen": _adaptation("FROZEN", "the encoder as published", "no adaptation"),
    "tokens": _adaptation("TOKENS", "the frozen encoder with density-aware tokens", "ours"),
    "adabn": _adaptation(
        "ADABN", "BatchNorm statistics of sparse clouds", "AdaBN, arXiv 1603.04779"
    ),
    "tent": _adaptation(
        "TENT",
        "lowers the entropy of predictions by scales and shifts of the norms",
        "Tent, arXiv 2006.10726",
    ),
    "t3a": _adaptation(
        "T3A",
        "training-free: class embeddings move towards the most certain clouds",
        "T3A, NeurIPS 2021",
        "all",
    ),
    "uni-adapter": _adaptation(
        "UNI_ADAPTER",
        "training-free: prototypes of each label from the clouds so far, smoothed on a graph",
        "Uni-Adapter, AAAI 2026, arXiv 2511.15311",
        "earlier",
    ),
    "point-cache": _adaptation(
        "POINT_CACHE",
        "training-free: the most certain clouds so far vote for their labels, whole and in parts",
        "Point-Cache, CVPR 2025, arXiv 2503.12150",
        "earlier",
    ),
    "vpt-shallow": _adaptation("VPT_SHALLOW", "prompts before all blocks", "VPT, arXiv 2203.12119"),
    "vpt-deep": _adaptation("VPT_DEEP", "prompts in each block", "VPT, arXiv 2203.12119"),
    "lora": _adaptation("LORA", "low-rank differences", "LoRA, arXiv 2106.09685"),
    "full": _adaptation("FULL", "a copy of every parameter", "fine-tuning"),
    "esp-zero-paper": _adaptation(
        "ESP_ZERO_PAPER", "fused cross-attention, random start, negatives alone", _ESP_ZERO
    ),
    "esp-zero": _adaptation(
        "ESP_ZERO",
        "fused cross-attention, closed start, negatives and cosine, statistics by density",
        f"{_ESP_ZERO}, with changes of ours",
    ),
    "sparse-full": _adaptation(
        "SPARSE_FULL",
        "a copy of every parameter, trained and faded in as in sparse-lora",
        "fine-tuning, WiSE-FT, arXiv 2109.01903",
    ),
    "sparse-lora": _adaptation(
        "SPARSE_LORA",
        "low-rank differences and a copy of the layers that make tokens, trained on clouds sparser "
        "than the encoder's and faded in",
        "ours, after ESP-Zero and WiSE-FT, arXiv 2109.01903",
    ),
}
"""Ways to adapt a point encoder to sparse clouds, for `budwood points adapt`. ``sees`` says which
clouds of a call a label depends on: that one alone, the earlier ones too, or all."""


CLOUDS = {
    "indoor": ("furniture.npz", "parts.npz"),
    "road": ("road.npz",),
}
"""The files of point clouds that ship, by part."""
CLOUD_PARTS = (*CLOUDS, "both")
"""What can be asked for."""


BOX_FORMATS = {
    "json": Entry("boxes/NAME.json, one file per frame: all that is known about each object"),
    "csv": Entry("boxes.csv: one line per object, for all frames"),
    "kitti": Entry(
        "kitti/NAME.txt: labels in the format of KITTI's object detection, without unknown objects"
    ),
    "nuscenes": Entry(
        "nuscenes.json: results in the format of nuScenes' detection task, without unknown objects"
    ),
    "clusters": Entry(
        "clusters/NAME.npy: the points of each object, with poses of several frames together: "
        "unlabelled clouds for `budwood points adapt`"
    ),
    "png": Entry("views/NAME.png: the frame from above, with boxes and labels"),
    "html": Entry("pages/NAME.html: the frame in 3D, to turn in a browser, without a server"),
}
"""What `budwood scan` writes into its folder."""


def _model(family: str, summary: str, source: str = "the hub") -> Entry:
    return Entry(summary, source, {"family": family})


MODELS = {
    "sprout": _model(
        "llava_next",
        "embedded default: a small LLaVA-NeXT around SmolLM2-135M, up to 1,280 visual tokens",
        "this package",
    ),
    "sprout-256": _model("llava", "its weights as a LLaVA of 256 visual tokens", "this package"),
    "llava-hf/llava-1.5-7b-hf": _model("llava", "LLaVA-1.5, 576 visual tokens"),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _model("llava_next", "LLaVA-NeXT, up to 2,880"),
    "google/gemma-3-4b-it": _model("gemma3", "Gemma 3, 256 a picture or crop"),
    "google/paligemma2-3b-mix-448": _model("paligemma", "PaliGemma 2, 1,024 a picture"),
    "mistral-community/pixtral-12b": _model("llava-pixtral", "Pixtral, up to 4,096"),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": _model(
        "mistral3", "Mistral Small 3.1, up to 3,025"
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _model(
        "llava_onevision", "LLaVA-OneVision, 729 a crop"
    ),
    "OpenGVLab/InternVL3-1B-hf": _model("internvl", "InternVL3, 256 a tile"),
    "HuggingFaceM4/Idefics3-8B-Llama3": _model("idefics3", "Idefics3, 169 a tile"),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": _model("smolvlm", "SmolVLM2, 81 a tile"),
    "Qwen/Qwen2-VL-2B-Instruct": _model("qwen2_vl", "Qwen2-VL, any number"),
    "Qwen/Qwen2.5-VL-3B-Instruct": _model("qwen2_5_vl", "Qwen2.5-VL, any number"),
    "Qwen/Qwen3-VL-4B-Instruct": _model("qwen3_vl", "Qwen3-VL, any number"),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": _model("qwen3_vl_moe", "Qwen3-VL, mixture of experts"),
}
"""Models to start with; any checkpoint of a known family works."""
