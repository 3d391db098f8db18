"""Several servers over one engine: what one has answered the next request to any of them sees, and nothing is freed
that a request needs.

Random histories of loads, replacements, unloads, requests and cancellations at random servers; every answer is checked
against all changes of that name, every request against what the engine holds when it arrives there.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_vllm.config import SteerConfig
from steer_vllm.engine.board import Board
from steer_vllm.errors import ArtifactExists, EngineUnavailable, ModelNotFound
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.intervention import Card, Intervention
from steer_vllm.plan import PartSummary, Summary
from steer_vllm.server.names import _IDLE
from steer_vllm.server.registry import Registry
from steer_vllm.server.store import Store

from .clock import Clock
from .conftest import BASE, lofit
from .fake_core import FakeCore

NAMES, SOURCES, SERVERS = "xyz", 3, 3
SLOW = 0.02  # seconds, the longest pause of anything on its way
LONGEST = 600.0  # seconds, by the loop's clock
NEVER = float("inf")


@dataclass
class Change:
    """A name pointed to this content (None: to none), some time between the two."""

    content: str | None
    began: float
    ended: float = NEVER


class Record:
    """All changes of all names. A moment is a number that grows with every look."""

    def __init__(self) -> None:
        self._now = 0
        self._changes: dict[str, list[Change]] = defaultdict(lambda: [Change(None, -1, -1)])

    def now(self) -> int:
        self._now += 1
        return self._now

    @contextmanager
    def change(self, name: str, content: str | None) -> Iterator[None]:
        """An error of ours changes nothing; a cancelled change may have happened, or happen later."""
        change = Change(content, self.now())
        self._changes[name].append(change)
        try:
            yield
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._changes[name].remove(change)
            raise
        change.ended = self.now()

    def check(self, name: str, content: str | None, began: float) -> None:
        """A request that began then and was decided now may have seen this, unless all of that was over before."""
        changes = self._changes[name]
        for seen in (change for change in changes if change.content == content):
            if not any(seen.ended < other.began and other.ended < began for other in changes):
                return
        raise AssertionError(f"{name} was seen as {content} at {began}: {changes}")


class Engine:
    """Loads and frees slowly, admits what is loaded and not being freed, and notices who interferes."""

    def __init__(self, draw: random.Random) -> None:
        self.loaded: set[str] = set()
        self._closing: set[str] = set()
        self._users: Counter[str] = Counter()
        self._at_work: Counter[str] = Counter()
        self._draw = draw

    @contextmanager
    def _alone(self, digest: str) -> Iterator[None]:
        assert not self._at_work[digest], "a load and a free of one content at once"
        self._at_work[digest] += 1
        try:
            yield
        finally:
            self._at_work[digest] -= 1

    async def load(self, folder: str, digest: str) -> Summary:
        with self._alone(digest):
            await asyncio.sleep(self._draw.random() * SLOW)
            if self._draw.random() < 0.1:
                raise EngineUnavailable("a rank is tired")
            self.loaded.add(digest)
            self._closing.discard(digest)
            await asyncio.sleep(self._draw.random() * SLOW)
        return Summary(digest, (PartSummary(True, 0, 1.0),))

    async def unload(self, digest: str) -> bool:
        with self._alone(digest):
            await asyncio.sleep(self._draw.random() * SLOW)
            self._closing.add(digest)
            if self._users[digest]:
                return False
            self.loaded.discard(digest)
            self._closing.discard(digest)
            await asyncio.sleep(self._draw.random() * SLOW)
            return True

    async def base(self) -> Fingerprint:
        return BASE

    async def settle(self) -> None:
        await asyncio.sleep(self._draw.random() * SLOW)

    def admit(self, digest: str) -> None:
        assert digest in self.loaded, "a request finds its content gone"
        assert digest not in self._closing, "a request is turned away"
        self._users[digest] += 1

    def release(self, digest: str) -> None:
        self._users[digest] -= 1


class History:
    """One random history."""

    def __init__(self, seed: int, store: Path) -> None:
        self.draw = random.Random(seed)
        self.engine = Engine(self.draw)
        self.core = FakeCore(SLOW, seed)
        self.record = Record()
        self.done: Counter[str] = Counter()
        board = Board(SERVERS)
        books = [self.core.client(server, SERVERS) for server in range(SERVERS)]
        self.servers = [Registry(self.engine, book, board, Store(store), SteerConfig(), ("tiny",)) for book in books]

    async def run(self, users: int, steps: int) -> None:
        for server in self.servers:
            server.names.follow()
        await asyncio.gather(*(self.user(steps) for _ in range(users)))
        assert all(self.done[kind] for kind in ("load", "request")), "nothing has happened"
        await asyncio.sleep(20 * _IDLE)  # a name may still be published for a user who has left
        for name in NAMES:
            with suppress(ModelNotFound):
                await self.servers[0].unload(name)
        await asyncio.sleep(20 * _IDLE)
        book = self.core.book
        assert not self.engine.loaded
        assert (book._known, book._turns) == (set(), {})
        for server in self.servers:
            assert not server.catalog.needed
            assert not server._freeing
            await server.names.close()

    async def user(self, steps: int) -> None:
        for _ in range(steps):
            await asyncio.sleep(self.draw.random() * SLOW * 2)
            server, name = self.draw.choice(self.servers), self.draw.choice(NAMES)
            kind = self.draw.choices([self.request, self.load, self.unload], [6, 3, 2])[0]
            task = asyncio.create_task(kind(server, name))
            if self.draw.random() < 0.15:
                await asyncio.sleep(self.draw.random() * SLOW * 4)
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()

    async def load(self, server: Registry, name: str) -> None:
        source = f"s{self.draw.randrange(SOURCES)}"
        content = DIGESTS[source]
        with suppress(ArtifactExists, EngineUnavailable), self.record.change(name, content):
            await server.load(name, source, load_inplace=self.draw.random() < 0.6)
            self.done["load"] += 1

    async def unload(self, server: Registry, name: str) -> None:
        began = self.record.now()
        try:
            with self.record.change(name, None):
                await server.unload(name)
                self.done["unload"] += 1
        except ModelNotFound:
            self.record.check(name, None, began)

    async def request(self, server: Registry, name: str) -> None:
        began = self.record.now()
        await server.refresh()
        try:
            digest = server.catalog.get(name).digest
        except ModelNotFound:
            self.record.check(name, None, began)
            return
        server.enter({digest})
        try:
            self.record.check(name, digest, began)
            await asyncio.sleep(self.draw.choice([0, 1, 30]) * SLOW)  # waits for rows, is tokenised, is sent
            self.engine.admit(digest)
            self.done["request"] += 1
            ends_in = self.draw.random() * SLOW * 20
            asyncio.get_running_loop().call_later(ends_in, self.engine.release, digest)
            await asyncio.sleep(ends_in + self.draw.choice([-SLOW, SLOW]))  # a client may leave before
        finally:
            server.leave({digest})


DIGESTS: dict[str, str] = {}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for i in range(SOURCES):
        method, tensors = lofit(i)
        artifact = Intervention(method, tensors, BASE, method.positions, card=Card("tiny"))
        artifact.save(folder / f"s{i}")
        DIGESTS[f"s{i}"] = artifact.digest
    return folder


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_history(store: Path, seed: int) -> None:
    with asyncio.Runner(loop_factory=Clock) as runner:

        async def run() -> None:
            async with asyncio.timeout(LONGEST):
                await History(seed, store).run(users=8, steps=12)

        runner.run(run())
