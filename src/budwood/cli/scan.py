"""`budwood scan`: boxes with labels for the objects in frames of a sensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood import catalogue, optional
from budwood.cli import clouds, options
from budwood.cli.assumed import say_assumed
from budwood.cli.columns import Column, Columns
from budwood.cli.console import print_json, print_table, progress, say, warnings_said, working
from budwood.cli.output import reserve, reserve_picture
from budwood.errors import InputError, InputWarning
from budwood.figures import need_matplotlib
from budwood.files import need_parent, write_text, write_whole
from budwood.registry import Registry

if TYPE_CHECKING:
    from budwood.points import Assumed, ScannedFrame

COLUMNS = Columns(
    Column("frame"),
    Column("label"),
    Column("score", ".0%"),
    Column("points"),
    Column("place", heading="x y z, m"),
    Column("size", heading="l × w × h, m"),
)
SHOWN = 60
"""Objects in the table; the others are counted below it."""

_FORMATS = Registry("box format", catalogue.BOX_FORMATS)


def scan(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FRAME…", help="Files or folders of frames, as for `budwood classify`."
        ),
    ],
    labels: clouds.Labels = None,
    labels_file: clouds.LabelsFile = None,
    embeddings: clouds.Embeddings = None,
    text: clouds.Text = None,
    templates: clouds.Templates = "short",
    synonyms: clouds.Synonyms = True,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the boxes; an unfinished run is resumed."),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME,…",
            callback=options.each(_FORMATS.check),
            help="What to write into --output: json, csv, kitti, nuscenes, clusters, png, html.",
        ),
    ] = "json",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the frame from above (of a single file)."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the frame as a 3D page for a browser."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write all boxes as CSV.")
    ] = None,
    poses: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR", help="Poses of KITTI odometry, or the folder of nuScenes' tables."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calib",
            metavar="FILE|DIR",
            help="KITTI's calib.txt, or a folder with a file per frame, for poses and labels.",
        ),
    ] = None,
    reach: Annotated[
        float,
        typer.Option(
            "--range", min=0, help="Metres around the sensor; 0 for all, as in map files."
        ),
    ] = 60.0,
    near: Annotated[
        float, typer.Option(help="Metres around the sensor to leave out, such as its vehicle.")
    ] = 0.0,
    ground: Annotated[
        bool, typer.Option("--ground/--no-ground", help="Remove the ground, or leave it.")
    ] = True,
    gap: Annotated[float, typer.Option(help="Largest gap within an object, metres.")] = 0.6,
    min_points: Annotated[int, typer.Option(min=2, help="Fewest points of an object.")] = 10,
    max_size: Annotated[float, typer.Option(help="Longest object, metres.")] = 20.0,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Least probability of the labels against the background; 0: never "
            "unknown. Default: calibrated.",
        ),
    ] = None,
    window: Annotated[
        int, typer.Option(min=1, help="Frames whose points are put together, with poses.")
    ] = 10,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An adapter, by `budwood points adapt --sampler lidar`."),
    ] = None,
    encoder: clouds.EncoderOrAdapters = None,
    checkpoint: clouds.Checkpoint = None,
    points: Annotated[
        int | None,
        typer.Option(min=2, help="Most points of an object that are encoded."),
    ] = None,
    up: clouds.Up = "z",
    units: Annotated[
        str,
        typer.Option(
            metavar="UNIT",
            help="Of the frames: m, km, cm, mm, micron, in, ft, us-ft; auto: as the file says, or "
            "metres. Boxes are in metres.",
        ),
    ] = "auto",
    columns: clouds.Columns = None,
    box: clouds.Box = None,
    drop_invalid: clouds.DropInvalid = False,
    seed: options.Seed = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Frames whose objects are encoded at once.")
    ] = 8,
    device: options.Device = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Find the objects in frames of a LiDAR, radar or depth camera, and name them.

    The ground is removed, and the other points are clustered. Each cluster gets a label, or
    "unknown" if it resembles the background more. Lengths are in metres, and the sensor is at the
    origin. With --poses, objects are tracked over frames, and the points of several frames together
    name an object. Frames that cannot be read are listed at the end, and the exit code is 2.

    \b
    Examples:
      budwood scan 000008.bin --labels car,pedestrian,cyclist --plot above.png --page frame.html
      budwood scan velodyne/ --labels car,pedestrian --output found --format json,csv,kitti
      budwood scan velodyne/ --labels-file labels.txt --poses poses/00.txt --output found
    """
    from budwood.points.io.units import check_units
    from budwood.points.scanning.config import ScanConfig

    check_units(units)
    given = clouds.labels_of(labels, labels_file, embeddings)
    reading = clouds.reading_of(columns, box, drop_invalid, up, True, False)
    how = {key: reading[key] for key in ("columns", "box", "invalid", "up")}
    config = ScanConfig(
        max_range=reach or None,
        min_range=near,
        ground=ground,
        gap=gap,
        min_points=min_points,
        max_size=max_size,
        threshold=threshold,
        window=window,
        points=points,
        seed=seed,
    )
    others = (labels_file, table, poses, *_named_by(calibration))
    files = clouds.files_of(paths, *others, within=output)
    wanted = options.listed(formats)
    used = (labels_file, embeddings, checkpoint, adapter, poses, calibration, text)
    _reserve(files, table, plot, page, force, [*files, *used])
    _check_packages(output, wanted, ground)

    # These import torch, which takes seconds.
    from budwood.cli.models import be_quiet
    from budwood.points import scan as scan_frames

    be_quiet()
    skipped = clouds.Skipped()
    model = clouds.load(encoder, checkpoint, device, adapter)
    strange = clouds.say_unfamiliar(
        model, clouds.embed(model, given, embeddings, text, templates, synonyms), text
    )
    with working("preparing the labels"), _notes_said():
        found = scan_frames(
            iter(files),
            given,
            config,
            poses=poses,
            calibration=calibration,
            output=output,
            formats=wanted,
            encoder=model,
            adapter=adapter,
            embeddings=embeddings,
            batch_frames=batch,
            on_error=skipped,
            units=units,
            text=text,
            templates=templates,
            synonyms=synonyms,
            **how,
        )
    frames: list[ScannedFrame] = []
    with progress("frames") as advance, _notes_said():
        for frame in found:
            _draw(frame, plot, page)
            frames.append(_without_points(frame))
            advance(len(frames) + len(skipped), len(files))
    if not frames:
        raise InputError(skipped.rows[0]["reason"])
    is_assumed = context.get_parameter_source("up").name == "DEFAULT"  # type: ignore[union-attr]
    about = reading | {"units": units, "up": "auto" if is_assumed else up}
    say_assumed({frame.source: _noted(frame) for frame in frames}, about)
    if table:
        _write_table(table, frames)
    if json:
        rows = [frame.as_json() for frame in frames]
        named = {"encoder": model.name, "unfamiliar": strange}
        print_json({**named, "frames": rows, "skipped": skipped.rows})
    else:
        _print(frames, output)
    skipped.refuse(len(files), "frames have no boxes")


