"""What the command line prints: results on standard output, everything else on standard error.

A result is a record or several: a table or a sentence for a person, JSON lines or tab-separated values for a program. Whatever comes out of the
database is data, not terminal control: control characters are printed as escapes.
"""

import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

__all__ = ["Column", "Format", "Json", "Output", "Rows", "as_json", "visible"]

READER_GONE = 141
"""The exit code when the reader of standard output went away: 128 + SIGPIPE, as a shell reports it of any other tool."""

FIRST_ROWS = 500
"""Rows of a table that are kept until the widths of its columns are settled."""

ALIGNED = 48
"""Cells beyond which a value makes its own row longer, and not its column wider."""

GAP = "  "

_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_STYLES = {"active": "green", "suspended": "yellow", "inactive": "dim", "pending": "cyan", "error": "bold red"}

Record = Mapping[str, Any]


class Format(StrEnum):
    """How results are printed."""

    AUTO = "auto"
    TABLE = "table"
    JSON = "json"
    TSV = "tsv"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        name: The record's key.
        optional: Whether it is left out where the terminal is too narrow for it.
        widest: Beyond so many cells the value is cut; None never cuts, as is right for what people copy.
    """

    name: str
    optional: bool = False
    widest: int | None = None


@dataclass(frozen=True, slots=True)
class Json:
    """A value that is shown as JSON in every form, so that the text "1" and the number 1 stay apart."""

    value: Any


def visible(text: str) -> str:
    """Return the text with control characters and bidirectional overrides as escapes, so that no value steers a terminal."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def as_json(value: Any) -> str:
    """Write a value as one line of JSON; readable, for only what is not visible is escaped."""
    # After json.dumps, what `visible` escapes stands inside of strings, where its escapes are JSON's own.
    return visible(_ENCODER.encode(value))


def _plain(value: object) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, Json):
        return value.value
    msg = f"{type(value).__name__} has no JSON form here"
    raise TypeError(msg)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_plain)


def _cell(value: Any) -> str:
    """Write a value for a person; what is empty is left out."""
    match value:
        case None:
            text = ""
        case bool():
            text = "yes" if value else "no"
        case datetime():
            text = f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
        case dict() if all(isinstance(part, str) for part in value.values()):
            text = " ".join(f"{key}={part}" for key, part in value.items())
        case Json() | dict() | list():
            text = as_json(value)
        case _:
            text = str(value)
    return visible(text)


def _field(value: Any) -> str:
    """Write a value for a column of tab-separated values, escaped as PostgreSQL's COPY does."""
    match value:
        case None:
            text = ""
        case str():
            text = value
        case datetime() | uuid.UUID():
            text = _plain(value)
        case _:
            text = as_json(value)
    escaped = text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return visible(escaped)


def _style(name: str, text: str) -> str:
    return _STYLES.get(text, "") if name == "status" else ""


