"""Rows of data: from files of JSON, CSV and Parquet, and from datasets of the hub."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from budwood import optional
from budwood.errors import BudwoodError, InputError, first_line
from budwood.hub import hub_or_cache
from budwood.loading import is_file_name, refuse_folder
from budwood.tune.data.other_formats import has_choices

Rows = Iterable[tuple[str, Any]]
"""Where each row stands, for messages, and the row."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Endings of tables of text. Apart from these and .parquet, files have JSON lines or an array."""

_ANSWERS = ("answer", "answerKey")
"""Columns whose texts may stand for truth values."""


def rows_of(source: str, split: str = "train") -> Rows:
    """Rows of a file, or of a dataset on the hub.

    Args:
        source: a path, or a hub id, with its configuration behind a colon if it has several.
        split: split of a dataset on the hub.

    Raises:
        InputError: there is no such file or dataset, or it is damaged; while it is read, a line is
            not JSON.
    """
    refuse_folder(source)
    if not is_file_name(source):
        return _rows_of_hub(source, split)
    path = Path(source)
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _rows_of_parquet(path)
    return _rows_of_csv(path, DELIMITERS[kind]) if kind in DELIMITERS else _rows_of_json(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        InputError: the file can't be read, or is not UTF-8 text.
    """
    return "".join(_lines(path))


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from error


def _rows_of_json(path: Path) -> Iterator[tuple[str, Any]]:
    lines, before = _lines(path), []
    for line in lines:
        before.append(line)
        if line.strip():
            break
    if before and before[-1].lstrip()[:1] == "[":
        yield from _rows_of_array(path, "".join([*before, *lines]))
        return
    for number, line in enumerate(itertools.chain(before, lines), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: is not JSON ({error}); give one object a line, or one "
                "array of objects"
            ) from error


def _rows_of_array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} begins with [ and is no JSON array ({error})") from error
    for i, row in enumerate(rows):
        yield f"{path}, row {i}", row


def _rows_of_parquet(path: Path) -> Rows:
    optional.need("pyarrow", f"{path}, a table,")
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path.expanduser())
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot read {path}: {reason}") from error
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    return ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _rows_of_csv(path: Path, delimiter: str) -> Rows:
    """Rows of a table of texts; an empty field is missing."""
    reader = csv.reader(_lines(path, newline=""), delimiter=delimiter, strict=True)
    records = _records(path, reader)
    names = [name.strip() for name in next(records, ("", []))[1]]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path} has the column {twice[0]!r} more than once; rename it")
    rows = []
    for where, values in records:
        if len(values) != len(names):
            raise InputError(
                f"{where}: has {len(values)} fields, and the header {len(names)}; put fields with "
                f"{delimiter!r} in quotes"
            )
        rows.append((where, {key: value or None for key, value in zip(names, values)}))
    return _with_truths(rows)


def _records(path: Path, reader: Any) -> Iterator[tuple[str, list[str]]]:
    """What the reader of a table gives, without empty lines; see :func:`_rows_of_csv`."""
    largest = csv.field_size_limit(sys.maxsize // 2**32)
    begin = 1
    try:
        for values in reader:
            if values:
                yield f"{path}, line {begin}", values
            begin = reader.line_num + 1
    except csv.Error as error:
        hint = (
            "; a quote that opens there is never closed" if "unexpected end" in str(error) else ""
        )
        raise InputError(f"cannot read {path}, line {begin}: {first_line(error)}{hint}") from error
    finally:
        csv.field_size_limit(largest)


def _with_truths(rows: list[tuple[str, dict[str, Any]]]) -> Rows:
    """Rows of texts, their answers as truth values where all are true or false.

    Rows with choices stay as they are: there, true and false are choices.
    """
    if any(has_choices(row) for _, row in rows):
        return rows
    for name in _ANSWERS:
        answers = {str(row.get(name) or "").strip().lower() for _, row in rows}
        if answers - {""} and answers <= {"true", "false", ""}:
            for _, row in rows:
                if row.get(name):
                    row[name] = row[name].strip().lower() == "true"
    return rows


def _rows_of_hub(source: str, split: str) -> Rows:
    name, _, config = source.partition(":")
    try:
        with hub_or_cache(name, kind="dataset", what="dataset", instead="give a file"):
            datasets = optional.need("datasets", f"{source}, a dataset of the hub,")
            rows = datasets.load_dataset(name, config or None, split=split)
    except BudwoodError:
        raise
    except Exception as error:  # whatever the hub's client raises for what is not there
        raise InputError(
            f"{source} is neither a file nor a dataset to be had: {first_line(error)}"
        ) from error
    return ((f"{source}, row {i}", row) for i, row in enumerate(rows))
