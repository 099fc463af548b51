"""Table: rows with units in their columns' names, as CSV, JSON lines or Parquet; a dict of lists, which pandas and polars take."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...simulator.errors import UsageError
from ...simulator.reading import parse_csv, parse_json, read_text
from ...simulator.results import html

FORMATS = (".csv", ".jsonl", ".parquet")
NEEDS_PYARROW = "Parquet needs pyarrow: pip install 'fasim[tables]', or give a file that ends in .csv or .jsonl"


class Table(dict):
    """Column name -> values, as many in each; `pandas.DataFrame(table)` and `polars.DataFrame(table)` are the same table."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> Table:
        """From rows, with these columns in this order; what a row lacks is None."""
        return cls({name: [row.get(name) for row in rows] for name in columns})

    @property
    def rows(self) -> list[dict[str, object]]:
        """The rows, each as column -> value."""
        return [dict(zip(self, values, strict=True)) for values in zip(*self.values(), strict=True)]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.values()), ()))

    def to_csv(self) -> str:
        """Comma-separated, one line a row, a header first; None is empty."""
        return csv_header(self) + "".join(csv_line(row.values()) for row in self.rows)

    def to_jsonl(self) -> str:
        """One JSON object a line."""
        return "".join(json_line(row) for row in self.rows)

    def to_parquet(self) -> bytes:
        """As a Parquet file. Raises UsageError where pyarrow is not installed."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError(NEEDS_PYARROW) from None
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(dict(self)), sink)
        return sink.getvalue()

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        rows = [tuple("" if cell is None else str(cell) for cell in row.values()) for row in self.rows]
        return html.table(f"{self.count:,} rows", tuple(self), rows)


def csv_header(columns: Iterable[str]) -> str:
    """The first line of a CSV table."""
    return csv_line(columns)


def csv_line(cells: Iterable[object]) -> str:
    """One line of a CSV table: None is empty, truth is true or false."""
    text = io.StringIO()
    said = ["" if cell is None else str(cell).lower() if isinstance(cell, bool) else cell for cell in cells]
    csv.writer(text, lineterminator="\n").writerow(said)
    return text.getvalue()


def json_line(row: Mapping[str, object]) -> str:
    """One line of JSON."""
    return json.dumps(row, allow_nan=False) + "\n"


def encoded(table: Table, suffix: str) -> bytes:
    """The table as the bytes of a file of one of the FORMATS."""
    return table.to_parquet() if suffix == ".parquet" else (table.to_csv() if suffix == ".csv" else table.to_jsonl()).encode()


def suffix_of(path: Path) -> str:
    """Which of the FORMATS a file's name asks for. Raises UsageError for another."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: rows are kept in a file that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    return path.suffix


def read_rows(path: Path) -> list[dict[str, object]]:
    """The rows of a file that a sweep wrote; a last line that was cut short is left out. Raises UsageError."""
    suffix, what = suffix_of(path), "table"
    if suffix == ".csv":
        text = read_text(path, what, MAX_BYTES)
        whole = text[: text.rfind("\n") + 1]
        if not whole.strip():
            return []
        header, *rows = parse_csv(whole, f"{what} {path}")
        return [dict(zip(header, row, strict=True)) for row in rows]
    if suffix == ".jsonl":
        lines = read_text(path, what, MAX_BYTES).split("\n")[:-1]
        found = [parse_json(line, f"{what} {path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
        return [row for row in found if isinstance(row, dict)]
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(NEEDS_PYARROW) from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} {path} cannot be read: {' '.join(str(error).split())[:200]}") from None


MAX_BYTES = 1 << 30
"""Of a table that is read back: some 500 B a row."""
