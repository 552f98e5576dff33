"""Stages 2 and 3 of sprout: projector, then projector and LoRA, by the language-model loss alone.

Stage 2 (`regions`) reads single visual tokens aloud: one patch, then a caption of what covers it.
The LLM is frozen. Stage 3 (`questions`) answers questions about whole pictures. All questions of a
scene share one prefill: each sees the picture and itself, nothing else, which equals single-turn
training at a fraction of the price. LoRA on the LLM learns with the projector; the tower stays as
stage 1 left it.

    python recipes/sprout/train_llava.py --tower runs/tower/tower.safetensors --out runs/llava
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import MasterWeights, Run, cosine
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from budwood.sprout.model import (
    LORA_ALPHA,
    LORA_RANK,
    assemble,
    image_tensor,
    load_llm,
    load_tokenizer,
    tower_config,
)
from budwood.sprout.questions import KINDS, Question, ask
from budwood.sprout.scenes import SIZE, Scene, SceneObject, make_scene, scene_rng

PREFIX = "<|im_start|>user\n"
PROMPT = "\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
STAGES = ("regions", "glimpses", "questions")
FIRST_SEED = 10_000_000  # the tower has seen the seeds below


@dataclass
class Item:
    """One packed sequence: prefix, visual tokens, then segments that do not see each other."""

    pixels: Tensor  # (3, 336, 336)
    patches: Tensor  # which of the 256 visual tokens are shown, in segments as `shown_in`; int64
    ids: Tensor  # (L,), -1 where a visual token goes
    segment: Tensor  # (L,): 0 is seen by all later segments
    position: Tensor  # (L,)
    labels: Tensor  # (L,), -100 where nothing is asked
    kind: Tensor  # (L,): at the first token of an answer the question's place in KINDS, else -1


def training_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """All that the scene allows, presence and counts thinned out: no kind or answer dominates."""
    questions = [q for q in ask(scene) if q.kind not in ("presence", "count")]
    presence = ask(scene, "presence")
    for answer in ("yes", "no"):
        pool = [q for q in presence if q.answer == answer]
        questions += rng.sample(pool, min(2, len(pool)))
    counts = ask(scene, "count")
    questions += [q for q in counts if scene.objects[1].category in q.text]
    if rng.random() < 0.25:
        questions.append(rng.choice(counts))
    rng.shuffle(questions)
    return questions


def caption(scene: Scene, patch: int, side: int) -> str:
    """What a single visual token shows, in words."""
    row, column = divmod(patch, side)
    x, y = ((edge + 0.5) * SIZE / side for edge in (column, row))
    place = f"row {row + 1}, column {column + 1}"
    for thing in scene.objects:
        left, top, right, bottom = thing.outer
        if left <= x < right and top <= y < bottom:
            known = [thing.category, thing.colour, thing.digit, place]
            return ", ".join(str(word) for word in known if word is not None)
    return f"background, {place}"


class Packed(Dataset):
    """Scenes as packed sequences; the seed decides everything."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stage: str, first: int, count: int):
        self.tokenizer, self.stage, self.first, self.count = tokenizer, stage, first, count
        self.side = SIZE // tower_config().patch_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Item:
        scene = make_scene(self.first + i, "train")
        rng = scene_rng(self.first + i, "validation")  # a stream of its own, not the picture's
        make = {
            "regions": self._regions,
            "glimpses": self._glimpses,
            "questions": self._questions,
        }[self.stage]
        return make(scene, rng)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pack(
        self,
        scene: Scene,
        patches: list[int],
        shared: list[int],
        segments: list[tuple[list[int], list[int], int]],
    ) -> Item:
        """Lay out `shared`, then segments (given, asked, kind) as if each followed it directly."""
        ids, segment, position = list(shared), [0] * len(shared), list(range(len(shared)))
        labels, kinds = [-100] * len(shared), [-1] * len(shared)
        for k, (given, asked, kind) in enumerate(segments, start=1):
            ids += given + asked
            segment += [k] * len(given + asked)
            position += range(len(shared), len(shared) + len(given) + len(asked))
            labels += [-100] * len(given) + asked
            kinds += [-1] * len(given) + [kind] + [-1] * (len(asked) - 1)
        columns = (torch.tensor(c) for c in (patches, ids, segment, position, labels, kinds))
        return Item(image_tensor(scene.image), *columns)

    def _questions(self, scene: Scene, rng: random.Random) -> Item:
        patches = list(range(self.side**2))
        shared = self._tokens(PREFIX) + [-1] * len(patches)
        segments = [
            (
                self._tokens(PROMPT.format(q.text)),
                self._tokens(q.answer + END),
                KINDS.index(q.kind),
            )
            for q in training_questions(scene, rng)
        ]
        return self._pack(scene, patches, shared, segments)

    def _regions(self, scene: Scene, rng: random.Random, shown: int = 14) -> Item:
        captions = [caption(scene, patch, self.side) for patch in range(self.side**2)]
        things = [p for p, text in enumerate(captions) if not text.startswith("background")]
        patches = rng.sample(things, min(shown, len(things))) + rng.sample(range(self.side**2), 2)
        segments = [
            ([-1, *self._tokens("\n")], self._tokens(captions[p] + END), -1) for p in patches
        ]
        return self._pack(scene, patches, self._tokens(PREFIX), segments)

    def _glimpses(self, scene: Scene, rng: random.Random) -> Item:
        patches: list[int] = []
        segments = []
        for question in training_questions(scene, rng):
            needed = [o for o in scene.objects if o.outer in question.boxes]
            others = [o for o in scene.objects if o not in needed]
            shown = needed + rng.sample(others, rng.randint(not needed, min(2, len(others))))
            seen = sorted({self._patch_of(thing, rng) for thing in shown for _ in range(2)})
            patches += seen
            given = [-1] * len(seen) + self._tokens(PROMPT.format(question.text))
            asked = self._tokens(question.answer + END)
            segments.append((given, asked, KINDS.index(question.kind)))
        return self._pack(scene, patches, self._tokens(PREFIX), segments)

    def _patch_of(self, thing: SceneObject, rng: random.Random) -> int:
        """A random patch of an object's sprite."""
        left, top, right, bottom = (int(edge * self.side / SIZE) for edge in thing.box)
        return rng.randint(top, bottom - 1) * self.side + rng.randint(left, right - 1)


