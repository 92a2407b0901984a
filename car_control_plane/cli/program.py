"""What all commands share: how they run, what they are given, and what becomes of an error.

`command` makes a coroutine a Typer command: it runs in an event loop of its own and gets a `Cli`, its way to the database and to the user. `Program`
is the one place that turns errors into words and exit codes; `EXIT_CODES` is the table.
"""

import asyncio
import functools
import inspect
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, NoReturn, ParamSpec

import typer
from typer.core import TyperGroup

import car_control_plane as library
from car_control_plane.cli.output import Format, Output, visible
from car_control_plane.errors import (
    AccessDeniedError,
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    InvalidDataError,
    InvalidTransitionError,
    KeyUnavailableError,
    MissingExtraError,
    NotFoundError,
    PermissionDeniedError,
    SchemaError,
)

if TYPE_CHECKING:
    from sqlmodel.ext.asyncio.session import AsyncSession

__all__ = ["EXIT_CODES", "Cli", "Program", "UsageError", "command", "exit_code", "interruptible"]

P = ParamSpec("P")

EXIT_CODES: Final = MappingProxyType(
    {
        ControlPlaneError: 1,
        InvalidDataError: 2,  # what a command refuses as invalid was typed; what a file holds is told apart where it is read
        ConfigurationError: 3,
        MissingExtraError: 3,
        ConnectionUnavailableError: 4,
        KeyUnavailableError: 4,
        SchemaError: 5,
        PermissionDeniedError: 6,
        AccessDeniedError: 6,
        NotFoundError: 7,
        ConflictError: 8,
        InvalidTransitionError: 8,
    }
)
"""The exit code of an error: that of its class, or of the nearest class above."""

INTERRUPTED = 130

# Click's base of everything that is wrong with what was typed; Typer hands on only this leaf of it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def exit_code(kind: type[ControlPlaneError]) -> int:
    """Return the exit code of a class of errors."""
    return next(EXIT_CODES[cls] for cls in kind.__mro__ if issubclass(cls, ControlPlaneError) and cls in EXIT_CODES)


