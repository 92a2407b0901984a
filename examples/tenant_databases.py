"""Which database serves a tenant, and the sealed way in: python examples/tenant_databases.py

Runs with nothing set up, on a temporary PostgreSQL server and with keys made on the spot. A platform sets DATABASE_URL and
CAR_CONTROL_PLANE_ENCRYPTION_KEYS (or a key file, AWS KMS, Vault), and writes `Keyring.from_settings(manager.settings)`.
"""

import asyncio
import re

from pydantic import SecretStr

from car_control_plane import (
    AsyncConnectionManager,
    ConnectionPolicy,
    DecryptionError,
    EmbeddedPostgres,
    Key,
    Keyring,
    StaticKeys,
    TenantCreate,
    TenantDatabaseCreate,
    TenantDatabaseRepository,
    TenantEnvironment,
    TenantRepository,
    rotate_keys,
)
from car_control_plane.migrations import upgrade

# A tenant's database is usually another machine's; the embedded server's is reached through a socket of this one.
POLICY = ConnectionPolicy(allow=frozenset({"sockets"}))


def keyring(*keys: Key) -> Keyring:
    """The first key seals, all of them open."""
    return Keyring(StaticKeys(",".join(f"{key.kid}:{key.to_base64()}" for key in keys)))


def way_in(server: EmbeddedPostgres, database: str) -> SecretStr:
    server.create_database(database)
    return SecretStr(re.sub(r"^(postgresql://\w+)@", r"\1:t0p-s3cret@", server.dsn(database)))


async def main(server: EmbeddedPostgres) -> None:
    first, second = Key.generate("2026-05"), Key.generate("2026-11")
    async with AsyncConnectionManager(server.dsn("control_plane")) as manager:
        await upgrade(manager)

        async with keyring(first) as keys, manager.get_session() as session:
            databases = TenantDatabaseRepository(session, keys, policy=POLICY, actor="examples")
            for name in ("acme", "globex"):
                new = TenantCreate(name=name, environment=TenantEnvironment.DEVELOPMENT)
                tenant = await TenantRepository(session).create(new)
                create = TenantDatabaseCreate(connection_string=await asyncio.to_thread(way_in, server, name))
                row = await databases.register(tenant.tenant_id, create)
                print("registered:", name, row.database_name, row.purpose)

            page = await databases.list()
            print("stored:", [row.connection_string_encrypted for row in page])
            found = await databases.verify(page.items[0].id)
            print("verified:", bool(found), "PostgreSQL", found.server_version)
            secret = await databases.connection_string(page.items[0].id)
            print("opened:", secret, "- that is how it prints, and its parts as", secret.dsn)
            print("for the driver alone:", len(secret.reveal()), "characters")
            versions = [row.version for row in await databases.list()]

        # A new key, as a restart with "second,first" gives it to every process; then all rows are sealed anew, while everything runs.
        async with keyring(second, first) as keys:
            done = await rotate_keys(manager, keys)
            print("rotated:", done.rotated, "remaining:", done.remaining)

        async with keyring(second) as keys, manager.get_session() as session:  # the first one is not needed any more
            databases = TenantDatabaseRepository(session, keys, policy=POLICY, actor="examples")
            one, other = (await databases.list()).items
            print("to the rows nothing has happened:", [one.version, other.version] == versions)
            print("opened with the new key:", await databases.connection_string(one.id))

            # Somebody who may write the table, but has no key, gives one tenant the other's way in. It does not open there.
            other.connection_string_encrypted = one.connection_string_encrypted
            await session.flush()
            try:
                await databases.connection_string(other.id)
            except DecryptionError as error:
                print("refused:", error.message)
            await session.rollback()


if __name__ == "__main__":
    with EmbeddedPostgres() as server:
        server.create_database("control_plane")
        asyncio.run(main(server))
