"""A self-contained HTML page from benchmark records: curves, tables and example pictures."""

from __future__ import annotations

import base64
import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from budwood import records
from budwood.bench.plots import has_front, plot_front, plot_lines
from budwood.errors import InputError
from budwood.records import Record, Row

TEMPLATE = Path(__file__).parent / "report.html"

_NEEDED = {
    "bench prune": {"method": str, "n_kept": int | float, "accuracy": int | float},
    "bench points": {"method": str, "sampler": str, "points": int},
}
"""What each row of a record has that is drawn."""


@dataclass(frozen=True)
class Column:
    """A column of a table on the page: key of the rows, number format, heading."""

    key: str
    spec: str
    heading: str


@dataclass(frozen=True, eq=False)
class Example:
    """A picture of what methods kept, and words about it."""

    picture: Image.Image
    caption: str


def page(
    read: Mapping[str, Record],
    columns: Mapping[str, Sequence[Column]],
    examples: Iterable[Example] = (),
    title: str = "Results",
) -> str:
    """Make the page.

    Args:
        read: records by what the page calls them.
        columns: of the table of each kind of record, by its name (``"bench prune"``, …). A kind
            that is not in it gets all keys of its first row.
        examples: pictures for the top of the page; asked for when the records have been checked
            and drawn.
        title: of the page.

    Returns:
        HTML that needs no other file.

    Raises:
        InputError: there is no record, or one has no rows or lacks what is drawn of it.
        MissingPackageError: matplotlib is not installed.
    """
    import jinja2

    if not read:
        raise InputError("nothing to report: give at least one record")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    sections = [_section(name, record, columns) for name, record in read.items()]
    shown = [{"picture": _png(one.picture), "caption": one.caption} for one in examples]
    return template.render(title=title, sections=sections, examples=shown)


def _section(name: str, record: Record, columns: Mapping[str, Sequence[Column]]) -> dict[str, Any]:
    if not record.rows:
        raise InputError(f"record {name} has no rows, so there is nothing to report")
    for key, kind in _NEEDED.get(record.name, {}).items():
        for row in record.rows:
            if record.status != "complete" and key not in row:
                raise InputError(
                    f"record {name} is unfinished, and its rows are no results yet; repeat its "
                    "command to complete it"
                )
            if not isinstance(row.get(key), kind):
                raise InputError(
                    f"record {name} is malformed: {key!r} of a row is {row.get(key)!r}"
                )
    known = columns.get(record.name) or [Column(key, "", key) for key in record.rows[0]]
    shared, differing = _apart(record.rows, known)
    return {
        "name": name,
        "kind": record.name,
        "partial": record.status != "complete",
        "facts": [*_facts(record), *shared],
        "charts": [_chart(*chart) for chart in _charts(record)],
        "tables": _tables(record, differing),
    }


def _apart(
    rows: Sequence[Row], columns: Sequence[Column]
) -> tuple[list[tuple[str, str]], list[Column]]:
    """Terms that are the same in all rows that have them, with their values; the other columns."""
    shared, differing = [], list(columns[:1])
    for column in columns[1:]:
        values = [row[column.key] for row in rows if row.get(column.key) is not None]
        first = values[0] if values else None
        if len(rows) > 1 and isinstance(first, str) and all(value == first for value in values):
            shared.append((column.heading, first))
        else:
            differing.append(column)
    return shared, differing


def _facts(record: Record) -> list[tuple[str, str]]:
    """Where the numbers come from, as terms and their values."""
    commit = record.git.get("commit")
    state = " with changes" if record.git.get("dirty") else ""
    named = [
        ("command", record.command),
        ("reference", record.config.get("reference")),
        ("model", record.config.get("model") or record.config.get("encoder")),
        ("seed", record.seed),
        ("commit", f"{str(commit)[:12]}{state}" if commit else None),
        ("versions", ", ".join(f"{k} {v}" for k, v in record.versions.items() if v)),
        ("hardware", ", ".join(_hardware(k, v) for k, v in record.hardware.items() if v)),
        ("date", record.created),
    ]
    return [(term, str(value)) for term, value in named if value not in (None, "")]


def _hardware(kind: str, value: Any) -> str:
    """Such as "2 cores"."""
    return f"{value} {kind.removesuffix('s') if value == 1 else kind}"


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, Any]:
    """A table of the keys that rows have; the ends of an interval go beside its value."""
    keys = {column.key for column in columns}
    ends = {f"{key}{end}" for key in keys for end in ("_low", "_high")}
    known = [c for c in columns if c.key not in ends and any(c.key in row for row in rows)]
    numeric = [all(isinstance(row.get(c.key), int | float | None) for row in rows) for c in known]
    cells = [[_cell(row, c, f"{c.key}_low" in keys) for c in known] for row in rows]
    return {"title": title, "heads": [c.heading for c in known], "numeric": numeric, "rows": cells}


