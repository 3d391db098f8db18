"""Joins vLLM's API server and the server package (`vllm.endpoint_plugins`): routes, registry, the first artifacts.

vLLM calls `attach_router` when it builds its app and `init_state` when the engine runs, before the first connection is
accepted; what raises there stops the server. Decides nothing about requests.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..errors import StartupRefused, SteerError
from ..server.asked import asked_model
from ..server.front import Front
from ..server.middleware import SteerMiddleware
from ..server.names import log
from ..server.registry import Registry
from ..server.routes import router
from ..server.settings import Settings, Source
from ..server.store import Store
from .adapters import ServedAdapters
from .board import Board
from .client import AsyncEngine
from .http import answer_with
from .names_client import Names
from .serve import MIDDLEWARE


class SteerEndpoint:
    """vLLM's `EndpointPlugin` protocol."""

    name = "steer_vllm"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add our routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Build the front; the first of several servers loads what was given at the start, the others wait for it.

        Errors: `StartupRefused`, among others for a server that was not started by `steer-vllm serve`: it would have
        these routes without the middleware, and answer with the base model where an intervention is asked for.
        """
        settings = getattr(args, "steer_settings", None)
        if not isinstance(settings, Settings) or MIDDLEWARE not in args.middleware:
            raise StartupRefused("start this server with `steer-vllm serve`, or take steer_vllm out of VLLM_PLUGINS")
        assert f"{SteerMiddleware.__module__}.{SteerMiddleware.__name__}" == MIDDLEWARE
        board: Board = args.steer_board
        answer_with(asked_model.get)
        try:
            await _start(engine_client, state, settings, board)
        except StartupRefused as error:
            board.failure = error.message  # several servers are processes of their own: the first one says it
            raise


async def _start(engine_client: Any, state: Any, settings: Settings, board: Board) -> None:
    engine, book = AsyncEngine(engine_client), Names(engine_client)
    facts = await engine.facts()
    registry = Registry(
        engine,
        book,
        board,
        Store(settings.store, (artifact.source for artifact in settings.artifacts)),
        facts.config,
        tuple(path.name for path in state.openai_serving_models.base_model_paths),
    )
    adapters = ServedAdapters(engine, state.openai_serving_models)
    front = Front(registry, settings.keys(), facts.config, facts.largest, settings.limits, adapters, book.servers)
    if book.server == 0:
        for artifact in settings.artifacts:
            await _load(registry, artifact)
        await registry.names.open()
    await registry.names.opened()
    registry.names.follow()
    state.steer = front
    log.info(
        "steer-vllm: %d interventions, tables of %.1f MB and at most %g GiB of host memory per rank (%d), %s, "
        "API server %d of %d",
        len(registry.catalog),
        facts.table_bytes / (1 << 20),
        facts.config.memory_gib,
        facts.ranks,
        facts.dtype,
        1 + book.server,
        book.servers,
    )


async def _load(registry: Registry, artifact: Source) -> None:
    try:
        await registry.load(artifact.name, artifact.source)
    except SteerError as error:
        raise StartupRefused(f"artifact {artifact.name}={artifact.source}: {error.message}") from error
