"""How much host memory the loaded interventions of one rank take, and the bound on it.

It counts and refuses, before anything is allocated; what the bytes hold is the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

from .errors import HostMemoryFull


class HostMemory:
    """Bytes by holder; `used`: of all together, at most `limit`. Several threads may load at once, so it locks."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._held: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def reserve(self, holder: Hashable, nbytes: int, where: str) -> None:
        """Hold that much in place of what the holder had. Errors: `HostMemoryFull`; nothing changes then."""
        with self._lock:
            used = self.used - self._held.get(holder, 0)
            if used + nbytes > self.limit:
                raise HostMemoryFull(
                    f"{where}: needs {nbytes / 1e6:.1f} MB of host memory, and {used / 1e6:.1f} of "
                    f"{self.limit / 1e6:.1f} MB are held by what is loaded: unload something, or start with a larger "
                    "memory_gib"
                )
            self._held[holder] = nbytes
            self.used = used + nbytes

    def hand_over(self, holder: Hashable, to: Hashable) -> None:
        """Another holds it now. Errors: `KeyError` for a holder that has reserved nothing."""
        with self._lock:
            self.used -= self._held.pop(to, 0)
            self._held[to] = self._held.pop(holder)

    def release(self, holder: Hashable) -> None:
        """Hold nothing; no error for who held nothing."""
        with self._lock:
            self.used -= self._held.pop(holder, 0)