def _cell(row: Row, column: Column, has_interval: bool) -> str:
    keys = [column.key, *(f"{column.key}{end}" for end in ("_low", "_high") if has_interval)]
    value, *ends = records.cells_of([row], dict.fromkeys(keys, column.spec))[0]
    return f"{value} [{', '.join(ends)}]" if all(ends) and ends else value


def _tables(record: Record, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The tables of a record; columns are those of the table of all rows."""
    if record.name == "bench prune":
        return _prune_tables(record.rows, columns)
    return [_table("", record.rows, columns)]


def _prune_tables(rows: Sequence[Row], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The accuracy at each budget side by side, all rows, and the accuracy by kind of question."""
    rows = labelled(rows)
    method = Column("curve", "", "method")
    beside, specs = records.spread(rows, {"curve": "", "accuracy": ".1%"}, "keep")
    budgets = [Column(key, spec, key) for key, spec in specs.items() if key != "curve"]
    tables = [
        _table("Accuracy by fraction or number of tokens kept", beside, [method, *budgets]),
        _table("Every row", rows, columns),
    ]
    if kinds := _kinds(rows):
        heads = [method, Column("keep", "", "keep")]
        tables.append(_table("Accuracy by kind of question", rows, [*heads, *kinds]))
    return tables


def _kinds(rows: Sequence[Row]) -> list[Column]:
    """Columns of the accuracy on each kind of question, where a record has them."""
    from budwood.sprout.questions import KINDS

    keys = {kind: f"accuracy_{kind}" for kind in KINDS}
    return [
        Column(key, ".1%", kind)
        for kind, key in keys.items()
        if any(row.get(key) is not None for row in rows)
    ]


Chart = tuple[str, Callable[..., object]]


def _charts(record: Record) -> list[Chart]:
    """What to draw of a record: a description, and a function that draws to a file."""
    if record.name == "bench prune":
        return _prune_charts(record.rows)
    if record.name == "bench points":
        return _points_charts(record.rows)
    if record.name == "bench tune":
        return _tune_charts(record.config.get("runs"))
    return []


def _tune_charts(runs: Any) -> list[Chart]:
    """What was learnt against what was forgotten, if the runs were measured on texts."""
    if not isinstance(runs, list) or not has_front(runs):
        return []
    return [("What was learnt against what was forgotten", partial(plot_front, runs))]


def _prune_charts(rows: Sequence[Row]) -> list[Chart]:
    curves = [row for row in labelled(rows) if row["method"] not in ("full", "blind")]
    full = next((row for row in rows if row["method"] == "full"), None)
    baseline = (
        {} if full is None else {"baseline": full["accuracy"], "baseline_label": "all tokens"}
    )
    draw = partial(plot_lines, curves, x="n_kept", y="accuracy", by="curve", log=True, **baseline)
    return [("Accuracy of each method over the visual tokens kept", draw)] if curves else []


def labelled(rows: Sequence[Row]) -> list[Row]:
    """Name the curve of each row of ``budwood bench prune`` in the key ``curve``.

    The name is the method, with its choices of question and positions if there are several.
    """
    return [row | {"curve": _label(row, rows)} for row in rows]


def _label(row: Row, rows: Sequence[Row]) -> str:
    """The method of a row, with its choices of question and positions if there are several."""
    same = [other for other in rows if other["method"] == row["method"]]
    several = [
        str(row.get(name))
        for name in ("question", "positions")
        if len({other.get(name) for other in same}) > 1
    ]
    return f"{row['method']} ({', '.join(several)})" if several else row["method"]


def _points_charts(rows: Sequence[Row]) -> list[Chart]:
    """A chart for each part, group of classes and way of thinning clouds to several densities."""
    charts: list[Chart] = []
    kinds = dict.fromkeys((row.get("part"), row["sampler"]) for row in rows)
    for (part, sampler), group in itertools.product(kinds, ("seen", "unseen", "novel")):
        key, kind = f"{group}_top1", (part, sampler)
        of_kind = [row for row in rows if (row.get("part"), row["sampler"]) == kind]
        drawn = [row for row in of_kind if row.get(key) is not None]
        if len({row["points"] for row in drawn}) > 1:
            draw = partial(plot_lines, drawn, x="points", y=key, by="method", log=True)
            where = f"{part} clouds" if part else "clouds"  # older records have no part
            charts.append(
                (f"Top-1 accuracy on {group} classes, {where} thinned by {sampler}", draw)
            )
    return charts


def _chart(description: str, draw: Callable[..., object]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chart.svg"
        draw(path=file)
        return {"picture": _data("image/svg+xml", file.read_bytes()), "description": description}


def _png(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return _data("image/png", stream.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
