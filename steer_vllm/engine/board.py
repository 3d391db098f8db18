"""What the API servers of one `steer-vllm serve` tell each other without asking: a few numbers in shared memory.

Each server writes in its own place, so no two ever write the same. Knows neither names nor requests.
"""

from __future__ import annotations

import multiprocessing

_FAILURE_BYTES = 4096


class Board:
    """Shared with the processes it is given to when they are spawned; nothing of it is left when the last has ended.

    The memory is a file that is deleted as soon as it is open, so there is none to remove after a signal.
    """

    def __init__(self, servers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._epochs = context.RawArray("Q", servers)  # one aligned store each, so a reader sees the old or the new
        self._failure = context.RawArray("c", _FAILURE_BYTES)

    @property
    def latest(self) -> int:
        """The newest epoch that any server has announced; 0 at first."""
        return max(self._epochs)

    def announce(self, server: int, epoch: int) -> None:
        """Tell all servers that the book has changed up to this epoch."""
        self._epochs[server] = max(self._epochs[server], epoch)

    @property
    def failure(self) -> str:
        """Why a server refused to start; empty when none did."""
        return bytes(self._failure.value).decode(errors="ignore")

    @failure.setter
    def failure(self, message: str) -> None:
        self._failure.value = message.encode()[: _FAILURE_BYTES - 1]
