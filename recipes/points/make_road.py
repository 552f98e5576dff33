"""Make clouds of road objects: parametric models, and those of Debian packages if they are given.

    python recipes/points/make_road.py --out runs/road --models 120 --packages packages

`--packages` is a folder where torcs-data=1.3.7+dfsg-5 and flightgear-data-models=1:2020.3.16+dfsg-1
are unpacked (`apt-get download …`, `dpkg-deb -x … packages`). Each model has one use: pretraining,
adaptation, validation or test. A class is a file in the folder, and a run that was killed goes on
with the next. Of the test, validation and adaptation, parametric models alone ship (`road.npz`):
they are ours, and the packages' licences are copyleft. Of unseen classes, the models for adaptation
are for test too, and nothing else ships.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from classes import ROAD, SEEN
from make_clouds import N_SHIPPED, _number, cloud_of
from road_shapes import MAKERS, packaged, parametric
from shapes import Shape

from budwood.points.data import Split, write_clouds

USES = (("test", 0.15), ("val", 0.07), ("adapt", 0.13))
SHIPPED_EACH = {"seen": 18, "unseen": 36}


def cut_road(n: int) -> list[str]:
    """The use of each of the n models of a class from one source, in their random order."""
    uses = [use for use, part in USES for _ in range(round(part * n))]
    return uses + ["pretrain"] * (n - len(uses))


def shapes_of(label: str, n_models: int, others: list[Shape]) -> Iterator[tuple[Shape, str]]:
    """The models of a class with their uses."""
    own = [parametric(label, number) for number in range(n_models)]
    for source in (own, [shape for shape in others if shape.label == label]):
        ordered = sorted(source, key=lambda shape: _number(shape.id))
        yield from zip(ordered, cut_road(len(ordered)))


def make_class(label: str, n_models: int, others: list[Shape], file: Path) -> None:
    """Write the clouds of a class, whole or not at all."""
    rows, clouds = [], []
    for shape, use in shapes_of(label, n_models, others):
        cloud = cloud_of(shape)
        if cloud is not None:
            rows.append((shape.id, use, shape.package))
            clouds.append(np.round(cloud * 32767).astype(np.int16))
    ids, uses, packages = map(np.array, zip(*rows))
    part = file.with_suffix(".part.npz")
    np.savez(part, xyz=np.stack(clouds), id=ids, use=uses, package=packages)
    part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=int, default=120, help="parametric models a class")
    parser.add_argument("--packages", type=Path)
    args = parser.parse_args()

    folder = args.out / f"classes-{args.models}{'-packages' if args.packages else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {label: folder / f"{label}.npz" for label in sorted(MAKERS)}
    missing = [label for label, file in files.items() if not file.exists()]
    others = list(packaged(args.packages)) if missing and args.packages else []
    for label in missing:
        make_class(label, args.models, others, files[label])
        print("made", label, flush=True)
    join(files, args.out)


def join(files: dict[str, Path], out: Path) -> None:
    """Put the classes together: `clouds.npz` to train on, `road.npz` to ship."""
    parts = {label: np.load(file) for label, file in files.items()}
    xyz = np.concatenate([part["xyz"] for part in parts.values()])
    label = np.concatenate([[name] * len(part["use"]) for name, part in parts.items()])
    use, package, id_ = (
        np.concatenate([part[key] for part in parts.values()]) for key in ("use", "package", "id")
    )
    group = np.array([ROAD[name] for name in label.tolist()])
    use = np.where((group != SEEN) & (use == "adapt"), "test", use)
    np.savez(out / "clouds.npz", xyz=xyz, label=label, group=group, use=use, part=np.array("road"))
    about = [Split(*row) for row in zip(label.tolist(), group.tolist(), use.tolist())]
    shipped = to_ship(about, package == "parametric")
    write_clouds(out / "road.npz", xyz[shipped, :N_SHIPPED] / 32767, [about[i] for i in shipped])
    models = Counter(zip(label.tolist(), package.tolist(), use.tolist()))
    text = {"models": {" / ".join(key): n for key, n in sorted(models.items())}}
    text["sources"] = sorted(name for name in id_.tolist() if not name.startswith("parametric"))
    (out / "clouds.json").write_text(json.dumps(text, indent=1))
    print(f"{len(xyz)} models, {len(shipped)} to ship")


def to_ship(about: Sequence[Split], is_ours: np.ndarray) -> list[int]:
    """The models to ship, at most `SHIPPED_EACH` of a class and a use."""
    shipped, counts = [], Counter()
    for i in np.flatnonzero(is_ours).tolist():
        if about[i].use == "test" or (about[i].group == SEEN and about[i].use != "pretrain"):
            counts[about[i]] += 1
            if counts[about[i]] <= SHIPPED_EACH[about[i].group]:
                shipped.append(i)
    return shipped


if __name__ == "__main__":
    main()
