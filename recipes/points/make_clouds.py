"""Make clouds from two packages of 3D models: some train sprout points, others ship.

    apt-get download sweethome3d-furniture=1.8-1 kicad-packages3d=6.0.10-1
    dpkg-deb -x sweethome3d-furniture_*.deb furniture
    mkdir parts; dpkg-deb --fsys-tarfile kicad-packages3d_*.deb |
        tar -x -C parts --wildcards '*.wrl' '*copyright'
    python recipes/points/make_clouds.py --furniture furniture --parts parts --out runs/points

The shapes of each class are split in a fixed random order. Seen classes have shapes for test,
adaptation, validation and pretraining, unseen ones for test and pretraining, novel ones for test
alone. Shapes for pretraining do not ship, and shapes that ship are not in pretraining; but the
electronic parts of a class are much alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from classes import NOVEL, OTHER, SEEN
from shapes import Shape, furniture, parts

from budwood.points.data import Split, write_clouds
from budwood.points.io.meshes import sample_surface

N_DENSE = 4096
N_SHIPPED = 1024


def cut(group: str, n: int) -> list[str]:
    """The use of each of the n shapes of a class, in their random order."""
    if group == OTHER:
        return ["pretrain"] * n
    if group == NOVEL:
        return ["test"] * min(n, 12) + ["left"] * max(0, n - 12)
    if group == SEEN:
        n_test, n_adapt = min(6, round(0.3 * n)), min(10, round(0.25 * n))
        n_val = min(2, round(0.1 * n))
    else:
        n_test, n_adapt, n_val = min(12, n // 2), 0, 0
    rest = n - n_test - n_adapt - n_val
    return ["test"] * n_test + ["adapt"] * n_adapt + ["val"] * n_val + ["pretrain"] * rest


def cloud_of(shape: Shape) -> np.ndarray | None:
    """Points on the surface, centred, the largest norm 1; float32, shape (N_DENSE, 3)."""
    if not np.isfinite(shape.vertices).all() or len(shape.faces) == 0:
        return None
    xyz, _ = sample_surface(shape.vertices, shape.faces, N_DENSE, seed=_number(shape.id))
    xyz = xyz - xyz.mean(axis=0)
    radius = np.linalg.norm(xyz, axis=1).max()
    return (xyz / radius).astype(np.float32) if radius > 0 else None


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--furniture", type=Path, required=True)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    by_class: dict[str, list[tuple[Shape, np.ndarray]]] = defaultdict(list)
    for make, folder in ((furniture, args.furniture), (parts, args.parts)):
        for shape in make(folder):
            cloud = cloud_of(shape)
            if cloud is not None:
                by_class[shape.label].append((shape, cloud))
    rows, clouds = [], []
    for members in by_class.values():
        members.sort(key=lambda pair: _number(pair[0].id))
        for (shape, cloud), use in zip(members, cut(members[0][0].group, len(members))):
            rows.append((shape, use))
            clouds.append(cloud)
    stacked = np.stack(clouds)
    args.out.mkdir(parents=True, exist_ok=True)
    _save_training(args.out, rows, stacked)
    for package in ("furniture", "parts"):
        chosen = [
            i
            for i, (s, use) in enumerate(rows)
            if s.package == package and use not in ("pretrain", "left")
        ]
        about = [Split(rows[i][0].label, rows[i][0].group, rows[i][1]) for i in chosen]
        write_clouds(args.out / f"{package}.npz", stacked[chosen, :N_SHIPPED], about)
    _report(args.out, rows)


def _save_training(folder: Path, rows: list[tuple[Shape, str]], clouds: np.ndarray) -> None:
    """Save all clouds: those for pretraining, and the others to watch it."""
    np.savez(
        folder / "clouds.npz",
        xyz=np.round(clouds * 32767).astype(np.int16),
        label=np.array([shape.label for shape, _ in rows]),
        group=np.array([shape.group for shape, _ in rows]),
        use=np.array([use for _, use in rows]),
    )


def _report(folder: Path, rows: list[tuple[Shape, str]]) -> None:
    table = Counter((s.group, use) for s, use in rows)
    classes = {group: len({s.label for s, _ in rows if s.group == group}) for group, _ in table}
    creators = sorted({s.creator for s, use in rows})
    sizes = Counter(s.label for s, _ in rows)
    text = {"classes": classes, "uses": {" ".join(k): n for k, n in sorted(table.items())}}
    text |= {"models": dict(sizes), "creators": creators}
    (folder / "clouds.json").write_text(json.dumps(text, indent=1, ensure_ascii=False))
    print(json.dumps({k: text[k] for k in ("classes", "uses")}, indent=1))


if __name__ == "__main__":
    main()
