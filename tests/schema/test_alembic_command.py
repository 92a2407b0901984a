"""The `alembic` command, as the seed's guide has it: what it does, and what it says when it cannot."""

import asyncio
import io
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from alembic.config import CommandLine, Config

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.migrations import current, drift
from car_control_plane.models import REVISIONS
from tests.schema.rows import acting_as
from tests.schema.scripts import HEAD, add_revision, copy_scripts


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


class Alembic:
    """The command, in a folder that has the scripts and nothing else: in this process, which is much faster, or in one of its own."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.scripts = copy_scripts(home)
        self.monkeypatch = monkeypatch
        monkeypatch.chdir(home)

    @property
    def revisions(self) -> set[str]:
        return {path.stem for path in (self.scripts / "versions").glob("*.py")}

    def read(self, revision: str) -> str:
        return (self.scripts / "versions" / f"{revision}.py").read_text(encoding="utf-8")

    async def __call__(self, *arguments: str, url: str | None = None) -> Outcome:
        self.monkeypatch.delenv("DATABASE_URL", raising=False)
        if url is not None:
            self.monkeypatch.setenv("DATABASE_URL", url)
        return await asyncio.to_thread(self._run, arguments)  # for there must be no loop

    @staticmethod
    def _run(arguments: tuple[str, ...]) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        program, code = CommandLine(), None
        with redirect_stdout(out), redirect_stderr(err):
            options = program.parser.parse_args(arguments)
            try:
                program.run_cmd(Config("alembic.ini", cmd_opts=options, stdout=out, output_buffer=out), options)
            except SystemExit as end:
                code = end.code
        return Outcome(int(code or 0) % 256, out.getvalue(), err.getvalue())

    async def process(self, *arguments: str, url: str) -> Outcome:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "alembic", *arguments),
            cwd=self.home,
            env={**os.environ, "DATABASE_URL": url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return Outcome(process.returncode, out.decode(), err.decode())


@pytest.fixture
def alembic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Alembic]:
    """The command. It sets up logging for a program of its own, which is taken back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Alembic(tmp_path, monkeypatch)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("alembic", "alembic.runtime.plugins"):
        logging.getLogger(name).setLevel(logging.NOTSET)


# --- the seed's commands ----------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_the_command_is_a_program(alembic: Alembic, empty_database: str) -> None:
    """Everything below runs the same code without the cost of a process."""
    outcome = await alembic.process("upgrade", "head", url=empty_database)
    assert outcome.code == 0
    assert (await alembic.process("current", url=empty_database)).out.strip() == f"{HEAD} (head)"
    assert failure(await alembic.process("upgrade", "head", url="")).startswith(
        "DATABASE_URL environment variable is required"
    )


async def test_the_commands_of_the_guide(alembic: Alembic, empty_database: str) -> None:
    url = empty_database
    assert (await alembic("current", url=url)).out == ""
    up = await alembic("upgrade", "head", url=url)
    assert up.code == 0
    for before, after in itertools.pairwise(["", *REVISIONS]):
        assert f"Running upgrade {before} -> {after}" in up.err
    assert (await alembic("current", url=url)).out.strip() == f"{HEAD} (head)"
    assert await drift(url) == ()
    assert (await alembic("history", url=url)).out.count("->") == len(REVISIONS)
    assert (await alembic("check", url=url)).code == 0
    assert (await alembic("downgrade", "-1", url=url)).code == 0
    assert (await alembic("current", url=url)).out.strip() == REVISIONS[-2]
    assert (await alembic("check", url=url)).code == 255
    assert (await alembic("downgrade", "base", url=url)).code == 0
    assert (await alembic("stamp", "head", url=url)).code == 0
    assert await current(url) == HEAD
    assert (await alembic("stamp", "base", url=url)).code == 0
    assert await current(url) is None


async def test_check_tells_a_difference_by_its_exit_code(alembic: Alembic, own_database: str) -> None:
    async with AsyncConnectionManager(own_database) as manager:
        connection = await manager.connect()
        await connection.execute("DROP INDEX control_plane.idx_tenants_status")
        await connection.close()
    outcome = await alembic("check", url=own_database)
    assert outcome.code == 255
    assert "idx_tenants_status" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("current",), ""),
        (("history", "-i"), f"{HEAD} (head)"),
        (("check",), "FAILED: Target database is not up to date."),
        (("downgrade", "base"), ""),
        (("downgrade", "-1"), "FAILED: Relative revision -1"),
        (("stamp", "base"), ""),
    ],
)
async def test_nothing_is_left_in_a_database_that_was_never_migrated(
    alembic: Alembic, empty_database: str, arguments: tuple[str, ...], expected: str
) -> None:
    outcome = await alembic(*arguments, url=empty_database)
    assert expected in outcome.out
    assert outcome.code == (255 if "FAILED" in expected else 0)
    async with AsyncConnectionManager(empty_database) as manager:
        connection = await manager.connect()
        assert await connection.fetchval("SELECT to_regnamespace('control_plane') IS NULL")
        await connection.close()


