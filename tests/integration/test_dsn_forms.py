"""The forms of a connection string against a real server: asyncpg gets in with what `Dsn.for_host` writes, and libpq with what `reveal` does."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import psycopg
import pytest

from car_control_plane.dsn import Dsn, Host, parse

APPLICATION = "a b+c&d=e/ü"


@asynccontextmanager
async def connected(dsn: Dsn, host: Host | None = None) -> AsyncIterator[Any]:
    """Connect as the connection manager does: the text for one host, the password apart."""
    text = dsn.for_host(host or dsn.hosts[0])
    connection = await asyncpg.connect(text, password=dsn.password, timeout=dsn.connect_timeout_seconds or 30)
    try:
        yield connection
    finally:
        await connection.close()


def forms(server: Dsn) -> dict[str, str]:
    """Write the same address in the ways people do."""
    host, user, database = server.hosts[0], server.user or "", server.database or ""
    password = server.password or ""
    credentials = f"{quote(user, safe='')}:{quote(password, safe='')}@"
    query = f"host={quote(host.name, safe='')}&port={host.port}"
    place = f"[{host.name}]:{host.port}" if ":" in host.name else f"{quote(host.name, safe='')}:{host.port}"
    extra = "sslmode=prefer&connect_timeout=20&channel_binding=prefer&keepalives=1"
    keywords: dict[str, Any] = {
        "host": host.name,
        "port": host.port,
        "user": user,
        "password": password,
        "dbname": database,
    }
    return {
        "uri": f"postgresql://{credentials}{place}/{quote(database, safe='')}",
        "short scheme": f"postgres://{credentials}{place}/{quote(database, safe='')}?{extra}",
        "SQLAlchemy": f"postgresql+asyncpg://{credentials}{place}/{quote(database, safe='')}",
        "host in the query": f"postgresql+psycopg2://{credentials}/{quote(database, safe='')}?{query}&{extra}",
        "everything in the query": f"postgresql://?user={quote(user)}&password={quote(password, safe='')}&dbname={quote(database)}&{query}",
        "keywords": psycopg.conninfo.make_conninfo("", **keywords),
    }


@pytest.mark.parametrize("form", list(forms(parse("postgresql://h"))))
async def test_the_server_is_reached_in_every_form(server_dsn: str, form: str) -> None:
    server = parse(server_dsn)
    dsn = parse(forms(server)[form] + "\n")
    assert (dsn.hosts, dsn.user, dsn.password, dsn.database) == (
        server.hosts,
        server.user,
        server.password,
        server.database,
    )
    async with connected(dsn) as connection:
        assert await connection.fetchval("SELECT current_database()") == server.database


async def test_server_settings_arrive(server_dsn: str) -> None:
    added = f"options=-c%20geqo%3Doff%20-c%20work_mem%3D5MB&timezone=Etc/GMT%2B5&search_path=a,%22b%20c%22&application_name={quote(APPLICATION)}"
    plain = parse(server_dsn).reveal()
    dsn = parse(f"{plain}{'&' if '?' in plain else '?'}{added}&my_app.tenant=x%20y")
    wanted = {
        "geqo": "off",
        "work_mem": "5MB",
        "TimeZone": "Etc/GMT+5",
        "search_path": 'a,"b c"',
        "my_app.tenant": "x y",
    }
    async with connected(dsn) as connection:
        assert {name: await connection.fetchval(f"SHOW {name}") for name in wanted} == wanted
        application = await connection.fetchval(
            "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        )
        assert application.startswith("a b+c&d=e/")  # servers before 16 write what is not ASCII as question marks


async def test_names_that_need_escaping_are_reached_by_asyncpg_and_by_libpq(server_dsn: str) -> None:
    server, mark = parse(server_dsn), secrets.token_hex(4)
    role, database, password = f"ro:le@{mark} ü%", f"da/ta?ba#se&{mark} é%", "p@:/?#% +&ü'\\"
    quoted_role, quoted_database = f'"{role}"', f'"{database}"'
    async with connected(server) as connection:
        await connection.execute(f"CREATE ROLE {quoted_role} LOGIN PASSWORD $${password}$$")
        try:
            await connection.execute(f"CREATE DATABASE {quoted_database}")
            address = server.replace(database=database).reveal().rpartition("@")[2]
            dsn = parse(f"postgresql://{quote(role, safe='')}:{quote(password, safe='')}@{address}")
            async with connected(dsn) as other:
                assert list(await other.fetchrow("SELECT current_user::text, current_database()::text")) == [
                    role,
                    database,
                ]
            async with await psycopg.AsyncConnection.connect(dsn.reveal()) as libpq:
                row = await (await libpq.execute("SELECT current_user::text, current_database()::text")).fetchone()
                assert row == (role, database)
                assert libpq.info.password == password
        finally:
            await connection.execute(f"DROP DATABASE IF EXISTS {quoted_database}")
            await connection.execute(f"DROP ROLE {quoted_role}")


async def test_each_of_several_hosts_is_tried_by_itself(server_dsn: str) -> None:
    server = parse(server_dsn)
    host = server.hosts[0]
    user = quote(server.user or "", safe="")
    dsn = parse(
        f"postgresql://{user}:{quote(server.password or '', safe='')}@/{server.database}"
        f"?host=127.0.0.1,{quote(host.name)}&port=1,{host.port}&target_session_attrs=read-write"
    )
    with pytest.raises(ConnectionRefusedError):
        async with connected(dsn, dsn.hosts[0]):
            pass
    async with connected(dsn, dsn.hosts[1]) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_a_unix_socket_is_reached(server_dsn: str) -> None:
    server = parse(server_dsn)
    async with connected(server) as connection:
        listed = str(await connection.fetchval("SHOW unix_socket_directories"))
        port = int(await connection.fetchval("SHOW port"))
    here = [path for path in map(str.strip, listed.split(",")) if path and (Path(path) / f".s.PGSQL.{port}").exists()]
    if not here:
        pytest.skip(f"the server of this run has no socket on this machine (unix_socket_directories = {listed!r})")
    path = here[0].strip('"')
    credentials = f"{quote(server.user or '', safe='')}:{quote(server.password or '', safe='')}@"
    for text in (
        f"postgresql://{credentials}/{server.database}?host={quote(path)}&port={port}",
        f"postgresql://{credentials}{quote(path, safe='')}:{port}/{server.database}",
    ):
        dsn = parse(text)
        assert dsn.hosts == (Host(path, port),)
        async with connected(dsn) as connection:
            assert await connection.fetchval("SELECT inet_server_addr() IS NULL")
