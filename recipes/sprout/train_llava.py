"""Stages 2 and 3 of sprout: projector, then projector and LoRA, by the language-model loss alone.

LoRA on the LLM learns with the projector; the tower stays as stage 1 left it. Stage 2 (`regions`)
reads single visual tokens aloud ("<patch>" goes on with the name of what covers it, then its
frame, digit and place) and looks them up in tables (" dog A, cat K,<patch>" goes on with the
letter of what the patch shows, and the other way round). Stage 3 (`questions`) answers questions
about more and more of the picture, then about all of it. All segments of a scene share one
prefill: each sees the picture and itself, nothing else, which equals single-turn training at a
fraction of the price.

    python recipes/sprout/train_llava.py --tower runs/tower/tower.safetensors --out runs/llava
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from common import MasterWeights, Run, trapezoid
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from budwood.sprout.atlas import categories
from budwood.sprout.model import (
    IMAGE_TOKEN,
    LORA_ALPHA,
    LORA_RANK,
    assemble,
    image_tensor,
    load_llm,
    load_tokenizer,
    tower_config,
)
from budwood.sprout.questions import KINDS, TEMPLATES, Question, ask
from budwood.sprout.scenes import SIZE, Scene, SceneObject, make_scene, scene_rng

PREFIX = "<|im_start|>user\n"
PROMPT = "\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
STAGES = ("regions", "questions")
LETTERS = [f" {letter}" for letter in "ABCDEFGHJKLMNPQRSTUVWXYZ"]
LOGGED = (
    *KINDS,
    *(f"{kind} in short" for kind in KINDS),
    "name",
    "frame",
    "badge",
    "caption",
    "word key",
    "visual key",
    "order",
    "reverse",
    "about",
)
SHORT = {
    "presence": " {} shown",
    "colour": " {} frame",
    "digit": " {} digit",
    "count": " {} number",
    "largest": " largest",
    "left of": " left of {}",
    "right of": " right of {}",
    "above": " above {}",
    "below": " below {}",
}
FIRST_SEED = 10_000_000  # the tower has seen the seeds below
SIDE = SIZE // tower_config().patch_size
PATCHES = SIDE**2
BIN = 64  # tokens; segments are packed into bins of this length
SOME = 2_400  # pictures of the last stage in which only some of the objects are seen
WHOLE = 4_800  # pictures of the last stage, after which every picture is seen whole


@dataclass
class Turn:
    """What is given and what is asked. A token is a word's id, or `~patch` if visual."""

    kind: str  # one of LOGGED; what is not in KINDS helps to learn, and is asked nowhere else
    given: list[int]
    asked: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.given + self.asked


Segment = list[Turn]  # in one context, which sees the picture and nothing else


@dataclass
class Item:
    """What all segments of one picture see, and the segments, which do not see each other."""

    pixels: Tensor  # (3, 336, 336)
    shared: list[int]
    segments: list[Segment]


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


def in_short(question: Question) -> str:
    """The question in two or three words: "dog frame", "left of dog"."""
    for kind, template in TEMPLATES.items():
        before, _, after = template.partition("{}")
        if question.text.startswith(before) and question.text.endswith(after):
            return SHORT[kind].format(question.text.removeprefix(before).removesuffix(after))
    raise ValueError(question.text)


def listings(
    scene: Scene, shown: list[SceneObject], rng: random.Random
) -> list[tuple[str, str, str]]:
    """Kind, question, answer for training alone: objects in order, by frame or digit, described."""
    words, axis = rng.choice((("from left to right", 0), ("from top to bottom", 1)))
    ordered = sorted(shown, key=lambda o: o.centre[axis])
    order = ("order", f"Name all objects {words}.", ", ".join(o.category for o in ordered))
    found = []
    for text, values in (
        ("Which object has the {} frame?", [o.colour for o in scene.objects]),
        ("Which object is beside the digit {}?", [o.digit for o in scene.objects]),
    ):
        known = [i for i, v in enumerate(values) if v is not None and values.count(v) == 1]
        known = [i for i in known if scene.objects[i] in shown]
        found += [("reverse", text.format(values[i]), scene.objects[i].category) for i in known]
    single = [o for o in shown if len(scene.copies(o.category)) == 1]
    about = [("about", f"Describe the {o.category}.", details(o, o.centre)) for o in single]
    return [
        order,
        *rng.sample(found, min(2, len(found))),
        *rng.sample(about, min(2, len(about))),
    ]


def details(thing: SceneObject | None, point: tuple[float, float]) -> str:
    """Frame, digit and the place of a point, in words."""
    column, row = (int(edge * SIDE / SIZE) + 1 for edge in point)
    known = [thing.colour, thing.digit] if thing else []
    return ", ".join(str(v) for v in [*known, f"row {row}, column {column}"] if v is not None)


