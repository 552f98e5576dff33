"""`budwood points demo`: sparse clouds classified before and after adaptation, offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import clouds, options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import out, print_json, print_table, progress
from budwood.cli.output import make_folder
from budwood.errors import InputError, MissingPackageError
from budwood.files import write_whole

if TYPE_CHECKING:
    from budwood.points import Adapter, CloudSet, PointEncoder

SHOWN = 8
COUNTS = (128, 64, 32)
ENCODER = "sprout-dense"
COLUMNS = Columns(
    Column("cloud"),
    Column("truth"),
    Column("before"),
    Column("after"),
)


def demo(
    points: Annotated[int, typer.Option(min=2, max=1024, help="Points of each cloud.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Steps of adaptation.")] = 60,
    folder: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="New folder for clouds and the adapter.")
    ] = Path("budwood-points-demo"),
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Adapt an embedded point encoder, and classify sparse clouds before and after.

    It is sprout-dense, which was trained on dense clouds alone, as published encoders are. Works
    offline. Adaptation sees dense clouds of some classes, without labels; the sparse clouds
    are of other classes.

    \b
    Example:
      budwood points demo --points 32
    """
    from budwood.points import load_clouds
    from budwood.points.adapters.base import FILE

    adapted, picture = folder / "adapter", folder / "example.png"
    for file in (adapted / FILE, picture, *_files(folder)):
        if file.exists():
            raise InputError(f"{file} exists, perhaps from an earlier demo; choose another --dir")
    make_folder(folder)
    given = load_clouds()
    model = clouds.load(ENCODER, None, "auto")
    adapter = _adapt(given, model, adapted, steps, seed)
    tested = given.where(group="unseen", use="test")
    rows = _classify(tested, model, adapter, points, seed)
    shown = _save_some(tested, rows, points, seed, folder)
    correct = {
        key: sum(row[key] == row["truth"] for row in rows) / len(rows)
        for key in ("before", "after")
    }
    if json:
        about = {"points": points, "steps": steps, "n_clouds": len(rows)}
        print_json({**about, **correct, "rows": rows})
        return
    _print(rows, shown, correct, points)
    drawn = _draw(tested, shown[0], points, seed, picture)
    labels = ",".join(dict.fromkeys((shown[0]["truth"], *tested.classes[:6])))
    out().print(
        (f"\nThe first of them is drawn in {picture}.\n" if drawn else "") + "\nNext:\n"
        f'  budwood classify {shown[0]["cloud"]} --labels "{labels}" --adapter {adapted}\n'
        f"  budwood bench points --encoder {ENCODER} --methods tokens,sparse-lora --points 64",
        markup=False,
        soft_wrap=True,
    )


def _print(
    rows: list[dict[str, Any]],
    shown: list[dict[str, Any]],
    correct: dict[str, float],
    points: int,
) -> None:
    n_classes = len({row["truth"] for row in rows})
    out().print(
        f"{len(rows)} objects of {n_classes} classes that adaptation never saw, {points} points "
        f"each: {correct['before']:.1%} get the right label before adaptation, "
        f"{correct['after']:.1%} after.\n\n{sum(map(_gained, rows))} labels become right and "
        f"{sum(map(_lost, rows))} become wrong, such as:",
        markup=False,
        soft_wrap=True,
    )
    print_table(shown, COLUMNS)


def _adapt(given: CloudSet, model: PointEncoder, folder: Path, steps: int, seed: int) -> Adapter:
    from budwood.points import AdaptConfig, Curriculum, adapt

    dense = list(given.where(use="adapt").xyz)
    config = AdaptConfig(steps=steps, seed=seed, curriculum=Curriculum(COUNTS))
    with progress("adapting") as advance:
        return adapt(dense, None, model, config, output=folder, progress=advance)


def _classify(
    tested: CloudSet, model: PointEncoder, adapter: Adapter, points: int, seed: int
) -> list[dict[str, Any]]:
    from budwood.points import classify

    texts = clouds.embed(model, list(tested.classes))
    dense = list(tested.xyz)
    before = classify(dense, texts, encoder=model, points=points, seed=seed)
    after = classify(dense, texts, encoder=model, points=points, seed=seed, adapter=adapter)
    return [
        {"truth": truth, "before": frozen.best, "after": adapted.best}
        for truth, frozen, adapted in zip(tested.labels, before, after)
    ]


def _save_some(
    tested: CloudSet, rows: list[dict[str, Any]], points: int, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Save some of the clouds that change their label; their rows get the files' names.

    Returns:
        These rows, with the index of the cloud: right labels first, as many as their fraction.
    """
    import numpy as np

    from budwood.points import Cloud, sample

    gained = [i for i, row in enumerate(rows) if _gained(row)]
    lost = [i for i, row in enumerate(rows) if _lost(row)]
    n_lost = round(SHOWN * len(lost) / max(1, len(gained) + len(lost)))
    chosen = [*_spread(gained, SHOWN - n_lost), *_spread(lost, n_lost)]
    shown = []
    for path, index in zip(_files(folder), chosen or _spread(range(len(rows)), SHOWN)):
        sparse = sample(Cloud(tested.xyz[index].astype("float64")), points, seed=seed)
        write_whole(path, lambda part, xyz=sparse.xyz: np.save(part, xyz))
        rows[index]["cloud"] = str(path)
        shown.append({**rows[index], "index": index})
    return shown


def _gained(row: dict[str, Any]) -> bool:
    return row["before"] != row["truth"] == row["after"]


def _lost(row: dict[str, Any]) -> bool:
    return row["before"] == row["truth"] != row["after"]


def _spread(indices: Sequence[int], n: int) -> list[int]:
    """At most ``n`` of the indices, evenly spread."""
    n = min(n, len(indices))
    return [indices[(2 * i + 1) * len(indices) // (2 * n)] for i in range(n)]


def _draw(tested: CloudSet, row: dict[str, Any], points: int, seed: int, path: Path) -> bool:
    """Draw one object dense and sparse. Returns False where matplotlib is not installed."""
    from budwood.points import Cloud, sample
    from budwood.points.picture import draw

    dense = Cloud(tested.xyz[row["index"]].astype("float64"))
    sparse = sample(dense, points, seed=seed)
    titles = (f"{row['truth']}, {len(dense)} points", f"{len(sparse)} points")
    titles = (titles[0], f"{titles[1]}: {row['before']} → {row['after']}")
    try:
        write_whole(path, lambda part: draw([*zip(titles, (dense.xyz, sparse.xyz))], part))
    except (InputError, MissingPackageError):
        return False
    return True


def _files(folder: Path) -> list[Path]:
    return [folder / f"cloud-{number}.npy" for number in range(1, SHOWN + 1)]
