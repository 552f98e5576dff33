"""Rows of data: from files of JSON, CSV and Parquet, and from datasets of the hub."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from budwood import optional
from budwood.errors import BudwoodError, InputError, first_line
from budwood.hub import hub_or_cache
from budwood.loading import is_file_name

Rows = Iterable[tuple[str, Any]]
"""Where each row stands, for messages, and the row."""

TABLES = (".csv", ".tsv", ".parquet")
"""Endings of files that are tables; every other file has JSON lines, or one JSON array."""

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
    if not is_file_name(source):
        return _rows_of_hub(source, split)
    path = Path(source)
    return _rows_of_table(path) if path.suffix.lower() in TABLES else _rows_of_json(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        InputError: the file can't be read, or is not UTF-8 text.
    """
    return "".join(_lines(path))


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.expanduser().open(encoding="utf-8-sig") as file:
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
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: is not JSON ({error}); give one object a line, or one "
                "array of objects"
            ) from error


def _rows_of_array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} begins with [ and is no JSON array ({error})") from error
    for i, row in enumerate(rows):
        yield f"{path}, row {i}", row


def _rows_of_table(path: Path) -> Rows:
    optional.need("pyarrow", f"{path}, a table,")
    import pyarrow as pa
    from pyarrow import csv, parquet

    kind = path.suffix.lower()
    file = path.expanduser()
    try:
        if kind == ".parquet":
            table = parquet.read_table(file)
        else:
            parsing = csv.ParseOptions(
                delimiter="\t" if kind == ".tsv" else ",", newlines_in_values=True
            )
            columns = csv.open_csv(file, parse_options=parsing).schema.names
            as_text = csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            )
            table = csv.read_csv(file, parse_options=parsing, convert_options=as_text)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot read {path}: {reason}") from error
    if kind != ".parquet":
        table = _with_truths(table)
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    return ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _with_truths(table: Any) -> Any:
    """A table of texts, its answers as truth values where all are true or false."""
    for number, name in enumerate(table.column_names):
        if name in _ANSWERS:
            texts = [text and text.strip().lower() for text in table[name].to_pylist()]
            if set(texts) - {None} and set(texts) <= {"true", "false", None}:
                values = [None if text is None else text == "true" for text in texts]
                table = table.set_column(number, name, [values])
    return table


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