def middle(patch: int) -> tuple[float, float]:
    """Centre of a patch, x and y in px."""
    row, column = divmod(patch, SIDE)
    return (column + 0.5) * SIZE / SIDE, (row + 0.5) * SIZE / SIDE


def what_covers(scene: Scene, patch: int) -> SceneObject | None:
    """The object at the centre of a patch."""
    x, y = middle(patch)
    for thing in scene.objects:
        left, top, right, bottom = thing.outer
        if left <= x < right and top <= y < bottom:
            return thing
    return None


def caption(scene: Scene, patch: int) -> str:
    """What a single visual token shows, in words."""
    thing = what_covers(scene, patch)
    name = thing.category if thing else "background"
    return as_answer(f"{name}, {details(thing, middle(patch))}")


def as_answer(text: str) -> str:
    """With a leading space, an answer is the same token as the word in a question."""
    return text if text.isdigit() else f" {text}"


def patches_of(scene: Scene, rng: random.Random) -> dict[SceneObject, int]:
    """A random patch of each object."""
    found: dict[SceneObject, list[int]] = {}
    for patch in range(PATCHES):
        thing = what_covers(scene, patch)
        if thing is not None:
            found.setdefault(thing, []).append(patch)
    return {thing: rng.choice(patches) for thing, patches in found.items()}


