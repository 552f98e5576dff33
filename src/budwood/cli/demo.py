"""`budwood demo`: the embedded model with all of its visual tokens, and with a few of them."""

from __future__ import annotations

import shlex
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import options
from budwood.cli.columns import Column, Columns
from budwood.cli.console import print_json, print_table, print_text, progress
from budwood.cli.output import make_folder, reserve_picture
from budwood.cli.prune import drawn
from budwood.errors import OutputError
from budwood.files import write_whole
from budwood.loading import EMBEDDED_VLMS, SPROUT, SPROUT_256

if TYPE_CHECKING:
    from budwood.loading import Loaded
    from budwood.sprout.questions import Question
    from budwood.sprout.scenes import Scene

SEED = 24
SOFTWARE = "budwood demo"
"""By which pictures of a demo are told from others."""
N_OF_KIND = {"presence": 1, "colour": 2}
"""Questions about a scene, of the kinds that the embedded model answers best."""

COLUMNS = Columns(
    Column("scene"),
    Column("asked", heading="question"),
    Column("truth", heading="right answer"),
    Column("answer_full", heading="all tokens"),
    Column("answer", heading="the kept ones"),
    Column("answer_random", heading="as many at random"),
)


def demo(
    scenes: Annotated[int, typer.Option(min=1, max=100, help="Number of scenes.")] = 3,
    keep: options.Keep = "0.05",
    method: options.Method = options.BEST_METHOD,
    overlay_dir: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder for the pictures; replaces those of a demo."),
    ] = Path("budwood-demo"),
    seed: options.Seed = SEED,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Ask about pictures with all visual tokens, with a few, and with as many random ones.

    Works offline, with the embedded model. The scenes are held out from its training, and no
    question is about the large, salient object. Saves each scene, and a picture of the tokens kept
    for the last question about it.

    \b
    Example:
      budwood demo --scenes 3 --keep 0.05
    """
    from budwood.cli.models import load

    attached = {"method": method, "keep": options.keep_of(keep)}
    make_folder(overlay_dir)
    paths = [
        (overlay_dir / f"scene-{number}.png", overlay_dir / f"scene-{number}-kept.png")
        for number in range(1, scenes + 1)
    ]
    for path in (path for pair in paths for path in pair):
        _reserve(path)
    chosen = _choose(scenes, seed, high_resolution=model != SPROUT_256)
    loaded = load(model, device, dtype)
    rows = _ask_all(loaded, chosen, paths, attached)
    if json:
        print_json({"model": loaded.name, **attached, "rows": rows})
    else:
        _print(rows, method)
        chosen = {"keep": keep, "model": model, "device": device, "dtype": dtype}
        _print_next(rows[-1], method, {k: v for k, v in chosen.items() if v not in (None, "auto")})


def _reserve(path: Path) -> None:
    """Check that a picture can be written; one of an earlier demo may be replaced."""
    if path.is_file() and not _is_of_demo(path):
        raise OutputError(
            f"{path} exists and is not marked as a demo's; move it, or give another --overlay-dir"
        )
    reserve_picture(path, force=True)


def _is_of_demo(path: Path) -> bool:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of very large pictures, which are not read
            with Image.open(path) as picture:
                return picture.info.get("Software") == SOFTWARE
    except Exception:  # whatever Pillow has against it, it is none of a demo
        return False


def _choose(n_scenes: int, seed: int, high_resolution: bool) -> list[tuple[Scene, list[Question]]]:
    """Held-out scenes, and questions about objects in them other than the salient one."""
    from budwood.sprout.questions import ask
    from budwood.sprout.scenes import make_scene, scene_rng

    chosen = []
    for scene_seed in range(seed, seed + n_scenes):
        rng = scene_rng(scene_seed, "test")
        scene = make_scene(scene_seed, "test", high_resolution)
        questions = []
        for kind, n in N_OF_KIND.items():
            about_there = [q for q in ask(scene, kind) if q.boxes and not q.asks_salient]
            questions += rng.sample(about_there, min(n, len(about_there)))
        chosen.append((scene, questions))
    return chosen


def _ask_all(
    loaded: Loaded,
    chosen: list[tuple[Scene, list[Question]]],
    paths: list[tuple[Path, Path]],
    attached: dict[str, Any],
) -> list[dict[str, Any]]:
    rows = []
    n_questions = sum(len(questions) for _, questions in chosen)
    with progress("questions") as advance:
        for number, ((scene, questions), (whole, kept)) in enumerate(zip(chosen, paths), 1):
            write_whole(whole, _saver(scene.image))
            for question in questions:
                row, picture = _ask(loaded, scene, question, attached, warm_up=not rows)
                rows.append({"scene": number, **row, "image": str(whole), "overlay": str(kept)})
                advance(len(rows), n_questions)
            write_whole(kept, _saver(picture))
    return rows


def _ask(
    loaded: Loaded, scene: Scene, question: Question, attached: dict[str, Any], warm_up: bool
) -> tuple[dict[str, Any], Any]:
    from budwood.prune.compare import compare

    def ask(options: dict[str, Any], warm_up: bool = False) -> Any:
        return compare(
            loaded.model,
            loaded.processor,
            scene.image,
            question.text,
            options,
            max_new_tokens=8,
            repeats=1,
            warm_up=warm_up,
        )

    pruned, at_random = ask(attached, warm_up), ask({**attached, "method": "random"})
    row = {
        "kind": question.kind,
        "asked": question.text,
        "truth": question.answer,
        "answer_full": pruned.answer_full,
        "answer": pruned.answer,
        "answer_random": at_random.answer,
        "n_visual": pruned.report.n_before,
        "n_kept": pruned.report.n_after,
        "ttft_full_ms": pruned.first_full.as_dict()["total_ms"],
        "ttft_ms": pruned.first.as_dict()["total_ms"],
    }
    return row, drawn(scene.image, question.text, pruned)


def _saver(picture: Any) -> Callable[[Path], None]:
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    return lambda part: picture.save(part, pnginfo=mark)


def _print(rows: list[dict[str, Any]], method: str) -> None:
    answers = ("answer_full", "answer", "answer_random")
    print_table(
        [row | {key: " ".join(row[key].split()) for key in answers} for row in rows], COLUMNS
    )
    n_right = {key: sum(row[key] == row["truth"] for row in rows) for key in answers}
    first, full = (
        statistics.median(row[key] for row in rows) for key in ("ttft_ms", "ttft_full_ms")
    )
    row = rows[-1]
    print_text(
        f"\nRight answers: {n_right['answer_full']} of {len(rows)} with all {row['n_visual']} "
        f"visual tokens, {n_right['answer']} with the {row['n_kept']} that {method} keeps, "
        f"{n_right['answer_random']} with {row['n_kept']} at random.\n"
        f"Time to the first token: {full:.0f} ms with all, {first:.0f} ms with {row['n_kept']}.\n"
        f"Pictures: {rows[0]['image']}, the tokens kept in it {rows[0]['overlay']}, and so on."
    )


def _print_next(row: dict[str, Any], method: str, chosen: dict[str, str]) -> None:
    """Print commands that go on from a demo, with the options that were chosen."""
    options = [part for name, value in chosen.items() for part in (f"--{name}", value)]
    commands = [["prune", row["image"], row["asked"], "--method", method, *options]]
    if chosen.get("model", SPROUT) in EMBEDDED_VLMS:
        methods = ",".join(dict.fromkeys((method, "random")))
        commands.append(["bench", "prune", "--scenes", "20", "--methods", methods, *options])
    lines = [f"  budwood {shlex.join(command)}" for command in commands]
    print_text("\n".join(["\nNext:", *lines]))