# --- at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_four_processes_at_once(alembic: Alembic, empty_database: str) -> None:
    outcomes = await asyncio.gather(*(alembic.process("upgrade", "head", url=empty_database) for _ in range(4)))
    assert [outcome.code for outcome in outcomes] == [0, 0, 0, 0], [outcome.err for outcome in outcomes]
    assert sum("Running upgrade" in outcome.err for outcome in outcomes) == 1
    assert await drift(empty_database) == ()


@pytest.mark.slow
async def test_four_processes_at_once_with_a_concurrent_index(alembic: Alembic, empty_database: str) -> None:
    """Whoever waited inside a transaction would keep the index waiting, and the other way round."""
    add_revision(
        alembic.scripts,
        "005_index",
        """
        with op.get_context().autocommit_block():
            op.create_index("extra", "tenants", ["updated_at"], schema="control_plane", postgresql_concurrently=True)
        """,
    )
    outcomes = await asyncio.gather(*(alembic.process("upgrade", "head", url=empty_database) for _ in range(4)))
    assert [outcome.code for outcome in outcomes] == [0, 0, 0, 0], [outcome.err for outcome in outcomes]
    async with AsyncConnectionManager(empty_database) as manager:
        connection = await manager.connect()
        valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'control_plane.extra'::regclass"
        assert await connection.fetchval(valid)
        await connection.close()


# --- what it says -----------------------------------------------------------------------------------------------------


def failure(outcome: Outcome) -> str:
    """Return what a failed command says: one line, no traceback."""
    assert outcome.code == 255
    assert "Traceback" not in outcome.err
    [line] = outcome.out.splitlines()
    return line.removeprefix("FAILED: ")


async def test_without_database_url(alembic: Alembic) -> None:
    for command in (["upgrade", "head"], ["downgrade", "-1"], ["current"], ["check"]):
        assert failure(await alembic(*command)).startswith("DATABASE_URL environment variable is required")


async def test_database_url_is_read_from_the_env_file(alembic: Alembic, own_database: str) -> None:
    (alembic.home / ".env").write_text(f"DATABASE_URL={own_database}\n", encoding="utf-8")
    assert (await alembic("current")).out.strip() == f"{HEAD} (head)"


async def test_a_server_that_is_not_there(alembic: Alembic) -> None:
    line = failure(await alembic("upgrade", "head", url="postgresql://u:s3cret@127.0.0.1:1/x"))
    assert "127.0.0.1:1" in line
    assert "s3cret" not in line


async def test_a_malformed_database_url(alembic: Alembic) -> None:
    outcome = await alembic("upgrade", "head", url="postgresql://u:s3@cret@h/x")
    assert "%40" in failure(outcome)
    assert "s3" not in outcome.out + outcome.err


async def test_permission_denied(alembic: Alembic, role: str, empty_database: str) -> None:
    line = failure(await alembic("upgrade", "head", url=acting_as(role, empty_database)))
    assert line.startswith("permission denied")
    assert re.search(rf"GRANT CREATE ON DATABASE \S+ TO {role};$", line)


async def test_a_migration_that_fails(alembic: Alembic, own_database: str) -> None:
    add_revision(alembic.scripts, "005_fails", 'op.execute("SELECT 1 / 0")')
    assert failure(await alembic("upgrade", "head", url=own_database)).startswith("005_fails failed: ")


async def test_a_database_ahead_of_the_code_and_the_way_out(alembic: Alembic, own_database: str) -> None:
    add_revision(alembic.scripts, "005_future", "pass")
    await alembic("upgrade", "head", url=own_database)
    (alembic.scripts / "versions" / "005_future.py").unlink()
    for command in (["upgrade", "head"], ["current"], ["check"]):
        line = failure(await alembic(*command, url=own_database))
        assert line.startswith("the database is at revision '005_future', which this version of the library, with head")
    assert (await alembic("stamp", "--purge", "head", url=own_database)).code == 0
    assert await current(own_database) == HEAD


async def test_an_unknown_revision(alembic: Alembic, own_database: str) -> None:
    assert "nope" in failure(await alembic("upgrade", "nope", url=own_database))


async def test_loggers_of_the_host_are_not_silenced(alembic: Alembic, own_database: str) -> None:
    host = logging.getLogger("a_host_that_was_there_before")
    await alembic("current", url=own_database)
    assert not host.disabled


