"""`EncryptionKeyRepository` and `EncryptionKeyStore` against real PostgreSQL: what is recorded of keys, and who finds a wrong one."""

import asyncio
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import (
    Key,
    KeyInfo,
    Keyring,
    KeyState,
    KeyWrapper,
    LocalKeyWrapper,
    SealedConnectionString,
    StaticKeys,
    WrappedKeys,
)
from car_control_plane.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ClosedError,
    ConfigurationError,
    ConflictError,
    ConnectionUnavailableError,
    ControlPlaneError,
    DecryptionError,
    InvalidDataError,
    KeyUnavailableError,
    NotFoundError,
    PermissionDeniedError,
    StaleWriteError,
    StillReferencedError,
    UnknownKeyError,
    translate,
)
from car_control_plane.migrations import upgrade
from car_control_plane.models import Tenant, TenantDatabase, TenantEnvironment, uuid7
from car_control_plane.repositories.keys import EncryptionKeyRepository, EncryptionKeyStore, KeyFinding
from tests.fixtures.doors import on_both
from tests.integration.test_tenant_repository import counting

K1, K2, K3 = (Key.generate(f"k{number}") for number in (1, 2, 3))


@pytest.fixture
def keys(where: Any) -> EncryptionKeyRepository:
    return EncryptionKeyRepository(where)


def outer_file(path: Path, *kids: str) -> Path:
    path.write_text("\n".join(f"{kid}:{Key.generate(kid).to_base64()}" for kid in kids), encoding="utf-8")
    path.chmod(0o600)
    return path


@pytest.fixture
def wrapper(tmp_path: Path) -> LocalKeyWrapper:
    return LocalKeyWrapper(outer_file(tmp_path / "outer", "outer-1"))


def keyring(*keys: Key) -> Keyring:
    return Keyring(StaticKeys(",".join(f"{key.kid}:{key.to_base64()}" for key in keys)))


async def seal_rows(session: AsyncSession, *texts: str) -> None:
    """Store a tenant database for each text."""
    for each in texts:
        tenant = Tenant(name=str(uuid7()), environment=TenantEnvironment.STAGING)
        sealed = SealedConnectionString(each)
        session.add(tenant)
        session.add(
            TenantDatabase(tenant_id=tenant.tenant_id, connection_string_encrypted=sealed, database_name="d", host="h")
        )
    await session.flush()


async def states(keys: EncryptionKeyRepository) -> dict[str, str | None]:
    return {row.kid: row.state for row in await keys.list()}


def holds(error: BaseException, *secrets: Key) -> list[str]:
    """Return the frames of an error that show a key in clear."""
    shown = [f"{error!r} {error} {vars(error)}"]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        shown += [repr(value) for value in frame.f_locals.values()]
    return [each for each in shown for key in secrets if key.to_base64() in each]


# --- finding ----------------------------------------------------------------------------------------------------------


async def test_keys_are_listed_by_id_and_found(keys: EncryptionKeyRepository, session: AsyncSession) -> None:
    assert await keys.list() == []
    for key in (K2, K1):
        await keys.confirm(key, "environment")
    assert [row.kid for row in await keys.list()] == ["k1", "k2"]
    row = await keys.get("k1")
    assert (row.provider, row.check_value, row.state, row.kek_ref, row.wrapped) == (
        "environment",
        K1.check_value,
        None,
        None,
        None,
    )
    with counting(session) as sent:
        assert await keys.get("k1") is row
    assert sent == []
    for kid in ("k3", "", "K1"):
        with pytest.raises(NotFoundError) as caught:
            await keys.get(kid)
        assert caught.value.details == {"kid": kid}
    with pytest.raises(InvalidDataError):
        await keys.get("k\x00")


async def test_usage_counts_rows_by_key(keys: EncryptionKeyRepository, session: AsyncSession) -> None:
    assert await keys.usage() == {}
    await seal_rows(session, "ccp1:k1:AAAA", "ccp1:k2:AAAA", "ccp1:k1:BBBB")
    await keys.confirm(K3, "file")
    with counting(session) as sent:
        assert await keys.usage() == {"k1": 2, "k2": 1}
    assert len(sent) == 1


