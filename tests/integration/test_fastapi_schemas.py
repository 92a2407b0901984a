"""A FastAPI application that uses our models as they are: as bodies, as answers, and in its OpenAPI page."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlmodel import col, func, select
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane.connection import AsyncConnectionManager
from car_control_plane.encryption import SealedConnectionString
from car_control_plane.errors import ControlPlaneError
from car_control_plane.models import (
    SystemConfig,
    SystemConfigCreate,
    SystemConfigPublic,
    SystemConfigUpdate,
    Tenant,
    TenantCreate,
    TenantDatabase,
    TenantDatabaseCreate,
    TenantDatabasePublic,
    TenantDatabaseUpdate,
    TenantPublic,
    TenantUpdate,
)

CANARY = "c4n4ry-s3cr3t"
SEALED = SealedConnectionString("ccp1:k1:c4n4ry-sealed")


def application(manager: AsyncConnectionManager) -> FastAPI:
    app = FastAPI()

    async def session() -> AsyncIterator[AsyncSession]:
        async with manager.get_session() as session:
            yield session

    # scope="function": the commit comes before the answer. By default the client is told 200 and the commit may still fail.
    Session = Annotated[AsyncSession, Depends(session, scope="function")]  # noqa: N806 -- a type

    @app.exception_handler(ControlPlaneError)
    async def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ControlPlaneError)
        return JSONResponse({"code": error.code, "message": str(error)}, error.http_status)

    @app.post("/tenants", status_code=201, response_model=TenantPublic)
    async def create(body: TenantCreate, session: Session) -> Tenant:
        tenant = Tenant.model_validate(body)
        session.add(tenant)
        await session.flush()
        return tenant

    @app.post("/rows", status_code=201)
    async def create_row(row: Tenant, session: Session) -> Tenant:
        session.add(row)
        await session.flush()
        return row

    @app.post("/late", status_code=201)
    async def create_late(row: Tenant, session: Session) -> TenantPublic | None:
        session.add(row)  # flushed by the commit, after this function
        return None

    @app.patch("/tenants/{tenant_id}", response_model=TenantPublic)
    async def change(tenant_id: uuid.UUID, patch: TenantUpdate, session: Session) -> Tenant:
        tenant = await session.get_one(Tenant, tenant_id)
        tenant.sqlmodel_update(patch)
        await session.flush()
        return tenant

    @app.post("/tenants/{tenant_id}/databases", status_code=201, response_model=TenantDatabasePublic)
    async def register(tenant_id: uuid.UUID, body: TenantDatabaseCreate, session: Session) -> TenantDatabase:
        assert body.connection_string.get_secret_value()
        database = TenantDatabase(
            tenant_id=tenant_id,
            connection_string_encrypted=SEALED,
            database_name="acme",
            host="db.example",
            purpose=body.purpose,
        )
        session.add(database)
        await session.flush()
        return database

    @app.patch("/databases/{database_id}")
    async def change_database(database_id: uuid.UUID, patch: TenantDatabaseUpdate) -> dict[str, Any]:
        return patch.model_dump()

    @app.post("/database-rows", status_code=201)
    async def create_database_row(row: TenantDatabase, session: Session) -> TenantDatabase:
        session.add(row)
        await session.flush()
        return row

    @app.get("/database-rows")
    async def list_database_rows(session: Session) -> list[TenantDatabase]:
        return list((await session.exec(select(TenantDatabase))).all())

    @app.post("/config", status_code=201, response_model=SystemConfigPublic)
    async def define(body: SystemConfigCreate, session: Session) -> SystemConfig:
        config = SystemConfig.model_validate(body)
        session.add(config)
        await session.flush()
        return config

    @app.put("/config/{key}", response_model=SystemConfigPublic)
    async def redefine(key: str, body: SystemConfigUpdate, session: Session) -> SystemConfig:
        config = await session.get_one(SystemConfig, key)
        config.value = body.value
        await session.flush()
        return config

    return app


@pytest.fixture
async def client(shared_manager: AsyncConnectionManager) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application(shared_manager))
    async with httpx.AsyncClient(transport=transport, base_url="http://control.plane") as client:
        yield client


async def send(client: httpx.AsyncClient, method: str, path: str, body: Any) -> httpx.Response:
    """Send JSON; text and bytes as they are, valid or not."""
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    return await client.request(method, path, content=content, headers={"content-type": "application/json"})


async def count(manager: AsyncConnectionManager) -> tuple[int, ...]:
    async with manager.get_session() as session:
        models = (Tenant, TenantDatabase, SystemConfig)
        return tuple([(await session.exec(select(func.count()).select_from(model))).one() for model in models])


GOOD = {"name": "acme", "environment": "production"}
NIL = str(uuid.UUID(int=0))


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/tenants", "/rows"])
async def test_a_good_body_is_stored(client: httpx.AsyncClient, path: str) -> None:
    body = {**GOOD, "name": "Cafe\u0301", "labels": {"tier": "gold"}, "tenant_id": str(uuid.UUID(int=7))}
    response = await send(client, "POST", path, body)
    assert response.status_code == 201
    answer = response.json()
    assert answer["name"] == "Caf\u00e9"
    assert (answer["tenant_id"], answer["status"], answer["labels"]) == (body["tenant_id"], "pending", {"tier": "gold"})
    assert answer["version"] > 0
    assert answer["created_at"] == answer["updated_at"]
    assert answer["created_at"].endswith("Z")


async def test_a_client_does_not_choose_the_version(
    client: httpx.AsyncClient, shared_manager: AsyncConnectionManager
) -> None:
    response = await send(client, "POST", "/rows", {**GOOD, "version": 2**62})
    assert response.status_code == 201
    async with shared_manager.get_session() as session:
        tenant = (await session.exec(select(Tenant).where(col(Tenant.name) == "acme"))).one()
    assert response.json()["version"] == tenant.version < 2**62


BAD_TENANTS: list[Any] = [
    {**GOOD, "name": ""},
    {**GOOD, "name": " acme"},
    {**GOOD, "name": f"{CANARY}\n"},
    {**GOOD, "name": f"{CANARY}\x00"},
    {**GOOD, "name": f"{CANARY}\u202e"},
    {**GOOD, "name": CANARY * 20},
    {**GOOD, "name": [CANARY]},
    {**GOOD, "name": None},
    {**GOOD, "environment": CANARY},
    {**GOOD, "status": CANARY},
    {**GOOD, "labels": {"k": f"{CANARY}\x00"}},
    {**GOOD, "labels": {f"k{n}": "" for n in range(65)}},
    {**GOOD, "status_reason": CANARY * 100},
    {**GOOD, "colour": CANARY},
    {**GOOD, "tenant_id": CANARY},
    {"name": CANARY},
    {},
    [CANARY],
    CANARY.join('""'),
    "null",
    json.dumps({**GOOD, "name": "\ud800"}),
    '{"name": "a", "environment": "production", "labels": {"\\ud800": "\\udfff"}}',
]


@pytest.mark.parametrize("path", ["/tenants", "/rows", "/late"])
@pytest.mark.parametrize("body", BAD_TENANTS, ids=range(len(BAD_TENANTS)))
async def test_a_bad_body_is_422_and_not_stored(
    client: httpx.AsyncClient, shared_manager: AsyncConnectionManager, path: str, body: Any
) -> None:
    before = await count(shared_manager)
    response = await send(client, "POST", path, body)
    assert response.status_code == 422, response.text
    assert CANARY not in response.text
    assert {"type", "loc", "msg"} <= response.json()["detail"][0].keys()
    assert await count(shared_manager) == before


BAD_VALUES = {
    "NaN": '{"value": NaN}',
    "infinity": '{"value": [1e999]}',
    "negative infinity": '{"value": {"k": -Infinity}}',
    "NUL": f'{{"value": "{CANARY}\\u0000"}}',
    "surrogate": f'{{"value": "{CANARY}\\ud800"}}',
    "surrogate in a key": f'{{"value": {{"{CANARY}\\ud800": 1}}}}',
    "depth": f'{{"value": {"[" * 201}{"]" * 201}}}',
    "more depth": f'{{"value": {"[" * 900}{"]" * 900}}}',
    "size": json.dumps({"value": CANARY * 100_000}),
    "nothing": "{}",
    "something else": f'{{"value": 1, "colour": "{CANARY}"}}',
}


@pytest.mark.parametrize("name", BAD_VALUES)
async def test_a_bad_value_is_422(client: httpx.AsyncClient, shared_manager: AsyncConnectionManager, name: str) -> None:
    await send(client, "POST", "/config", {"key": "k", "value": 1})
    for method, path, body in (
        ("PUT", "/config/k", BAD_VALUES[name]),
        ("POST", "/config", BAD_VALUES[name].replace("{", '{"key": "new", ', 1).replace(", }", "}")),
    ):
        response = await send(client, method, path, body)
        assert response.status_code == 422, response.text
        assert CANARY not in response.text
        assert len(response.text) < 1000
    async with shared_manager.get_session() as session:
        assert (await session.get_one(SystemConfig, "k")).value == 1
        assert await session.get(SystemConfig, "new") is None


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}, 2**80, {"a": [None, {"b": 1.5}]}], ids=repr)
async def test_any_json_value_goes_through(client: httpx.AsyncClient, value: Any) -> None:
    created = await send(client, "POST", "/config", {"key": "k", "value": value})
    assert created.status_code == 201
    assert created.json()["value"] == value
    changed = await send(client, "PUT", "/config/k", {"value": [value]})
    assert changed.json()["value"] == [value]
    assert changed.json()["version"] > created.json()["version"]


# --- PATCH ------------------------------------------------------------------------------------------------------------


async def test_a_patch_changes_what_it_names(client: httpx.AsyncClient) -> None:
    created = (await send(client, "POST", "/tenants", {**GOOD, "labels": {"tier": "gold"}})).json()
    path = f"/tenants/{created['tenant_id']}"
    nothing = (await send(client, "PATCH", path, {})).json()
    assert nothing == created
    renamed = (await send(client, "PATCH", path, {"name": "other"})).json()
    assert renamed == {**created, "name": "other", "version": renamed["version"], "updated_at": renamed["updated_at"]}
    assert renamed["version"] > created["version"]


@pytest.mark.parametrize("field", TenantUpdate.model_fields)
async def test_a_patch_to_null_is_422(client: httpx.AsyncClient, field: str) -> None:
    created = (await send(client, "POST", "/tenants", GOOD)).json()
    path = f"/tenants/{created['tenant_id']}"
    response = await send(client, "PATCH", path, {field: None})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][:2] == ["body", field]
    assert (await send(client, "PATCH", path, {})).json() == created


@pytest.mark.parametrize(
    "body", [{"name": " x"}, {"status": "active"}, {"name": "x", "version": 1}, {"labels": {"": ""}}]
)
async def test_a_bad_patch_is_422(client: httpx.AsyncClient, body: Any) -> None:
    assert (await send(client, "PATCH", f"/tenants/{NIL}", body)).status_code == 422


# --- the way in -------------------------------------------------------------------------------------------------------

BAD_DATABASES: list[Any] = [
    {"connection_string": [CANARY]},
    {"connection_string": {"dsn": CANARY}},
    {"connection_string": CANARY, "purpose": "UPPER"},
    {"connection_string": CANARY, "colour": "red"},
    {"connection_strin": CANARY},
    {"connection_string": None, "purpose": CANARY.upper()},
    [CANARY],
    f'"{CANARY}"',
    f'{{"connection_string": ["{CANARY}", NaN]}}',
    f'{{"connection_string": "{CANARY}", "purpose": "\\ud800"}}',
]


@pytest.mark.parametrize("body", BAD_DATABASES, ids=range(len(BAD_DATABASES)))
async def test_a_refused_connection_string_is_not_repeated(client: httpx.AsyncClient, body: Any) -> None:
    for method, path in (
        ("POST", f"/tenants/{NIL}/databases"),
        ("PATCH", f"/databases/{NIL}"),
        ("POST", "/database-rows"),
    ):
        response = await send(client, method, path, body)
        assert response.status_code == 422, response.text
        assert CANARY not in response.text
        assert CANARY.upper() not in response.text


async def test_the_answer_holds_no_way_in(client: httpx.AsyncClient, shared_manager: AsyncConnectionManager) -> None:
    tenant = (await send(client, "POST", "/tenants", GOOD)).json()["tenant_id"]
    response = await send(
        client, "POST", f"/tenants/{tenant}/databases", {"connection_string": f"postgresql://u:{CANARY}@h/d"}
    )
    assert response.status_code == 201
    listed = await client.get("/database-rows")
    assert len(listed.json()) == 1
    for text in (response.text, listed.text):
        assert "encrypted" not in text
        assert "c4n4ry" not in text
    async with shared_manager.get_session() as session:
        stored = (await session.exec(select(col(TenantDatabase.connection_string_encrypted)))).all()
    assert list(stored) == [SEALED]


async def test_no_client_sends_a_sealed_value(client: httpx.AsyncClient) -> None:
    """A row as a body takes text of the right form no more than any other: what is sealed was sealed here."""
    tenant = (await send(client, "POST", "/tenants", GOOD)).json()["tenant_id"]
    row = {"tenant_id": tenant, "connection_string_encrypted": SEALED.text, "database_name": "d", "host": "h"}
    response = await send(client, "POST", "/database-rows", row)
    assert response.status_code == 422
    assert "c4n4ry" not in response.text
    assert (await client.get("/database-rows")).json() == []


# --- errors of the database -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/tenants", "/rows", "/late"])
async def test_a_duplicate_is_409_before_the_client_is_told_otherwise(client: httpx.AsyncClient, path: str) -> None:
    assert (await send(client, "POST", path, {**GOOD, "name": CANARY})).status_code == 201
    response = await send(client, "POST", path, {**GOOD, "name": CANARY})
    assert response.status_code == 409
    assert response.json() == {"code": "already-exists", "message": "a tenant with this name exists already"}


async def test_an_unknown_tenant_is_404(client: httpx.AsyncClient) -> None:
    response = await send(client, "POST", f"/tenants/{NIL}/databases", {"connection_string": "postgresql://h/d"})
    assert response.status_code == 404
    assert response.json()["code"] == "tenant-not-found"


# --- OpenAPI ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    return application(AsyncConnectionManager("postgresql://db.example/control_plane")).openapi()


def test_openapi_holds_no_secret(openapi: dict[str, Any]) -> None:
    assert "encrypted" not in json.dumps(openapi)
    plain = openapi["components"]["schemas"]["TenantDatabaseCreate"]["properties"]["connection_string"]
    assert (plain["format"], plain["writeOnly"]) == ("password", True)
    shown = {
        name
        for name, schema in openapi["components"]["schemas"].items()
        if "connection_string" in schema.get("properties", {})
    }
    assert shown == {"TenantDatabaseCreate", "TenantDatabaseUpdate"}


def test_openapi_shows_a_patch_as_plain_optional_fields(openapi: dict[str, Any]) -> None:
    schema = openapi["components"]["schemas"]["TenantUpdate"]
    assert schema["properties"]["name"] == {"type": "string", "minLength": 1, "maxLength": 255, "title": "Name"}
    assert "required" not in schema
    assert "null" not in json.dumps(schema["properties"])
    assert schema["additionalProperties"] is False


def test_openapi_leaves_room_for_new_fields_in_answers(openapi: dict[str, Any]) -> None:
    for name in ("TenantPublic", "TenantDatabasePublic", "SystemConfigPublic"):
        schema = openapi["components"]["schemas"][name]
        assert "additionalProperties" not in schema
        assert set(schema["required"]) == set(schema["properties"])


def test_openapi_names_the_values_of_enums(openapi: dict[str, Any]) -> None:
    schemas = openapi["components"]["schemas"]
    assert schemas["TenantStatus"]["enum"] == ["active", "inactive", "suspended", "pending"]
    assert schemas["TenantEnvironment"]["enum"] == ["development", "staging", "production"]
