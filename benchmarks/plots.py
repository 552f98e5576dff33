"""Draw the plots of the documentation from the records that are kept here.

    python benchmarks/plots.py                 # all
    python benchmarks/plots.py prune points    # some

They are prune, points, tune-front, tune-curves and tune-identity, and kept, which runs
`budwood prune` on the example picture. Each becomes docs/images/NAME.png. `make plots` runs this
too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from budwood import records
from budwood.bench import plots
from budwood.prune.overlay import PANEL
from budwood.sprout import example

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / records.RESULTS, ROOT / "docs" / "images"
COLOURS = 128
PRUNED = ("adav+", "cen-scope", "scope", "mmtok", "adav", "fastervlm", "uniform", "random")
POINTS = ("frozen", "tokens", "t3a", "esp-zero", "full", "lora", "sparse-lora")


def rows_of(*names: str) -> list[dict[str, Any]]:
    """The rows of records, one after the other."""
    return [row for name in names for row in records.read(RESULTS / name).rows]


def prune(path: Path) -> None:
    """Accuracy on large scenes by the number of visual tokens kept."""
    rows = rows_of("prune-high.json")
    full = next(row["accuracy"] for row in rows if row["method"] == "full")
    plots.plot_lines(
        [
            row | {"n_kept": round(row["n_kept"])}
            for method in PRUNED
            for row in rows
            if row["method"] == method
        ],
        path,
        x="n_kept",
        y="accuracy",
        by="method",
        low="accuracy_low",
        high="accuracy_high",
        baseline=full,
        baseline_label="all tokens",
        log=True,
    )


def points(path: Path) -> None:
    """Top-1 on unseen classes by the number of points."""
    rows = rows_of("points.json", "points-peers.json", "points-sparse.json")
    chosen = [row for row in rows if row["sampler"] == "random" and row["method"] in POINTS]
    plots.plot_lines(chosen, path, x="points", y="unseen_top1", by="method", log=True)


def tune_front(path: Path) -> None:
    """Accuracy on validation questions against divergence and perplexity."""
    plots.plot_front(records.read(RESULTS / "tune/record.json").config["runs"], path)


def tune_curves(path: Path) -> None:
    """Accuracy, loss and divergence over the steps of one run of LoRA and one of SLIM."""
    runs = sorted((RESULTS / "tune-curves/runs").glob("*/record.json"))
    histories = {file.parent.name.partition("-lr")[0]: records.read(file) for file in runs}
    plots.plot_curves({name: run.config["history"] for name, run in histories.items()}, path)


def tune_identity(path: Path) -> None:
    """Weight on identity experts and distance, by layer."""
    file = RESULTS / "tune/runs/slim-lr0.01-seed0/routing.json"
    plots.plot_identity(json.loads(file.read_text()), path)


def kept(path: Path) -> None:
    """A picture, and beside it the visual tokens that answer the question."""
    picture, question = example()
    with tempfile.TemporaryDirectory() as folder:
        source, overlay = Path(folder) / "picture.png", Path(folder) / "overlay.png"
        picture.save(source)
        words = [source, question, "--keep", "0.05", "--method", "adav+", "--json"]
        command = [sys.executable, "-m", "budwood.cli", "prune", *words, "--overlay", overlay]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        panels = Image.open(overlay).convert("RGB")
    answers = json.loads(done.stdout)
    edge = panels.crop((14 + PANEL, 0, 15 + PANEL, panels.height)).convert("L")
    top = next(y for y in range(edge.height) if edge.getpixel((0, y)) < 128)  # below the caption
    right = panels.crop((16, top, 16 + PANEL, top + PANEL))
    left = picture.resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", (2 * PANEL + 48, PANEL + 88), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(19)
    pen.text((16, 12), question, font=font, fill="black")
    for x, panel, label in (
        (16, left, f"all {answers['n_visual']} visual tokens: {answers['answer_full']}"),
        (PANEL + 32, right, f"{answers['n_kept']} kept: {answers['answer']}"),
    ):
        sheet.paste(panel, (x, 46))
        pen.text((x, PANEL + 54), label, font=font, fill="black")
    sheet.save(path)


PLOTS = {
    "kept": kept,
    "prune": prune,
    "points": points,
    "tune-front": tune_front,
    "tune-curves": tune_curves,
    "tune-identity": tune_identity,
}


def main(names: Iterable[str]) -> None:
    """Draw the plots of these names; without a name, all."""
    for name in names or PLOTS:
        path = IMAGES / f"{name}.png"
        PLOTS[name](path)
        small = Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