async def test_usage_counts_rows_that_name_no_key_for_themselves(
    keys: EncryptionKeyRepository, session: AsyncSession
) -> None:
    """What somebody has put there past the constraint; not even the part that stands where a key id should is told."""
    await session.exec(
        text("ALTER TABLE control_plane.tenant_databases DROP CONSTRAINT ck_tenant_databases_sealed")  # type: ignore[call-overload]
    )
    plain = "postgresql://user:s3cret@h/d"
    await seal_rows(session, "ccp1:k1:AAAA", plain, "", "ccp1:k1:AA==", "::", "ccp2:k1:AAAA")
    assert await keys.usage() == {"": 4, "k1": 2}
    found = await keys.verify(keyring(K1))
    assert [finding.kid for finding in found] == ["", "k1"]
    assert "user" not in repr(found)


# --- recording --------------------------------------------------------------------------------------------------------


async def test_a_key_is_recorded_once_and_recognised(keys: EncryptionKeyRepository, session: AsyncSession) -> None:
    with counting(session) as sent:
        assert await keys.confirm(K1, "environment") is True
        assert await keys.confirm(K1, "environment") is True
        assert await keys.confirm(K1, "file") is True
    assert len(sent) == 4
    row = await keys.get("k1")
    assert row.provider == "environment"  # where it came from first


@on_both
async def test_another_key_of_the_same_name_is_refused(keys: EncryptionKeyRepository) -> None:
    await keys.confirm(K1, "environment")
    before = (await keys.get("k1")).model_dump()
    impostor = Key.generate("k1")
    with pytest.raises(ConfigurationError, match="'k1' is another one") as caught:
        await keys.confirm(impostor, "environment")
    assert caught.value.details == {"kid": "k1"}
    assert holds(caught.value, impostor, K1) == []
    assert [row.model_dump() for row in await keys.list()] == [before]


@on_both
@pytest.mark.parametrize("name", ["", "n" * 64, "a\nb"])
async def test_a_provider_has_a_name_that_can_be_stored(keys: EncryptionKeyRepository, name: str) -> None:
    with pytest.raises(InvalidDataError, match="provider"):
        await keys.confirm(K1, name)
    assert await keys.list() == []


async def test_of_two_processes_with_different_keys_of_a_name_one_hears_of_it(manager: AsyncConnectionManager) -> None:
    impostor = Key.generate("k1")

    async def start(key: Key) -> bool:
        async with manager.get_session() as session:
            return await EncryptionKeyRepository(session).confirm(key, "environment")

    outcomes = await asyncio.gather(*(start(key) for key in (K1, impostor, K1, impostor)), return_exceptions=True)
    assert outcomes.count(True) == 2
    assert [type(outcome) for outcome in outcomes if outcome is not True] == [ConfigurationError, ConfigurationError]


async def test_two_processes_with_the_same_new_key_agree(manager: AsyncConnectionManager) -> None:
    """The second one waits for the first one's insert, and finds it."""
    async with manager.get_session() as first:
        await EncryptionKeyRepository(first).confirm(K1, "environment")

        async def later() -> bool:
            async with manager.get_session() as second:
                return await EncryptionKeyRepository(second).confirm(K1, "environment")

        task = asyncio.create_task(later())
        async with manager.get_session() as watcher:
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            while not await watcher.scalar(waiting):  # noqa: ASYNC110 -- the other side is a server
                await asyncio.sleep(0.01)
        await first.commit()
    assert await task is True


async def test_a_read_session_records_nothing(manager: AsyncConnectionManager) -> None:
    async with manager.get_session() as session:
        await EncryptionKeyRepository(session).confirm(K1, "environment")
    async with manager.get_read_session() as reading:
        assert await EncryptionKeyRepository(reading).confirm(K1, "environment") is True
        assert await EncryptionKeyRepository(reading).verify(keyring(K1)) == []
        with pytest.raises(AccessDeniedError):
            await EncryptionKeyRepository(reading).confirm(K2, "environment")


