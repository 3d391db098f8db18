"""The names users know: which content each points to, and who still uses it.

A name points to a digest and can be moved to another; requests in flight keep the one they started with. Knows neither
how content is loaded nor who asks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import ArtifactExists, InvalidIntervention, ModelNotFound
from .intervention import Intervention
from .plan import PartSummary, Summary
from .positions import Positions

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """A published intervention."""

    name: str
    source: str
    digest: str
    method: str
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    rank: int
    positions: Positions
    default_scale: float
    base_model: str
    description: str
    prompt_format: str | None
    summary: Summary

    @classmethod
    def of(cls, name: str, source: str, intervention: Intervention, summary: Summary) -> Entry:
        """What the catalog keeps of a loaded artifact."""
        settings = intervention.method
        return cls(
            name=name,
            source=source,
            digest=intervention.digest,
            method=settings.name,
            sites=tuple(site.value for site in settings.sites),
            layers=settings.layers,
            rank=max(part.rank for part in summary.parts),
            positions=intervention.positions,
            default_scale=intervention.default_scale,
            base_model=intervention.card.base_model,
            description=intervention.card.description,
            prompt_format=intervention.card.prompt_format,
            summary=summary,
        )

    def to_wire(self) -> dict[str, Any]:
        """All of it as plain data, for another process."""
        return {
            **vars(self),
            "positions": str(self.positions),
            "sites": list(self.sites),
            "layers": list(self.layers),
            "summary": [part._asdict() for part in self.summary.parts],
        }

    @classmethod
    def from_wire(cls, plain: Mapping[str, Any]) -> Entry:
        """Read back what `to_wire` gave."""
        parts = tuple(PartSummary(**part) for part in plain["summary"])
        return cls(
            **{
                **plain,
                "positions": Positions.parse(plain["positions"]),
                "sites": tuple(plain["sites"]),
                "layers": tuple(plain["layers"]),
                "summary": Summary(plain["digest"], parts),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """What /v1/interventions shows."""
        return {
            "id": self.name,
            "object": "intervention",
            "digest": self.digest,
            "method": self.method,
            "sites": list(self.sites),
            "layers": list(self.layers),
            "rank": self.rank,
            "positions": str(self.positions),
            "default_scale": self.default_scale,
            "base_model": self.base_model,
            "description": self.description,
            "prompt_format": self.prompt_format,
            "source": self.source,
        }


class Snapshot(NamedTuple):
    """The names at an epoch, as what has changed since an earlier one: the entries that are new and the names that are
    gone. opened: the artifacts of the start are loaded; unused: contents that may be freed."""

    epoch: int
    opened: bool
    entries: tuple[Entry, ...]
    gone: tuple[str, ...]
    unused: tuple[str, ...]


def check_name(name: object, base_model: str = "") -> str:
    """A name that may be published.

    Errors: `InvalidIntervention` unless it is [a-z0-9][a-z0-9._-]{0,63} and not the base model's.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidIntervention(f"name {name!r}: expected [a-z0-9][a-z0-9._-]{{0,63}}", param="name")
    if name == base_model:
        raise InvalidIntervention(f"name {name!r} is the base model's", param="name")
    return name


class Catalog:
    """Published names and the number of requests in flight per digest. For one thread or event loop.

    What a request costs here does not depend on how many names there are.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._names: Counter[str] = Counter()  # digest -> names that point to it
        self._users: dict[str, int] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def get(self, name: str) -> Entry:
        """Errors: `ModelNotFound`."""
        if name not in self._entries:
            raise ModelNotFound(f"no intervention named {name!r} is loaded", param="interventions")
        return self._entries[name]

    def check_free(self, name: str, digest: str, replace: bool) -> None:
        """Errors: `ArtifactExists` when the name points to other content and may not be moved."""
        known = self._entries.get(name)
        if known is not None and known.digest != digest and not replace:
            raise ArtifactExists(
                f"{name!r} is loaded with other content (sha256 {known.digest[:12]}): say load_inplace"
            )

    def publish(self, entry: Entry) -> Entry | None:
        """Make a name visible; returns what it pointed to before."""
        before = self._entries.get(entry.name)
        self._entries[entry.name] = entry
        self._names[entry.digest] += 1
        self._forget(before)
        return before

    def withdraw(self, name: str) -> Entry:
        """Make a name invisible at once. Errors: `ModelNotFound`."""
        entry = self.get(name)
        del self._entries[name]
        self._forget(entry)
        return entry

    def update(self, entries: Iterable[Entry], gone: Iterable[str]) -> None:
        """Take changes over: these names are visible now, as they are here, and those are gone."""
        for name in gone:
            self._forget(self._entries.pop(name, None))
        for entry in entries:
            self.publish(entry)

    def enter(self, digests: set[str]) -> None:
        """One more request uses these contents."""
        for digest in digests:
            self._users[digest] = self._users.get(digest, 0) + 1

    def leave(self, digests: set[str]) -> set[str]:
        """One request fewer; returns the contents that nothing names or uses any more."""
        for digest in digests:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]
        return {digest for digest in digests if self.is_unused(digest)}

    def is_unused(self, digest: str) -> bool:
        """No name points to it and no request uses it."""
        return not self.names(digest) and digest not in self._users

    def names(self, digest: str) -> bool:
        """A name points to it."""
        return digest in self._names

    @property
    def named(self) -> set[str]:
        """Contents that a name points to."""
        return set(self._names)

    @property
    def needed(self) -> set[str]:
        """Contents that a name points to or a request uses."""
        return self.named | set(self._users)

    def _forget(self, entry: Entry | None) -> None:
        """A name points to it no more."""
        if entry is not None:
            self._names[entry.digest] -= 1
            if not self._names[entry.digest]:
                del self._names[entry.digest]
