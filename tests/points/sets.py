"""A small set of clouds that is easy to tell apart, and names for it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from budwood.points.data import CloudSet, Split
from budwood.points.text import TextEmbeddings

CLASSES = {"ball": "seen", "stick": "seen", "plate": "unseen", "ring": "unseen", "brick": "novel"}


def shape(label, rng, n=60):
    xyz = rng.normal(size=(n, 3))
    xyz /= np.linalg.norm(xyz, axis=1, keepdims=True)
    stretch = {"ball": (1, 1, 1), "stick": (0.05, 1, 0.05), "plate": (1, 0.05, 1)}
    if label == "ring":
        xyz[:, 1] = 0
        xyz /= np.linalg.norm(xyz, axis=1, keepdims=True)
    elif label == "brick":
        xyz = rng.uniform(-1, 1, (n, 3)) * (1, 0.4, 0.5)
    xyz = xyz * stretch.get(label, (1, 1, 1))
    xyz -= xyz.mean(axis=0)
    return (xyz / np.linalg.norm(xyz, axis=1).max()).astype(np.float32)


def clouds(n_each=3, seed=0):
    rng = np.random.default_rng(seed)
    about = []
    for label, group in CLASSES.items():
        uses = ("adapt", "val", "test") if group == "seen" else ("test",)
        about += [Split(label, group, use) for use in uses for _ in range(n_each)]
    xyz = np.stack([shape(one.label, rng) for one in about])
    return CloudSet(xyz, tuple(about))


def texts(width, labels=tuple(CLASSES), seed=0):
    vectors = torch.randn(len(labels), width, generator=torch.Generator().manual_seed(seed))
    return TextEmbeddings(tuple(labels), F.normalize(vectors, dim=-1))
