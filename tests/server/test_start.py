"""What `steer-vllm serve` does to vLLM's arguments and environment before vLLM starts; no vLLM is needed."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

from steer_vllm.config import SteerConfig
from steer_vllm.engine import serve, variables
from steer_vllm.errors import StartupRefused
from steer_vllm.server.middleware import SteerMiddleware


def parsed(**more: Any) -> Namespace:
    plain = {"api_server_count": None, "data_parallel_size": 1, "additional_config": None, "middleware": []}
    return Namespace(**{**plain, "api_key": None, **more})


def test_steering_is_turned_on() -> None:
    args = parsed(additional_config={"mine": 1}, middleware=["their.Own"])
    config = SteerConfig(additive_rows=5)
    serve.prepare(args, config, "settings")
    assert args.additional_config["mine"] == 1
    limits = {name: value for name, value in args.additional_config["steer_vllm"].items() if name != "version"}
    assert SteerConfig.from_dict(limits) == config
    assert args.middleware == [serve.MIDDLEWARE, "their.Own"]
    assert args.steer_settings == "settings"
    assert len(args.steer_board._epochs) == 1


@pytest.mark.parametrize(("flags", "servers"), [({"api_server_count": 3}, 3), ({"data_parallel_size": 2}, 2)])
def test_several_api_servers(flags: dict[str, int], servers: int) -> None:
    args = parsed(**flags)
    serve.prepare(args, SteerConfig(), None)
    assert len(args.steer_board._epochs) == servers
    assert args.api_server_count == flags.get("api_server_count")  # vLLM's own default is kept


def test_rows_are_enough_for_every_server() -> None:
    config = SteerConfig(additive_rows=256, low_rank_rows=40, per_request=3)  # a request may need 12 rows
    serve.prepare(parsed(api_server_count=3), config, None)
    with pytest.raises(StartupRefused, match=r"low_rank_rows 40: 4 API servers get 10 each.* set it to 48"):
        serve.prepare(parsed(api_server_count=4), config, None)


def test_the_middleware_is_the_one_that_is_named() -> None:
    assert f"{SteerMiddleware.__module__}.{SteerMiddleware.__qualname__}" == serve.MIDDLEWARE


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("api_server_count", -1),
        ("api_server_count", 0),
        ("headless", True),
        ("grpc", True),
        ("grpc_port", 50051),
        ("api_key", ["secret"]),
        ("data_parallel_rank", 0),
        ("data_parallel_start_rank", 0),
        ("data_parallel_external_lb", True),
        ("data_parallel_hybrid_lb", True),
        ("data_parallel_multi_port_external_lb", True),
    ],
)
def test_refused_flags(flag: str, value: Any) -> None:
    with pytest.raises(StartupRefused, match=f"--{flag.replace('_', '-')}"):
        serve.prepare(parsed(**{flag: value}), SteerConfig(), None)


def test_the_limits_are_not_given_twice() -> None:
    with pytest.raises(StartupRefused, match="additional-config"):
        serve.prepare(parsed(additional_config={"steer_vllm": {}}), SteerConfig(), None)


@pytest.mark.parametrize("name", ["VLLM_USE_RUST_FRONTEND", "VLLM_SKIP_MODEL_NAME_VALIDATION", "VLLM_API_KEY"])
def test_refused_variables(name: str) -> None:
    (line,) = variables.refused({name: "1"})
    assert line.startswith(f"{name} is set: ")
    for off in ({}, {name: ""}, {name: "0"}, {name: "False"}):
        assert variables.refused(off) == []


def test_refused_variables_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(StartupRefused, match="VLLM_USE_RUST_FRONTEND"):
        serve.serve("m", SteerConfig(), None, host="127.0.0.1", port=0, flags=[])


def test_a_list_of_plugins_is_kept() -> None:
    assert serve.allowed_plugins("mine,theirs") == "mine,theirs,steer_vllm"
    assert serve.allowed_plugins("steer_vllm,mine") == "steer_vllm,mine"
    assert serve.allowed_plugins("") == "steer_vllm"


def test_without_a_list_every_plugin_that_vllm_would_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoint plugins of others stay off, as without the variable."""
    found = EntryPoints(
        [
            EntryPoint("steer_vllm", "a:b", "vllm.general_plugins"),
            EntryPoint("other", "a:b", "vllm.general_plugins"),
            EntryPoint("stats", "a:b", "vllm.stat_logger_plugins"),
            EntryPoint("board", "a:b", "vllm.platform_plugins"),
            EntryPoint("routes", "a:b", "vllm.endpoint_plugins"),
            EntryPoint("unrelated", "a:b", "console_scripts"),
        ]
    )
    monkeypatch.setattr(serve, "entry_points", lambda: found)
    assert set(serve.allowed_plugins(None).split(",")) == {"steer_vllm", "other", "stats", "board"}
