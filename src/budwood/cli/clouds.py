"""Options that the commands on point clouds share, and what they become."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli.console import working
from budwood.cli.models import be_quiet
from budwood.errors import InputError

if TYPE_CHECKING:
    from budwood.points import PointEncoder, TextEmbeddings

Clouds = Annotated[
    list[Path],
    typer.Argument(
        metavar="CLOUD…",
        help="Files or folders of .ply .pcd .las .laz .npy .npz .bin .xyz .txt .csv .off .obj "
        ".stl .glb; meshes are sampled.",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(metavar="LABEL,…", help='Labels to choose from, such as chair,"desk lamp".'),
]
LabelsFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A text file with one label a line, instead.")
]
Embeddings = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Text embeddings of labels (.safetensors), instead of a text model."
    ),
]
Encoder = Annotated[str, typer.Option(help="One of `budwood ls encoders`.")]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Local weights for that encoder.")
]
Sampler = Annotated[
    str, typer.Option(help="How points are chosen: random, farthest, lidar or occluded.")
]
Up = Annotated[str, typer.Option(help="The axis that points up in the files: y or z.")]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="LETTERS", help="Columns of tables, such as xyz_rgb; _ is a column to leave out."
    ),
]
Box = Annotated[
    str | None,
    typer.Option(
        metavar="X0,Y0,Z0,X1,Y1,Z1", help="Use only the points in this box, in the file's units."
    ),
]
DropInvalid = Annotated[
    bool, typer.Option("--drop-invalid", help="Leave out points with NaN or infinite coordinates.")
]


def labels_of(labels: str | None, file: Path | None, embeddings: Path | None) -> list[str] | None:
    """Labels from one of the three options; None if it is a file of embeddings.

    Raises:
        InputError: none or several options, an unreadable file, or an empty or repeated label.
    """
    from budwood.points.labels import check_labels

    given = [option for option in (labels, file, embeddings) if option is not None]
    if len(given) != 1:
        raise InputError("give one of --labels, --labels-file and --embeddings")
    if labels is not None:
        return list(check_labels(labels.split(",")))
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a UTF-8 text"
        raise InputError(f"cannot read {file}: {reason}") from None
    return list(check_labels([line for line in lines if line.strip()]))


def files_of(paths: list[Path], *others: Path | None) -> list[Path]:
    """Files to read: those given, and those in folders that no other option names.

    Args:
        paths: files and folders.
        others: files that other options name.

    Raises:
        InputError: a path does not exist, or there is nothing to read.
    """
    from budwood.points import find_files

    given = {path.resolve() for path in paths}
    taken = {path.resolve() for path in others if path is not None} - given
    files = [file for file in find_files(paths) if file.resolve() not in taken]
    if not files:
        raise InputError(f"{paths[0]} has no clouds apart from the files that other options name")
    return files


def reading_of(columns: str | None, box: str | None, drop_invalid: bool, up: str) -> dict[str, Any]:
    """The options of reading, as `classify` and `adapt` of the library take them."""
    return {
        "columns": columns,
        "box": None if box is None else box.split(","),
        "invalid": "drop" if drop_invalid else "error",
        "up": up,
    }


def load(encoder: str, checkpoint: Path | None, device: str) -> PointEncoder:
    """Load an encoder onto a device."""
    from budwood.points import load_encoder

    with working("loading the encoder"):
        return load_encoder(encoder, checkpoint, device=device)


def embed(
    encoder: PointEncoder, labels: list[str] | None, embeddings: Path | None = None
) -> TextEmbeddings:
    """Embed labels in the space of an encoder, by its text model or from a file."""
    from budwood.points.text import embed_labels_for

    with working("embedding the labels"):
        be_quiet()
        return embed_labels_for(encoder, labels, embeddings=embeddings)


class Skipped:
    """Clouds that cannot be used, with the reason; an ``on_error`` of the library."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def __call__(self, name: str, error: Exception) -> None:
        self.rows.append({"cloud": name, "reason": str(error)})

    def __len__(self) -> int:
        return len(self.rows)
