"""Train sprout points: a point transformer aligned with the MiniLM embeddings of class labels.

Each step draws shapes, samples them to one random number of points for the batch, turns, scales and
jitters them, and classifies them among all labels (cross-entropy of scaled cosines, the
shape-to-text half of CLIP's loss). The number of points falls to an eighth at most, as with the
point dropout of PointNet++ in the training of published encoders: sparser clouds are new to it.

The batches of a step have one number of points, so the running BatchNorm statistics fit none. At
the end they are estimated over all numbers and fixed, and training goes on for some steps.

    python recipes/points/train_encoder.py --clouds runs/points/clouds.npz --out runs/points/encoder

With the clouds of make_road.py as a second file, half of each batch are road objects, most of them
as sensors see them: LiDARs of 16 to 128 beams, and depth cameras; now and then partly hidden, or
with some ground. Half of the steps then go down to 16 points. Labels of the two parts that mean the
same, such as "pedestrian" and "standing person", are not told apart.

Started again, it resumes from the last checkpoint in its folder, at most `SAVE_AFTER` seconds old.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from budwood.points.encoders.sprout import Sprout, SproutConfig, save_sprout
from budwood.points.familiar import save_trained_labels
from budwood.points.label_file import labels_beside
from budwood.points.labels import resolve_templates
from budwood.points.sampling import lidar_points, visible_points
from budwood.points.text import TextEmbeddings, average_embeddings
from budwood.points.towers import MiniLM
from budwood.points.vocabulary import alike

FEWEST, MOST = 128, 1024
FEWEST_SEEN = 16  # in half of the steps, where there are road objects
BEAMS = (16, 32, 64, 128)
HIDDEN, GROUND = 0.3, 0.2  # fractions of scans that are partly hidden, and that have some ground
ALIKE = 0.6  # labels of two parts whose texts have this cosine mean the same
WATCHED = (1024, 128, 64)
SAVE_AFTER = 180  # seconds from one checkpoint to the next
SETTLING = 200  # batches from which the final statistics are estimated


class Shapes:
    """The clouds of make_clouds.py and make_road.py, and the embeddings of their labels.

    Attributes:
        xyz: for pretraining, int16, shape (n, 4096, 3).
        target: index of the label of each.
        parts: of each label: "indoor", or "road" if the road has it.
        same: which labels are not told apart, shape (n_labels, n_labels).
        texts: embeddings of all labels minus their mean, of length 1, shape (n_labels, 384).
        center: that mean.
    """

    def __init__(self, files: Sequence[Path], folder: Path):
        loaded = [_load(file) for file in files]
        xyz, label, use, part = (np.concatenate(column) for column in zip(*loaded))
        train = use == "pretrain"
        self.labels = sorted(set(label[train].tolist()))
        index = {name: i for i, name in enumerate(self.labels)}
        self.xyz = xyz[train]
        self.target = np.array([index[name] for name in label[train].tolist()])
        count = np.bincount(self.target)
        weight = 1 / np.sqrt(count[self.target])
        self.part = part[train]
        for name in np.unique(self.part):
            weight[self.part == name] /= weight[self.part == name].sum()
        self.chance = weight / weight.sum()
        self.watched, self.watched_part = xyz[use == "val"], part[use == "val"]
        self.watched_target = torch.tensor([index[name] for name in label[use == "val"].tolist()])
        on_road = set(label[part == "road"].tolist())
        self.parts = ["road" if name in on_road else "indoor" for name in self.labels]
        averages = self._embeddings(folder / "texts.pt")
        self.center = averages.mean(0)
        self.texts = F.normalize(averages - self.center, dim=-1)
        cosines = self.texts @ self.texts.T
        other = torch.tensor([[a != b for a in self.parts] for b in self.parts])
        same = (other & (cosines >= ALIKE)) | (cosines > 0.999)
        self.same = same & ~torch.eye(len(same), dtype=torch.bool)

    def _embeddings(self, cached: Path) -> Tensor:
        if cached.exists():
            found = torch.load(cached, weights_only=True)
            if found["labels"] == self.labels:
                return found["averages"]
        lines = resolve_templates("points64")[::4]
        phrases = [alike([label])[0] for label in self.labels]
        words = [word for group in phrases for word in group]
        each = average_embeddings(words, MiniLM(), lines).split([len(group) for group in phrases])
        averages = torch.stack([group.mean(dim=0) for group in each])
        torch.save({"labels": self.labels, "averages": averages}, cached)
        return averages

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        chosen = rng.choice(len(self.xyz), size, p=self.chance)
        seen = bool((self.part == "road").any())
        fewest = FEWEST_SEEN if seen and rng.random() < 0.5 else FEWEST
        n_points = round(math.exp(rng.uniform(math.log(fewest), math.log(MOST))))
        clouds = np.stack(
            [augmented(self.xyz[i], n_points, rng, self.part[i] == "road") for i in chosen]
        )
        return torch.from_numpy(clouds), torch.from_numpy(self.target[chosen])


def _load(file: Path) -> tuple[np.ndarray, ...]:
    """Clouds, labels, uses and parts of a file."""
    with np.load(file) as content:
        part = str(content["part"]) if "part" in content else "indoor"
        label = content["label"]
        return content["xyz"], label, content["use"], np.full(len(label), part, dtype="<U8")


def seen_points(points: np.ndarray, n_points: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of points as a LiDAR or a depth camera sees them, or of all sides.

    Where a sensor sees fewer than are wanted, some are drawn again.
    """
    kind, seed = rng.random(), int(rng.integers(1 << 31))
    if kind < 0.25:
        return rng.choice(len(points), n_points, replace=False)
    if kind < 0.75:
        beams = int(rng.choice(BEAMS))
        seen = lidar_points(points.astype(np.float64), n_points, seed, beams=beams)
    else:
        seen = visible_points(points.astype(np.float64), n_points, seed)
    lacking = n_points - len(seen)
    return np.concatenate([seen, rng.choice(seen, lacking)]) if lacking else seen


