"""The routes that vLLM does not have: list, load and unload interventions.

Keys are checked by the middleware, which also turns the errors raised here into answers.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from ..catalog import Catalog
from ..errors import InvalidIntervention
from . import body as bodies
from .front import Front
from .registry import Registry

router = APIRouter()
Body = TypeVar("Body", bound=BaseModel)


class Load(BaseModel):
    """source: a folder below the store. load_inplace: let the name point to other content than before."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    source: str
    load_inplace: bool = False


class Unload(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


@router.get("/v1/interventions")
async def list_interventions(request: Request) -> dict[str, Any]:
    """All published interventions, by name."""
    return {"object": "list", "data": [entry.to_json() for entry in await _catalog(request)]}


@router.get("/v1/interventions/{name}")
async def show_intervention(request: Request, name: str) -> dict[str, Any]:
    """One intervention. Errors: 404."""
    return (await _catalog(request)).get(name).to_json()


@router.post("/v1/load_intervention")
async def load_intervention(request: Request) -> dict[str, Any]:
    """Load an artifact and publish its name. Errors: 400, 403, 409, 422, 503, 507."""
    asked = await _read(request, Load)
    entry = await _registry(request).load(asked.name, asked.source, load_inplace=asked.load_inplace)
    return entry.to_json()


@router.post("/v1/unload_intervention")
async def unload_intervention(request: Request) -> dict[str, Any]:
    """Withdraw a name; requests in flight finish with it. Errors: 400, 403, 404, 503."""
    asked = await _read(request, Unload)
    entry = await _registry(request).unload(asked.name)
    return {**entry.to_json(), "deleted": True}


async def _read(request: Request, kind: type[Body]) -> Body:
    try:
        return kind.model_validate(bodies.read(await request.body()))
    except ValidationError as error:
        faults = error.errors()
        text = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)
        raise InvalidIntervention(text, param=str(faults[0]["loc"][0])) from error


async def _catalog(request: Request) -> Catalog:
    registry = _registry(request)
    await registry.refresh()
    return registry.catalog


def _registry(request: Request) -> Registry:
    front: Front = request.app.state.steer
    return front.registry
