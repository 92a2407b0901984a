"""Any sequence of verbs leaves the database where a small model of the rules says it is, on real PostgreSQL."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from uuid import UUID

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.errors import AlreadyExistsError, ControlPlaneError, InvalidTransitionError, StaleWriteError
from car_control_plane.models import SYSTEM_ADMIN_ID, TRANSITIONS, Tenant, TenantCreate, TenantEnvironment, TenantStatus
from car_control_plane.repositories import TenantRepository

T = TypeVar("T")
NAMES = ["a", "b", "c", "d", "e"]


def test_life_cycle_and_names_follow_the_model(shared_database: str) -> None:
    class Machine(RuleBasedStateMachine):
        """The model: per tenant its name, status and last version; every change moves the version up."""

        tenants = Bundle("tenants")

        def __init__(self) -> None:
            super().__init__()
            self.runner = asyncio.Runner()
            self.manager = AsyncConnectionManager(shared_database, pool_size=1)
            self.model: dict[UUID, tuple[str, TenantStatus, int]] = {}
            self.highest = 0

        def call(self, verb: Callable[[TenantRepository], Awaitable[T]]) -> T:
            async def unit() -> T:
                async with self.manager.get_session() as session:
                    return await verb(TenantRepository(session))

            return self.runner.run(unit())

        def refused(self, verb: Callable[[TenantRepository], Awaitable[Any]], kind: type[ControlPlaneError]) -> None:
            try:
                self.call(verb)
            except kind:
                return
            raise AssertionError(f"{kind.__name__} was due")

        def record(self, row: Tenant) -> None:
            assert row.version > self.highest, "versions only grow"
            self.highest = row.version
            self.model[row.tenant_id] = (row.name, row.status, row.version)

        @rule(target=tenants, name=st.sampled_from(NAMES), status=st.sampled_from(TenantStatus))
        def create(self, name: str, status: TenantStatus) -> UUID:
            new = TenantCreate(name=name, environment=TenantEnvironment.STAGING, status=status)
            if name in {known for known, _, _ in self.model.values()}:
                self.refused(lambda tenants: tenants.create(new), AlreadyExistsError)
            else:
                self.record(self.call(lambda tenants: tenants.create(new)))
            return new.tenant_id

        @rule(
            key=tenants,
            verb=st.sampled_from(["activate", "suspend", "deactivate"]),
            fresh=st.sampled_from([None, True, False]),
        )
        def transition(self, key: UUID, verb: str, fresh: bool | None) -> None:
            if key not in self.model:
                return
            _, status, version = self.model[key]
            target = {"activate": "active", "suspend": "suspended", "deactivate": "inactive"}[verb]
            expected = {None: None, True: version, False: version - 1}[fresh]

            def change(tenants: TenantRepository) -> Awaitable[Tenant]:
                result: Awaitable[Tenant] = getattr(tenants, verb)(key, expected_version=expected)
                return result

            if fresh is False:
                self.refused(change, StaleWriteError)
            elif TenantStatus(target) in TRANSITIONS[status]:
                self.record(self.call(change))
            else:
                self.refused(change, InvalidTransitionError)

        @rule(key=tenants, name=st.sampled_from(NAMES))
        def rename(self, key: UUID, name: str) -> None:
            if key not in self.model:
                return
            mine, status, version = self.model[key]
            if name == mine:
                assert self.call(lambda tenants: tenants.rename(key, name)).version == version
            elif name in {known for known, _, _ in self.model.values()}:
                self.refused(lambda tenants: tenants.rename(key, name), AlreadyExistsError)
            else:
                row = self.call(lambda tenants: tenants.rename(key, name))
                assert row.status is status
                self.record(row)

        @rule(key=consumes(tenants))
        def delete(self, key: UUID) -> None:
            self.remove(key)

        def remove(self, key: UUID) -> None:
            if self.model.pop(key, None):
                self.call(lambda tenants: tenants.delete(key))

        @invariant()
        def the_database_agrees(self) -> None:
            page = self.call(lambda tenants: tenants.list(limit=500))
            stored = {t.tenant_id: (t.name, t.status, t.version) for t in page if t.tenant_id != SYSTEM_ADMIN_ID}
            assert stored == self.model

        def teardown(self) -> None:
            for key in list(self.model):
                self.remove(key)
            self.runner.run(self.manager.close())
            self.runner.close()

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