def scanned(points: np.ndarray, n_points: int, rng: np.random.Generator) -> np.ndarray:
    """Points as a sensor sees them: now and then partly hidden, or with some ground.

    Another object hides a side, or the lowest points go with the ground. Returns float64, shape
    (n_points, 3).
    """
    part = points
    if rng.random() < HIDDEN:
        angle = rng.uniform(0, 2 * math.pi)
        side = np.array([math.cos(angle), 0, math.sin(angle)])
        direction, most = (side, 0.4) if rng.random() < 0.5 else (np.array([0, 1, 0]), 0.2)
        along = points @ direction
        part = points[along >= np.quantile(along, rng.uniform(0, most))]
    xyz = part[seen_points(part, n_points, rng)].astype(np.float64)
    if rng.random() < GROUND:
        low, high = points.min(axis=0), points.max(axis=0)
        on_ground = rng.choice(n_points, math.ceil(rng.uniform(0, 0.15) * n_points), replace=False)
        xyz[on_ground] = rng.uniform(1.2 * low, 1.2 * high, (len(on_ground), 3))
        xyz[on_ground, 1] = low[1]
    return xyz


def augmented(
    points: np.ndarray, n_points: int, rng: np.random.Generator, by_sensor: bool = False
) -> np.ndarray:
    """Sample, scale by axis, turn about y by any angle, tilt a little, and jitter."""
    if by_sensor:
        xyz = scanned(points, n_points, rng)
    else:
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
def accuracy(
    encoder: Sprout, shapes: Shapes, n_points: int, part: str = "indoor"
) -> tuple[float, float]:
    """Accuracy on the validation shapes of a part: among all labels, and among theirs.

    They are sampled in a fixed way, road objects as sensors see them. Labels that mean the same as
    the right one do not compete.
    """
    rng = np.random.default_rng(0)
    mine = shapes.watched_part == part
    thin = []
    for cloud in shapes.watched[mine]:
        if part == "road":
            chosen = seen_points(cloud, n_points, rng)
        else:
            chosen = rng.choice(len(cloud), n_points, replace=False)
        thin.append(normalized(cloud[chosen].astype(np.float64)))
    target = shapes.watched_target[torch.from_numpy(mine)]
    xyz = torch.from_numpy(np.stack(thin))
    features = torch.cat([encoder(part) for part in xyz.split(64)])
    cosines = F.normalize(features, dim=-1) @ shapes.texts.T
    among_all = cosines.masked_fill(shapes.same[target], -2)
    others = torch.ones(len(shapes.labels), dtype=torch.bool)
    others[target] = False
    among_own = among_all.masked_fill(others, -2)
    right = [(found.argmax(-1) == target).float().mean().item() for found in (among_all, among_own)]
    return right[0], right[1]