async def test_a_role_that_may_not_record_is_told_which_grant_it_lacks(
    manager: AsyncConnectionManager, own_database: str
) -> None:
    role = f"car_cp_role_{uuid7().hex[-8:]}"
    connection = await manager.connect()
    await connection.execute(
        f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA control_plane TO {role};"
        f" GRANT SELECT ON control_plane.encryption_keys TO {role}"
    )
    try:
        separator = "&" if "?" in own_database else "?"
        async with AsyncConnectionManager(f"{own_database}{separator}role={role}") as weak:
            with pytest.raises(PermissionDeniedError, match=r"GRANT SELECT, INSERT ON control_plane\.encryption_keys"):
                async with weak.get_session() as session:
                    await EncryptionKeyRepository(session).confirm(K1, "environment")
            await connection.execute(f"REVOKE SELECT ON control_plane.encryption_keys FROM {role}")
            with pytest.raises(PermissionDeniedError, match=r"GRANT SELECT ON control_plane\.encryption_keys"):
                await EncryptionKeyStore(weak).load()
    finally:
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await connection.close()


# --- verifying --------------------------------------------------------------------------------------------------------


async def test_all_is_well(keys: EncryptionKeyRepository, session: AsyncSession) -> None:
    for key in (K1, K2):
        await keys.confirm(key, "environment")
    await seal_rows(session, "ccp1:k1:AAAA", "ccp1:k2:AAAA", "ccp1:k2:BBBB")
    with counting(session) as sent:
        assert await keys.verify(keyring(K1, K2)) == []
    assert len(sent) == 2


class HalfBroken(StaticKeys):
    """A provider that lists a key it cannot give, and one that is destroyed."""

    async def list(self) -> Sequence[KeyInfo]:
        return [*await super().list(), KeyInfo("lost", KeyState.RETIRED), KeyInfo("gone", KeyState.DESTROYED)]


async def test_one_keys_trouble_does_not_hide_anothers(keys: EncryptionKeyRepository, session: AsyncSession) -> None:
    await keys.confirm(K1, "environment")
    await keys.confirm(Key.generate("k2"), "environment")
    await keys.confirm(Key.generate("lost"), "environment")
    await seal_rows(session, "ccp1:k1:AAAA", "ccp1:elsewhere:AAAA", "ccp1:gone:AAAA", "ccp1:k3:AAAA")
    new = Key.generate("new")  # has sealed nothing, so it need not be on record
    ring = Keyring(HalfBroken(",".join(f"{key.kid}:{key.to_base64()}" for key in (K1, K2, K3, new))))
    found = await keys.verify(ring)
    assert all(isinstance(finding, KeyFinding) for finding in found)
    assert {finding.kid: finding.problem.split()[:3] for finding in found} == {
        "elsewhere": ["has", "sealed", "rows,"],
        "gone": ["has", "sealed", "rows,"],
        "k2": ["is", "another", "key"],
        "k3": ["has", "sealed", "rows,"],
        "lost": ["cannot", "be", "opened:"],
    }
    assert [finding.kid for finding in found] == sorted(finding.kid for finding in found)


@on_both
async def test_a_key_source_that_does_not_answer_ends_it(keys: EncryptionKeyRepository) -> None:
    class Down(StaticKeys):
        async def list(self) -> Sequence[KeyInfo]:
            raise KeyUnavailableError("down")

    with pytest.raises(KeyUnavailableError, match="down"):
        await keys.verify(Keyring(Down(f"k1:{K1.to_base64()}")))


# --- keys that are kept here ------------------------------------------------------------------------------------------


@on_both
async def test_a_wrapped_key_is_kept_and_opened_again(keys: EncryptionKeyRepository, wrapper: LocalKeyWrapper) -> None:
    row = await keys.create(K1, wrapper)
    assert (row.kid, row.provider, row.kek_ref, row.state) == ("k1", "local", "outer-1", "pending")
    assert row.check_value == K1.check_value
    assert row.wrapped is not None
    assert K1.to_base64() not in row.wrapped
    assert await wrapper.unwrap("k1", row.wrapped, "outer-1") == K1
    await keys.create(K2, wrapper, state=KeyState.CURRENT)
    await keys.create(K3, wrapper, state="retired")
    assert await states(keys) == {"k1": "pending", "k2": "current", "k3": "retired"}