class Packed(Dataset):
    """The scenes of one stage from the `start`-th on; the index decides everything."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stage: str,
        images: int,
        start: int,
        batch: int,
    ):
        self.tokenizer, self.images, self.start, self.batch = tokenizer, images, start, batch
        self.first = FIRST_SEED * (1 + STAGES.index(stage))
        self.make = {
            "regions": self._regions,
            "questions": self._questions,
        }[stage]

    def __len__(self) -> int:
        return self.images - self.start

    def __getitem__(self, i: int) -> Item:
        place = self.start + i
        scene = make_scene(self.first + place, "train")
        rng = scene_rng(self.first + place, "validation")  # a stream of its own, not the picture's
        return self.make(scene, rng, place)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _segment(self, kind: str, given: str, asked: str, *seen: int) -> Segment:
        """`<image>` in what is given stands for the next of the patches seen."""
        return [Turn(kind, self._given(given, iter(seen)), self._tokens(asked + END))]

    def _given(self, text: str, patches: Iterator[int]) -> list[int]:
        first, *rest = text.split(IMAGE_TOKEN)
        ids = self._tokens(first)
        for part in rest:
            ids += [~next(patches), *self._tokens(part)]
        return ids

    def _regions(self, scene: Scene, rng: random.Random, place: int) -> Item:
        patches = [p for p in range(PATCHES) if what_covers(scene, p)]
        patches = rng.sample(patches, 2) + rng.sample(range(PATCHES), 1)
        segments = [self._segment("caption", "<image>:", caption(scene, p), p) for p in patches]
        segments += self._readings(scene, rng, {"name": 20, "frame": 12, "badge": 12})
        segments += self._lookups(scene, rng, 6)
        return Item(image_tensor(scene.image), self._tokens(PREFIX), segments)

    def _readings(self, scene: Scene, rng: random.Random, numbers: dict[str, int]) -> list[Segment]:
        """So many names, frames and digits of single patches."""
        covers = [(p, what_covers(scene, p)) for p in range(PATCHES)]
        segments = []
        for kind, text, attribute in (
            ("name", "<image>,<image>,", "category"),
            ("frame", "<image> frame<image>", "colour"),
            ("badge", "<image> digit<image>", "digit"),
        ):
            known = [(p, str(v)) for p, o in covers if (v := getattr(o, attribute, None))]
            for patch, value in rng.sample(known, min(numbers[kind], len(known))):
                segments.append(self._segment(kind, text, as_answer(value), patch, patch))
        return segments

    def _lookups(self, scene: Scene, rng: random.Random, number: int) -> list[Segment]:
        """Tables of words looked up by a patch, tables of patches looked up by a word, in turn."""
        segments = []
        shown = {thing.category for thing in scene.objects}
        strangers = rng.sample([c for c in categories() if c not in shown], 3)
        for n in range(number):
            patches = {thing.category: p for thing, p in patches_of(scene, rng).items()}
            rows = [*patches, *(strangers if n % 2 else ())]
            rng.shuffle(rows)
            letters = dict(zip(rows, rng.sample(LETTERS, len(rows)), strict=True))
            kind, row, key = (
                ("word key", " {}", "<image>") if n % 2 else ("visual key", "<image>", " {}")
            )
            text = "".join(row.format(c) + f"{letters[c]}," for c in rows)
            turns, seen = [], iter([] if n % 2 else [patches[c] for c in rows])
            for asked in rng.sample(list(patches), min(4, len(patches))):
                given = self._given(text + key.format(asked), chain(seen, [patches[asked]]))
                turns.append(Turn(kind, given, self._tokens(letters[asked] + ",")))
                text = ""
            segments.append(turns)
        return segments

    def _questions(self, scene: Scene, rng: random.Random, place: int) -> Item:
        seen = self._seen(scene, rng, place)
        shown = [thing for thing in scene.objects if thing in {what_covers(scene, p) for p in seen}]
        boxes = {thing.outer for thing in shown}
        questions = [q for q in training_questions(scene, rng) if boxes.issuperset(q.boxes)]
        asked = [(q.kind, q.text, q.answer) for q in questions[:6]]
        asked += rng.sample(extra := listings(scene, shown, rng), min(2, len(extra)))
        segments = [self._segment(k, PROMPT.format(q), as_answer(a)) for k, q, a in asked]
        notes = [q for q in ask(scene) if boxes.issuperset(q.boxes)]
        segments += self._notes(rng.sample(notes, min(32, len(notes))))
        if place < SOME:
            segments += self._lookups(scene, rng, 2)
            segments += self._readings(scene, rng, {"name": 2, "frame": 2, "badge": 4})
        shared = self._tokens(PREFIX) + [~patch for patch in seen]
        return Item(image_tensor(scene.image), shared, segments)

    def _notes(self, questions: list[Question]) -> list[Segment]:
        """Questions in short, eight in a row."""
        turns = [
            Turn(
                f"{q.kind} in short",
                self._tokens(in_short(q)),
                self._tokens(as_answer(q.answer) + ","),
            )
            for q in questions
        ]
        return [turns[n : n + 8] for n in range(0, len(turns), 8)]

    def _seen(self, scene: Scene, rng: random.Random, place: int) -> list[int]:
        """The visual tokens shown: of one or two objects at first, then of all, then everything.

        Their number is the same for the pictures of a batch.
        """
        first = place // self.batch * self.batch
        chance = random.Random(first)
        one_each = patches_of(scene, rng)
        if first < SOME:
            objects = chance.randint(1, 2 + 6 * first // SOME)
            shown = rng.sample(list(one_each), min(objects, len(one_each)))
            number = 2 * objects
        else:
            shown = list(one_each)
            done = min(1.0, (first - SOME) / (WHOLE - SOME))
            number = round(20 * (PATCHES / 20) ** done * chance.uniform(0.5 if done < 1 else 1, 1))
        seen = [one_each[thing] for thing in shown]
        rest = [patch for patch in range(PATCHES) if patch not in seen]
        rng.shuffle(rest)
        if first < SOME:  # others only where the objects have too few
            rest.sort(key=lambda patch: what_covers(scene, patch) not in shown)
        return sorted(seen + rest[: number - len(seen)])


def length(segment: Segment) -> int:
    return sum(len(turn.tokens) for turn in segment)


def fill_bins(segments: list[Segment]) -> list[list[Segment]]:
    """Pack into bins of at most `BIN` tokens, the longest first, each into the first that fits."""
    bins: list[list[Segment]] = []
    free: list[int] = []
    for segment in sorted(segments, key=length, reverse=True):
        place = next((i for i, room in enumerate(free) if room >= length(segment)), None)
        if place is None:
            bins.append([])
            free.append(BIN)
            place = len(bins) - 1
        bins[place].append(segment)
        free[place] -= length(segment)
    return bins


def collate(items: list[Item]) -> dict[str, Tensor]:
    """Lay out each picture as its shared part, then bins; positions as if each segment stood alone.

    Returns:
        `pixels` (B, 3, 336, 336); `ids`, `positions`, `labels`, `kinds` (B, P + bins · BIN), where
        an id below zero is a visual token; `patches`, which of the B · 256 these are, in order;
        `own` (B, bins, BIN, BIN): which token of its bin a token sees.
    """
    packed = [fill_bins(item.segments) for item in items]
    n_bins, shared = max(map(len, packed)), len(items[0].shared)
    width = shared + n_bins * BIN
    ids, positions = torch.zeros(len(items), width).long(), torch.zeros(len(items), width).long()
    labels, kinds = torch.full_like(ids, -100), torch.full_like(ids, -1)
    part = torch.full_like(ids, -1)
    for b, (item, bins) in enumerate(zip(items, packed, strict=True)):
        ids[b, :shared] = torch.tensor(item.shared)
        positions[b, :shared] = torch.arange(shared)
        for k, segments in enumerate(bins):
            start = shared + k * BIN
            for n, segment in enumerate(segments):
                first = start
                for turn in segment:
                    answer, end = start + len(turn.given), start + len(turn.tokens)
                    ids[b, start:end] = torch.tensor(turn.tokens)
                    labels[b, answer:end] = ids[b, answer:end]
                    kinds[b, answer] = LOGGED.index(turn.kind)
                    start = end
                positions[b, first:end] = torch.arange(shared, shared + end - first)
                part[b, first:end] = n
    visual = ids < 0
    offset = 256 * torch.arange(len(items))[:, None].expand_as(ids)
    part = part[:, shared:].unflatten(1, (n_bins, BIN))
    return {
        "pixels": torch.stack([item.pixels for item in items]),
        "ids": ids,
        "positions": positions,
        "labels": labels,
        "kinds": kinds,
        "patches": (~ids + offset)[visual],
        "own": (part[..., :, None] == part[..., None, :]) & torch.ones(BIN, BIN).tril().bool(),
    }


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention in `collate`'s layout: the shared part is causal, bins see it and their own.

    Half the price of one masked attention over everything. Registered with transformers.

    Args:
        module: unused.
        query: (B, H, P + bins · BIN, d).
        key: (B, H / g, P + bins · BIN, d).
        value: as `key`.
        attention_mask: (B, bins, BIN, BIN), additive.
        scaling: of the scores.

    Returns:
        (B, P + bins · BIN, H, d), and no weights.
    """
    heads, n_bins = key.shape[1], attention_mask.shape[1]
    shared = key.shape[2] - n_bins * BIN
    query = (query * scaling).unflatten(1, (heads, -1))  # (B, H / g, g, L, d)
    key, value = key[:, :, None], value[:, :, None]
    (q0, q), (k0, k), (v0, v) = (x.split((shared, n_bins * BIN), -2) for x in (query, key, value))
    future = torch.ones(shared, shared, dtype=torch.bool).triu(1)
    first = (q0 @ k0.mT).masked_fill(future, -torch.inf).softmax(-1) @ v0
    q_own, k_own, v_own = (x.unflatten(-2, (n_bins, BIN)) for x in (q, k, v))
    own = q_own @ k_own.mT + attention_mask[:, None, None]
    weights = torch.cat((q @ k0.mT, own.flatten(-3, -2)), -1).softmax(-1)
    from_own = weights[..., shared:].unflatten(-2, (n_bins, BIN)) @ v_own
    rest = weights[..., :shared] @ v0 + from_own.flatten(-3, -2)
    return torch.cat((first, rest), -2).flatten(1, 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


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


def build(tower_file: Path, tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """The assembled VLM in bfloat16, with everything frozen but projector and LoRA."""
    tower = CLIPVisionModel(tower_config())
    tower.load_state_dict(load_file(tower_file))
    model = assemble(tower, load_llm(), tokenizer).requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets)
    inject_adapter_in_model(lora, model.model.language_model)
    model.model.language_model.set_attn_implementation("packed")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "multi_modal_projector" in name)
    return model.bfloat16()


