"""The Points tab: labels of a cloud, before and after adaptation, and the objects of a frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from budwood.app import markup
from budwood.app.models import Models
from budwood.app.uploads import uploaded
from budwood.errors import InputError
from budwood.points import FORMATS, Cloud, InputOptions, load_clouds

if TYPE_CHECKING:
    from budwood.points import Ranking
    from budwood.points.io.cloud import Assumed
    from budwood.points.scanning.formats import ScannedFrame
    from budwood.progress import Progress

EXAMPLES = ("armchair", "desk", "bathtub", "ceiling lamp", "toilet", "television", "truck", "vase")
"""Classes of held-out clouds that ship, one cloud of each."""
LABELS = (
    "armchair, desk, bathtub, ceiling lamp, toilet, television, truck, vase, bowl, wardrobe, "
    "washing machine, stool, trash can, motorcycle, window"
)
ROOM = {"armchair": (2.5, 1.0), "desk": (3.5, -1.5), "toilet": (1.5, -2.5), "wardrobe": (4.5, 2.5)}
"""Objects of the example frame, and how far ahead of the sensor and to its left they are, metres.
"""
SUFFIXES = tuple(FORMATS)
SHOWN_LABELS = 5
POINTS = 64


@dataclass(frozen=True, eq=False)
class Named:
    """What the tab shows of one cloud.

    Attributes:
        figure: of plotly, with the points that were encoded.
        ranked: HTML: the labels, before and after adaptation.
    """

    figure: Any = field(repr=False)
    ranked: str


def name(
    models: Models, file: str | None, example: str, labels: str, n_points: float, up: str
) -> Named:
    """Thin a cloud and rank labels for it.

    Args:
        models: of the page.
        file: an uploaded cloud, or None for the example.
        example: one of ``EXAMPLES``.
        labels: with commas.
        n_points: points to keep.
        up: the axis that points up in the file, or ``"auto"``.

    Raises:
        BudwoodError: an unusable file or label.
    """
    given = _labels(labels)
    options = InputOptions(points=int(n_points), up=up, invalid="drop")
    cloud = _cloud(file, example, options)
    with models.points.held() as held:
        from budwood.points import classify

        texts = held.texts(given)
        how: dict[str, Any] = {"encoder": held.encoder, "points": options.points, "up": up}
        before = classify(cloud, texts, **how)[0]
        after = classify(cloud, texts, adapter=held.adapter, **how)[0] if held.adapter else None
        xyz, _ = options.prepare(cloud, held.encoder)
    figure = _figure(xyz.numpy(), f"{before.n_points} of {len(cloud):,} points")
    return Named(figure, _ranked(before, after))


def adapt(models: Models, progress: Progress) -> None:
    """Adapt the encoder to sparse clouds, on clouds that ship, without labels.

    The adapter is kept for the next start.

    Args:
        models: of the page.
        progress: called with the steps done and all steps.
    """
    with models.points.held() as held:
        held.adapt(progress)


def scan(models: Models, file: str | None, labels: str, up: str) -> tuple[Any, str]:
    """Find the objects of a frame, and name them.

    Args:
        models: of the page.
        file: an uploaded frame, or None for the example: furniture on a floor.
        labels: with commas.
        up: the axis that points up in the file.

    Returns:
        A figure of plotly with boxes and labels, and HTML with a table of the objects.

    Raises:
        BudwoodError: an unusable file or label.
    """
    from budwood.points import scan as scan_frames
    from budwood.points.scanning.views import frame_figure

    given = _labels(labels)
    cloud = (
        room() if file is None else _read(file, InputOptions(up=up, strays="keep", invalid="drop"))
    )
    with models.points.held() as held:
        frames = scan_frames(
            cloud,
            given,
            encoder=held.encoder,
            adapter=held.adapter,
            up="z" if file is None else up,
        )
    (frame,) = frames
    figure = frame_figure(frame)
    figure.update_layout(legend={"orientation": "h", "y": 0, "yanchor": "top"})  # fits a phone
    return figure, _objects(frame)


def room(seed: int = 0) -> Cloud:
    """The example frame: furniture on a floor, z up, the sensor 1.2 m above the floor."""
    rng = np.random.default_rng(seed)
    floor = np.column_stack([rng.uniform(0, 6, 6000), rng.uniform(-4, 4, 6000), np.zeros(6000)])
    parts = [floor + rng.normal(0, 0.01, floor.shape)]
    known = load_clouds()
    for label, (ahead, left) in ROOM.items():
        x, height, z = known.xyz[known.labels.index(label)].astype(np.float64).T * 0.8
        parts.append(np.column_stack([x + ahead, left - z, height - height.min()]))
    return Cloud(np.concatenate(parts) - [0, 0, 1.2], None, "example room")


def _labels(text: str) -> list[str]:
    from budwood.points.labels import check_labels

    return list(check_labels([label.strip() for label in text.split(",") if label.strip()]))


def _cloud(file: str | None, example: str, options: InputOptions) -> Cloud:
    if file is not None:
        return _read(file, options)
    known = load_clouds()
    if example not in EXAMPLES:
        raise InputError(f"there is no example {example!r}; choose one of {', '.join(EXAMPLES)}")
    xyz = known.xyz[known.labels.index(example)].astype(np.float64)
    return options.read(Cloud(xyz, None, example))


def _read(file: str, options: InputOptions) -> Cloud:
    from budwood.app.uploads import check_cloud_file

    with uploaded(file):
        check_cloud_file(Path(file))
        return replace(options.read(file), source=Path(file).name)


def _figure(xyz: Any, title: str) -> Any:
    from budwood.points.figure3d import cloud_figure

    return cloud_figure(xyz, title)


def _ranked(before: Ranking, after: Ranking | None) -> str:
    columns = [("before adaptation", before)] + ([("after", after)] if after else [])
    heads = ("rank", *(name for name, _ in columns))
    n_labels = min(SHOWN_LABELS, len(before.labels))
    rows = [
        (str(i + 1), *(f"{one.labels[i]}, {one.scores[i]:.0%}" for _, one in columns))
        for i in range(n_labels)
    ]
    said = _said(before.assumed, before.assumed.notes) if before.assumed else ""
    return markup.status(markup.table("Labels, best first", heads, rows) + said)


def _objects(frame: ScannedFrame) -> str:
    heads = ("label", "probability", "size, m", "points")
    rows = [
        (
            box.label,
            f"{box.score:.0%}",
            " × ".join(f"{side:.1f}" for side in box.size),
            f"{box.n_points:,}",
        )
        for box in frame.boxes
    ]
    said = _said(frame.assumed, frame.notices)
    return markup.status(markup.table(f"{len(rows)} objects", heads, rows) + said)


def _said(assumed: Assumed, notes: Sequence[str]) -> str:
    """Notes on a cloud, and which of its points were left out."""
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in assumed.dropped.items())
    lines = [*notes, f"points left out: {left_out}"] if left_out else notes
    return "".join(markup.paragraph(line) for line in lines)
