"""`budwood demo`: the main job on the embedded model, in about a minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import options
from budwood.cli.console import out, print_json, print_table, progress, say
from budwood.cli.output import make_folder, reserve_picture
from budwood.cli.prune import drawn
from budwood.files import write_whole

if TYPE_CHECKING:
    from budwood.cli.models import Loaded
    from budwood.sprout.questions import Question
    from budwood.sprout.scenes import Scene

SEED = 2_025

_COLUMNS = {
    "scene": ("scene", ""),
    "asked": ("question", ""),
    "truth": ("truth", ""),
    "answer_full": ("all tokens", ""),
    "answer": ("kept tokens", ""),
    "tokens": ("tokens", ""),
    "ttft_full_ms": ("first token ms", ".0f"),
    "ttft_ms": ("kept", ".0f"),
}


def demo(
    scenes: Annotated[int, typer.Option(min=1, max=100, help="Scenes to look at.")] = 3,
    keep: Annotated[
        str, typer.Option(metavar="N|RATIO", help="Visual tokens to keep: a count, or a ratio.")
    ] = "0.1",
    method: Annotated[str, typer.Option(help="One of `budwood ls methods`.")] = "adav",
    overlay_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the pictures go; earlier ones are replaced.")
    ] = Path("budwood-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which scenes.")] = SEED,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Ask the embedded model about held-out scenes, with all visual tokens and with a tenth.

    Works offline. About each scene it asks one question of each kind, none of them about the large,
    salient object. Each scene and a picture of what was kept for its last question are saved.

    \b
    Example:
      budwood demo --scenes 3 --keep 0.1
    """
    from budwood.cli.models import load
    from budwood.prune.methods import METHODS

    METHODS.get(method)
    attached = {"method": method, "keep": options.keep_of(keep)}
    chosen = _choose(scenes, seed)
    paths = [
        (overlay_dir / f"scene-{i}.png", overlay_dir / f"scene-{i}-kept.png")
        for i in _count(chosen)
    ]
    make_folder(overlay_dir)
    for path in (path for pair in paths for path in pair):
        reserve_picture(path, force=True)
    loaded = load(model, device, dtype)
    rows = _ask_all(loaded, chosen, paths, attached)
    if json:
        print_json({"model": loaded.name, **attached, "rows": rows})
    else:
        _print(rows, paths)


def _count(chosen: list[Any]) -> range:
    return range(1, len(chosen) + 1)


def _choose(n_scenes: int, seed: int) -> list[tuple[Scene, list[Question]]]:
    """Held-out scenes, and of each kind one question that is not about the salient object."""
    from budwood.sprout.questions import KINDS, ask
    from budwood.sprout.scenes import make_scene, scene_rng

    chosen = []
    for i in range(seed, seed + n_scenes):
        draw = scene_rng(i, "test")
        scene = make_scene(i, "test")
        others = [[q for q in ask(scene, kind) if not q.asks_salient] for kind in KINDS]
        chosen.append((scene, [draw.choice(questions) for questions in others if questions]))
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

    found = compare(
        loaded.model,
        loaded.processor,
        scene.image,
        question.text,
        attached,
        max_new_tokens=8,
        repeats=1,
        warm_up=warm_up,
    )
    row = {
        "kind": question.kind,
        "asked": question.text,
        "truth": question.answer,
        "answer_full": found.answer_full,
        "answer": found.answer,
        "n_visual": found.report.n_before,
        "n_kept": found.report.n_after,
        "ttft_full_ms": found.first_full.as_dict()["total_ms"],
        "ttft_ms": found.first.as_dict()["total_ms"],
    }
    return row, drawn(scene.image, question.text, found)


def _saver(picture: Any) -> Callable[[Path], None]:
    return lambda part: picture.save(part)


def _print(rows: list[dict[str, Any]], paths: list[tuple[Path, Path]]) -> None:
    shown = [
        row
        | {name: " ".join(row[name].split()) for name in ("answer_full", "answer")}
        | {"tokens": f"{row['n_visual']} → {row['n_kept']}"}
        for row in rows
    ]
    print_table(shown, _COLUMNS)
    whole, kept = paths[0]
    asked = rows[0]["asked"]
    say("")
    out().print(
        f"\nThe scenes are {whole} and so on; what was kept of them is in {kept} and so on.\n\n"
        "Next:\n"
        f'  budwood prune {whole} "{asked}" --keep 16 --overlay kept.png\n'
        "  budwood bench prune --scenes 20 --methods adav,random --keep 0.1\n"
        "  budwood ls methods",
        markup=False,
        soft_wrap=True,
    )
