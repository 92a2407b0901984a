"""An HTTP API on the control plane, with our models as its schemas.

Serve it:                        DATABASE_URL=embedded:./data uvicorn examples.fastapi_app:app
See it work, nothing set up:     python examples/fastapi_app.py
"""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import httpx
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlmodel.ext.asyncio.session import AsyncSession

from car_control_plane import (
    AsyncConnectionManager,
    ControlPlaneError,
    TenantCreate,
    TenantPublic,
    TenantRepository,
    TenantUpdate,
)
from car_control_plane.migrations import upgrade


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncConnectionManager(os.environ.get("DATABASE_URL", "embedded:")) as manager:
        await upgrade(manager)  # in production, run `alembic upgrade head` before the new version starts
        app.state.manager = manager
        yield


app = FastAPI(title="Tenants", lifespan=lifespan)


async def session(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.app.state.manager.get_session() as session:
        yield session


# scope="function": the commit happens before the response is sent. With the default, a client would be told 200 before a commit that fails.
Session = Annotated[AsyncSession, Depends(session, scope="function")]


@app.exception_handler(ControlPlaneError)
async def refuse(_: Request, error: ControlPlaneError) -> JSONResponse:
    return JSONResponse({"code": error.code, "detail": error.message, "hint": error.hint}, error.http_status)


@app.get("/health")
async def health(request: Request) -> JSONResponse:
    status = await request.app.state.manager.health_check()
    return JSONResponse({"healthy": bool(status), "schema": status.schema}, 200 if status else 503)


@app.post("/tenants", status_code=201)
async def create(body: TenantCreate, session: Session) -> TenantPublic:
    return TenantPublic.model_validate(await TenantRepository(session).create(body))


@app.get("/tenants")
async def list_tenants(session: Session, limit: int = 50, after: str | None = None) -> dict[str, object]:
    page = await TenantRepository(session).list(limit=limit, after=after)
    return {"items": [TenantPublic.model_validate(tenant) for tenant in page], "next": page.next_cursor}


@app.patch("/tenants/{tenant_id}")
async def update(
    tenant_id: uuid.UUID, body: TenantUpdate, session: Session, version: int | None = None
) -> TenantPublic:
    changed = await TenantRepository(session).update(tenant_id, body, expected_version=version)
    return TenantPublic.model_validate(changed)


@app.post("/tenants/{tenant_id}/suspend")
async def suspend(tenant_id: uuid.UUID, session: Session, reason: str | None = None) -> TenantPublic:
    return TenantPublic.model_validate(await TenantRepository(session).suspend(tenant_id, reason=reason))


async def main() -> None:
    """Talk to the app in this process, as a client would."""
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://example.test") as client:
        created = await client.post("/tenants", json={"name": "acme", "environment": "production", "status": "active"})
        print(created.status_code, created.json()["name"], created.json()["status"])
        path = f"/tenants/{created.json()['tenant_id']}"
        for method, url, body in [
            ("POST", "/tenants", {"name": "acme", "environment": "production"}),
            ("POST", "/tenants", {"name": " ", "environment": "moon"}),
            ("PATCH", path, {"labels": {"tier": "gold"}}),
            ("PATCH", path, {"name": None}),
            ("PATCH", f"{path}?version=1", {"name": "acme-2"}),
            ("POST", f"{path}/suspend?reason=payment+overdue", None),
            ("POST", f"{path}/suspend", None),
            ("GET", "/tenants?limit=1", None),
            ("GET", "/health", None),
        ]:
            answer = await client.request(method, url, json=body)
            print(answer.status_code, method, url.replace(path, "/tenants/…"), answer.text[:110])


if __name__ == "__main__":
    asyncio.run(main())