# --- SQL to run by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [None, "postgresql://127.0.0.1:1/x"])
async def test_sql_without_a_database(alembic: Alembic, empty_database: str, url: str | None) -> None:
    up = await alembic("upgrade", "head", "--sql", url=url)
    down = await alembic("downgrade", "head:base", "--sql", url=url)
    assert (up.code, down.code) == (0, 0)
    async with AsyncConnectionManager(empty_database) as manager:
        connection = await manager.connect()
        await connection.execute(up.out)
        assert await drift(manager) == ()
        await connection.execute(down.out)
        assert await connection.fetchval("SELECT to_regnamespace('control_plane') IS NULL")
        await connection.execute(up.out)
        assert await drift(manager) == ()
        await connection.close()


# --- new revisions ----------------------------------------------------------------------------------------------------


async def test_a_revision_when_nothing_changed_is_empty(alembic: Alembic, own_database: str) -> None:
    before = alembic.revisions
    assert (await alembic("revision", "--autogenerate", "-m", "Nothing new!", url=own_database)).code == 0
    assert alembic.revisions - before == {"005_nothing_new"}
    text = alembic.read("005_nothing_new")
    assert "revision: str = '005_nothing_new'" in text
    assert f"down_revision: str | None = '{HEAD}'" in text
    assert text.count("pass") == 2
    assert "op." not in text
    assert (await alembic("upgrade", "head", url=own_database)).code == 0


MODELS = """
from datetime import datetime
from enum import StrEnum
import uuid
import sqlalchemy as sa
from sqlmodel import Field
from car_control_plane.models import Tenant, metadata
from car_control_plane.models.base import Model, Name, enum_type

class Colour(StrEnum):
    RED = "red"
    GREEN = "green"

class Note(Model, table=True):
    __tablename__ = "notes"
    __table_args__ = (sa.CheckConstraint("length(text) > 0", name="text"),)
    id: int = Field(primary_key=True)
    tenant_id: uuid.UUID = Field(foreign_key="control_plane.tenants.tenant_id", ondelete="CASCADE", index=True)
    text: Name
    colour: Colour = Field(sa_type=enum_type(Colour, "colour"))
    written_at: datetime

tenants = metadata.tables["control_plane.tenants"]
tenants.append_column(sa.Column("nickname", sa.String(40)))
tenants.append_column(sa.Column("paint", enum_type(Colour, "colour")))
statuses = tenants.c.status.type.enum
statuses.enums = [*statuses.enums, "frozen"]
"""


@pytest.mark.slow
async def test_a_revision_for_changed_models_is_right_and_imports_none_of_them(
    alembic: Alembic, own_database: str
) -> None:
    environment = alembic.scripts / "env.py"
    environment.write_text(MODELS + environment.read_text(encoding="utf-8"), encoding="utf-8")
    # In processes of their own, for the models of this one are not to be changed.
    written = await alembic.process("revision", "--autogenerate", "-m", "add notes", url=own_database)
    assert written.code == 0, written.err
    text = alembic.read("005_add_notes")
    imports = {line for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {
        "import sqlalchemy as sa",
        "from alembic import op",
        "from sqlalchemy.dialects import postgresql",
    }
    assert "sa.Column('text', sa.String(length=255), nullable=False)" in text
    assert "sa.Column('written_at', sa.DateTime(timezone=True), nullable=False)" in text

    for command in (["upgrade", "head"], ["check"], ["downgrade", "-1"], ["upgrade", "head"], ["check"]):
        outcome = await alembic.process(*command, url=own_database)
        assert outcome.code == 0, outcome.out + outcome.err + text
    async with AsyncConnectionManager(own_database) as manager:
        connection = await manager.connect()
        labels = "SELECT array_agg(enumlabel::text ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = $1::regtype"
        assert await connection.fetchval(labels, "control_plane.colour") == ["red", "green"]
        assert "frozen" in await connection.fetchval(labels, "control_plane.tenant_status")
        await connection.close()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["-m", "add x"], "005_add_x"),
        (["-m", "add x", "--rev-id", "007"], "007_add_x"),
        (["-m", "add x", "--rev-id", "hotfix_1"], "hotfix_1"),
        ([], "005"),
        (["-m", "a very long message that does not fit"], "005_a_very_long_message_that"),
    ],
)
async def test_how_a_revision_is_called(alembic: Alembic, options: list[str], name: str) -> None:
    before = alembic.revisions
    outcome = await alembic("revision", *options)  # without --autogenerate it needs no database
    assert outcome.code == 0, outcome.err
    assert alembic.revisions - before == {name}
    assert f"revision: str = '{name}'" in alembic.read(name)
    assert f"{name} (head)" in (await alembic("heads")).out


async def test_a_revision_is_not_written_for_a_database_that_is_behind(alembic: Alembic, empty_database: str) -> None:
    before = alembic.revisions
    outcome = await alembic("revision", "--autogenerate", "-m", "x", url=empty_database)
    assert failure(outcome) == "Target database is not up to date."
    assert alembic.revisions == before
