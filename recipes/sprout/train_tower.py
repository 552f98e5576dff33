"""Stage 1 of sprout: train the CLIP-style vision tower on scenes, with dense and [CLS] supervision.

Every patch of the selected layer (-2) learns what object covers it: category, frame colour, digit,
where the object's centre is, how large it is, and how many of its kind there are. [CLS] of the
last layer learns the categories in proportion to their area, as captions name what is large: so
its attention is a saliency map, not an answer key.

    python recipes/sprout/train_tower.py --out runs/tower
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Run, cosine, optimizers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel

from budwood.sprout.atlas import categories
from budwood.sprout.model import image_tensor, tower_config
from budwood.sprout.scenes import COLOURS, MAX_COPIES, SIZE, Scene, make_scene

N_CATEGORIES = len(categories())
HEADS = {
    "category": 1 + N_CATEGORIES,
    "colour": 1 + len(COLOURS),
    "digit": 11,
    "count": MAX_COPIES + 1,
    "place": 3,
}
WEIGHTS = {"category": 1.0, "colour": 0.7, "digit": 3.0, "count": 0.5, "place": 1.0, "cls": 0.5}


def patch_targets(scene: Scene, side: int) -> Tensor:
    """What covers the centre of each patch, shape (side², 7).

    Columns: category (0 is background), colour (0 none), digit (0 none), count, x and y offset to
    the object's centre in hundreds of px, log of its size.
    """
    cell = SIZE / side
    centres = (np.arange(side) + 0.5) * cell
    targets = np.zeros((side, side, 7), dtype=np.float32)
    for thing in scene.objects:
        left, top, right, bottom = (round(edge / cell) for edge in thing.outer)
        area = targets[top:bottom, left:right]
        area[..., 0] = 1 + categories().index(thing.category)
        area[..., 1] = 0 if thing.colour is None else 1 + list(COLOURS).index(thing.colour)
        area[..., 2] = 0 if thing.digit is None else 1 + thing.digit
        area[..., 3] = len(scene.copies(thing.category))
        area[..., 4] = (thing.centre[0] - centres[left:right])[None, :] / 100
        area[..., 5] = (thing.centre[1] - centres[top:bottom])[:, None] / 100
        area[..., 6] = math.log((thing.box[2] - thing.box[0]) / 60)
    return torch.from_numpy(targets).flatten(0, 1)


def area_shares(scene: Scene) -> Tensor:
    """Fraction of the objects' area that each category has, shape (N_CATEGORIES,)."""
    areas = torch.zeros(N_CATEGORIES)
    for thing in scene.objects:
        areas[categories().index(thing.category)] += (thing.box[2] - thing.box[0]) ** 2
    return areas / areas.sum()


class Scenes(Dataset):
    """Training scenes from consecutive seeds, as tensors."""

    def __init__(self, first: int, count: int, side: int):
        self.first, self.count, self.side = first, count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        scene = make_scene(self.first + i, "train")
        return image_tensor(scene.image), patch_targets(scene, self.side), area_shares(scene)


def grid_positions(side: int, width: int) -> Tensor:
    """2-D sine–cosine positions for [CLS] (zeros) and the patches, shape (1 + side², width)."""
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    waves = torch.arange(side)[:, None] * frequencies
    one = torch.cat([waves.sin(), waves.cos()], 1)
    grid = torch.cat(
        [one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)], -1
    ).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), grid])


def build(config: CLIPVisionConfig) -> tuple[CLIPVisionModel, nn.ModuleDict]:
    # Plain softmax attention: the backward pass of CPU flash attention took half of the time.
    tower = CLIPVisionModel._from_config(config, attn_implementation="eager")
    embeddings = tower.embeddings
    side = config.image_size // config.patch_size
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(0.1 * grid_positions(side, config.hidden_size))
    heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, n) for name, n in HEADS.items()})
    heads["cls"] = nn.Linear(config.hidden_size, N_CATEGORIES)
    heads["norm"] = nn.LayerNorm(config.hidden_size)
    return tower, heads


def losses(
    tower: CLIPVisionModel, heads: nn.ModuleDict, batch: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the weighted parts of the loss, and the accuracies for the log."""
    pixels, targets, areas = batch
    out = tower(pixels, output_hidden_states=True)
    patches = heads["norm"](out.hidden_states[-2][:, 1:])
    predicted = {name: heads[name](patches).float() for name in HEADS}
    wanted = dict(
        zip(
            ("category", "colour", "digit", "count"),
            targets[..., :4].long().unbind(-1),
            strict=True,
        )
    )
    covered = wanted["category"] > 0
    weight = torch.full((HEADS["category"],), 1.0)
    weight[0] = 0.3
    parts = {
        "category": F.cross_entropy(
            predicted["category"].flatten(0, 1), wanted["category"].flatten(), weight
        )
    }
    hits = {}
    for name in ("colour", "digit", "count"):
        parts[name] = F.cross_entropy(predicted[name][covered], wanted[name][covered])
    for name in wanted:
        hits[name] = (predicted[name].argmax(-1) == wanted[name])[covered].float().mean()
    parts["place"] = F.smooth_l1_loss(
        predicted["place"][covered], targets[..., 4:][covered], beta=0.1
    )
    named = heads["cls"](out.pooler_output).float()
    parts["cls"] = F.cross_entropy(named, areas)
    hits["largest"] = (named.argmax(-1) == areas.argmax(-1)).float().mean()
    return {name: WEIGHTS[name] * value for name, value in parts.items()}, hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; an unfinished run there goes on"
    )
    parser.add_argument("--images", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = tower_config()
    side = config.image_size // config.patch_size
    tower, heads = build(config)
    named = [*tower.named_parameters(), *heads.named_parameters()]
    run = Run(args.out, {"tower": tower, "heads": heads}, optimizers(named, args.lr, args.lr, 0.02))
    steps = args.images // args.batch
    scenes = Scenes(run.step * args.batch, (steps - run.step) * args.batch, side)
    for batch in DataLoader(scenes, args.batch, num_workers=args.workers, prefetch_factor=4):
        run.scale_lr(cosine(run.step, steps, 100))
        with torch.autocast("cpu", torch.bfloat16):
            parts, hits = losses(tower, heads, batch)
        for optim in run.optims:
            optim.zero_grad()
        sum(parts.values()).backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        for optim in run.optims:
            optim.step()
        run.step += 1
        if run.step % 25 == 0:
            run.log(
                **{k: round(v.item(), 3) for k, v in parts.items()},
                **{f"{k}_hit": round(v.item(), 3) for k, v in hits.items()},
            )
        if run.step % 200 == 0:
            run.save()
    run.save()
    save_file(
        {k: v.bfloat16().contiguous() for k, v in tower.state_dict().items()},
        args.out / "tower.safetensors",
    )


if __name__ == "__main__":
    main()
