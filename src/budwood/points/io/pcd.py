"""Point clouds of PCL and ROS: .pcd, by pypcd4.

pypcd4 reads version 0.7 alone. The header of other versions and spellings is brought into that form
first, and the rows are left as they are.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import BinaryIO

from budwood.errors import InputError
from budwood.optional import need
from budwood.points.io.cloud import Cloud, ReadOptions, damaged, make_cloud
from budwood.points.io.fields import from_fields

VERSIONS = ("0.7", ".7", "0.6", ".6", "0.5", ".5")
ENCODINGS = ("ascii", "binary", "binary_compressed", "binaryscompressed")
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
    elif header["DATA"] != ["binary"]:
        _check_compressed(path, header, body)
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
    return cloud.noting(_behind(header, body)).noting(_other_product(header))


def _width(header: dict[str, list[str]]) -> int:
    """Bytes of a point."""
    return sum(int(size) * int(count) for size, count in zip(header["SIZE"], header["COUNT"]))


def _check_compressed(path: Path, header: dict[str, list[str]], body: bytes) -> None:
    """Compare the unpacked size with the header: the columns lie one behind the other."""
    width, n_points = _width(header), int(header["POINTS"][0])
    n_bytes = struct.unpack_from("<4xI", body)[0] if len(body) >= 8 else 0
    if n_bytes // width != n_points:
        raise InputError(
            f"{path} is damaged: its data are {n_bytes // width} points, and its header says "
            f"{n_points}"
        )


def _other_product(header: dict[str, list[str]]) -> str | None:
    """A note where WIDTH and HEIGHT make another number of points than POINTS, which is read."""
    width, height, n_points = (header[key][0] for key in ("WIDTH", "HEIGHT", "POINTS"))
    if int(width) * int(height) == int(n_points):
        return None
    return f"its header says POINTS {n_points}, but WIDTH {width} and HEIGHT {height}"


def _behind(header: dict[str, list[str]], body: bytes) -> str | None:
    """A note where binary points go on behind those that the header declares."""
    if header["DATA"] != ["binary"]:
        return None
    n_more = len(body) // _width(header) - int(header["POINTS"][0])
    return f"{n_more} points behind those of its header are left out" if n_more > 0 else None


def _header(path: Path, file: BinaryIO) -> dict[str, list[str]]:
    """Read the header, as version 0.7 has it: key → words.

    COUNT may be missing, fields of COUNT 0 take no room, and version 0.5 has neither VIEWPOINT nor
    always POINTS. A line with nothing behind its keyword counts as missing.
    """
    given = _lines(path, file)
    names = given.get("FIELDS") or given.get("COLUMNS")
    missing = [key for key in ("SIZE", "TYPE", "WIDTH", "DATA") if not given.get(key)]
    if not names or missing:
        raise InputError(f"{path} is damaged: its header lacks {(missing or ['FIELDS'])[0]}")
    version = (given.get("VERSION") or ["0.7"])[0]
    if version not in VERSIONS:
        raise InputError(f"{path} is PCD of version {version}; 0.5, 0.6 and 0.7 are understood")
    counts = given.get("COUNT") or ["1"] * len(names)
    columns = [names, given["SIZE"], given["TYPE"], counts]
    if len({len(words) for words in columns}) > 1:
        raise InputError(f"{path} is damaged: FIELDS, SIZE, TYPE and COUNT differ in length")
    fields = [field for field in zip(*columns) if field[3].strip("0")]
    if not fields or not all(_is_whole(count) for count in counts):
        raise InputError(f"{path} is damaged: COUNT {' '.join(counts)[:60]}; expected numbers")
    for name, size, kind, _ in fields:
        if kind + size not in TYPES:
            raise InputError(f"{path}: field {name} has TYPE {kind} and SIZE {size}, no PCD type")
    keys = ("FIELDS", "SIZE", "TYPE", "COUNT")
    header = {"VERSION": ["0.7"], **{key: [*words] for key, words in zip(keys, zip(*fields))}}
    width, height = _number(path, given, "WIDTH"), _number(path, given, "HEIGHT", 1)
    header |= {"WIDTH": [str(width)], "HEIGHT": [str(height)]}
    header["VIEWPOINT"] = ["0", "0", "0", "1", "0", "0", "0"]
    header["POINTS"] = [str(_number(path, given, "POINTS", width * height))]
    return {**header, "DATA": _encoding(path, given["DATA"])}


def _number(path: Path, given: dict[str, list[str]], key: str, default: int = 0) -> int:
    """The whole number behind a keyword; ``default`` where there is none."""
    words = given.get(key) or [str(default)]
    if len(words) > 1 or not _is_whole(words[0]):
        raise InputError(f"{path} is damaged: {key} {' '.join(words)[:60]}; expected one number")
    return int(words[0])


def _is_whole(word: str) -> bool:
    return word.isascii() and word.isdecimal()


def _encoding(path: Path, words: list[str]) -> list[str]:
    if len(words) > 1 or words[0] not in ENCODINGS:
        found = " ".join(words)[:60]
        raise InputError(f"{path} has DATA {found}; {', '.join(ENCODINGS[:3])} are understood")
    return words


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


def _single_blanks(body: bytes) -> bytes:
    """Rows with one blank between values, as pypcd4 wants them; tabs and wide gaps are usual."""
    return b"\n".join(b" ".join(line.split()) for line in body.splitlines())
