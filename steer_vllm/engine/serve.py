"""Starts vLLM's OpenAI server with steering on: plugins, middleware, limits, what the API servers share.

vLLM's `serve` command is called as a class: the console command of its CPU build cannot start. What our settings mean
is not known here; they travel on vLLM's arguments to the endpoint plugin, in this process or in those of the servers.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points

from ..config import SteerConfig
from ..errors import StartupRefused
from . import variables
from .board import Board
from .refusals import SEVERAL_FRONTS
from .settings import KEY, entry

MIDDLEWARE = "steer_vllm.server.middleware.SteerMiddleware"

_ENDPOINTS = "vllm.endpoint_plugins"
_SEVERAL = f"{SEVERAL_FRONTS}; --api-server-count shares them"
_REFUSED_FLAGS = {
    "headless": "there is no API server to steer",
    "grpc": "only the HTTP server is steered",
    "grpc_port": "only the HTTP server is steered",
    "api_key": "give it before the --, where it guards every path",
    "data_parallel_external_lb": _SEVERAL,
    "data_parallel_hybrid_lb": _SEVERAL,
    "data_parallel_multi_port_external_lb": _SEVERAL,
    "data_parallel_rank": _SEVERAL,
    "data_parallel_start_rank": _SEVERAL,
}


def serve(model: str, config: SteerConfig, settings: object, *, host: str, port: int, flags: Sequence[str]) -> None:
    """Run until SIGINT or SIGTERM. flags: vLLM's own, as on its command line.

    Errors: `StartupRefused` for what cannot be combined with steering; vLLM's own errors as they are.
    """
    refused = variables.refused(os.environ)
    if refused:
        raise StartupRefused("; ".join(refused))
    os.environ["VLLM_PLUGINS"] = allowed_plugins(os.environ.get("VLLM_PLUGINS"))
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command does

    # Below the variables: vLLM reads them when it is imported.
    from vllm import logger
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="steer-vllm serve MODEL --")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", model, f"--host={host}", f"--port={port}", *flags])
    prepare(args, config, settings)
    configure_logging = getattr(logger, "configure_logging_from_args", None)  # since 0.32
    if configure_logging is not None:
        configure_logging(args)
    command.validate(args)
    try:
        command.cmd(args)
    except StartupRefused:
        raise
    except Exception:
        if args.steer_board.failure:  # an API server in a process of its own refused; vLLM only says that it ended
            raise StartupRefused(args.steer_board.failure) from None
        raise


def prepare(args: Namespace, config: SteerConfig, settings: object) -> None:
    """Turn steering on in vLLM's parsed arguments. Errors: `StartupRefused`."""
    for name, reason in _REFUSED_FLAGS.items():
        value = getattr(args, name, None)
        if value is not None and value is not False and value != []:  # 0 is a rank
            raise StartupRefused(f"--{name.replace('_', '-')}: {reason}")
    additional = args.additional_config or {}
    if KEY in additional:
        raise StartupRefused(f"--additional-config: {KEY} is set by the limits of steer-vllm")
    servers = args.data_parallel_size if args.api_server_count is None else args.api_server_count  # as vLLM has it
    if servers < 1:
        raise StartupRefused(f"--api-server-count {servers}: there is no API server to steer")
    config.share(servers)  # refuses here what every server would refuse later
    args.additional_config = {**additional, KEY: entry(config)}
    args.middleware = [MIDDLEWARE, *args.middleware]  # the first is the innermost: others see requests as they came
    args.steer_settings = settings
    # Ledger. What: vLLM hands its arguments to `run_api_server_worker_proc` of every API server as it spawns them. Why:
    # memory can be shared only with processes that are being spawned. Since 0.26. Can go when plugins can share state.
    args.steer_board = Board(servers)


def allowed_plugins(allowed: str | None) -> str:
    """The value of VLLM_PLUGINS that adds ours to those that would have been loaded.

    Endpoint plugins are loaded only when they are named, and naming one makes the variable an allow-list for every
    group; so where it is not set, every plugin of the other groups is named.
    """
    if allowed is not None:
        names: Iterable[str] = [name for name in allowed.split(",") if name]
    else:
        found = entry_points()
        names = [p.name for group in found.groups if _is_plugin_group(group) for p in found.select(group=group)]
    return ",".join(dict.fromkeys([*names, KEY]))


def _is_plugin_group(group: str) -> bool:
    return group.startswith("vllm.") and group != _ENDPOINTS