def _write_table(path: Path, frames: Sequence[ScannedFrame]) -> None:
    from budwood.points.scanning.formats import csv_text

    write_text(path, csv_text(frames))
    say(f"wrote {path}")


@contextmanager
def _notes_said() -> Iterator[None]:
    """Print warnings as notes, but for that of labels, which ``say_unfamiliar`` prints."""
    with warnings_said("", category=InputWarning, lead="note: "):
        warnings.filterwarnings("ignore", "the encoder was trained on nothing", InputWarning)
        yield


def _reserve(
    files: list[Path],
    table: Path | None,
    plot: Path | None,
    page: Path | None,
    force: bool,
    reads: list[Path | str | None],
) -> None:
    """Check that the outputs can be written, before slow work."""
    named = [path for path in (table, plot, page) if path is not None]
    if len({path.resolve() for path in named}) < len(named):
        raise InputError("--csv, --plot and --page must be different files")
    if (plot or page) and len(files) > 1:
        raise InputError(
            f"--plot and --page show one frame, and there are {len(files)}; with --output, give "
            "--format png,html"
        )
    if plot:
        reserve_picture(plot, force, reads)
        need_matplotlib()
    if page:
        if page.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"{page} must end in .html")
        reserve(page, force, reads)
        optional.check("plotly", "a 3D page")
    if table:
        reserve(table, force, reads)


def _named_by(calibration: Path | None) -> list[Path]:
    """The files that --calib names: one, or those of a folder, which are no frames."""
    if calibration is None:
        return []
    return sorted(calibration.glob("*.txt")) if calibration.is_dir() else [calibration]


def _check_packages(output: Path | None, formats: list[str], ground: bool) -> None:
    """Check the packages that are needed, and the folder, before slow work."""
    optional.check("scipy", "clustering")
    optional.check("trimesh", "fitting boxes")
    if ground:
        optional.check("sklearn", "removing the ground")
    if output is None:
        if formats != ["json"]:
            raise InputError("--format says what to write into --output; give both")
        return
    need_parent(output)
    if "png" in formats:
        need_matplotlib()
    if "html" in formats:
        optional.check("plotly", "a 3D page")


def _draw(frame: ScannedFrame, plot: Path | None, page: Path | None) -> None:
    from budwood.points import draw_from_above, write_page

    for path, draw in ((plot, draw_from_above), (page, write_page)):
        if path:
            write_whole(path, lambda part, draw=draw: draw(frame, part))
            say(f"wrote {path}")


def _without_points(frame: ScannedFrame) -> ScannedFrame:
    """A frame whose points are not kept: thousands of frames fit into memory."""
    return replace(frame, segments=None, clusters=())


def _noted(frame: ScannedFrame) -> Assumed:
    """What was assumed, with all notices of a frame among the notes."""
    return replace(frame.assumed, notes=frame.notices)


def _print(frames: list[ScannedFrame], output: Path | None) -> None:
    """Print the objects with labels, and how many there are."""
    rows: list[dict[str, Any]] = [
        {
            "frame": Path(frame.source).name,
            "label": box.label,
            "score": box.score,
            "points": box.n_points,
            "place": " ".join(f"{x:.1f}" for x in box.center),
            "size": " × ".join(f"{x:.1f}" for x in box.size),
        }
        for frame in frames
        for box in frame.known
    ]
    if rows:
        print_table(rows[:SHOWN], COLUMNS)
    if len(rows) > SHOWN:
        say(f"and {len(rows) - SHOWN:,} more")
    n_unknown = sum(len(frame.boxes) for frame in frames) - len(rows)
    say(f"{len(frames):,} frames, {len(rows):,} objects with labels, {n_unknown:,} unknown")
    if n_unknown and not rows:
        say("every object resembles the background more than the labels; --threshold 0 names all")
    if output:
        say(f"wrote {output}")
