"""The columns of a command's table, declared once for the terminal and for records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the rows.
        spec: how numbers are formatted, such as ``".1%"``.
        heading: above the column in a terminal; ``key`` if empty.
        only: ``"terminal"`` for what a command prints, ``"record"`` for what `budwood bench show`
            prints; None for both.
    """

    key: str
    spec: str = ""
    heading: str = ""
    only: Literal["terminal", "record"] | None = None


class Columns:
    """The columns of a command, in order.

    >>> shown = Columns(Column("method"), Column("n_kept", heading="tokens"))
    >>> shown.of_record()
    {'method': '', 'n_kept': ''}
    """

    def __init__(self, *columns: Column) -> None:
        self._columns = columns

    def __iter__(self) -> Iterator[Column]:
        """Those of the terminal."""
        return (column for column in self._columns if column.only != "record")

    def of_record(self) -> dict[str, str]:
        """Key → format of those of `budwood bench show`, as for :func:`budwood.records.table`."""
        return {column.key: column.spec for column in self._columns if column.only != "terminal"}

    def headings(self) -> dict[str, str]:
        """Key → heading of all columns."""
        return {column.key: column.heading or column.key for column in self._columns}

    def present_in(self, row: dict[str, object]) -> Columns:
        """The columns whose keys a row has."""
        return Columns(*(column for column in self._columns if column.key in row))
