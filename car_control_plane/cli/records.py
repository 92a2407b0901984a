"""Reads tenants from CSV or JSON lines, one by one, and says in which line something is wrong.

The first character decides: `{` begins JSON lines, anything else CSV. Files come from spreadsheets, so a byte order mark, Windows line ends and
semicolons or tabs between the columns are read as well. A file of any length is read in flat memory.
"""

import codecs
import csv
import io
import itertools
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from car_control_plane.cli.program import UsageError, interruptible
from car_control_plane.errors import ControlPlaneError, InvalidDataError
from car_control_plane.models import TenantCreate
from car_control_plane.repositories.base import validated

__all__ = ["Source", "open_source", "tenants"]

LONGEST_LINE: Final = 1024 * 1024
"""Characters of a line; what has a longer one is no list of tenants."""

KEPT_BY_SERVER: Final = frozenset({"created_at", "updated_at", "version"})
"""Passed over, so that what `car-cp tenant list` prints can be read; the database gives new ones."""

LABEL_PREFIX: Final = "label."
SEPARATORS: Final = ",;\t"
SHOWN_EVERY: Final = 1_000
STANDARD_INPUT: Final = Path("-")


class Source:
    """A text that is read line by line.

    Attributes:
        name: What messages call it.
        line: The number of the line where the tenant read last begins, from 1; 0 before the first.
    """

    def __init__(self, name: str, stream: BinaryIO, progress: Progress) -> None:
        """Take the stream; nothing is read yet."""
        self.name = name
        self.line = 0
        self._raw = _Raw(stream)
        self._progress = progress
        self._task = progress.add_task(name, total=_size(stream), tenants=0)

    def lines(self) -> Iterator[str]:
        """Read the lines.

        Yields:
            Each line with its end.

        Raises:
            ControlPlaneError: The text is not UTF-8, or has a line longer than 1 MiB.
        """
        buffered = io.BufferedReader(self._raw)
        hint = "Save the file as UTF-8; spreadsheets call it CSV UTF-8."
        if buffered.peek(2)[:2] in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}:
            self.refuse("it is UTF-16", hint=hint)
        # A byte that is not UTF-8 becomes a surrogate: so it can be told in which line it stands.
        text = io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline="")
        for number in itertools.count(1):
            line = text.readline(LONGEST_LINE)
            if len(line) == LONGEST_LINE:
                self.refuse(f"has more than {LONGEST_LINE} characters", line=number)
            if not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line):
                self.refuse("is not UTF-8", hint=hint, line=number)
            if not line:
                return
            yield line

    def show(self, count: int) -> None:
        """Show how far the reading has come."""
        self._progress.update(self._task, completed=self._raw.position, tenants=count)

    def refuse(self, what: str, *, hint: str = "", line: int | None = None) -> NoReturn:
        """Say what is wrong in a line, by default the one of `line`.

        Raises:
            ControlPlaneError: Always. Not `InvalidDataError`, which stands for what was typed.
        """
        number = line or self.line
        where = f"{self.name}, line {number}:" if number else f"{self.name}:"
        end = "" if what.endswith("nothing was written") else "; nothing was written"
        raise ControlPlaneError(f"{where} {what}{end}", hint=hint, details={"line": number})


