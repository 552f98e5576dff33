"""What the commands on point clouds share: options, labels, encoders and clouds in batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from budwood.cli.console import working
from budwood.errors import InputError

if TYPE_CHECKING:
    from budwood.points import Cloud, PointEncoder, TextEmbeddings

Clouds = Annotated[
    list[Path],
    typer.Argument(metavar="CLOUD…", help="Files or folders: .ply .pcd .las .npy .xyz .obj …."),
]
Labels = Annotated[
    str | None, typer.Option(metavar="NAME,…", help="Names to choose from, with commas.")
]
LabelsFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The same from a file, a name in each line.")
]
Embeddings = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Names with their text embeddings (.safetensors) instead."),
]
Encoder = Annotated[str, typer.Option(help="One of `budwood ls encoders`.")]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Local weights of that encoder.")
]
Sampler = Annotated[str, typer.Option(help="random, farthest, lidar or occluded.")]
Up = Annotated[str, typer.Option(help="y or z: the axis of the clouds that points up.")]
Columns = Annotated[
    str | None, typer.Option(metavar="LETTERS", help="Columns of tables, such as xyz_rgb.")
]
DropInvalid = Annotated[
    bool, typer.Option("--drop-invalid", help="Leave out points that are NaN or infinite.")
]


def names_of(labels: str | None, file: Path | None, embeddings: Path | None) -> list[str] | None:
    """Names from one of the three options; None for those of embeddings.

    Raises:
        InputError: none or several of them, an unreadable file, or an empty or repeated name.
    """
    from budwood.points.text import check_labels

    given = [option for option in (labels, file, embeddings) if option is not None]
    if len(given) != 1:
        raise InputError("give one of --labels, --labels-file and --embeddings")
    if labels is not None:
        return list(check_labels(labels.split(",")))
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"cannot read {file}: {reason}") from None
    return list(check_labels([line for line in lines if line.strip()]))


def files_of(paths: list[Path], *others: Path | None) -> list[Path]:
    """Files to read: of folders without those that other options name.

    Raises:
        InputError: a path does not exist, or there is nothing to read.
    """
    from budwood.points import find_files

    taken = {one.resolve() for one in others if one is not None} - {p.resolve() for p in paths}
    files = [file for file in find_files(paths) if file.resolve() not in taken]
    if not files:
        raise InputError(f"{paths[0]} has no clouds but what other options name")
    return files


def load(
    encoder: str, checkpoint: Path | None, names: list[str] | None, embeddings: Path | None
) -> tuple[PointEncoder, TextEmbeddings]:
    """An encoder, and names in its space."""
    from budwood.points import load_encoder
    from budwood.points.classify import embed_names

    with working("loading the encoder and the text tower"):
        model = load_encoder(encoder, checkpoint)
        return model, embed_names(model, names, embeddings=embeddings)


def read_each(
    files: list[Path], columns: str | None, drop_invalid: bool, seed: int
) -> Iterator[Cloud]:
    """The clouds of some files, one after the other."""
    from budwood.points import read

    invalid = "drop" if drop_invalid else "error"
    return (read(path, columns=columns, invalid=invalid, seed=seed) for path in files)


def chunks(items: list[Path], size: int) -> Iterator[list[Path]]:
    """Consecutive parts of at most ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))
