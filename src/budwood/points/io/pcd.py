"""Point clouds of PCL and ROS: .pcd, by pypcd4.

pypcd4 reads version 0.7 alone. The header of other versions and spellings is brought into that form
first, and the rows are left as they are.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from budwood.errors import InputError
from budwood.optional import need
from budwood.points.io.cloud import Cloud, ReadOptions, damaged, make_cloud
from budwood.points.io.fields import from_fields

VERSIONS = ("0.7", ".7", "0.6", ".6", "0.5", ".5")
TYPES = ("F4", "F8", "U1", "U2", "U4", "U8", "I1", "I2", "I4", "I8")
MOST_HEADER = 1 << 16  # bytes


def read_pcd(path: Path, options: ReadOptions) -> Cloud:
    """Read PCD of versions 0.5 to 0.7, ascii, binary or compressed.

    Colours are those of a packed ``rgb`` or ``rgba`` field, or of three fields.
    """
    pypcd4 = need("pypcd4", "reading .pcd")
    with path.open("rb") as file:
        header = _header(path, file)
        body = file.read()
    if header["DATA"] == ["ascii"]:
        body = _single_blanks(body)
    try:
        lines = "".join(f"{key} {' '.join(words)}\n" for key, words in header.items())
        data = pypcd4.PointCloud.from_fileobj(io.BytesIO(lines.encode() + body))
        fields = {name: data.pc_data[name] for name in data.pc_data.dtype.names}
        n_declared = data.points
    except Exception as error:  # the library raises what its parsers happen to
        raise damaged(path, error) from None
    xyz, rgb = from_fields(fields, str(path))
    if len(xyz) != n_declared:
        kind = "is truncated" if len(xyz) < n_declared else "is damaged"
        raise InputError(f"{path} {kind}: {len(xyz)} points, and its header says {n_declared}")
    cloud = make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)
    return cloud.noting(_behind(header, body))


def _behind(header: dict[str, list[str]], body: bytes) -> str | None:
    """A note where binary points go on behind those that the header declares."""
    if header["DATA"] != ["binary"]:
        return None
    sizes = (int(size) * int(count) for size, count in zip(header["SIZE"], header["COUNT"]))
    width = sum(sizes)
    n_more = len(body) // width - int(header["POINTS"][0])
    return f"{n_more} points behind those of its header are left out" if n_more > 0 else None


def _header(path: Path, file: BinaryIO) -> dict[str, list[str]]:
    """Read the header, as version 0.7 has it: key → words.

    COUNT may be missing, fields of COUNT 0 take no room, and version 0.5 has neither VIEWPOINT nor
    always POINTS.
    """
    given = _lines(path, file)
    names = given.get("FIELDS") or given.get("COLUMNS")
    missing = [key for key in ("SIZE", "TYPE", "WIDTH") if not given.get(key)]
    if not names or missing:
        raise InputError(f"{path} is damaged: its header lacks {(missing or ['FIELDS'])[0]}")
    version = given.get("VERSION", ["0.7"])[0]
    if version not in VERSIONS:
        raise InputError(f"{path} is PCD of version {version}; 0.5, 0.6 and 0.7 are understood")
    counts = given.get("COUNT") or ["1"] * len(names)
    columns = [names, given["SIZE"], given["TYPE"], counts]
    if len({len(words) for words in columns}) > 1:
        raise InputError(f"{path} is damaged: FIELDS, SIZE, TYPE and COUNT differ in length")
    fields = [field for field in zip(*columns) if field[3] != "0"]
    for name, size, kind, _ in fields:
        if kind + size not in TYPES:
            raise InputError(f"{path}: field {name} has TYPE {kind} and SIZE {size}, no PCD type")
    width, height = given["WIDTH"], given.get("HEIGHT") or ["1"]
    keys = ("FIELDS", "SIZE", "TYPE", "COUNT")
    header = {"VERSION": ["0.7"], **{key: [*words] for key, words in zip(keys, zip(*fields))}}
    header |= {"WIDTH": width, "HEIGHT": height}
    header["VIEWPOINT"] = ["0", "0", "0", "1", "0", "0", "0"]
    header["POINTS"] = given.get("POINTS") or [_product(path, width, height)]
    if not header["POINTS"][0].isdecimal():
        raise InputError(f"{path} is damaged: POINTS {header['POINTS'][0]}")
    return {**header, "DATA": given["DATA"]}


def _lines(path: Path, file: BinaryIO) -> dict[str, list[str]]:
    """The lines of a header up to DATA: key → words."""
    given: dict[str, list[str]] = {}
    for line in iter(lambda: file.readline(MOST_HEADER), b""):
        words = line.decode("latin-1").split("#")[0].split()
        if words:
            given[words[0].upper()] = words[1:]
        if "DATA" in given:
            given["DATA"] = [word.lower() for word in given["DATA"]]
            return given
        if file.tell() > MOST_HEADER:
            break
    raise InputError(f"{path} is truncated or no PCD file: its header does not end with DATA")


def _product(path: Path, width: list[str], height: list[str]) -> str:
    if not (width[0].isdecimal() and height[0].isdecimal()):
        raise InputError(f"{path} is damaged: WIDTH {width[0]} and HEIGHT {height[0]}")
    return str(int(width[0]) * int(height[0]))


def _single_blanks(body: bytes) -> bytes:
    """Rows with one blank between values, as pypcd4 wants them; tabs and wide gaps are usual."""
    return b"\n".join(b" ".join(line.split()) for line in body.splitlines())
