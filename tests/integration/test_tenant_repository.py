"""`TenantRepository` against real PostgreSQL: every verb, every refusal, and what each of them costs in round trips."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import SealedConnectionString
from car_control_plane.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ControlPlaneError,
    InvalidDataError,
    InvalidTransitionError,
    ProtectedError,
    StaleWriteError,
    StillReferencedError,
    TenantNotFoundError,
)
from car_control_plane.models import (
    SYSTEM_ADMIN_ID,
    SYSTEM_ADMIN_NAME,
    TRANSITIONS,
    Tenant,
    TenantCreate,
    TenantDatabase,
    TenantEnvironment,
    TenantStatus,
    TenantUpdate,
    uuid7,
)
from car_control_plane.repositories import TenantRepository, base, tenants as module
from tests.fixtures.doors import on_both

PRODUCTION, STAGING = TenantEnvironment.PRODUCTION, TenantEnvironment.STAGING


def new(name: str, **more: Any) -> TenantCreate:
    return TenantCreate.model_validate({"name": name, "environment": PRODUCTION, **more})


@pytest.fixture
def tenants(where: Any) -> TenantRepository:
    return TenantRepository(where)


@contextmanager
def counting(session: AsyncSession) -> Iterator[list[str]]:
    """The statements the session sends while the block runs."""
    sent: list[str] = []

    def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith(("SAVEPOINT", "RELEASE")):  # the fixture's
            sent.append(statement)

    engine = session.sync_session.get_bind().engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


async def fetch_all(session: AsyncSession) -> dict[str, Tenant]:
    rows = await session.exec(select(Tenant).execution_options(populate_existing=True))
    return {row.name: row for row in rows}


# --- finding


@on_both
async def test_a_created_tenant_is_found_by_id_and_by_name(tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme", labels={"tier": "gold"}, status_reason=None))
    assert (made.name, made.environment, made.status, made.labels) == (
        "acme",
        PRODUCTION,
        TenantStatus.PENDING,
        {"tier": "gold"},
    )
    assert made.version > 0
    assert made.created_at == made.updated_at
    assert await tenants.get(made.tenant_id) == made
    assert await tenants.get_or_none(made.tenant_id) == made
    assert await tenants.get_by_name("acme") == made
    assert await tenants.exists(made.tenant_id)


async def test_a_session_has_one_object_for_a_row(session: AsyncSession, tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme"))
    assert await tenants.get(made.tenant_id) is made
    assert await tenants.get_by_name("acme") is made
    assert (await TenantRepository(session).get_many([made.tenant_id]))[made.tenant_id] is made


@on_both
async def test_an_id_may_be_given_as_text(tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme"))
    assert await tenants.get(str(made.tenant_id)) == made  # type: ignore[arg-type]  # what a web framework hands over


@on_both
async def test_absence_is_said_in_the_way_asked_for(tenants: TenantRepository) -> None:
    nobody = uuid7()
    assert await tenants.get_or_none(nobody) is None
    assert not await tenants.exists(nobody)
    assert await tenants.get_many([nobody]) == {}
    with pytest.raises(TenantNotFoundError, match=str(nobody)):
        await tenants.get(nobody)
    with pytest.raises(TenantNotFoundError, match="'nobody'") as caught:
        await tenants.get_by_name("nobody")
    assert caught.value.details == {"name": "nobody"}


@on_both
async def test_a_name_is_found_in_any_unicode_spelling(tenants: TenantRepository) -> None:
    made = await tenants.create(new("Caf\u0065\u0301"))
    assert made.name == "Caf\u00e9"
    assert await tenants.get_by_name("Caf\u0065\u0301") == made


@on_both
async def test_get_many_returns_those_that_exist_by_id(tenants: TenantRepository) -> None:
    made = [await tenants.create(new(f"t{i}")) for i in range(3)]
    found = await tenants.get_many([made[2].tenant_id, uuid7(), made[0].tenant_id, made[0].tenant_id])
    assert found == {made[0].tenant_id: made[0], made[2].tenant_id: made[2]}


async def test_get_asks_once_and_then_the_session_knows(session: AsyncSession, tenants: TenantRepository) -> None:
    key = (await tenants.create(new("acme"))).tenant_id
    session.expunge_all()
    with counting(session) as sent:
        first = await tenants.get(key)
        assert await tenants.get(key) is first
    assert len(sent) == 1


async def test_get_reads_an_expired_row_again(session: AsyncSession, tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme"))
    key = made.tenant_id
    session.sync_session.expire(made)
    assert (await tenants.get(key)).name == "acme"


@on_both
@pytest.mark.parametrize("value", ["no-uuid", "", 5, None, b"x"])
async def test_what_is_no_id_is_refused(tenants: TenantRepository, value: Any) -> None:
    for verb in (tenants.get, tenants.get_or_none, tenants.exists, tenants.activate, tenants.delete):
        with pytest.raises(InvalidDataError, match="must be a UUID"):
            await verb(value)


@pytest.mark.parametrize("name", ["\x00", "a\nb", "\ud800", 5, None])
async def test_what_no_name_can_be_is_refused_before_postgresql_sees_it(
    session: AsyncSession, tenants: TenantRepository, name: Any
) -> None:
    with counting(session) as sent, pytest.raises(InvalidDataError):
        await tenants.get_by_name(name)
    assert sent == []


# --- listing


@on_both
async def test_pages_follow_each_other_without_gap_or_repetition(tenants: TenantRepository) -> None:
    await tenants.create_many(new(f"t{i:03}") for i in range(25))
    seen: list[uuid.UUID] = []
    after: str | None = None
    while True:
        page = await tenants.list(limit=10, after=after)
        seen += [tenant.tenant_id for tenant in page]
        after = page.next_cursor
        if after is None:
            break
    everything = sorted([t async for t in tenants.stream()], key=lambda t: (t.created_at, t.tenant_id))
    assert seen == [t.tenant_id for t in everything]
    assert len(seen) == len(set(seen)) == 26  # with system_admin


@on_both
async def test_the_last_page_has_no_cursor_even_when_full(tenants: TenantRepository) -> None:
    await tenants.create_many(new(f"t{i}") for i in range(9))
    page = await tenants.list(limit=10)
    assert (len(page), page.next_cursor) == (10, None)
    assert [*page] == [*page.items]


async def test_a_row_created_while_paging_comes_later_and_one_deleted_breaks_nothing(
    shared_manager: AsyncConnectionManager,
) -> None:
    async with shared_manager.get_session() as session:
        await TenantRepository(session).create_many(new(f"t{i}") for i in range(6))
    async with shared_manager.get_session() as session:
        first = await TenantRepository(session).list(limit=4)
    async with shared_manager.get_session() as session:
        await TenantRepository(session).delete(first.items[-1].tenant_id)  # the very row the cursor stands on
        await TenantRepository(session).create(new("late"))
    async with shared_manager.get_session() as session:
        rest = await TenantRepository(session).list(limit=10, after=first.next_cursor)
    assert {t.tenant_id for t in first}.isdisjoint(t.tenant_id for t in rest)
    assert rest.items[-1].name == "late"
    assert len(first) + len(rest) == 8


@on_both
async def test_filters_narrow_and_combine(tenants: TenantRepository) -> None:
    await tenants.create_many(
        [
            new("eu-1", labels={"tier": "gold", "region": "eu"}, status="active"),
            new("eu-2", labels={"tier": "free", "region": "eu"}, environment=STAGING),
            new("us-1", labels={"tier": "gold", "region": "us"}, status="suspended"),
            new("EU-3"),
        ]
    )

    async def names(**which: Any) -> set[str]:
        listed = {t.name for t in await tenants.list(**which)} - {SYSTEM_ADMIN_NAME}
        assert listed == {t.name async for t in tenants.stream(**which)} - {SYSTEM_ADMIN_NAME}
        assert await tenants.count(**which) in {len(listed), len(listed) + 1}
        return listed

    assert await names() == {"eu-1", "eu-2", "us-1", "EU-3"}
    assert await names(status=TenantStatus.ACTIVE) == {"eu-1"}
    assert await names(status="active") == {"eu-1"}
    assert await names(status=[TenantStatus.ACTIVE, TenantStatus.SUSPENDED]) == {"eu-1", "us-1"}
    assert await names(status=[]) == set()
    assert await names(environment=STAGING) == {"eu-2"}
    assert await names(environment=["staging", "production"]) == {"eu-1", "eu-2", "us-1", "EU-3"}
    assert await names(name_prefix="eu-") == {"eu-1", "eu-2"}
    assert await names(name_prefix="") == await names()
    assert await names(labels={"tier": "gold"}) == {"eu-1", "us-1"}
    assert await names(labels={"tier": "gold", "region": "us"}) == {"us-1"}
    assert await names(labels={}) == await names()
    assert await names(name_prefix="eu", labels={"tier": "gold"}, status="active", environment="production") == {"eu-1"}


@on_both
@pytest.mark.parametrize("prefix", ["%", "_", "\\", "a%", "\U0010ffff", "x\U0010ffff", "\ud7ff", "ß", "'"])
async def test_a_prefix_is_taken_literally(tenants: TenantRepository, prefix: str) -> None:
    await tenants.create_many([new(f"{prefix}1"), new(f"{prefix}\U0010ffff"), new("other"), new("zz"), new("a")])
    assert {t.name for t in await tenants.list(name_prefix=prefix)} == {f"{prefix}1", f"{prefix}\U0010ffff"}


@on_both
@pytest.mark.parametrize(
    ("which", "says"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 501}, "limit"),
        ({"limit": True}, "limit"),
        ({"limit": "5"}, "limit"),
        ({"after": ""}, "cursor"),
        ({"after": "AAAA"}, "cursor"),
        ({"after": "é"}, "cursor"),
        ({"after": 5}, "cursor"),
        ({"after": "_" * 34}, "cursor"),
        ({"status": "gone"}, "status"),
        ({"status": 5}, "status"),
        ({"environment": ["production", "moon"]}, "environment"),
        ({"name_prefix": "a\x00"}, "prefix"),
        ({"labels": {"a": "\x00"}}, "labels"),
        ({"labels": {"a": 5}}, "labels"),
        ({"labels": "tier=gold"}, "labels"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_bad_listing_arguments_are_refused(tenants: TenantRepository, which: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidDataError, match=says):
        await tenants.list(**which)


@on_both
async def test_a_cut_or_changed_cursor_is_refused(tenants: TenantRepository) -> None:
    await tenants.create_many(new(f"t{i}") for i in range(3))
    cursor = (await tenants.list(limit=2)).next_cursor
    assert cursor is not None
    for bad in (cursor[:-1], cursor + "=", cursor + "A", " " + cursor, "B" + cursor[1:]):
        with pytest.raises(InvalidDataError, match="not a cursor"):
            await tenants.list(after=bad)


@on_both
async def test_stream_crosses_page_borders(tenants: TenantRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "STREAM_ROWS", 5)
    for total in (0, 1, 4, 5, 10):
        await tenants.create_many((new(f"s{total}-{i}") for i in range(total)), on_conflict="raise")
        assert len([t async for t in tenants.stream(name_prefix=f"s{total}-")]) == total


# --- creating


async def test_create_is_one_statement(session: AsyncSession, tenants: TenantRepository) -> None:
    with counting(session) as sent:
        await tenants.create(new("acme"))
    assert len(sent) == 1


@on_both
async def test_a_taken_name_or_id_is_refused_and_the_session_goes_on(tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme"))
    with pytest.raises(AlreadyExistsError, match="the name 'acme'"):
        await tenants.create(new("acme"))
    with pytest.raises(AlreadyExistsError, match=f"the id {made.tenant_id}"):
        await tenants.create(new("other", tenant_id=made.tenant_id))
    assert (await tenants.create(new("next"))).name == "next"


@on_both
async def test_create_takes_a_mapping_and_names_what_is_wrong_in_it(tenants: TenantRepository) -> None:
    made = await tenants.create({"name": "acme", "environment": "staging"})  # type: ignore[arg-type]  # mappings are taken
    assert made.environment is STAGING
    with pytest.raises(InvalidDataError, match="environment") as caught:
        await tenants.create({"name": " secret-canary", "environment": "moon"})  # type: ignore[arg-type]
    assert caught.value.details == {"fields": ["name", "environment"]}
    assert "secret-canary" not in str(caught.value)
    assert caught.value.__context__ is None


async def test_create_many_creates_all_and_says_so(session: AsyncSession, tenants: TenantRepository) -> None:
    result = await tenants.create_many(
        [
            new("a", labels={"k": 'quote" \\ ü'}, status="active", status_reason="because"),
            {"name": "b", "environment": "staging"},
        ]
    )
    assert (result.created, result.skipped, result.conflicts) == (2, 0, ())
    stored = await fetch_all(session)
    assert stored["a"].labels == {"k": 'quote" \\ ü'}
    assert (stored["a"].status, stored["a"].status_reason) == (TenantStatus.ACTIVE, "because")
    assert stored["b"].environment is STAGING
    assert stored["a"].version != stored["b"].version


@on_both
async def test_create_many_reads_async_iterators_and_nothing(tenants: TenantRepository) -> None:
    async def source() -> AsyncIterator[TenantCreate]:
        for i in range(3):
            await asyncio.sleep(0)
            yield new(f"a{i}")

    assert (await tenants.create_many(source())).created == 3
    assert (await tenants.create_many([])).created == 0


@on_both
async def test_create_many_reports_exactly_what_it_skipped(
    tenants: TenantRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 4)
    known = await tenants.create(new("known"))
    again = new("again")
    given = [
        new("n0"),
        new("known"),  # 1: the name is taken
        new("n2"),
        new("other", tenant_id=known.tenant_id),  # 3: the id is taken
        again,
        new("n5"),
        new("n5"),  # 6: repeats a name of the batch
        again,  # 7: repeats a row of the batch
        new("n0"),  # 8: repeats a name of an earlier batch
        TenantCreate.model_validate(
            known.model_dump(include={"tenant_id", "name", "environment"})
        ),  # 9: an identical row
    ]
    result = await tenants.create_many(given, on_conflict="skip")
    assert (result.created, result.skipped) == (4, 6)
    assert [c.index for c in result.conflicts] == [1, 3, 6, 7, 8, 9]
    assert [c.name for c in result.conflicts] == [given[i].name for i in (1, 3, 6, 7, 8, 9)]
    assert result.conflicts[1].tenant_id == known.tenant_id
    assert await tenants.count(name_prefix="n") == 3


@on_both
async def test_create_many_bounds_its_report(tenants: TenantRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONFLICTS", 5)
    monkeypatch.setattr(module, "BATCH_ROWS", 4)
    await tenants.create_many(new(f"t{i}") for i in range(12))
    result = await tenants.create_many((new(f"t{i}") for i in range(13)), on_conflict="skip")
    assert (result.created, result.skipped, [c.index for c in result.conflicts]) == (1, 12, [0, 1, 2, 3, 4])


async def test_create_many_that_raises_has_written_nothing(
    session: AsyncSession, tenants: TenantRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 2)
    await tenants.create(new("taken"))
    before = set(await fetch_all(session))
    with pytest.raises(AlreadyExistsError, match="'taken'") as caught:
        await tenants.create_many([new("a"), new("b"), new("c"), new("taken"), new("d")])
    assert [c["index"] for c in caught.value.details["conflicts"]] == [3]
    with pytest.raises(InvalidDataError, match="item 2: environment") as refused:
        await tenants.create_many([new("a"), new("b"), {"name": "c", "environment": "moon"}])
    assert refused.value.details == {"fields": ["environment"], "index": 2}

    def failing() -> Iterator[TenantCreate]:
        yield from (new("a"), new("b"), new("c"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await tenants.create_many(failing())
    with pytest.raises(InvalidDataError, match="on_conflict"):
        await tenants.create_many([new("a")], on_conflict="replace")  # type: ignore[arg-type]
    assert set(await fetch_all(session)) == before
    assert (await tenants.create_many([new("a"), new("b")])).created == 2  # the session goes on


async def test_create_many_cancelled_half_way_has_written_nothing(
    shared_manager: AsyncConnectionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 2)
    reached = asyncio.Event()

    async def source() -> AsyncIterator[TenantCreate]:
        for i in range(5):
            yield new(f"c{i}")
        reached.set()
        await asyncio.sleep(60)

    async def work() -> None:
        async with shared_manager.get_session() as session:
            await TenantRepository(session).create_many(source())

    task = asyncio.create_task(work())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with shared_manager.get_session() as session:
        assert await TenantRepository(session).count() == 1
    assert shared_manager.pool_status().in_use == 0


# --- changing


async def in_status(tenants: TenantRepository, status: TenantStatus, name: str = "acme") -> Tenant:
    return await tenants.create(new(name, status=status))


VERBS: dict[TenantStatus, Callable[[TenantRepository, uuid.UUID], Awaitable[Tenant]]] = {
    TenantStatus.ACTIVE: lambda tenants, key: tenants.activate(key),
    TenantStatus.SUSPENDED: lambda tenants, key: tenants.suspend(key, reason="late payment"),
    TenantStatus.INACTIVE: lambda tenants, key: tenants.deactivate(key),
}


@pytest.mark.parametrize("target", VERBS)
@pytest.mark.parametrize("source", TenantStatus)
async def test_life_cycle(
    session: AsyncSession, tenants: TenantRepository, source: TenantStatus, target: TenantStatus
) -> None:
    made = await in_status(tenants, source)
    before = made.version
    if target in TRANSITIONS[source]:
        with counting(session) as sent:
            changed = await VERBS[target](tenants, made.tenant_id)
        assert len(sent) == 1
        assert changed is made  # the session's own row, brought up to date
        assert (changed.status, changed.version > before) == (target, True)
        assert changed.status_reason == ("late payment" if target is TenantStatus.SUSPENDED else None)
    else:
        with pytest.raises(InvalidTransitionError, match=f"from {source} to {target}") as caught:
            await VERBS[target](tenants, made.tenant_id)
        assert caught.value.details["from"] == source
        assert caught.value.details["to"] == target
        assert ((await fetch_all(session))["acme"].status, made.version) == (source, before)


@on_both
async def test_activation_clears_the_reason(tenants: TenantRepository) -> None:
    made = await in_status(tenants, TenantStatus.ACTIVE)
    assert (await tenants.suspend(made.tenant_id, reason="why")).status_reason == "why"
    assert (await tenants.activate(made.tenant_id)).status_reason is None


@on_both
@pytest.mark.parametrize("reason", ["x" * 1001, "line\nbreak", "\x00", 5])
async def test_a_bad_reason_is_refused(tenants: TenantRepository, reason: Any) -> None:
    made = await in_status(tenants, TenantStatus.ACTIVE)
    with pytest.raises(InvalidDataError, match="the reason"):
        await tenants.suspend(made.tenant_id, reason=reason)
    assert made.status is TenantStatus.ACTIVE


async def test_update_changes_what_is_given_and_nothing_else(session: AsyncSession, tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme", labels={"a": "1"}))
    with counting(session) as sent:
        changed = await tenants.update(made.tenant_id, TenantUpdate(labels={"b": "2"}))
    assert len(sent) == 1
    assert (changed.name, changed.environment, changed.labels) == ("acme", PRODUCTION, {"b": "2"})
    changed = await tenants.update(made.tenant_id, TenantUpdate(name="acme-2", environment=STAGING))
    assert (changed.name, changed.environment, changed.labels) == ("acme-2", STAGING, {"b": "2"})


@on_both
async def test_an_empty_update_writes_nothing_but_checks(tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme"))
    version = made.version
    assert (await tenants.update(made.tenant_id, TenantUpdate(), expected_version=version)).version == version
    with pytest.raises(StaleWriteError):
        await tenants.update(made.tenant_id, TenantUpdate(), expected_version=version + 1)
    with pytest.raises(TenantNotFoundError):
        await tenants.update(uuid7(), TenantUpdate())


@on_both
async def test_an_update_to_the_same_values_is_no_change(tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme"))
    version = made.version
    assert (await tenants.rename(made.tenant_id, "acme")).version == version


@on_both
async def test_a_taken_name_is_refused_and_the_session_goes_on(tenants: TenantRepository) -> None:
    await tenants.create(new("taken"))
    made = await tenants.create(new("acme"))
    with pytest.raises(AlreadyExistsError, match="'taken'"):
        await tenants.rename(made.tenant_id, "taken")
    assert (await tenants.rename(made.tenant_id, "free")).name == "free"


@on_both
@pytest.mark.parametrize("changes", [{"name": None}, {"name": ""}, {"status": "active"}, {"colour": "red"}, [], None])
async def test_a_bad_update_is_refused(tenants: TenantRepository, changes: Any) -> None:
    made = await tenants.create(new("acme"))
    with pytest.raises(InvalidDataError):
        await tenants.update(made.tenant_id, changes)


async def test_every_change_minds_the_expected_version(session: AsyncSession, tenants: TenantRepository) -> None:
    made = await in_status(tenants, TenantStatus.ACTIVE)
    key, old = made.tenant_id, made.version
    current = (await tenants.update(key, TenantUpdate(labels={"moved": "on"}), expected_version=old)).version
    for change in (
        lambda: tenants.update(key, TenantUpdate(labels={}), expected_version=old),
        lambda: tenants.rename(key, "x", expected_version=old),
        lambda: tenants.suspend(key, expected_version=old),
        lambda: tenants.deactivate(key, expected_version=old),
        lambda: tenants.delete(key, expected_version=old),
    ):
        with pytest.raises(StaleWriteError) as caught:
            await change()
        assert caught.value.details == {"expected_version": old, "version": current}
        assert caught.value.retryable
    stored = (await fetch_all(session))["acme"]
    assert (stored.version, stored.status, stored.labels) == (current, TenantStatus.ACTIVE, {"moved": "on"})
    suspended = await tenants.suspend(key, expected_version=current)
    active = await tenants.activate(key, expected_version=suspended.version)
    await tenants.delete(key, expected_version=active.version)


@on_both
@pytest.mark.parametrize("version", [-1, True, "1", 1.0, 2**63])
async def test_what_is_no_version_is_refused(tenants: TenantRepository, version: Any) -> None:
    made = await tenants.create(new("acme"))
    with pytest.raises(InvalidDataError, match="expected_version"):
        await tenants.activate(made.tenant_id, expected_version=version)


@on_both
async def test_changing_nobody_is_not_found(tenants: TenantRepository) -> None:
    for change in (tenants.activate, tenants.suspend, tenants.deactivate, tenants.delete):
        with pytest.raises(TenantNotFoundError):
            await change(uuid7())
    with pytest.raises(TenantNotFoundError):
        await tenants.rename(uuid7(), "x", expected_version=7)


async def test_delete_forgets_a_tenant_without_databases(session: AsyncSession, tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme"))
    with counting(session) as sent:
        await tenants.delete(made.tenant_id)
    assert len(sent) == 1
    assert await tenants.get_or_none(made.tenant_id) is None
    with pytest.raises(TenantNotFoundError):
        await tenants.delete(made.tenant_id)


async def test_delete_refuses_a_tenant_that_owns_a_database(session: AsyncSession, tenants: TenantRepository) -> None:
    made = await tenants.create(new("acme"))
    sealed = SealedConnectionString("ccp1:k1:c2VhbGVk")
    session.add(
        TenantDatabase(tenant_id=made.tenant_id, connection_string_encrypted=sealed, database_name="d", host="h")
    )
    await session.flush()
    with pytest.raises(StillReferencedError, match="owns a database"):
        await tenants.delete(made.tenant_id)
    assert await tenants.exists(made.tenant_id)


async def test_system_admin_is_protected(session: AsyncSession, tenants: TenantRepository) -> None:
    changes: list[Callable[[], Awaitable[object]]] = [
        lambda: tenants.suspend(SYSTEM_ADMIN_ID),
        lambda: tenants.deactivate(SYSTEM_ADMIN_ID),
        lambda: tenants.delete(SYSTEM_ADMIN_ID),
        lambda: tenants.rename(SYSTEM_ADMIN_ID, "root"),
        lambda: tenants.suspend(str(SYSTEM_ADMIN_ID)),  # type: ignore[arg-type]
    ]
    for change in changes:
        with pytest.raises(ProtectedError, match=SYSTEM_ADMIN_NAME):
            await change()
    stored = (await fetch_all(session))[SYSTEM_ADMIN_NAME]
    assert (stored.status, stored.environment) == (TenantStatus.ACTIVE, PRODUCTION)
    assert (await tenants.update(SYSTEM_ADMIN_ID, TenantUpdate(labels={"may": "be labelled"}))).labels


async def test_the_database_keeps_the_same_rules_for_the_orm(shared_manager: AsyncConnectionManager) -> None:
    async with shared_manager.get_session() as session:
        key = (await TenantRepository(session).create(new("acme"))).tenant_id

    async def set_status(key: uuid.UUID, status: TenantStatus) -> None:
        async with shared_manager.get_session() as session:
            row = await session.get(Tenant, key)
            assert row is not None
            row.status = status

    with pytest.raises(InvalidTransitionError, match="from pending to suspended") as caught:
        await set_status(key, TenantStatus.SUSPENDED)
    assert caught.value.details["from"] == "pending"
    with pytest.raises(ProtectedError):
        await set_status(SYSTEM_ADMIN_ID, TenantStatus.INACTIVE)
    await set_status(key, TenantStatus.ACTIVE)


async def test_a_repository_on_a_read_session_reads_and_refuses_to_write(
    shared_manager: AsyncConnectionManager,
) -> None:
    async with shared_manager.get_read_session() as session:
        tenants = TenantRepository(session)
        assert (await tenants.get(SYSTEM_ADMIN_ID)).name == SYSTEM_ADMIN_NAME
        assert len(await tenants.list()) == 1
        for write in (
            lambda: tenants.create(new("acme")),
            lambda: tenants.create_many([new("acme")]),
            lambda: tenants.activate(uuid7()),
            lambda: tenants.delete(uuid7()),
        ):
            with pytest.raises(AccessDeniedError, match="only reads"):
                await write()
        assert await tenants.count() == 1  # refused before anything was sent: the transaction goes on


# --- concurrency


async def test_of_concurrent_transitions_exactly_one_wins(shared_manager: AsyncConnectionManager) -> None:
    async with shared_manager.get_session() as session:
        key = (await TenantRepository(session).create(new("acme", status="active"))).tenant_id

    async def suspend() -> bool:
        try:
            async with shared_manager.get_session() as session:
                await TenantRepository(session).suspend(key)
        except InvalidTransitionError:
            return False
        return True

    assert sorted(await asyncio.gather(*(suspend() for _ in range(8)))) == [False] * 7 + [True]


async def test_of_concurrent_writers_with_one_version_exactly_one_wins(shared_manager: AsyncConnectionManager) -> None:
    async with shared_manager.get_session() as session:
        made = await TenantRepository(session).create(new("acme"))

    async def label(i: int) -> bool:
        try:
            async with shared_manager.get_session() as session:
                changes = TenantUpdate(labels={"writer": str(i)})
                await TenantRepository(session).update(made.tenant_id, changes, expected_version=made.version)
        except StaleWriteError:
            return False
        return True

    assert sum(await asyncio.gather(*(label(i) for i in range(8)))) == 1


async def test_of_concurrent_creators_of_one_name_exactly_one_wins(shared_manager: AsyncConnectionManager) -> None:
    async def create() -> bool:
        try:
            async with shared_manager.get_session() as session:
                await TenantRepository(session).create(new("acme"))
        except AlreadyExistsError:
            return False
        return True

    assert sum(await asyncio.gather(*(create() for _ in range(8)))) == 1


async def test_concurrent_renames_to_one_name_leave_one_winner(shared_manager: AsyncConnectionManager) -> None:
    async with shared_manager.get_session() as session:
        keys = [(await TenantRepository(session).create(new(f"t{i}"))).tenant_id for i in range(6)]

    async def rename(key: uuid.UUID) -> bool:
        try:
            async with shared_manager.get_session() as session:
                await TenantRepository(session).rename(key, "wanted")
        except AlreadyExistsError:
            return False
        return True

    assert sum(await asyncio.gather(*(rename(key) for key in keys))) == 1


@on_both
async def test_refusals_are_ours_and_carry_no_driver_error(tenants: TenantRepository) -> None:
    made = await in_status(tenants, TenantStatus.ACTIVE)
    refusals: list[Callable[[], Awaitable[Tenant]]] = [
        lambda: tenants.activate(made.tenant_id),
        lambda: tenants.create(new("acme")),
        lambda: tenants.get(uuid7()),
    ]
    for refused in refusals:
        with pytest.raises(ControlPlaneError) as caught:
            await refused()
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
