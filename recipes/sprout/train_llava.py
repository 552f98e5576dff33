"""Stages 2 and 3 of sprout: projector and LoRA, by the language-model loss alone.

LoRA on the LLM learns with the projector; the tower stays as stage 1 left it. Stage 2 (`regions`)
reads single visual tokens aloud ("<patch>" goes on with the name of what covers it, its frame, its
digit) and looks them up in tables (" dog A, cat K,<patch>" goes on with the letter of what the
patch shows, and the other way round). Stage 3 (`questions`) asks about a few patches of one or two
objects, then of all of them, then about the whole picture: as users do, and in short, many in a
row. All segments of a scene share one prefill: each sees the picture and itself, nothing else,
which equals asking them one by one at a fraction of the price.

    python recipes/sprout/train_llava.py --tower runs/tower/tower.safetensors --out runs/llava
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import MasterWeights, Run, trapezoid
from exercises import LOGGED, Exercises
from packing import collate
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from budwood.sprout.model import (
    LORA_ALPHA,
    LORA_RANK,
    assemble,
    load_llm,
    load_tokenizer,
    tower_config,
)


def visual_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Encode: patches of the selected layer, flattened over the crops, shape (n · 256, 256)."""
    pixels = pixels.to(tower.dtype)
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)


def visual_tokens(inner: Any, pixels: Tensor) -> Tensor:
    """Encode and project; in a LLaVA-NeXT the newline comes last. Shape (n · 256 (+ 1), 576)."""
    projected = inner.multi_modal_projector(visual_features(inner.vision_tower, pixels))
    if not hasattr(inner, "image_newline"):
        return projected
    return torch.cat((projected, inner.image_newline[None]))


def loss_and_hits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean next-token loss over asked tokens; kind and success of each, shape (n, 2)."""
    inner = model.model
    projected = visual_tokens(inner, batch["pixels"])[batch["patches"]]
    visual = batch["ids"] < 0
    embeds = inner.get_input_embeddings()(batch["ids"].clamp(min=0))
    embeds = embeds.masked_scatter(visual[..., None], projected.to(embeds.dtype))
    mask = torch.zeros(batch["own"].shape, dtype=embeds.dtype)
    mask.masked_fill_(~batch["own"], -torch.inf)
    hidden = inner.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    asked = batch["labels"][:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][asked]).float()
    labels = batch["labels"][:, 1:][asked]
    right = logits.argmax(-1) == labels
    kinds = batch["kinds"][:, 1:][asked]
    return F.cross_entropy(logits, labels), torch.stack((kinds, right.long()), 1)


def build(
    tower_file: Path, tokenizer: PreTrainedTokenizerBase, high_resolution: bool = False
) -> Any:
    """Assemble the VLM in bfloat16, with everything frozen but projector, newline and LoRA."""
    tower = CLIPVisionModel(tower_config())
    tower.load_state_dict(load_file(tower_file))
    model = assemble(tower, load_llm(), tokenizer, high_resolution).requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets)
    inject_adapter_in_model(lora, model.model.language_model)
    model.model.language_model.set_attn_implementation("packed")
    for name, parameter in model.named_parameters():
        learns = ("lora_", "multi_modal_projector", "image_newline")
        parameter.requires_grad_(any(part in name for part in learns))
    return model.bfloat16()


@torch.no_grad()
def start_as_words(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> None:
    """Start visual tokens as mixtures of random words, so that they look like words to the LLM."""
    inner = model.model
    features = visual_features(inner.vision_tower, batch["pixels"])
    words = inner.get_input_embeddings().weight
    projector = inner.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    first.weight.mul_(1 / first(features).std())
    mixture = words[torch.randperm(len(words))[: second.in_features]] - words.mean(0)
    second.weight.copy_(mixture.T)
    second.bias.zero_()
    second.weight.mul_(words.std() / projector(features).std(0).mean())
    second.bias.copy_(words.mean(0) - projector(features).mean(0))


def accuracies(hits: Tensor) -> dict[str, float]:
    """Fraction of correct first tokens by kind of question, and of all tokens."""
    named = {name: hits[hits[:, 0] == k, 1] for k, name in enumerate(LOGGED)} | {"all": hits[:, 1]}
    return {
        name: round(right.float().mean().item(), 3) for name, right in named.items() if len(right)
    }


def train(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    stage: str,
    out: Path,
    args: argparse.Namespace,
) -> None:
    """Run one stage, from its last checkpoint if there is one."""
    projector = model.model.multi_modal_projector
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    groups = [
        {"params": list(projector.parameters()), "lr": args.projector_lr},
        {"params": lora, "lr": args.lora_lr},
    ]
    modules = {"projector": projector, "llm": model.model.language_model}
    masters = MasterWeights(groups)
    run = Run(out / stage, modules, [masters.optim])
    masters.resume()
    size, images = getattr(args, f"{stage}_batch"), getattr(args, f"{stage}_images")
    steps = images // size
    recent: list[float] = []
    seen: list[Tensor] = []
    data = Exercises(tokenizer, stage, steps * size, run.step * size, size)
    for batch in DataLoader(data, size, num_workers=1, prefetch_factor=4, collate_fn=collate):
        if run.step == 0 and stage == "regions":
            start_as_words(model, batch)
            masters.resume()
        run.scale_lr(trapezoid(run.step, steps, 30))
        loss, hits = loss_and_hits(model, batch)
        recent.append(loss.item())
        seen.append(hits)
        loss.backward()
        masters.step()
        run.step += 1
        if run.step % 10 == 0:
            run.log(loss=round(sum(recent) / len(recent), 3), **accuracies(torch.cat(seen)))
            recent, seen = [], []
        if run.step % 100 == 0:
            run.save()
    run.save()


def export(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write the weights that ship, in bfloat16."""
    state = {k: v.bfloat16() for k, v in model.model.multi_modal_projector.state_dict().items()}
    save_file(state, out / "projector.safetensors")
    lora = {
        n.replace(".default", ""): p.bfloat16()
        for n, p in model.model.language_model.named_parameters()
        if "lora_" in n
    }
    save_file(lora, out / "lora.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", type=Path, required=True, help="tower.safetensors of stage 1")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; an unfinished run there goes on"
    )
    parser.add_argument("--regions-images", type=int, default=1_800)
    parser.add_argument("--regions-batch", type=int, default=4)
    parser.add_argument("--questions-images", type=int, default=6_400)
    parser.add_argument("--questions-batch", type=int, default=8)
    parser.add_argument("--projector-lr", type=float, default=5e-4)
    parser.add_argument("--lora-lr", type=float, default=6e-4)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = build(args.tower, tokenizer)
    for stage in ("regions", "questions"):
        train(model, tokenizer, stage, args.out, args)
    export(model, args.out)


if __name__ == "__main__":
    main()
