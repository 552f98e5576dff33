"""What the commands on point clouds share: options, labels, encoders and clouds in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli.console import working
from budwood.cli.models import be_quiet, device_of
from budwood.errors import InputError

if TYPE_CHECKING:
    from budwood.points import PointEncoder, TextEmbeddings

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
Box = Annotated[
    str | None,
    typer.Option(metavar="X0,Y0,Z0,X1,Y1,Z1", help="Only points in this box, in the file's units."),
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
        lines = file.read_text(encoding="utf-8-sig").splitlines()
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


def load(encoder: str, checkpoint: Path | None, device: str) -> PointEncoder:
    """An encoder on a device."""
    from budwood.points import load_encoder

    where = device_of(device)
    with working("loading the encoder"):
        return load_encoder(encoder, checkpoint, device=where)


def words_of(
    model: PointEncoder, names: list[str] | None, embeddings: Path | None = None
) -> TextEmbeddings:
    """Names in the space of an encoder, from its text tower or from a file."""
    from budwood.points.classify import embed_names

    with working("embedding the names"):
        be_quiet()
        return embed_names(model, names, embeddings=embeddings)


@dataclass(frozen=True)
class Reading:
    """How files become what an encoder takes.

    Attributes:
        columns: of tables.
        drop_invalid: leave out points that are NaN or infinite.
        up: the axis that points up.
        seed: of sampling.
        box: six numbers, outside of which points are left out.

    Raises:
        InputError: there are no such columns or axis, or the box is malformed.
    """

    columns: str | None
    drop_invalid: bool
    up: str
    seed: int
    box: str | None = None

    def __post_init__(self) -> None:
        from budwood.points.io.cloud import corners
        from budwood.points.io.options import ReadOptions
        from budwood.points.sampling import check_up

        ReadOptions(columns=self.columns)
        check_up(self.up)
        if self.box is not None:
            corners(self.box.split(","))

    def prepare(
        self, model: PointEncoder, file: Path, points: int | None = None, sampler: str = "random"
    ) -> Any:
        """The xyz and rgb of a file, as :meth:`PointEncoder.prepare` returns them."""
        from budwood.points import crop, read

        invalid = "drop" if self.drop_invalid else "error"
        cloud = read(file, columns=self.columns, invalid=invalid, seed=self.seed)
        if self.box is not None:
            cloud = crop(cloud, self.box.split(","))
        return model.prepare(cloud, points, up=self.up, sampler=sampler, seed=self.seed)

    def prepare_each(
        self, model: PointEncoder, files: list[Path], skipped: list[dict[str, str]], **how: Any
    ) -> Iterator[tuple[str, Any]]:
        """What each file is called and holds; one that cannot be used goes to ``skipped``."""
        for file in files:
            try:
                yield str(file), self.prepare(model, file, **how)
            except InputError as error:
                skipped.append({"cloud": str(file), "reason": str(error)})


def chunks(items: list[Path], size: int) -> Iterator[list[Path]]:
    """Consecutive parts of at most ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))
