"""Who may do what: one static key for requests, one for administration.

Only digests are kept, and they are compared in constant time. Knows paths and headers, not what they lead to.
"""

from __future__ import annotations

import hashlib
import hmac

from ..errors import AdminRequired, InvalidKey

OPEN_PATHS = frozenset({"/health"})
"""Answered without a key: load balancers have none. /metrics is not among them, since it names interventions."""

ADMIN_PATHS = frozenset({"/v1/load_intervention", "/v1/unload_intervention"})


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
        if path in ADMIN_PATHS:
            raise AdminRequired(f"{path} needs the admin key, which the server is given at its start")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