async def test_a_key_that_was_kept_outside_is_taken_in(
    keys: EncryptionKeyRepository, session: AsyncSession, wrapper: LocalKeyWrapper
) -> None:
    """How a platform moves from the environment to an outer key, with rows that are sealed already."""
    await keys.confirm(K1, "environment")
    await seal_rows(session, "ccp1:k1:AAAA")
    row = await keys.create(K1, wrapper, state="current")
    assert (row.provider, row.state) == ("local", "current")
    assert [each.kid for each in await keys.list()] == ["k1"]


@on_both
async def test_a_key_is_kept_once(keys: EncryptionKeyRepository, wrapper: LocalKeyWrapper) -> None:
    await keys.create(K1, wrapper)
    await keys.confirm(K2, "environment")
    before = [row.model_dump() | {"wrapped": row.wrapped} for row in await keys.list()]
    with pytest.raises(AlreadyExistsError, match="the key of the id 'k1' is kept here already"):
        await keys.create(K1, wrapper)
    for kid in ("k1", "k2"):
        with pytest.raises(AlreadyExistsError, match=f"another key of the id '{kid}' is on record already") as caught:
            await keys.create(Key.generate(kid), wrapper)
        assert caught.value.details == {"kid": kid}
    assert [row.model_dump() | {"wrapped": row.wrapped} for row in await keys.list()] == before


@on_both
async def test_a_second_current_key_is_refused(keys: EncryptionKeyRepository, wrapper: LocalKeyWrapper) -> None:
    await keys.create(K1, wrapper, state="current")
    with pytest.raises(ConflictError, match="another encryption key is current"):
        await keys.create(K2, wrapper, state="current")
    assert await states(keys) == {"k1": "current"}


@on_both
@pytest.mark.parametrize("state", ["destroyed", "lost", "", None])
async def test_a_new_key_has_a_state_of_a_new_key(
    keys: EncryptionKeyRepository, wrapper: LocalKeyWrapper, state: str
) -> None:
    with pytest.raises(InvalidDataError, match="pending, current or retired"):
        await keys.create(K1, wrapper, state=state)
    assert await keys.list() == []


class Forgetful(LocalKeyWrapper):
    """An outer key that gives back another key than it was given."""

    async def unwrap(self, kid: str, wrapped: str, kek_ref: str) -> Key:
        await super().unwrap(kid, wrapped, kek_ref)
        return Key.generate(kid)


@on_both
async def test_a_key_that_does_not_come_back_is_not_kept(
    keys: EncryptionKeyRepository, wrapper: LocalKeyWrapper, tmp_path: Path
) -> None:
    forgetful = Forgetful(tmp_path / "outer")
    with pytest.raises(DecryptionError, match="does not give back the key 'k1'") as caught:
        await keys.create(K1, forgetful)
    assert holds(caught.value, K1) == []
    assert await keys.list() == []
    await keys.create(K1, wrapper)
    before = (await keys.get("k1")).wrapped
    with pytest.raises(DecryptionError):
        await keys.rewrap(forgetful)
    assert (await keys.get("k1")).wrapped == before


# --- promoting --------------------------------------------------------------------------------------------------------


async def test_promoting_retires_the_former_key_in_one_statement(
    keys: EncryptionKeyRepository, session: AsyncSession, wrapper: LocalKeyWrapper
) -> None:
    await keys.create(K1, wrapper)
    assert (await keys.promote("k1")).state == "current"
    await keys.create(K2, wrapper)
    first = await keys.get("k1")
    with counting(session) as sent:
        second = await keys.promote("k2")
    assert [statement.split()[0] for statement in sent] == ["WITH", "SELECT"]
    assert (first.state, second.state) == ("retired", "current")  # what the session held is up to date
    assert second.version > first.version
    assert (await keys.promote("k1")).state == "current"  # and back
    assert await states(keys) == {"k1": "current", "k2": "retired"}


@on_both
async def test_promoting_the_current_key_changes_nothing(
    keys: EncryptionKeyRepository, wrapper: LocalKeyWrapper
) -> None:
    await keys.create(K1, wrapper, state="current")
    before = (await keys.get("k1")).model_dump()
    assert (await keys.promote("k1")).model_dump() == before