@torch.no_grad()
def start_as_words(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> None:
    """Let visual tokens start as mixtures of random words, so that the LLM takes them for words."""
    inner = model.model
    features = visual_features(inner.vision_tower, batch["pixels"].to(inner.vision_tower.dtype))
    words = inner.get_input_embeddings().weight
    projector = inner.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    first.weight.mul_(1 / first(features).std())
    mixture = words[torch.randperm(len(words))[: second.in_features]] - words.mean(0)
    second.weight.copy_(mixture.T)
    second.bias.zero_()
    second.weight.mul_(words.std() / projector(features).std(0).mean())
    second.bias.copy_(words.mean(0) - projector(features).mean(0))


def shares(hits: Tensor) -> dict[str, float]:
    """How many first tokens were right, by kind of question; all tokens together."""
    named = {name: hits[hits[:, 0] == k, 1] for k, name in enumerate(LOGGED)} | {"all": hits[:, 1]}
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
    data = Packed(tokenizer, stage, steps * size, run.step * size, size)
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
    parser.add_argument("--regions-images", type=int, default=1_800)
    parser.add_argument("--regions-batch", type=int, default=4)
    parser.add_argument("--questions-images", type=int, default=7_200)
    parser.add_argument("--questions-batch", type=int, default=8)
    parser.add_argument("--projector-lr", type=float, default=5e-4)
    parser.add_argument("--lora-lr", type=float, default=6e-4)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = build(args.tower, tokenizer)
    for stage in STAGES:
        train(model, tokenizer, stage, args.out, args)
    export(model, args.out)


if __name__ == "__main__":
    main()
