"""Options that the commands on point clouds share, and what they become."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli.console import say, working
from budwood.cli.models import be_quiet
from budwood.errors import InputError

if TYPE_CHECKING:
    from budwood.points import PointEncoder, TextEmbeddings

Clouds = Annotated[
    list[Path],
    typer.Argument(
        metavar="CLOUD…",
        help="Files or folders of .ply .pcd .las .laz .e57 .bin .pts .npy .npz .xyz .txt .csv "
        ".off .obj .stl .glb .gltf .3mf; meshes are sampled.",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(metavar="LABEL,…", help='Labels to choose from, such as chair,"desk lamp".'),
]
LabelsFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A text file with one label per line, instead.")
]
Embeddings = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text embeddings (.safetensors, by `budwood points embed`) instead of a text model; "
        "with --labels, only those of the file.",
    ),
]
Encoder = Annotated[str, typer.Option(help="One of `budwood ls encoders`.")]
EncoderOrAdapters = Annotated[
    str | None,
    typer.Option(
        help="One of `budwood ls encoders`; by default that of the adapter, or sprout.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Local weights for that encoder.")
]
Sampler = Annotated[
    str, typer.Option(help="How points are chosen: random, farthest, lidar or occluded.")
]
Up = Annotated[
    str,
    typer.Option(
        metavar="AXIS",
        help="The axis that points up in the files: x, -x, y, -y, z or -z; auto: z in scans (.pcd "
        ".las .laz .e57 .bin, Leica's .pts) and .3mf, y in the others.",
    ),
]
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
    bool,
    typer.Option(
        "--drop-invalid",
        help="Leave out points with one or two NaN or infinite coordinates. Rows of NaN or zeros "
        "are beams without a return and are always left out.",
    ),
]
KeepStrays = Annotated[
    bool, typer.Option("--keep-strays", help="Keep the few points that lie far from all others.")
]
RemoveGround = Annotated[
    bool, typer.Option("--remove-ground", help="Leave out the ground: the lowest large plane.")
]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|DIR|FILE",
        help="Text model instead of the encoder's: minilm, bigg, clip-l14, clip-b32, eva02-e or "
        "ulip, a directory, or a checkpoint of ULIP or open_clip.",
    ),
]
Templates = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="Sentences around labels: points64, short or plain, or a text file with a sentence on "
        "each line and {} for the label.",
    ),
]


Synonyms = Annotated[
    bool,
    typer.Option(
        "--synonyms/--no-synonyms",
        help='Average over phrasings of a label, so "pedestrian" and "person" give the same.',
    ),
]


def labels_of(
    labels: str | None,
    file: Path | None,
    embeddings: Path | None = None,
    ways: str = "--labels, --labels-file and --embeddings",
) -> list[str] | None:
    """Labels from the options; None for all that a file of embeddings has.

    Raises:
        InputError: no option, two lists, an unreadable file, or an empty or repeated label.
    """
    from budwood.points.labels import check_labels, read_labels

    given = [option for option in (labels, file) if option is not None]
    if len(given) > 1:
        raise InputError("--labels and --labels-file are both given; give one of them")
    if not given and embeddings is None:
        raise InputError(f"there are no labels; give one of {ways}")
    if labels is not None:
        return list(check_labels(next(csv.reader([labels], skipinitialspace=True), [""])))
    return None if file is None else list(check_labels(read_labels(file)))


def files_of(paths: list[Path], *others: Path | None, within: Path | None = None) -> list[Path]:
    """Files to read: those given, and those in folders that no other option names.

    Says how many files in folders are of no known format.

    Args:
        paths: files and folders.
        others: files that other options name.
        within: a folder that is written to, whose files are no input.

    Raises:
        InputError: a path does not exist, or there is nothing to read.
    """
    from budwood.points import find_files
    from budwood.points.inputs import left_out_note
    from budwood.points.io import unknown_files

    given = {path.resolve() for path in paths}
    taken = {path.resolve() for path in others if path is not None} - given
    written = None if within is None else within.resolve()
    files = [
        file
        for file in find_files(paths)
        if file.resolve() not in taken
        and (written not in file.resolve().parents or file.resolve() in given)
    ]
    if not files:
        raise InputError(f"{paths[0]} has no clouds apart from the files that other options name")
    if unknown := unknown_files(paths):
        say(f"left out: {left_out_note(unknown)}")
    return files


def reading_of(
    columns: str | None,
    box: str | None,
    drop_invalid: bool,
    up: str,
    keep_strays: bool,
    remove_ground: bool,
) -> dict[str, Any]:
    """The options of reading, as `classify` and `adapt` of the library take them."""
    return {
        "columns": columns,
        "box": None if box is None else box.split(","),
        "invalid": "drop" if drop_invalid else "error",
        "up": up,
        "strays": "keep" if keep_strays else "drop",
        "remove_ground": remove_ground,
    }


def load(
    encoder: str | None, checkpoint: Path | None, device: str, adapter: Path | None = None
) -> PointEncoder:
    """Load an encoder onto a device; by default that of an adapter, or sprout."""
    from budwood.points import load_encoder
    from budwood.points.adapters.base import encoder_name

    if adapter is not None:
        made_for = encoder_name(adapter)  # checks it before the encoder is loaded
        encoder = encoder or made_for

    with working("loading the encoder"):
        return load_encoder(encoder or "sprout", checkpoint, device=device)


def embed(
    encoder: PointEncoder,
    labels: list[str] | None,
    embeddings: Path | None = None,
    text: str | None = None,
    templates: str = "points64",
    synonyms: bool = True,
) -> TextEmbeddings:
    """Embed labels in the space of an encoder, by its text model or from a file."""
    from budwood.points.text import embed_labels_for

    with working("embedding the labels"):
        be_quiet()
        return embed_labels_for(
            encoder,
            labels,
            embeddings=embeddings,
            text=text,
            templates=templates,
            synonyms=synonyms,
        )


def say_unfamiliar(
    encoder: PointEncoder, texts: TextEmbeddings, text: str | None
) -> list[dict[str, Any]]:
    """Say which labels resemble none that the encoder was trained on; rows for ``--json``.

    Args:
        encoder: what names clouds.
        texts: the labels.
        text: another text model than the encoder's, whose embeddings cannot be compared.
    """
    from budwood.points.familiar import notice_of, unfamiliar

    strange = unfamiliar(encoder, texts) if text is None else []
    if strange:
        say(f"note: {notice_of(strange)}")
    return [dataclasses.asdict(one) for one in strange]


class Skipped:
    """Clouds that cannot be used, with the reason; an ``on_error`` of the library."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def __call__(self, name: str, error: Exception) -> None:
        self.rows.append({"cloud": name, "reason": str(error)})

    def __len__(self) -> int:
        return len(self.rows)

    def refuse(self, n_files: int, what: str) -> None:
        """End with the reasons, after the results of the others; nothing happens without any.

        Args:
            n_files: how many there were in all.
            what: what they lack, such as ``"clouds have no label"``.

        Raises:
            InputError: something was skipped.
        """
        if not self.rows:
            return
        for row in self.rows:
            say(f"skipped: {row['reason']}")
        raise InputError(f"{len(self)} of {n_files} {what}; see above")
