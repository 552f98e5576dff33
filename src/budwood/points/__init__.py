"""Classify point clouds, down to a few dozen points, with labels in words.

>>> from budwood.points import classify
>>> classify("chair.ply", ["chair", "table", "desk lamp"], points=64)[0].best  # doctest: +SKIP
'chair'

Names are imported on first use, so that reading clouds, for example, does not import PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood.lazy import lazy_exports

if TYPE_CHECKING:
    from budwood.points.accumulation import accumulate as accumulate
    from budwood.points.adaptation import AdaptConfig as AdaptConfig
    from budwood.points.adaptation import adapt as adapt
    from budwood.points.adapters import ADAPTERS as ADAPTERS
    from budwood.points.adapters import Adapter as Adapter
    from budwood.points.adapters import load_adapter as load_adapter
    from budwood.points.adapters import make_adapter as make_adapter
    from budwood.points.axes import AXES as AXES
    from budwood.points.classification import Ranking as Ranking
    from budwood.points.classification import classify as classify
    from budwood.points.cleaning import without_ground as without_ground
    from budwood.points.cleaning import without_strays as without_strays
    from budwood.points.data import CloudSet as CloudSet
    from budwood.points.data import load_clouds as load_clouds
    from budwood.points.distill import Curriculum as Curriculum
    from budwood.points.distill import Objective as Objective
    from budwood.points.encoders import ENCODERS as ENCODERS
    from budwood.points.encoders import PointEncoder as PointEncoder
    from budwood.points.encoders import load_encoder as load_encoder
    from budwood.points.familiar import Unfamiliar as Unfamiliar
    from budwood.points.familiar import trained_labels as trained_labels
    from budwood.points.familiar import unfamiliar as unfamiliar
    from budwood.points.inputs import InputOptions as InputOptions
    from budwood.points.io import FORMATS as FORMATS
    from budwood.points.io import READERS as READERS
    from budwood.points.io import Assumed as Assumed
    from budwood.points.io import Cloud as Cloud
    from budwood.points.io import crop as crop
    from budwood.points.io import find_files as find_files
    from budwood.points.io import read as read
    from budwood.points.methods import METHODS as METHODS
    from budwood.points.sampling import SAMPLERS as SAMPLERS
    from budwood.points.sampling import sample as sample
    from budwood.points.scanning.boxes import Box as Box
    from budwood.points.scanning.config import ScanConfig as ScanConfig
    from budwood.points.scanning.formats import ScannedFrame as ScannedFrame
    from budwood.points.scanning.pipeline import scan as scan
    from budwood.points.scanning.poses import read_poses as read_poses
    from budwood.points.scanning.views import draw_from_above as draw_from_above
    from budwood.points.scanning.views import write_page as write_page
    from budwood.points.text import TextEmbeddings as TextEmbeddings
    from budwood.points.text import embed_labels as embed_labels
    from budwood.points.text import read_embeddings as read_embeddings
    from budwood.points.text import save_embeddings as save_embeddings
    from budwood.points.towers import TOWERS as TOWERS

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ADAPTERS": "adapters",
        "AXES": "axes",
        "ENCODERS": "encoders",
        "FORMATS": "io",
        "METHODS": "methods",
        "READERS": "io",
        "SAMPLERS": "sampling",
        "TOWERS": "towers",
        "AdaptConfig": "adaptation",
        "Adapter": "adapters",
        "Assumed": "io",
        "Box": "scanning.boxes",
        "Cloud": "io",
        "CloudSet": "data",
        "Curriculum": "distill",
        "InputOptions": "inputs",
        "Objective": "distill",
        "PointEncoder": "encoders",
        "Ranking": "classification",
        "ScanConfig": "scanning.config",
        "ScannedFrame": "scanning.formats",
        "TextEmbeddings": "text",
        "Unfamiliar": "familiar",
        "accumulate": "accumulation",
        "adapt": "adaptation",
        "classify": "classification",
        "crop": "io",
        "draw_from_above": "scanning.views",
        "embed_labels": "text",
        "find_files": "io",
        "load_adapter": "adapters",
        "load_clouds": "data",
        "load_encoder": "encoders",
        "make_adapter": "adapters",
        "read": "io",
        "read_embeddings": "text",
        "read_poses": "scanning.poses",
        "sample": "sampling",
        "save_embeddings": "text",
        "scan": "scanning.pipeline",
        "trained_labels": "familiar",
        "unfamiliar": "familiar",
        "without_ground": "cleaning",
        "without_strays": "cleaning",
        "write_page": "scanning.views",
    },
)