class Program(TyperGroup):
    """The root of all commands: whatever goes wrong below leaves it as words on standard error and an exit code."""

    def main(self, *arguments: Any, **options: Any) -> NoReturn:
        """Run a command line and exit."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # JSON is UTF-8 on every system; a terminal may lack a character
                stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors="backslashreplace")
        # What goes wrong is told by the command; without a handler Python would print the library's warnings as well.
        logger = logging.getLogger(library.__name__)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        code = _guarded(functools.partial(super().main, *arguments, **{**options, "standalone_mode": False}))
        sys.exit(code)


def _guarded(run: Callable[[], Any]) -> int:
    try:
        result = run()
        code = result if isinstance(result, int) else 0  # Typer makes the result of `typer.Exit`, and 130 of Ctrl-C
    except Exception as problem:
        code = _explain(problem)
        if os.environ.get("CAR_CP_DEBUG"):
            traceback.print_exception(problem)
    if code == INTERRUPTED:
        Output.note("Interrupted.")
    return code


def _explain(problem: Exception) -> int:
    """Say what is wrong and return the exit code."""
    match problem:
        case ControlPlaneError():
            Output.error(problem.message, problem.hint)
            for line in problem.details.get("server_log", ()):
                Output.note(f"  {line}")
            return exit_code(type(problem))
        case UsageError():
            problem.show()  # type: ignore[attr-defined]  # Click's, see above
            return exit_code(InvalidDataError)
        case typer.Abort():
            if isinstance(problem.__context__, KeyboardInterrupt):  # at a prompt Typer takes Ctrl-C for a no
                return INTERRUPTED
            Output.note("Stopped; nothing was changed.")
        case OSError():
            what = problem.strerror or type(problem).__name__
            Output.error(what if problem.filename is None else f"{problem.filename}: {what}")
        case _:
            # Not its text: what a library says about a value it chokes on may hold the value.
            Output.error(
                f"unexpected {type(problem).__name__}; this is a mistake in car-cp",
                "Please report it, with the traceback that CAR_CP_DEBUG=1 shows.",
            )
    return exit_code(ControlPlaneError)


class Cli:
    """What a command is given: its output, the database, and the user's consent."""

    def __init__(self, wanted: Format) -> None:
        self.out = Output(wanted)

    @asynccontextmanager
    async def manager(self, **overrides: Any) -> AsyncGenerator["library.AsyncConnectionManager"]:
        """Give a manager on a database whose schema is what this version of the library needs.

        Args:
            **overrides: Settings that win over the environment.

        Yields:
            The manager; closed when the block ends.

        Raises:
            ControlPlaneError: It is not, or the database cannot be asked.
        """
        async with library.AsyncConnectionManager(**overrides) as manager:
            await manager.require_schema()
            yield manager

    @asynccontextmanager
    async def session(self) -> AsyncGenerator["AsyncSession"]:
        """Give a session whose work is committed when the block ends."""
        async with self.manager() as manager, manager.get_session() as session:
            yield session

    @asynccontextmanager
    async def read_session(self) -> AsyncGenerator["library.AsyncReadSession"]:
        """Give a session that only reads."""
        # A pager reads as slowly as its user does, and the transaction is open meanwhile.
        async with (
            self.manager(idle_in_transaction_timeout_seconds=0) as manager,
            manager.get_read_session() as session,
        ):
            yield session

    @asynccontextmanager
    async def keyring(self, manager: "library.AsyncConnectionManager") -> AsyncGenerator["library.Keyring"]:
        """Give the keys that the settings name.

        Args:
            manager: Has the settings, and the way to keys that are kept in the database.

        Yields:
            The keyring; closed when the block ends.

        Raises:
            ConfigurationError: No source of keys is set, or what it holds is not acceptable.
        """
        keyring = library.Keyring.from_settings(manager.settings, store=library.EncryptionKeyStore(manager))
        try:
            yield keyring
        finally:
            await keyring.close()

    def confirm(self, question: str, *, yes: bool) -> None:
        """Return when the user consents to what cannot be undone.

        Args:
            question: What is about to happen.
            yes: Whether the consent was typed already, as `--yes`.

        Raises:
            typer.Abort: The answer is no.
            UsageError: There is nobody to ask.
        """
        if yes:
            return
        if not sys.stdin.isatty():
            raise UsageError("this cannot be undone, and there is no terminal to ask: say --yes")
        with interruptible():
            typer.confirm(visible(question), abort=True, err=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end a call that blocks. The event loop only notes it, and the call would go on waiting."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, noted)


Wanted = Annotated[
    Format | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FORMAT",
        help="table, json, tsv, or auto: a table in a terminal, JSON lines elsewhere.",
        show_default=False,
    ),
]
"""The option every command has, before or after its name."""


def command(
    group: typer.Typer, name: str | None = None, **how: Any
) -> Callable[[Callable[Concatenate[Cli, P], Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Make a coroutine a command of the group: called with a `Cli`, then with what its own parameters say.

    The command is named after the function unless `name` is given; its help is the docstring; `how` goes to Typer.
    """

    def register(body: Callable[Concatenate[Cli, P], Coroutine[Any, Any, None]]) -> Callable[..., None]:
        own = list(inspect.signature(body).parameters.values())[1:]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        wanted = inspect.Parameter("wanted", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Wanted)
        parameters = [*(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own), wanted, context]

        def call(*, context: typer.Context, wanted: Format | None, **given: Any) -> None:
            cli = Cli(wanted or context.obj or Format.AUTO)
            asyncio.run(body(cli, **given))  # type: ignore[call-arg]  # Typer has read the parameters
            cli.out.flush()

        call.__name__, call.__doc__ = body.__name__, body.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what inspect looks for
        call.__annotations__ = {each.name: each.annotation for each in parameters}
        return group.command(name, **how)(call)

    return register