@on_both
async def test_what_cannot_become_current_leaves_the_current_key_alone(
    keys: EncryptionKeyRepository, wrapper: LocalKeyWrapper
) -> None:
    await keys.create(K1, wrapper, state="current")
    await keys.create(K2, wrapper)
    await keys.destroy("k2")
    await keys.confirm(K3, "environment")
    for kid, error, said in (
        ("k2", ConflictError, "it is destroyed"),
        ("k3", ConflictError, r"kept outside of the database \(environment\)"),
        ("k9", NotFoundError, "no encryption key 'k9'"),
    ):
        with pytest.raises(error, match=said):
            await keys.promote(kid)
    assert await states(keys) == {"k1": "current", "k2": "destroyed", "k3": None}


async def test_of_two_promotions_at_once_one_wins(manager: AsyncConnectionManager, wrapper: LocalKeyWrapper) -> None:
    async with manager.get_session() as session:
        keys = EncryptionKeyRepository(session)
        await keys.create(K1, wrapper, state="current")
        await keys.create(K2, wrapper)
        await keys.create(K3, wrapper)

    async def promote(kid: str) -> str:
        async with manager.get_session() as session:
            return (await EncryptionKeyRepository(session).promote(kid)).kid

    for _ in range(5):
        outcomes = await asyncio.gather(promote("k2"), promote("k3"), promote("k1"), return_exceptions=True)
        assert all(isinstance(outcome, str | ConflictError) for outcome in outcomes), outcomes
        assert any(isinstance(outcome, str) for outcome in outcomes)
        async with manager.get_session() as session:
            assert list((await states(EncryptionKeyRepository(session))).values()).count("current") == 1


# --- destroying -------------------------------------------------------------------------------------------------------


async def test_a_destroyed_key_leaves_its_record(
    keys: EncryptionKeyRepository, session: AsyncSession, wrapper: LocalKeyWrapper
) -> None:
    for key, state in ((K1, "pending"), (K2, "retired")):
        await keys.create(key, wrapper, state=state)
        row = await keys.destroy(key.kid)
        assert (row.state, row.wrapped, row.check_value) == ("destroyed", None, key.check_value)
        assert (await keys.destroy(key.kid)).version == row.version  # twice is once
    with pytest.raises(IntegrityError) as caught:
        await seal_rows(session, "ccp1:k1:AAAA")
    error = translate(caught.value)
    assert isinstance(error, UnknownKeyError)
    assert "destroyed" in error.message


async def test_a_key_in_use_is_not_destroyed(
    keys: EncryptionKeyRepository, session: AsyncSession, wrapper: LocalKeyWrapper
) -> None:
    await keys.create(K1, wrapper, state="retired")
    await keys.create(K2, wrapper, state="current")
    await seal_rows(session, "ccp1:k1:AAAA", "ccp1:k1:BBBB")
    with pytest.raises(StillReferencedError, match="'k1' is not destroyed: 2 tenant databases are sealed") as caught:
        await keys.destroy("k1")
    assert caught.value.details == {"kid": "k1", "rows": 2}
    with pytest.raises(StillReferencedError, match="it is current"):
        await keys.destroy("k2")
    await keys.confirm(K3, "file")
    with pytest.raises(ConflictError, match=r"kept outside of the database \(file\)"):
        await keys.destroy("k3")
    with pytest.raises(NotFoundError):
        await keys.destroy("k9")
    assert await states(keys) == {"k1": "retired", "k2": "current", "k3": None}  # and the session goes on


# --- changing the outer key -------------------------------------------------------------------------------------------


@on_both
async def test_rewrapping_changes_the_outer_key_and_nothing_else(keys: EncryptionKeyRepository, tmp_path: Path) -> None:
    path = outer_file(tmp_path / "outer", "outer-1")
    wrapper = LocalKeyWrapper(path)
    for key, state in ((K1, "retired"), (K2, "current"), (K3, "pending")):
        await keys.create(key, wrapper, state=state)
    await keys.destroy("k3")
    await keys.confirm(Key.generate("k4"), "environment")
    before = {row.kid: row.model_dump() for row in await keys.list()}

    former = path.read_text(encoding="utf-8")
    successor = outer_file(path, "outer-2").read_text(encoding="utf-8")
    path.write_text(f"{successor}\n{former}", encoding="utf-8")
    assert await keys.rewrap(wrapper) == 2
    path.write_text(successor, encoding="utf-8")  # the former outer key is needed no more

    rows = {row.kid: row for row in await keys.list()}
    for kid, row in rows.items():
        changed = {"updated_at", "version", "kek_ref"} if kid in {"k1", "k2"} else set()
        assert {name for name, value in row.model_dump().items() if before[kid][name] != value} == changed
    for key in (K1, K2):
        row = rows[key.kid]
        assert row.kek_ref == "outer-2"
        assert await wrapper.unwrap(key.kid, row.wrapped or "", "outer-2") == key