class Output:
    """Where a command's words go.

    Attributes:
        format: `TABLE`, `JSON` or `TSV`; never `AUTO`.
    """

    def __init__(self, wanted: Format) -> None:
        """Settle the format: `AUTO` is a table in a terminal and JSON lines elsewhere."""
        automatic = Format.TABLE if sys.stdout.isatty() else Format.JSON
        self.format = automatic if wanted is Format.AUTO else wanted
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._is_terminal = self._console.is_terminal

    # --- results ------------------------------------------------------------------------------------------------------

    def rows(self, columns: Sequence[Column], *, nothing: str) -> "Rows":
        """Give a context to which records are added one by one, in memory that does not grow.

        Args:
            columns: What a table shows; the other formats print whole records.
            nothing: What standard error is told when there was no record.
        """
        return Rows(self, columns, nothing)

    def record(self, record: Record) -> None:
        """Print one record; for a person one line for each field that has a value."""
        if self.format is not Format.TABLE:
            self._whole(record)
            return
        shown = {name: text for name, value in record.items() if (text := _cell(value))}
        width = max(map(len, shown), default=0)
        for name, text in shown.items():
            self.line((f"{name:<{width}}  ", "dim"), (text, _style(name, text)))

    def result(self, record: Record, sentence: str) -> None:
        """Print what was done: a sentence for a person, the record for a program."""
        if self.format is Format.TABLE:
            for line in sentence.split("\n"):
                self.line((visible(line), ""))
        else:
            self._whole(record)

    def value(self, value: Any) -> None:
        """Print one JSON value: indented for a person, one line for a program."""
        if self.format is Format.TABLE:
            text = json.dumps(value, ensure_ascii=False, indent=2)
            self.write("\n".join(map(visible, text.split("\n"))) + "\n")
        else:
            self.write(as_json(value) + "\n")

    def line(self, *pieces: tuple[str, str]) -> None:
        """Print a line of texts, each with its style. It is never cut or wrapped: the terminal does that without loss."""
        if self._is_terminal:
            self._console.print(Text.assemble(*pieces), soft_wrap=True)
        else:
            self.write("".join(text for text, _ in pieces) + "\n")

    def write(self, text: str) -> None:
        """Write text as it is.

        Raises:
            typer.Exit: Nobody reads any more.
        """
        self._guarded(lambda: sys.stdout.write(text))

    def flush(self) -> None:
        """See to it that what was written is read.

        Raises:
            typer.Exit: Nobody reads any more.
        """
        self._guarded(sys.stdout.flush)

    @property
    def width(self) -> int | None:
        """Cells of a line; None when nothing limits it."""
        return self._console.width if self._is_terminal or "COLUMNS" in os.environ else None

    def _guarded(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BrokenPipeError:
            # The interpreter flushes once more when it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(READER_GONE) from None

    def _whole(self, record: Record) -> None:
        if self.format is Format.TSV:
            self.write("\t".join(record) + "\n" + "\t".join(map(_field, record.values())) + "\n")
        else:
            self.write(as_json(record) + "\n")

    # --- everything else ----------------------------------------------------------------------------------------------

    @staticmethod
    def note(text: str) -> None:
        """Tell a person something that is not the result."""
        sys.stderr.write(f"{visible(text)}\n")

    @staticmethod
    @contextmanager
    def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Show how far something has come, when standard error is a terminal.

        Args:
            what: What is being done.
            unit: What is counted.

        Yields:
            What to call with how many are done, of how many.
        """
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: PLC0415 -- slow to import

        console = Console(stderr=True)
        columns = (
            *(TextColumn("{task.description}"), BarColumn()),
            *(TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]}"),),
            *(TimeElapsedColumn(), TimeRemainingColumn()),
        )
        how: dict[str, Any] = {"transient": True, "disable": not console.is_terminal}
        # In a terminal what is printed meanwhile goes above the bar; elsewhere it would go to the bar's stream.
        with Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty(), **how) as progress:
            task = progress.add_task(what, total=0, unit=unit)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    @staticmethod
    def error(message: str, hint: str = "") -> None:
        """Tell a person what is wrong and what to do."""
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        for label, style, text in (("Error:", "bold red", message), ("Hint:", "bold", hint)):
            if text:
                console.print(Text.assemble((label, style), " ", visible(text)), soft_wrap=True)


class Rows:
    """Prints records as they come."""

    def __init__(self, output: Output, columns: Sequence[Column], nothing: str) -> None:
        self._output = output
        self._columns = columns
        self._nothing = nothing
        self._kept: list[list[str]] = []
        self._widths: list[int] | None = None
        self._any = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        self._settle()
        if not self._any and self._nothing:
            self._output.note(self._nothing)

    def add(self, record: Record) -> None:
        """Print a record, at the latest when the context ends."""
        match self._output.format:
            case Format.JSON:
                self._output.write(as_json(record) + "\n")
            case Format.TSV:
                if not self._any:
                    self._output.write("\t".join(record) + "\n")
                self._output.write("\t".join(map(_field, record.values())) + "\n")
            case _:
                self._kept.append([_cell(record[column.name]) for column in self._columns])
                if self._widths is not None or len(self._kept) == FIRST_ROWS:
                    self._settle()
        self._any = True

    def _settle(self) -> None:
        """Print the rows kept so far; the first ones decide how wide the columns are, and which of them fit."""
        if self._kept and self._widths is None:
            self._widths = self._fitting()
            self._print([column.name.upper() for column in self._columns], header=True)
        for cells in self._kept:
            self._print(cells)
        self._kept.clear()

    def _fitting(self) -> list[int]:
        """Return the width of each column, 0 for one that is left out."""
        widths = []
        for number, column in enumerate(self._columns):
            longest = max(cell_len(row[number]) for row in self._kept)
            needed = max(len(column.name), min(longest, column.widest or ALIGNED))
            widths.append(needed if longest or not column.optional else 0)
        room = self._output.width
        taken = sum(
            width + len(GAP) for width, column in zip(widths, self._columns, strict=True) if not column.optional
        )
        for number, column in enumerate(self._columns):
            if column.optional and widths[number]:
                taken += widths[number] + len(GAP)
                if room is not None and taken - len(GAP) > room:
                    taken -= widths[number] + len(GAP)
                    widths[number] = 0
        return widths

    def _print(self, cells: Sequence[str], *, header: bool = False) -> None:
        pieces = []
        blanks = ""
        for width, cell, column in zip(self._widths or (), cells, self._columns, strict=True):
            if not width:
                continue
            wide = cell_len(cell)
            if column.widest is not None and wide > width:
                cell, wide = set_cell_size(cell, width - 1) + "…", width  # noqa: PLW2901 -- the cell, cut
            if cell:
                pieces += [(blanks, ""), (cell, "bold" if header else _style(column.name, cell))]
                blanks = ""
            blanks += " " * max(0, width - wide) + GAP
        self._output.line(*pieces)
