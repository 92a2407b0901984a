"""Encryption keys as the database knows them: which there are, what tells a wrong one, and the keys that are kept here, wrapped.

A `Keyring` has keys and opens values; this module has the record of them. It never sees a key in clear but the one it is handed to record or to
wrap, and keeps none. `EncryptionKeyStore` is the way back: what a `Keyring` with an outer key reads its wrapped keys from.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from sqlalchemy import bindparam, func, literal_column, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col, select

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption.values import KID, KeyState
from car_control_plane.errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConflictError,
    ControlPlaneError,
    DecryptionError,
    InvalidDataError,
    NotFoundError,
    PermissionDeniedError,
    StaleWriteError,
    StillReferencedError,
    UnknownKeyError,
    translate,
)
from car_control_plane.execution import grants_for
from car_control_plane.models import EncryptionKey, TenantDatabase
from car_control_plane.repositories.base import Repository, normal_text, validated

if TYPE_CHECKING:
    import builtins

    from car_control_plane.encryption.envelope import Key
    from car_control_plane.encryption.keyring import Keyring
    from car_control_plane.encryption.wrapping import KeyWrapper, WrappedKey

PENDING, CURRENT, RETIRED, DESTROYED = KeyState

_FORM: Final = re.compile(KID)


@dataclass(frozen=True, slots=True)
class KeyFinding:
    """Something that is wrong with one key.

    Attributes:
        kid: Its id; empty for rows that name no key because they hold something else than a sealed connection string.
        problem: What is wrong, in words that follow "the key …".
    """

    kid: str
    problem: str


class EncryptionKeyRepository(Repository):
    """The record of encryption keys.

    Refused changes write nothing and leave the session usable. Whoever changes states needs UPDATE on the table; at work SELECT and INSERT do.
    """

    # --- finding ------------------------------------------------------------------------------------------------------

    async def list(self) -> "builtins.list[EncryptionKey]":
        """Return every key on record, by id."""
        return await self._executor.all(select(EncryptionKey).order_by(col(EncryptionKey.kid)))

    async def get(self, kid: str) -> EncryptionKey:
        """Return one key; no round trip when the session holds it already.

        Raises:
            NotFoundError: There is none of this id on record.
        """
        row = await self._executor.get(EncryptionKey, col(EncryptionKey.kid), normal_text(kid, "the key id"))
        if row is None:
            error = _not_found(kid)
            raise error
        return row

    async def get_many(self, kids: Iterable[str]) -> dict[str, EncryptionKey]:
        """Return the keys with these ids by id; ids that are not on record are left out. One query however many.

        Raises:
            InvalidDataError: One of them is no text, or has control characters.
        """
        return await self._many(EncryptionKey, "kid", {normal_text(kid, "the key id") for kid in kids})

    async def usage(self) -> dict[str, int]:
        """Count the rows of `tenant_databases` by the key that sealed them; those that name no key, damaged as they are, under "".

        Reads the whole table, about a second for a million rows.
        """
        # No regular expression: matching one takes ten times as long as everything else.
        is_sealed = func.starts_with(col(TenantDatabase.connection_string_encrypted), literal_column("'ccp1:'"))
        counts: dict[str, int] = {}
        for kid, sealed, count in await self._executor.rows(
            select(_kid, is_sealed, func.count()).group_by(_kid, is_sealed)
        ):
            named = kid if sealed and _FORM.fullmatch(kid) else ""
            counts[named] = counts.get(named, 0) + count
        return dict(sorted(counts.items()))

    # --- recording and comparing --------------------------------------------------------------------------------------

    async def confirm(self, key: "Key", provider_name: str) -> bool:
        """Compare a key with the check value on record, and put it on record when there is none; True unless it raises.

        One round trip for a key that is on record, two for a new one. To be called before anything is sealed with the key: so two processes that
        were given different keys of the same name find out before the second one seals.

        Args:
            key: The key.
            provider_name: Where it comes from: `KeyProvider.name`.

        Raises:
            ConfigurationError: Another key of this id is on record; `details["kid"]` names it. Nothing was written.
            InvalidDataError: The provider's name is empty, longer than 63 characters, or has control characters.
        """
        recorded = await self._check_value(key.kid)
        if recorded is None:
            new = _record(key, provider=provider_name)
            recorded = await self._executor.one_or_none(
                insert(EncryptionKey).values(**new).on_conflict_do_nothing().returning(col(EncryptionKey.check_value))
            )
        if recorded is None:  # somebody else has put it on record meanwhile
            recorded = await self._check_value(key.kid)
        if recorded != key.check_value:
            raise ConfigurationError(
                f"the key {key.kid!r} is another one than the key of this id that the database knows",
                hint="Give this process the right key, or a new key a name of its own.",
                details={"kid": key.kid},
            )
        return True

    async def verify(self, keyring: "Keyring") -> "builtins.list[KeyFinding]":
        """Compare every key of a keyring with the record, and the rows with both; return what is wrong, by key. Empty is well.

        To be called when a program starts, so that a wrong key shows then and not at the first opening. Found are a key that cannot be opened, or
        is another one than the key on record; one that rows need but the keyring lacks, or that has no record. Each is looked at for itself. Three queries and one call of the provider for each key that is not open yet; fast however many rows
        there are, for the ids in use are read from an index.

        Raises:
            KeyUnavailableError: The provider cannot say which keys there are.
            ClosedError: The keyring was closed.
        """
        recorded = dict(await self._executor.rows(select(EncryptionKey.kid, EncryptionKey.check_value)))
        kids = {info.kid for info in await keyring.list() if str(info.state) != DESTROYED}
        used = await self._kids_in_use()
        problems = {kid: await _problem(keyring, kid, recorded.get(kid), used=kid in used) for kid in sorted(kids)}
        for kid in used:
            if kid is None:
                problems[""] = "is not named: rows hold something else than a sealed connection string"
            elif kid not in kids:
                problems[kid] = f"has sealed rows, but {keyring.provider.name} does not have it"
        return [KeyFinding(kid, problem) for kid, problem in sorted(problems.items()) if problem]

    async def _check_value(self, kid: str) -> str | None:
        value: str | None = await self._executor.one_or_none(_CHECK_VALUE, {"key": kid})
        return value

    async def _kids_in_use(self) -> set[str | None]:
        """Return the ids rows name, None among them when one names none: from key to key along the index, not row by row."""
        first = select(_kid).order_by(_kid).limit(1).subquery("first")
        kids = select(first.c.kid).cte("kids", recursive=True)
        following = select(_kid).where(kids.c.kid < _kid).order_by(_kid).limit(1).scalar_subquery()
        kids = kids.union_all(select(following).where(kids.c.kid.is_not(None)))
        found = await self._executor.all(select(kids.c.kid).where(kids.c.kid.is_not(None)))
        return {kid if _FORM.fullmatch(kid) else None for kid in found}

    # --- keys that are kept here --------------------------------------------------------------------------------------

    async def create(self, key: "Key", wrapper: "KeyWrapper", *, state: KeyState | str = PENDING) -> EncryptionKey:
        """Keep a key here, wrapped, and return its row.

        A key that was kept outside so far, and is on record, is taken in: so a platform can move its keys under an outer one. What was wrapped is
        opened once and compared before it is stored; and so is one of the keys that are here already, for a process with a wrong outer key of the
        right name would add one that nobody else can open.

        Args:
            key: The key.
            wrapper: The outer key.
            state: `pending`, `current` or `retired`.

        Raises:
            AlreadyExistsError: A key of this id is kept here already, or another one of this id is on record.
            ConflictError: It would be `current`, and another one is.
            InvalidDataError: There is no such state, or not for a new key.
            EncryptionError: The outer key does not wrap it, or does not open what it has wrapped.
            ConfigurationError: It is not the outer key of the keys that are here.
        """
        if state not in {PENDING, CURRENT, RETIRED}:
            raise InvalidDataError("a new key is pending, current or retired")
        await self._check_outer(wrapper)
        new = _record(key, **await _wrapped(wrapper, key), state=KeyState(state))
        statement = insert(EncryptionKey).values(**new)
        statement = statement.on_conflict_do_update(
            index_elements=[col(EncryptionKey.kid)],
            set_={column: statement.excluded[column] for column in ("provider", "kek_ref", "wrapped", "state")},
            where=col(EncryptionKey.state).is_(None) & (col(EncryptionKey.check_value) == key.check_value),
        )
        async with self._executor.atomic() as executor:
            row: EncryptionKey | None = await executor.one_or_none(statement.returning(EncryptionKey))
        if row is None:
            other = await self._check_value(key.kid) != key.check_value
            raise AlreadyExistsError(
                f"{'another' if other else 'the'} key of the id {key.kid!r} is {'on record' if other else 'kept here'} already",
                hint="Give the new key a name of its own." if other else "",
                details={"kid": key.kid},
            )
        return row

    async def _check_outer(self, wrapper: "KeyWrapper") -> None:
        """Open one of the keys this kind of wrapper keeps here, the current one if it is among them."""
        theirs = select(EncryptionKey).where(
            EncryptionKey.provider == wrapper.name, col(EncryptionKey.state).in_([PENDING, CURRENT, RETIRED])
        )
        row: EncryptionKey | None = await self._executor.one_or_none(
            theirs.order_by(col(EncryptionKey.state) == RETIRED, col(EncryptionKey.state) == PENDING).limit(1)
        )
        if row is None:
            return
        refused = False
        try:
            await _unwrapped({wrapper.name: wrapper}, row)
        except (DecryptionError, UnknownKeyError):
            refused = True
        if refused:
            raise ConfigurationError(
                f"the outer key of this process does not open the key {row.kid!r}, which is here already; nothing was written",
                hint="Give this process the outer key that wraps the others. To change it: car-cp key rewrap.",
                details={"kid": row.kid},
            )

    async def promote(self, kid: str, *, keyring: "Keyring | None" = None) -> EncryptionKey:
        """Make a pending or retired key the current one, and retire the one that was; return it. A key that is current stays so.

        One statement: there is no moment without a current key. Processes learn of it within `encryption_cache_seconds`.

        Args:
            kid: Which key.
            keyring: Opens the key first: what cannot be opened must not become current.

        Raises:
            EncryptionError: The keyring cannot open it.
            NotFoundError: There is none of this id on record.
            ConflictError: It was destroyed, is kept outside of the database, or somebody else promotes another one now.
        """
        wanted = normal_text(kid, "the key id")
        if keyring is not None and (await self.get(wanted)).state in {PENDING, RETIRED}:
            await keyring.get(wanted)
        target = (
            select(EncryptionKey.kid)
            .where(EncryptionKey.kid == wanted, col(EncryptionKey.state).in_([PENDING, RETIRED]))
            .with_for_update()
            .cte("target")
        )
        former = (
            update(EncryptionKey)
            .where(col(EncryptionKey.state) == CURRENT, select(target.c.kid).exists())
            .values(state=RETIRED)
            .returning(col(EncryptionKey.kid))
            .cte("former")
        )
        promoted = (
            update(EncryptionKey)
            .where(
                col(EncryptionKey.kid).in_(select(target.c.kid)),
                # Counting them makes PostgreSQL retire first: two current ones it refuses, be it for a moment.
                select(func.count()).select_from(former).scalar_subquery() >= 0,
            )
            .values(state=CURRENT)
            .returning(EncryptionKey)
        )
        async with self._executor.atomic() as executor:
            row: EncryptionKey | None = await executor.one_or_none(promoted)
        # The session may hold the former one, and for a refusal the row as it is now.
        rows: dict[str, EncryptionKey] = {each.kid: each for each in await self._executor.all(_ALL_AFRESH)}
        if row is None and (wanted not in rows or rows[wanted].state != CURRENT):
            error = _unchangeable(rows.get(wanted), wanted, "become current")
            raise error
        return rows[wanted]

    async def destroy(self, kid: str) -> EncryptionKey:
        """Forget the wrapped bytes of a pending or retired key for ever and return its row, which stays, so that nobody takes its id again.

        Writing of `tenant_databases` waits until the transaction ends, so end it soon. Backups of the database may still hold the wrapped key:
        it is gone for good when the outer key is.

        Raises:
            NotFoundError: There is none of this id on record.
            StillReferencedError: Rows are sealed with it (`details["rows"]` says how many), or it is current.
            ConflictError: It is kept outside of the database; or the transaction is not READ COMMITTED, and cannot see who uses the key.
        """
        wanted = normal_text(kid, "the key id")
        statement = (
            update(EncryptionKey)
            .where(col(EncryptionKey.kid) == wanted, col(EncryptionKey.state).in_([PENDING, RETIRED]))
            .values(state=DESTROYED, wrapped=None)
            .returning(EncryptionKey)
        )
        row: EncryptionKey | None = None
        used = False
        try:
            async with self._executor.atomic() as executor:
                row = await executor.one_or_none(statement)
        except StillReferencedError:
            used = True
        if used:
            raise await self._in_use(wanted)
        if row is None:
            row = next((each for each in await self._executor.all(_ALL_AFRESH) if each.kid == wanted), None)
        if row is None or row.state != DESTROYED:
            error = _unchangeable(row, wanted, "be destroyed")
            raise error
        return row

    async def _in_use(self, kid: str) -> StillReferencedError:
        rows = int(
            await self._executor.one_or_none(select(func.count()).select_from(TenantDatabase).where(_kid == kid))
        )
        return StillReferencedError(
            f"the key {kid!r} is not destroyed: {rows} tenant databases are sealed with it",
            hint="Rotate first: car-cp key rotate.",
            details={"kid": kid, "rows": rows},
        )

    async def rewrap(self, wrapper: "KeyWrapper", *, former: "KeyWrapper | None" = None) -> int:
        """Wrap every key that is kept here anew, all or none, and return how many: after the outer key was changed.

        The rows of tenants stay as they are. Each key is opened, compared with its check value, wrapped, and opened again before anything is
        written. A second run does no harm.

        Args:
            wrapper: What wraps from now on; opens what it has wrapped before.
            former: What opens the keys of another wrapper, when it is the wrapper that changes.

        Raises:
            ConfigurationError: Neither of the two opens what a third one has wrapped.
            EncryptionError: A key cannot be opened or wrapped.
            StaleWriteError: Somebody else has changed a key meanwhile.
        """
        openers = {each.name: each for each in (former, wrapper) if each is not None}
        rows: builtins.list[EncryptionKey] = await self._executor.all(
            select(EncryptionKey).where(col(EncryptionKey.wrapped).is_not(None)).order_by(col(EncryptionKey.kid))
        )
        changes = [(row, await _wrapped(wrapper, await _unwrapped(openers, row))) for row in rows]
        async with self._executor.atomic() as executor:
            for row, values in changes:
                statement = (
                    update(EncryptionKey)
                    .where(col(EncryptionKey.kid) == row.kid, col(EncryptionKey.version) == row.version)
                    .values(**values)
                    .returning(EncryptionKey)
                )
                if await executor.one_or_none(statement) is None:
                    error = StaleWriteError(f"the key {row.kid!r} has changed meanwhile", details={"kid": row.kid})
                    raise error
        return len(changes)


class EncryptionKeyStore:
    """Where a `Keyring` with an outer key finds its wrapped keys: the table `encryption_keys`.

    Reads on a connection of its own, so that it never waits for a pool whose sessions wait for a key. It is asked once in
    `encryption_cache_seconds`, and for keys that are new.

    Args:
        manager: Where to connect.
    """

    def __init__(self, manager: AsyncConnectionManager) -> None:
        self._manager = manager

    async def load(self) -> "Sequence[WrappedKey]":
        """Return every key that is kept in the database, the destroyed ones too, by id.

        Raises:
            ControlPlaneError: The database does not answer, was not migrated, or does not let this role read; each by its own class.
        """
        from car_control_plane.encryption.wrapping import WrappedKey  # noqa: PLC0415 -- imports cryptography

        return [
            WrappedKey(
                kid=row["kid"],
                state=KeyState(row["state"]),
                wrapper=row["provider"],
                kek_ref=row["kek_ref"],
                wrapped=row["wrapped"],
                check_value=row["check_value"],
            )
            for row in await self._rows()
        ]

    async def _rows(self) -> Sequence[Mapping[str, Any]]:
        rows: Sequence[Mapping[str, Any]] = []
        error: ControlPlaneError | None = None
        connection = await self._manager.connect(activity="keys")
        try:
            rows = await connection.fetch(_LOAD)
        except Exception as problem:
            error = translate(problem, io=True)
            if error is None:
                raise
        finally:
            with suppress(OSError, asyncpg.InterfaceError):  # gone already, or not answering
                await connection.close(timeout=self._manager.settings.connect_timeout_seconds)
        if isinstance(error, PermissionDeniedError):
            error.hint = grants_for(select(EncryptionKey))
        if error is not None:
            raise error
        return rows


_LOAD = """
SELECT kid, state::text, provider, kek_ref, wrapped, check_value
FROM control_plane.encryption_keys
WHERE state IS NOT NULL
ORDER BY kid
"""

# Written out, not as parameters: PostgreSQL finds the index by this very expression.
_kid = func.split_part(
    col(TenantDatabase.connection_string_encrypted), literal_column("':'"), literal_column("2")
).label("kid")

_CHECK_VALUE = select(EncryptionKey.check_value).where(col(EncryptionKey.kid) == bindparam("key"))
_ALL_AFRESH = select(EncryptionKey).execution_options(populate_existing=True)


async def _problem(keyring: "Keyring", kid: str, recorded: str | None, *, used: bool) -> str:
    try:
        found = (await keyring.get(kid)).check_value
    except ControlPlaneError as error:
        return f"cannot be opened: {error.message}"
    if recorded is None:  # a new key goes on record with the first row it seals
        return "has sealed rows, but is not on record: its record was deleted" if used else ""
    return "" if found == recorded else "is another key than the one of this id that the database knows"


async def _wrapped(wrapper: "KeyWrapper", key: "Key") -> dict[str, Any]:
    """Wrap a key, and make sure that it opens again: the stored copy may be the only one."""
    wrapped, kek_ref = await wrapper.wrap(key)
    if await wrapper.unwrap(key.kid, wrapped, kek_ref) != key:
        raise DecryptionError(
            f"{wrapper.name} does not give back the key {key.kid!r} it has wrapped; nothing was written",
            details={"kid": key.kid},
        )
    return {"provider": wrapper.name, "kek_ref": kek_ref, "wrapped": wrapped}


async def _unwrapped(openers: "Mapping[str, KeyWrapper]", row: EncryptionKey) -> "Key":
    if row.provider not in openers or row.wrapped is None or row.kek_ref is None:
        raise ConfigurationError(
            f"the key {row.kid!r} is wrapped by {row.provider!r}, not by {' or '.join(map(repr, openers))}; nothing was written",
            details={"kid": row.kid},
        )
    key = await openers[row.provider].unwrap(row.kid, row.wrapped, row.kek_ref)
    if key.check_value != row.check_value:
        raise DecryptionError(
            f"under the id {row.kid!r} another key is kept than the one on record; nothing was written",
            hint="Restore its row of control_plane.encryption_keys from a backup.",
            details={"kid": row.kid},
        )
    return key


def _record(key: "Key", **values: Any) -> dict[str, Any]:
    """Return the columns of a new row, validated."""
    given = {"kid": key.kid, "check_value": key.check_value, **values}
    row = validated(EncryptionKey, given)
    return {name: getattr(row, name) for name in given}


def _not_found(kid: str) -> NotFoundError:
    return NotFoundError(f"there is no encryption key {kid!r} on record", details={"kid": kid})


def _unchangeable(row: EncryptionKey | None, kid: str, what: str) -> ControlPlaneError:
    if row is None:
        return _not_found(kid)
    details = {"kid": kid, "state": row.state}
    if row.state is None:
        return ConflictError(
            f"the key {kid!r} cannot {what} here: it is kept outside of the database ({row.provider})",
            hint="Change it where it is kept.",
            details=details,
        )
    if row.state == CURRENT:
        return StillReferencedError(
            f"the key {kid!r} cannot {what}: it is current",
            hint="Promote another key first, and rotate.",
            details=details,
        )
    return ConflictError(f"the key {kid!r} cannot {what}: it is {row.state}", details=details)
