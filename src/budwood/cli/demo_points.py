"""`budwood points demo`: sparse clouds named before and after adaptation, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import clouds, options
from budwood.cli.console import out, print_json, print_table, progress
from budwood.errors import InputError
from budwood.files import write_whole

if TYPE_CHECKING:
    from budwood.points import Adapter, CloudSet, PointEncoder, TextEmbeddings

SHOWN = 8
COUNTS = (128, 64, 32)
_COLUMNS = {"cloud": ("cloud", ""), "truth": ("truth", ""), "before": ("before", "")}
_COLUMNS |= {"after": ("after", "")}


def demo(
    points: Annotated[int, typer.Option(min=2, max=1024, help="Points of each cloud.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Of adaptation.")] = 100,
    folder: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Where clouds and the adapter go.")
    ] = Path("budwood-points-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
    json: options.Json = False,
) -> None:
    """Adapt the embedded point encoder, and name sparse clouds of classes not seen in that.

    Works offline. The clouds that ship are split by class: adaptation has clouds of one part,
    without their names; tested are those of the other.

    \b
    Example:
      budwood points demo --points 32
    """
    from budwood.points import load_clouds
    from budwood.points.adapters.base import FILE

    adapted = folder / "adapter"
    for file in (adapted / FILE, *_files(folder)):
        if file.exists():
            raise InputError(f"{file} exists, perhaps of an earlier demo; choose another --dir")
    given = load_clouds()
    model = clouds.load("sprout", None, "auto")
    words = clouds.words_of(model, list(given.labels))
    adapter = _adapted(given, model, adapted, steps, seed)
    tested = given.where(group="unseen", use="test")
    rows = _name_all(tested, words, model, adapter, points, seed)
    files = _save_some(tested, rows, points, seed, folder)
    share = {
        key: sum(row[key] == row["truth"] for row in rows) / len(rows)
        for key in ("before", "after")
    }
    if json:
        print_json({"points": points, "steps": steps, "n_clouds": len(rows), **share, "rows": rows})
        return
    print_table([row for row in rows if "cloud" in row], _COLUMNS)
    names = ",".join(dict.fromkeys((rows[0]["truth"], *tested.labels[:6])))
    out().print(
        f"\nAll {len(rows)} clouds of {len(tested.labels)} classes, {points} points each: "
        f"{share['before']:.1%} named rightly before, {share['after']:.1%} after.\n\nNext:\n"
        f'  budwood classify {files[0]} --labels "{names}" --adapter {adapted}\n'
        "  budwood bench points --methods tokens,adabn,sparse-lora --points 64 --seeds 1",
        markup=False,
        soft_wrap=True,
    )


def _adapted(given: CloudSet, model: PointEncoder, folder: Path, steps: int, seed: int) -> Adapter:
    from budwood.points import AdaptConfig, Cloud, Curriculum, adapt

    dense = [Cloud(xyz.astype("float64")) for xyz in given.where(use="adapt").xyz]
    config = AdaptConfig(steps=steps, seed=seed, curriculum=Curriculum(COUNTS))
    with progress("adapting") as advance:
        return adapt(dense, None, model, config, output=folder, on_step=advance)


def _name_all(
    tested: CloudSet,
    words: TextEmbeddings,
    model: PointEncoder,
    adapter: Adapter,
    points: int,
    seed: int,
) -> list[dict[str, Any]]:
    from budwood.points import Cloud, TextEmbeddings, classify

    chosen = [words.labels.index(label) for label in tested.labels]
    names = TextEmbeddings(tested.labels, words.vectors[chosen])
    dense = [Cloud(xyz.astype("float64")) for xyz in tested.xyz]
    settings: dict[str, Any] = {"encoder": model, "points": points, "seed": seed}
    before = classify(dense, names, **settings)
    after = classify(dense, names, adapter=adapter, **settings)
    return [
        {"truth": one.label, "before": a.best, "after": b.best}
        for one, a, b in zip(tested.about, before, after)
    ]


def _save_some(
    tested: CloudSet, rows: list[dict[str, Any]], points: int, seed: int, folder: Path
) -> list[Path]:
    """Some clouds as files, evenly spread over the classes; their rows get the names."""
    import numpy as np

    from budwood.points import Cloud, sample

    files = _files(folder)
    for path, index in zip(files, np.linspace(0, len(rows) - 1, SHOWN).round().astype(int)):
        sparse = sample(Cloud(tested.xyz[index].astype("float64")), points, seed=seed)
        write_whole(path, _saver(sparse.xyz))
        rows[index]["cloud"] = str(path)
    return files


def _files(folder: Path) -> list[Path]:
    return [folder / f"cloud-{number}.npy" for number in range(1, SHOWN + 1)]


def _saver(xyz: Any) -> Any:
    import numpy as np

    return lambda part: np.save(part, xyz)
