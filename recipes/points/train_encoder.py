"""Train sprout points: a point transformer aligned with the MiniLM embeddings of class labels.

Each step draws shapes, samples them to one random number of points for the batch, turns, scales and
jitters them, and classifies them among all labels (cross-entropy of scaled cosines, the
shape-to-text half of CLIP's loss). The number of points falls to an eighth at most, as with the
point dropout of PointNet++ in the training of published encoders: sparser clouds are new to it.

The batches of a step have one number of points, so the running BatchNorm statistics fit none. At
the end they are estimated over all numbers and fixed, and training goes on for some steps.

    python recipes/points/train_encoder.py --clouds runs/points/clouds.npz --out runs/points/encoder

Started again, it resumes from the last checkpoint in its folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from budwood.points.encoders.sprout import Sprout, SproutConfig, save_sprout
from budwood.points.labels import resolve_templates
from budwood.points.text import average_embeddings
from budwood.points.towers import MiniLM

FEWEST, MOST = 128, 1024
WATCHED = (1024, 128, 64)
SETTLING = 200  # batches from which the final statistics are estimated


class Shapes:
    """The clouds of make_clouds.py and the embeddings of their labels.

    Attributes:
        xyz: for pretraining, int16, shape (n, 4096, 3).
        target: index of the label of each.
        texts: embeddings of all labels minus their mean, of length 1, shape (n_labels, 384).
        center: that mean.
    """

    def __init__(self, file: Path, folder: Path):
        with np.load(file) as content:
            xyz, label, use = content["xyz"], content["label"], content["use"]
        train = use == "pretrain"
        self.labels = sorted(set(label[train].tolist()))
        index = {name: i for i, name in enumerate(self.labels)}
        self.xyz = xyz[train]
        self.target = np.array([index[name] for name in label[train].tolist()])
        count = np.bincount(self.target)
        weight = 1 / np.sqrt(count[self.target])
        self.chance = weight / weight.sum()
        self.watched = xyz[use == "val"]
        self.watched_target = torch.tensor([index[name] for name in label[use == "val"].tolist()])
        averages = self._embeddings(folder / "texts.pt")
        self.center = averages.mean(0)
        self.texts = F.normalize(averages - self.center, dim=-1)

    def _embeddings(self, cached: Path) -> Tensor:
        if cached.exists():
            return torch.load(cached, weights_only=True)
        lines = resolve_templates("points64")[::4]
        averages = average_embeddings(self.labels, MiniLM(), lines)
        torch.save(averages, cached)
        return averages

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        chosen = rng.choice(len(self.xyz), size, p=self.chance)
        n_points = round(math.exp(rng.uniform(math.log(FEWEST), math.log(MOST))))
        clouds = np.stack([augmented(self.xyz[i], n_points, rng) for i in chosen])
        return torch.from_numpy(clouds), torch.from_numpy(self.target[chosen])


def augmented(points: np.ndarray, n_points: int, rng: np.random.Generator) -> np.ndarray:
    """Sample, scale by axis, turn about y by any angle, tilt a little, and jitter."""
    xyz = points[rng.choice(len(points), n_points, replace=False)].astype(np.float64)
    xyz *= rng.uniform(0.75, 1.33, 3) * rng.choice([-1, 1], 3, p=[0.5, 0.5]) ** [1, 0, 0]
    xyz = xyz @ turn(1, rng.uniform(0, 2 * math.pi))
    xyz = xyz @ turn(0, rng.normal(0, 0.06)) @ turn(2, rng.normal(0, 0.06))
    return normalized(xyz * (1 / 32767) + rng.normal(0, 0.008, xyz.shape))


def turn(axis: int, angle: float) -> np.ndarray:
    """Rotation about an axis."""
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def normalized(xyz: np.ndarray) -> np.ndarray:
    xyz = xyz - xyz.mean(axis=0)
    return (xyz / np.linalg.norm(xyz, axis=1).max()).astype(np.float32)


@torch.inference_mode()
def accuracy(encoder: Sprout, shapes: Shapes, n_points: int) -> float:
    """Accuracy among all labels on the validation shapes, sampled in a fixed way."""
    rng = np.random.default_rng(0)
    thin = [
        normalized(cloud[rng.choice(len(cloud), n_points, replace=False)].astype(np.float64))
        for cloud in shapes.watched
    ]
    xyz = torch.from_numpy(np.stack(thin))
    features = torch.cat([encoder(part) for part in xyz.split(64)])
    named = (F.normalize(features, dim=-1) @ shapes.texts.T).argmax(-1)
    return (named == shapes.watched_target).float().mean().item()


def averaged(encoder: Sprout) -> AveragedModel:
    return AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)


class Run:
    """Model, running average, optimiser, and where they are kept."""

    def __init__(self, folder: Path, lr: float, center: Tensor):
        self.folder, self.step, self.seconds = folder, 0, 0.0
        self.encoder = Sprout(SproutConfig())
        self.encoder.text_center.copy_(center)
        self.average = averaged(self.encoder)
        matrices = [p for p in self.encoder.parameters() if p.ndim >= 2]
        others = [p for p in self.encoder.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others}]
        self.optim = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
        self.parts = {"encoder": self.encoder, "average": self.average, "optim": self.optim}
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            for name, part in self.parts.items():
                part.load_state_dict(state[name])

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.pt"

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state | {"step": self.step, "seconds": self.seconds}, self.folder / "part.pt")
        (self.folder / "part.pt").replace(self.checkpoint)

    def log(self, **values: float) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.seconds), **values})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")


def rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate: one schedule, and another of half its height once statistics are held."""
    if step < args.steps:
        return args.lr * schedule(step, args.steps)
    return args.lr * schedule(step - args.steps, args.settled_steps) / 2


