"""Journal: the file of a sweep's rows. Each is appended as it comes, so that whatever stops the sweep keeps what is done."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import IO

from ...simulator.errors import UsageError
from ..files import check_place, write_whole
from .sweep import COLUMNS, WORDS
from .table import Table, csv_header, csv_line, encoded, json_line, read_rows, suffix_of


class Journal:
    """Rows on their way into a file (none where `path` is None); Parquet is written when all are there.

    With `resume` the rows that the file already holds are `known`, by their content.
    """

    def __init__(self, path: Path | None, resume: bool = False) -> None:
        self.path, self.rows, self.known = path, {}, {}
        self.file: IO[str] | None = None
        if path is None:
            return
        self.suffix = suffix_of(path)
        check_place(path)
        if self.suffix == ".parquet":
            encoded(Table.of([], COLUMNS), self.suffix)  # without pyarrow this is said now, not at the end
        if resume and path.exists():
            found = [_typed(row) for row in read_rows(path)]
            whole = [row for row in found if set(COLUMNS) <= set(row) and row["content"] and not row["error"]]
            self.known = {row["content"]: row for row in whole}

    def __enter__(self) -> Journal:
        if self.path is not None and self.suffix != ".parquet":
            try:
                self.file = open(self.path, "w", encoding="utf-8", newline="")
            except OSError as error:
                raise UsageError(f"cannot write {self.path}: {error.strerror or error}") from error
            if self.suffix == ".csv":
                self.file.write(csv_header(COLUMNS))
            for row in self.known.values():  # stopped again, it still has them
                self._write(row)
            self.file.flush()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file:
            self.file.close()

    def add(self, number: int, row: dict[str, object]) -> None:
        """One row, in the file when this returns."""
        self.rows[number] = row
        if self.file and row.get("content") not in self.known:
            self._write(row)
            self.file.flush()

    def finish(self) -> None:
        """All rows are there: the file holds them in the order of the sweep."""
        if self.path is None:
            return
        if self.file:
            self.file.close()
            self.file = None
        write_whole(self.path, encoded(Table.of([self.rows[number] for number in sorted(self.rows)], COLUMNS), self.suffix))

    def _write(self, row: dict[str, object]) -> None:
        self.file.write(csv_line(row[name] for name in COLUMNS) if self.suffix == ".csv" else json_line(row))


def _typed(row: dict[str, object]) -> dict[str, object]:
    """A row as it was made: CSV holds text."""
    return {name: _value(value, name in WORDS) for name, value in row.items()}


def _value(value: object, words: bool) -> object:
    if not isinstance(value, str) or words:
        return value or None if words else value
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value or None