class _Raw(io.RawIOBase):
    """Counts what was read of a stream, and lets Ctrl-C end the reading."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with interruptible():
            data: bytes = self._stream.read1(len(buffer))  # type: ignore[attr-defined]  # buffered streams have it
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _size(stream: BinaryIO) -> int | None:
    """Return how many bytes there are to read; None for what has no size, a pipe for example."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a file, or standard input for `-`, with a progress bar on standard error when that is a terminal.

    Yields:
        The source; closed when the block ends.

    Raises:
        UsageError: The file cannot be opened.
    """
    console = Console(stderr=True)
    columns = (
        *(TextColumn("Importing {task.description}"), BarColumn(), TextColumn("{task.fields[tenants]:,} tenants")),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with ExitStack() as opened:
        if path == STANDARD_INPUT:
            name, stream = "standard input", sys.stdin.buffer
        else:
            name, stream = path.name, opened.enter_context(_open(path))
        progress = opened.enter_context(
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        )
        yield Source(name, stream, progress)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        reason = error.strerror
    raise UsageError(f"{path}: {reason}")


def tenants(source: Source, defaults: Mapping[str, Any]) -> Iterator[TenantCreate]:
    """Read the tenants of a source.

    Args:
        source: CSV or JSON lines.
        defaults: The fields of a tenant that names none.

    Yields:
        The tenants, each as soon as it is read.

    Raises:
        ControlPlaneError: A line is not what it should be; the message names it.
    """
    lines = source.lines()
    first = next((line for line in lines if line.strip()), "")
    if not first:
        source.refuse("it is empty", hint="CSV begins with a line of column names: name,environment")
    read = _json_lines if first.lstrip().startswith(("{", "[")) else _csv
    for count, fields in enumerate(read(source, first, lines), 1):
        given = {**defaults, **fields}
        try:
            tenant = validated(TenantCreate, given)
        except InvalidDataError as error:
            fault, hint = error.message, "" if "environment" in given else "--environment is for those that name none."
        else:
            yield tenant
            if count % SHOWN_EVERY == 0:
                source.show(count)
            continue
        source.refuse(fault, hint=hint)


def _json_lines(source: Source, first: str, rest: Iterator[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(itertools.chain([first], rest), 1):
        if not line.strip():
            continue
        source.line = number
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            fault = f"is no JSON at character {error.pos + 1}: {error.msg}"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
            fault = f"is no JSON that can be read ({type(error).__name__})"
        else:
            if isinstance(fields, dict):
                yield {name: value for name, value in fields.items() if name not in KEPT_BY_SERVER}
                continue
            fault = "is no JSON object"
        source.refuse(fault, hint="One object a line; jq -c '.[]' makes such lines of an array, jq -c . of objects.")


def _csv(source: Source, first: str, rest: Iterator[str]) -> Iterator[dict[str, Any]]:
    separator = max(SEPARATORS, key=first.count)
    reader = csv.reader(itertools.chain([first], rest), delimiter=separator, skipinitialspace=True, strict=True)
    header = _header(source, next(_rows(source, reader)))
    for cells in _rows(source, reader):
        if len(cells) != len(header):
            source.refuse(f"has {len(cells)} fields, where the first line names {len(header)}")
        yield _fields(source, header, cells)


def _rows(source: Source, reader: Any) -> Iterator[list[str]]:
    """Read rows that are not blank, and keep the number of the line where each begins."""
    while True:
        source.line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fault = f"is no CSV: {error}"
        else:
            if cells is None:
                return
            if cells:
                yield cells
            continue
        source.refuse(
            fault, hint='A value with a separator, quote or line break stands in "", a quote in it is written "".'
        )


def _header(source: Source, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() if cell.strip().startswith(LABEL_PREFIX) else cell.strip().lower() for cell in cells]
    known = [*TenantCreate.model_fields, *sorted(KEPT_BY_SERVER)]
    hint = f"The first line names the columns: {', '.join(TenantCreate.model_fields)}, {LABEL_PREFIX}KEY."
    if "name" not in names:
        source.refuse("names no column name", hint=hint)
    if unknown := [name for name in names if name not in known and not name.startswith(LABEL_PREFIX)]:
        source.refuse(f"names a column {unknown[0]!r}, which tenants do not have", hint=hint)
    if len(set(names)) < len(names):
        source.refuse("names a column twice", hint=hint)
    return names


def _fields(source: Source, header: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    """Return what a row says; an empty cell says nothing."""
    fields: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if not cell or name in KEPT_BY_SERVER:
            continue
        if name.startswith(LABEL_PREFIX):
            labels[name.removeprefix(LABEL_PREFIX)] = cell
        elif name == "labels":
            labels |= _labels(source, cell)
        else:
            fields[name] = cell
    return fields | ({"labels": labels} if labels else {})


def _labels(source: Source, cell: str) -> dict[str, Any]:
    try:
        labels = json.loads(cell)
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, dict):
        source.refuse('has labels that are no JSON object such as {"tier": "gold"}')
    return labels