@on_both
async def test_rewrapping_is_all_or_nothing(keys: EncryptionKeyRepository, tmp_path: Path) -> None:
    first = outer_file(tmp_path / "outer", "outer-1")
    both = outer_file(tmp_path / "both", "outer-2")
    both.write_text(f"{both.read_text()}\n{first.read_text()}", encoding="utf-8")
    wrapper = LocalKeyWrapper(first)
    await keys.create(K1, wrapper)
    await keys.create(K2, LocalKeyWrapper(both))
    before = {row.kid: row.wrapped for row in await keys.list()}
    with pytest.raises(UnknownKeyError, match="outer-2"):
        await keys.rewrap(wrapper)
    assert {row.kid: row.wrapped for row in await keys.list()} == before


@on_both
@pytest.mark.parametrize("kid", ["outer-1", "outer-2"])
async def test_a_wrong_outer_key_adds_no_key(keys: EncryptionKeyRepository, tmp_path: Path, kid: str) -> None:
    """Of the right name or of another: what it wraps nobody else could open."""
    await keys.create(K1, LocalKeyWrapper(outer_file(tmp_path / "outer", "outer-1")), state="current")
    wrong = LocalKeyWrapper(outer_file(tmp_path / "wrong", kid))
    with pytest.raises(ConfigurationError, match="does not open the key 'k1', which is here already"):
        await keys.create(K2, wrong)
    assert [row.kid for row in await keys.list()] == ["k1"]


@on_both
async def test_a_key_that_cannot_be_opened_is_not_promoted(keys: EncryptionKeyRepository, tmp_path: Path) -> None:
    wrapper = LocalKeyWrapper(outer_file(tmp_path / "outer", "outer-1"))
    await keys.create(K1, wrapper, state="current")
    await keys.create(K2, wrapper)
    with pytest.raises(UnknownKeyError, match="'k2'"):
        await keys.promote("k2", keyring=keyring(K1))
    assert str((await keys.get("k1")).state) == "current"
    assert str((await keys.promote("k2", keyring=keyring(K1, K2))).state) == "current"


@on_both
async def test_another_wrapper_takes_over(keys: EncryptionKeyRepository, tmp_path: Path) -> None:
    class Elsewhere(LocalKeyWrapper):
        name = "elsewhere"

    former = LocalKeyWrapper(outer_file(tmp_path / "outer", "outer-1"))
    successor = Elsewhere(outer_file(tmp_path / "other", "outer-2"))
    await keys.create(K1, former)
    with pytest.raises(ConfigurationError, match="'k1' is wrapped by 'local', not by 'elsewhere'"):
        await keys.rewrap(successor)
    assert await keys.rewrap(successor, former=former) == 1
    row = await keys.get("k1")
    assert (row.provider, row.kek_ref) == ("elsewhere", "outer-2")
    assert await successor.unwrap("k1", row.wrapped or "", "outer-2") == K1
    assert await keys.rewrap(successor, former=former) == 1  # once more does no harm


async def test_a_row_that_holds_another_key_is_not_rewrapped(
    keys: EncryptionKeyRepository, session: AsyncSession, wrapper: LocalKeyWrapper
) -> None:
    await keys.create(K1, wrapper)
    wrapped, _ = await wrapper.wrap(Key.generate("k1"))
    await session.exec(
        text("UPDATE control_plane.encryption_keys SET wrapped = :wrapped").bindparams(wrapped=wrapped)  # type: ignore[call-overload]
    )
    session.expunge_all()
    with pytest.raises(DecryptionError, match="under the id 'k1' another key is kept"):
        await keys.rewrap(wrapper)


