"""Sleep mode: what a worker keeps on the device is written again from host memory when the weights wake up.

vLLM's sleep unmaps the memory that was taken while the model was loaded, the tables' among it: level 1 brings its
content back, level 2 does not. What had which content is known on the host, so nothing depends on what vLLM saved.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from .worker import found_in


def install(worker: Any) -> None:
    """Ledger: replaces `Worker.sleep` and `Worker.wake_up` of a worker that has sleep mode on.

    What: before, loads that read weights end, and no other begins; after, tables, segments and token slots are written
    again. Why: a load would read memory that is unmapped, which ends the process; at level 2 requests would find no
    segments. As long as sleep mode is refused, only tests/gpu/test_sleep.py comes here. Since 0.26. Can go when vLLM
    lets a plugin keep memory out of its pool.
    """
    sleep, wake_up = worker.sleep, worker.wake_up

    @wraps(sleep)
    def finish_and_sleep(level: int = 1) -> Any:
        steering = found_in(worker)
        if steering is not None:
            for load in list(steering.pending.values()):
                load.thread.join()
            steering.asleep = True
        return sleep(level)

    @wraps(wake_up)
    def wake_and_restore(tags: list[str] | None = None) -> Any:
        result = wake_up(tags)
        steering = found_in(worker)
        if steering is not None and (tags is None or "weights" in tags):
            steering.restore()
            steering.asleep = False
        return result

    worker.sleep, worker.wake_up = finish_and_sleep, wake_and_restore
