"""Who may do what: one static key for requests, one for administration.

Only digests are kept, and they are compared in constant time. Knows paths and headers, not what they lead to.
"""

from __future__ import annotations

import hashlib
import hmac

from ..errors import AdminRequired, InvalidKey

OPEN_PATHS = frozenset({"/health"})
"""Answered without a key: load balancers have none. /metrics is not among them, since it names interventions."""

OPERATOR_PATHS = frozenset(
    {
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/adapters",
        "/collective_rpc",
        "/server_info",
        "/kv_event_sources",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/release_kv_cache_memory",
        "/pause",
        "/resume",
        "/is_paused",
        "/abort_requests",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/update_weight_version",
        "/weight_info",
        "/weight_checker",
        "/get_world_size",
        "/start_profile",
        "/stop_profile",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/fault_tolerance/apply",
        "/fault_tolerance/status",
    }
)
"""vLLM's routes that change, stop or show the engine for everyone. Most are there only in its development mode."""

ADMIN_PATHS = frozenset({"/v1/load_intervention", "/v1/unload_intervention"}) | OPERATOR_PATHS

_ADMIN_FOLDERS = ("/adapters/",)
"""What is below them is for the admin key too."""


class Keys:
    """Without an API key every path but the admin ones is open; without an admin key those are closed to everyone."""

    def __init__(self, api_key: str | None, admin_key: str | None) -> None:
        self._api = _digest(api_key) if api_key else None
        self._admin = _digest(admin_key) if admin_key else None

    def check(self, path: str, authorization: str | None) -> None:
        """Errors: `InvalidKey` (401) for no or a wrong key; `AdminRequired` (403) where only the admin key will do."""
        scheme, _, secret = (authorization or "").partition(" ")
        given = _digest(secret.strip()) if scheme.lower() == "bearer" else b""
        is_admin = self._admin is not None and hmac.compare_digest(given, self._admin)
        if path in OPEN_PATHS or is_admin:
            return
        if self._api is not None and not hmac.compare_digest(given, self._api):
            raise InvalidKey("a valid API key is needed: Authorization: Bearer <key>")
        if path in ADMIN_PATHS or path.startswith(_ADMIN_FOLDERS):
            raise AdminRequired(f"{path} needs the admin key, which the server is given at its start")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