def averaged(encoder: Sprout) -> AveragedModel:
    return AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)


class Run:
    """Model, running average, optimiser, and where they are kept."""

    def __init__(self, folder: Path, lr: float, center: Tensor):
        self.folder, self.step, self.seconds = folder, 0, 0.0
        self.saved = time.monotonic()
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
        self.saved = time.monotonic()
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
    losses: list[float] = []

    def draw(step: int) -> tuple[Tensor, Tensor]:
        return shapes.batch(args.batch, np.random.default_rng([args.seed, step]))

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(draw, run.step)
        while run.step < last:
            if run.step == args.steps:
                settle(run, shapes, args)
            batch = coming.result()
            coming = ahead.submit(draw, run.step + 1)
            losses.append(learn(run, shapes, batch, args))
            now = time.monotonic()
            run.seconds, clock = run.seconds + now - clock, now
            if run.step % 50 == 0:
                run.log(loss=round(statistics.fmean(losses), 3))
                losses.clear()
            if run.step % 500 == 0 or run.step == last:
                watch(run, shapes)
            if run.step == last or time.monotonic() - run.saved > SAVE_AFTER:
                run.save()


def learn(
    run: Run, shapes: Shapes, batch: tuple[Tensor, Tensor], args: argparse.Namespace
) -> float:
    """One step; returns the loss."""
    for group in run.optim.param_groups:
        group["lr"] = rate(run.step, args)
    xyz, target = batch
    run.encoder.train()
    run.encoder.group_net.train(run.step < args.steps)
    cosines = F.normalize(run.encoder(xyz), dim=-1) @ shapes.texts.T
    logits = (run.encoder.logit_scale * cosines).masked_fill(shapes.same[target], -torch.inf)
    loss = F.cross_entropy(logits, target)
    run.optim.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.encoder.parameters(), 1.0)
    run.optim.step()
    run.average.update_parameters(run.encoder)
    run.step += 1
    return loss.item()


def watch(run: Run, shapes: Shapes) -> None:
    """Log the accuracies of the running average."""
    encoder = run.average.module.eval()
    for part in np.unique(shapes.watched_part).tolist():
        name = "val" if part == "indoor" else f"val_{part}"
        found: dict[str, float] = {}
        for n in WATCHED:
            among_all, among_own = accuracy(encoder, shapes, n, part)
            found |= {f"{name}_{n}": round(among_all, 3), f"{name}_own_{n}": round(among_own, 3)}
        run.log(**found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clouds", type=Path, required=True, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--settled-steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    shapes = Shapes(args.clouds, args.out)
    run = Run(args.out, args.lr, shapes.center)
    train(run, shapes, args)
    weights = args.out / "sprout.safetensors"
    save_sprout(run.average.module, weights, torch.bfloat16)
    known = TextEmbeddings(tuple(shapes.labels), shapes.texts)
    stamp = run.average.module.text_stamp()
    save_trained_labels(labels_beside(weights), known, shapes.parts, stamp)


if __name__ == "__main__":
    main()