def collate(items: list[Item]) -> dict[str, Tensor]:
    """Pad on the right; a token sees the shared part and the earlier tokens of its segment."""
    length = max(len(item.ids) for item in items)

    def stack(name: str, fill: int) -> Tensor:
        return torch.stack(
            [F.pad(getattr(i, name), (0, length - len(i.ids)), value=fill) for i in items]
        )

    segment = stack("segment", -1)
    same = segment[:, :, None] == segment[:, None, :]
    shared = (segment == 0)[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "pixels": torch.stack([i.pixels for i in items]),
        "patches": torch.cat([i.patches + 256 * b for b, i in enumerate(items)]),
        "ids": stack("ids", 0),
        "positions": stack("position", 0),
        "labels": stack("labels", -100),
        "kind": stack("kind", -1),
        "mask": ((same | shared) & causal)[:, None],
    }


def visual_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """The patches of the selected layer, flattened over the batch, shape (B · 256, 256)."""
    with torch.no_grad():
        return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)


def loss_and_hits(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean next-token loss over what is asked; kind and success of each token, shape (n, 2)."""
    inner = model.model
    features = visual_features(inner.vision_tower, batch["pixels"].to(inner.vision_tower.dtype))
    projected = inner.multi_modal_projector(features[batch["patches"]])
    visual = batch["ids"] == -1
    embeds = inner.get_input_embeddings()(batch["ids"].clamp(min=0))
    embeds = embeds.masked_scatter(visual[..., None], projected.to(embeds.dtype))
    mask = torch.zeros_like(batch["mask"], dtype=embeds.dtype).masked_fill(
        ~batch["mask"], torch.finfo(embeds.dtype).min
    )
    hidden = inner.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    asked = batch["labels"][:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][asked]).float()
    labels = batch["labels"][:, 1:][asked]
    right = logits.argmax(-1) == labels
    kinds = batch["kind"][:, 1:][asked]
    return F.cross_entropy(logits, labels), torch.stack((kinds, right.long()), 1)


def build(tower_file: Path, tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """The assembled VLM in bfloat16, with everything frozen but projector and LoRA."""
    tower = CLIPVisionModel(tower_config())
    tower.load_state_dict(load_file(tower_file))
    model = assemble(tower, load_llm(), tokenizer).requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets)
    inject_adapter_in_model(lora, model.model.language_model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "multi_modal_projector" in name)
    return model.bfloat16()


def match_scale(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> None:
    """Start the projector at the scale of the word embeddings."""
    inner = model.model
    features = visual_features(inner.vision_tower, batch["pixels"].to(inner.vision_tower.dtype))
    projector = inner.multi_modal_projector
    with torch.no_grad():
        wanted = inner.get_input_embeddings().weight.std()
        projector.linear_1.weight.mul_(1 / projector.linear_1(features).std())
        projector.linear_2.weight.mul_(wanted / projector(features).std())


def shares(hits: Tensor) -> dict[str, float]:
    """How many first tokens were right, by kind of question; all tokens together."""
    named = {name: hits[hits[:, 0] == k, 1] for k, name in enumerate(KINDS)} | {"all": hits[:, 1]}
    return {
        name: round(found.float().mean().item(), 3) for name, found in named.items() if len(found)
    }


def train(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    stage: str,
    out: Path,
    args: argparse.Namespace,
) -> None:
    """Run or go on with one stage."""
    projector = model.model.multi_modal_projector
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    groups = [{"params": list(projector.parameters()), "lr": getattr(args, f"{stage}_lr")}]
    if stage != "regions":
        groups.append({"params": lora, "lr": getattr(args, f"{stage}_lr")})
    for p in lora:
        p.requires_grad_(stage != "regions")
    modules = {"projector": projector} | (
        {"llm": model.model.language_model} if stage != "regions" else {}
    )
    masters = MasterWeights(groups)
    run = Run(out / stage, modules, [masters.optim])
    masters.resume()
    batch_size, images = getattr(args, f"{stage}_batch"), getattr(args, f"{stage}_images")
    steps = images // batch_size
    first = FIRST_SEED * (1 + STAGES.index(stage)) + run.step * batch_size
    recent: list[float] = []
    seen: list[Tensor] = []
    data = Packed(tokenizer, stage, first, (steps - run.step) * batch_size)
    for batch in DataLoader(data, batch_size, num_workers=1, prefetch_factor=4, collate_fn=collate):
        if run.step == 0 and stage == "regions":
            match_scale(model, batch)
            masters.resume()
        run.scale_lr(cosine(run.step, steps, 30))
        loss, hits = loss_and_hits(model, batch)
        recent.append(loss.item())
        seen.append(hits)
        loss.backward()
        masters.step()
        run.step += 1
        if run.step % 10 == 0:
            run.log(loss=round(sum(recent) / len(recent), 3), **shares(torch.cat(seen)))
            recent, seen = [], []
        if run.step % 100 == 0:
            run.save()
    run.save()


def export(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write what ships, in bfloat16."""
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
    parser.add_argument("--regions-images", type=int, default=640)
    parser.add_argument("--regions-batch", type=int, default=4)
    parser.add_argument("--glimpses-images", type=int, default=1_200)
    parser.add_argument("--glimpses-batch", type=int, default=4)
    parser.add_argument("--questions-images", type=int, default=1_500)
    parser.add_argument("--questions-batch", type=int, default=2)
    parser.add_argument("--regions-lr", type=float, default=2e-3)
    parser.add_argument("--glimpses-lr", type=float, default=6e-4)
    parser.add_argument("--questions-lr", type=float, default=4e-4)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = build(args.tower, tokenizer)
    for stage in STAGES:
        train(model, tokenizer, stage, args.out, args)
    export(model, args.out)


if __name__ == "__main__":
    main()