async def test_rewrapping_gives_way_to_another_change(
    manager: AsyncConnectionManager, wrapper: LocalKeyWrapper, tmp_path: Path
) -> None:
    async with manager.get_session() as session:
        await EncryptionKeyRepository(session).create(K1, wrapper)

    class Slow(LocalKeyWrapper):
        """While it wraps, somebody else promotes the key."""

        async def wrap(self, key: Key) -> tuple[str, str]:
            async with manager.get_session() as session:
                await EncryptionKeyRepository(session).promote("k1")
            return await super().wrap(key)

    with pytest.raises(StaleWriteError, match="'k1' has changed meanwhile"):
        async with manager.get_session() as session:
            await EncryptionKeyRepository(session).rewrap(Slow(tmp_path / "outer"))
    async with manager.get_session() as session:
        row = await EncryptionKeyRepository(session).get("k1")
        assert row.state == "current"
        assert await wrapper.unwrap("k1", row.wrapped or "", "outer-1") == K1


# --- the store --------------------------------------------------------------------------------------------------------


async def test_a_keyring_opens_what_is_kept_here(manager: AsyncConnectionManager, wrapper: LocalKeyWrapper) -> None:
    ids = {"tenant_id": uuid7(), "database_id": uuid7()}
    async with manager.get_session() as session:
        keys = EncryptionKeyRepository(session)
        await keys.create(K1, wrapper, state="current")
        await keys.create(K2, wrapper, state="retired")
        await keys.create(K3, wrapper)
        await keys.destroy("k3")
        await keys.confirm(Key.generate("k4"), "environment")
    store = EncryptionKeyStore(manager)
    assert [(row.kid, row.state, row.wrapper, row.wrapped is None) for row in await store.load()] == [
        ("k1", KeyState.CURRENT, "local", False),
        ("k2", KeyState.RETIRED, "local", False),
        ("k3", KeyState.DESTROYED, "local", True),
    ]
    async with Keyring(WrappedKeys(wrapper, store)) as ring:
        sealed = await ring.seal("postgresql://u:p@h/d", **ids)
        assert sealed.kid == "k1"
        assert (await ring.unseal(sealed, **ids)).reveal() == "postgresql://u:p@h/d"
        async with manager.get_read_session() as reading:
            found = await EncryptionKeyRepository(reading).verify(ring)
        assert found == []


async def test_the_store_does_not_wait_for_the_pool(own_database: str, wrapper: KeyWrapper) -> None:
    """Whoever holds the last session of the pool, and needs a key in it, would wait for himself."""
    async with AsyncConnectionManager(own_database, pool_size=1, max_overflow=0, pool_timeout_seconds=0.1) as manager:
        async with manager.get_session() as session:
            await EncryptionKeyRepository(session).create(K1, wrapper, state="current")
        async with manager.get_session() as session:
            await session.scalar(text("SELECT 1"))
            assert (await Keyring(WrappedKeys(wrapper, EncryptionKeyStore(manager))).current()) == K1


async def test_the_store_leaves_no_connection_behind(manager: AsyncConnectionManager) -> None:
    connection = await manager.connect()
    clients = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
    )
    for _ in range(3):
        await EncryptionKeyStore(manager).load()
    while await connection.fetchval(clients) > 1:  # noqa: ASYNC110 -- a server's process takes a moment to end
        await asyncio.sleep(0.01)
    await connection.close()


async def test_what_keeps_the_store_from_reading_is_one_of_ours(empty_database: str) -> None:
    async with AsyncConnectionManager(empty_database) as manager:
        with pytest.raises(ControlPlaneError) as caught:
            await EncryptionKeyStore(manager).load()
        assert caught.value.code in {"schema-missing", "schema-outdated"}
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        await upgrade(manager, "002_seed_data")
        with pytest.raises(ControlPlaneError):
            await EncryptionKeyStore(manager).load()
    with pytest.raises(ClosedError):
        await EncryptionKeyStore(manager).load()
    async with AsyncConnectionManager("postgresql://nobody@127.0.0.1:1/x") as nowhere:
        with pytest.raises(ConnectionUnavailableError):
            await EncryptionKeyStore(nowhere).load()
