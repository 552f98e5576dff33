"""Where the results of a benchmark go: a record, a plot, and a table or JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from budwood import records
from budwood.cli.console import print_json, print_table, say
from budwood.cli.output import reserve, reserve_picture, write_whole
from budwood.figures import need_matplotlib


@dataclass(frozen=True)
class Results:
    """Made before the slow work begins, so that it is not done in vain.

    Args:
        out: file of the record.
        force: overwrite files that exist.
        json: print the record and nothing else.
        plot: file of the plot.

    Raises:
        OutputError: a file exists and ``force`` is off, or cannot be written.
        InputError: a plot is wanted and matplotlib is missing.
    """

    out: Path | None
    force: bool
    json: bool
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.out:
            reserve(self.out, self.force)
        if self.plot:
            reserve_picture(self.plot, self.force)
            need_matplotlib()

    def publish(
        self,
        record: records.Record,
        columns: Mapping[str, tuple[str, str]],
        *,
        rows: Sequence[records.Row] | None = None,
        notes: Iterable[str] = (),
        draw: Callable[[list[records.Row], Path], object] | None = None,
    ) -> None:
        """Write and print what was measured.

        Args:
            record: what was measured.
            columns: of the table, as for ``print_table``.
            rows: of the table, where they are not the record's.
            notes: lines below the table.
            draw: draws the record's rows to a file.
        """
        if self.out:
            say(f"wrote {records.write(record, self.out, overwrite=self.force)}")
        if self.plot and draw:
            write_whole(self.plot, lambda part: draw(record.rows, part))
            say(f"wrote {self.plot}")
        if self.json:
            print_json(dataclasses.asdict(record))
            return
        print_table(record.rows if rows is None else rows, columns)
        for note in notes:
            say(note)