def schedule(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then one cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def settle(run: Run, shapes: Shapes, args: argparse.Namespace) -> None:
    """Take the statistics of normalisation over batches of all numbers of points."""
    for module in run.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean
    run.encoder.train()
    for i in range(SETTLING):
        run.encoder(shapes.batch(args.batch, np.random.default_rng([args.seed, run.step, i]))[0])
    run.average = run.parts["average"] = averaged(run.encoder)


def train(run: Run, shapes: Shapes, args: argparse.Namespace) -> None:
    clock = time.monotonic()
    last = args.steps + args.settled_steps
    while run.step < last:
        if run.step == args.steps:
            settle(run, shapes, args)
        xyz, target = shapes.batch(args.batch, np.random.default_rng([args.seed, run.step]))
        for group in run.optim.param_groups:
            group["lr"] = rate(run.step, args)
        run.encoder.train()
        run.encoder.group_net.train(run.step < args.steps)
        cosines = F.normalize(run.encoder(xyz), dim=-1) @ shapes.texts.T
        loss = F.cross_entropy(run.encoder.logit_scale * cosines, target)
        run.optim.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.encoder.parameters(), 1.0)
        run.optim.step()
        run.average.update_parameters(run.encoder)
        run.step += 1
        now = time.monotonic()
        run.seconds, clock = run.seconds + now - clock, now
        if run.step % 50 == 0:
            run.log(loss=round(loss.item(), 3))
        if run.step % 500 == 0 or run.step == last:
            encoder = run.average.module.eval()
            found = {f"val_{n}": round(accuracy(encoder, shapes, n), 3) for n in WATCHED}
            run.log(**found)
        if run.step % 100 == 0 or run.step == last:
            run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clouds", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--settled-steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    shapes = Shapes(args.clouds, args.out)
    run = Run(args.out, args.lr, shapes.center)
    train(run, shapes, args)
    save_sprout(run.average.module, args.out / "sprout.safetensors", torch.bfloat16)


if __name__ == "__main__":
    main()
