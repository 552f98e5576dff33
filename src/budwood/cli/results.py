"""What a benchmark writes and prints: a record, a plot, and a table or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from budwood import records
from budwood.cli.columns import Columns
from budwood.cli.console import print_json, print_table, say
from budwood.cli.output import reserve, reserve_picture
from budwood.errors import InputError
from budwood.figures import need_matplotlib
from budwood.files import write_whole


@dataclass(frozen=True)
class Results:
    """The outputs of a benchmark, checked before its slow work begins.

    Args:
        out: file of the record.
        force: overwrite files that exist.
        json: print the record and nothing else.
        plot: file of the plot.
        resumes: continue an interrupted run from its partial record.
        reads: files that the command reads, which it never overwrites.

    Raises:
        InputError: a file is one of those that are read.
        OutputError: a file exists and ``force`` is off, or cannot be written.
        MissingPackageError: a plot is wanted and matplotlib is missing.
    """

    out: Path | None
    force: bool
    json: bool
    plot: Path | None = None
    resumes: bool = False
    reads: Sequence[Path | str | None] = ()

    def __post_init__(self) -> None:
        if self.out:
            reserve(self.out, self.force or self._partial() is not None, self.reads)
        if self.plot:
            if self.out and self.out.absolute() == self.plot.absolute():
                raise InputError(f"--out and --plot are both {self.out}; give two names")
            reserve_picture(self.plot, self.force, self.reads)
            need_matplotlib()

    def begun(self, record: records.Record, free: str | None = None) -> list[records.Row]:
        """The rows that an interrupted run has measured; none if there is no such run.

        Args:
            record: of this run, without rows. Config, commit and versions must equal those of the
                interrupted run.
            free: key of the config that may differ; None if all must agree.

        Raises:
            InputError: the partial record is that of another run.
        """
        partial = None if self.force else self._partial()
        if partial is None:
            return []
        here, there = _settings(record), _settings(partial)
        # As text, since a budget of 1 and one of 1.0 are equal as numbers.
        differing = [
            key for key in here if key != free and _text(here[key]) != _text(there.get(key))
        ]
        if differing:
            what = ", ".join(f"{key} {there.get(key)}, not {here[key]}" for key in differing)
            raise InputError(
                f"{self.out} holds part of another run ({what}); choose another name, or overwrite "
                "it with --force"
            )
        say(f"continues {self.out}")
        return partial.rows

    def keep(self, record: records.Record) -> None:
        """Write the rows measured so far, as a partial record."""
        if self.out:
            records.write(replace(record, status="partial"), self.out, overwrite=True)

    def _partial(self) -> records.Record | None:
        if not (self.resumes and self.out and self.out.is_file()):
            return None
        try:
            record = records.read(self.out)
        except InputError:
            return None
        return record if record.status == "partial" else None

    def publish(
        self,
        record: records.Record,
        columns: Columns,
        *,
        rows: Sequence[records.Row] | None = None,
        notes: Iterable[str] = (),
        draw: Callable[[list[records.Row], Path], object] | None = None,
    ) -> None:
        """Write the record, print it, and draw it.

        Args:
            record: the measurement.
            columns: of the table.
            rows: of the table; by default those of the record.
            notes: lines below the table.
            draw: draws the record's rows to a file.
        """
        if self.out:
            say(f"wrote {records.write(record, self.out, overwrite=self.force or self.resumes)}")
        if self.json:
            print_json(asdict(record))
        else:
            print_table(record.rows if rows is None else rows, columns)
            for note in notes:
                say(note)
        if self.plot and draw:
            write_whole(self.plot, lambda part: draw(record.rows, part))
            say(f"wrote {self.plot}")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _settings(record: records.Record) -> dict[str, Any]:
    """What the rows of a record depend on, as JSON values."""
    code = {"commit": record.git.get("commit"), "versions": record.versions}
    return json.loads(json.dumps({**record.config, **code}))
