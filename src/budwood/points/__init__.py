"""Naming objects made of a few dozen points.

>>> from budwood.points import classify
>>> classify("chair.ply", ["chair", "table", "desk lamp"], points=64)[0].best  # doctest: +SKIP
'chair'
"""

from __future__ import annotations

from budwood.points.adapt import AdaptConfig, adapt
from budwood.points.adapters import ADAPTERS, Adapter, load_adapter, make_adapter
from budwood.points.classify import Ranking, classify
from budwood.points.data import CloudSet, load_clouds
from budwood.points.distill import Curriculum, Objective
from budwood.points.encoders import ENCODERS, PointEncoder, load_encoder
from budwood.points.io import READERS, Cloud, crop, find_files, read
from budwood.points.methods import METHODS
from budwood.points.sampling import SAMPLERS, sample
from budwood.points.text import TextEmbeddings, embed_labels, read_embeddings, save_embeddings
from budwood.points.towers import TOWERS

__all__ = [
    "ADAPTERS",
    "ENCODERS",
    "METHODS",
    "READERS",
    "SAMPLERS",
    "TOWERS",
    "AdaptConfig",
    "Adapter",
    "Cloud",
    "CloudSet",
    "Curriculum",
    "Objective",
    "PointEncoder",
    "Ranking",
    "TextEmbeddings",
    "adapt",
    "classify",
    "crop",
    "embed_labels",
    "find_files",
    "load_adapter",
    "load_clouds",
    "load_encoder",
    "make_adapter",
    "read",
    "read_embeddings",
    "sample",
    "save_embeddings",
]
