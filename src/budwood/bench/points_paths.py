"""`bench points-speed`: whole paths, from files to labels, and what large clouds take."""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from budwood.bench.frames import street, sweep
from budwood.bench.points_speed import clock, rate_rows
from budwood.points.classification import classify, score
from budwood.points.encoders import PointEncoder
from budwood.points.grouping import ball, farthest_points
from budwood.points.inputs import InputOptions
from budwood.points.io import make_cloud
from budwood.points.sampling import SAMPLERS, without_duplicates
from budwood.points.scanning.config import ScanConfig
from budwood.points.scanning.pipeline import scan
from budwood.points.text import TextEmbeddings
from budwood.timing import median_ratio, side_by_side

Row = dict[str, Any]
LABELS = 40
GROUPS = 384, 64, 0.2
"""Groups, points in each and radius of the ball queries: those of OpenShape."""
SHOTS = 2000
"""In a turn of the simulated LiDAR, with 64 beams: some 120,000 points a frame."""


def path_rows(encoder: PointEncoder, n_points: int, n_clouds: int, repeats: int) -> list[Row]:
    """Time the way from files to labels, and a straightforward loop over the files.

    Args:
        encoder: frozen; its weights do not matter.
        n_points: of each cloud. The encoder gets at most as many as it was made for.
        n_clouds: files.
        repeats: rounds, after one warm-up.

    Returns:
        Rows with ``what, points, clouds_per_s, over_loop``.
    """
    texts, used = random_texts(encoder), min(n_points, encoder.preparation.n_points)
    with tempfile.TemporaryDirectory(prefix="budwood-") as folder:
        files = write_clouds(Path(folder), n_points, n_clouds)
        ours = functools.partial(classify, files, texts, encoder=encoder, points=used)
        runs = {"classify": ours, "classify, loop": lambda: looped(files, texts, encoder, used)}
        times = side_by_side({name: clock(run) for name, run in runs.items()}, repeats)
    ratio = {name: median_ratio(times["classify, loop"], mine) for name, mine in times.items()}
    return rate_rows(times, n_points, n_clouds, over_loop=ratio)


def looped(
    files: Sequence[Path], texts: TextEmbeddings, encoder: PointEncoder, n_points: int
) -> list[str]:
    """Label files the simple way: file by file. The labels equal those of :func:`classify`."""
    options = InputOptions(n_points)
    labels = []
    for file in files:
        xyz, rgb = options.prepare(options.read(file), encoder)
        with torch.inference_mode():
            features = encoder(xyz[None], None if rgb is None else rgb[None])
        best = int(score(features, texts.vectors, encoder.logit_scale)[0].argmax())
        labels.append(texts.labels[best])
    return labels


def large_rows(n_points: int, repeats: int) -> list[Row]:
    """Time what is done to one large cloud, a noisy sphere.

    Returns:
        Rows with ``what, points, seconds``.
    """
    rng = np.random.default_rng(0)
    xyz = rng.normal(size=(n_points, 3))
    xyz *= rng.normal(1, 0.02, (n_points, 1)) / np.linalg.norm(xyz, axis=1, keepdims=True)
    cloud = make_cloud(xyz)
    n_groups, k, radius = GROUPS
    tensor = torch.from_numpy(xyz).float()[None]
    queries = tensor[:, :n_groups]
    runs: dict[str, Callable[[], Any]] = {
        f"sampler {name}": functools.partial(SAMPLERS.get(name), xyz, 1024)
        for name in SAMPLERS.names()
    }
    runs |= {
        "farthest points": lambda: farthest_points(tensor, n_groups),
        "ball query": lambda: ball(tensor, queries, radius, k),
        "small balls": lambda: ball(tensor, queries, radius / 100, k),
        "without duplicates": lambda: without_duplicates(cloud),
    }
    return _seconds_of(runs, n_points, repeats)


def frame_rows(encoder: PointEncoder, repeats: int) -> list[Row]:
    """Time scanning a simulated frame of some 120,000 points, from its file to named boxes.

    Returns:
        A row with ``what, points, seconds``.
    """
    xyz, _ = sweep(street(), shots=SHOTS)
    texts = random_texts(encoder)
    with tempfile.TemporaryDirectory(prefix="budwood-") as folder:
        file = Path(folder, "frame.bin")
        np.column_stack([xyz, np.zeros(len(xyz))]).astype("<f4").tofile(file)
        one = functools.partial(scan, [file], texts, ScanConfig(threshold=0), encoder=encoder)
        return _seconds_of({"scan": one}, len(xyz), repeats)


def random_texts(encoder: PointEncoder) -> TextEmbeddings:
    """Random embeddings of the encoder's width: the time does not depend on them."""
    vectors = torch.randn(LABELS, encoder.embed_dim, generator=torch.Generator().manual_seed(0))
    labels = tuple(f"label {i}" for i in range(LABELS))
    return TextEmbeddings(labels, F.normalize(vectors, dim=-1))


def write_clouds(folder: Path, n_points: int, n_clouds: int) -> list[Path]:
    """Write clouds of KITTI's layout."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(n_clouds):
        files.append(folder / f"{i:04}.bin")
        table = np.column_stack([rng.normal(size=(n_points, 3)), rng.random(n_points)])
        table.astype("<f4").tofile(files[-1])
    return files


def _seconds_of(runs: dict[str, Callable[[], Any]], n_points: int, repeats: int) -> list[Row]:
    times = side_by_side({name: clock(run) for name, run in runs.items()}, repeats)
    return [
        {"what": name, "points": n_points, "seconds": statistics.median(elapsed)}
        for name, elapsed in times.items()
    ]
