"""The command line: `car-cp`, also `python -m car_control_plane`.

It is the library for people and shell scripts: every command is a few calls of the public API, and what it prints and answers is decided in two
places, `output` (tables for a terminal, JSON lines for a pipe) and `program` (errors and exit codes). A connection string is never an argument:
process lists and shell histories would keep it.

Commands import what they need when they run, so that `--help` and completion in the shell answer at once.
"""

import sys
from typing import TYPE_CHECKING, Any

from car_control_plane.errors import MissingExtraError

if TYPE_CHECKING:
    from car_control_plane.cli.root import app as app

__all__ = ["app", "main"]


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        __getattr__("app")(prog_name="car-cp")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:  # while it is being imported
        return 130
    except ImportError as missing:
        if (missing.name or "").partition(".")[0] not in {"typer", "rich", "click"}:
            raise
        error = MissingExtraError(
            "the command line needs packages that are not installed", hint='pip install "car-control-plane[cli]"'
        )
        sys.stderr.write(f"Error: {error.message}\nHint: {error.hint}\n")
        return 3  # as EXIT_CODES in program has it, which cannot be imported now
    return 0


def __getattr__(name: str) -> Any:
    """Give the Typer application as `app`; it is imported when asked for, because typer is optional."""
    if name != "app":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from car_control_plane.cli.root import app  # noqa: PLC0415 -- typer is optional

    return app
