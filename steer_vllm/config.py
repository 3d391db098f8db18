"""The engine's limits: how much of everything there is.

Everything that shapes a compiled graph is here, so that one JSON object can go into vLLM's compile-cache key. Knows no
request and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .edit import Site
from .errors import StartupRefused

MAX_SCALE = 1e4
"""What no configuration may exceed: sums of scaled edits stay far from float32's limits."""

MAX_MEMORY_GIB = 1e6
"""More than any machine has."""

SPARE_ROWS = 8
"""Rows beyond what the front hands out, for requests whose release is still on its way to the engine."""


@dataclass(frozen=True)
class SteerConfig:
    """Row counts are per table; row 0 of each is the identity and not counted.

    additive_rows, low_rank_rows: distinct edits that requests in flight can use at once.
    max_rank: rank of a low-rank row. additive_sites, low_rank_sites: where tables exist.
    per_request: components of one request. max_scale: largest |scale|.
    memory_gib: host memory that what is loaded may take in each worker, GiB.
    """

    additive_rows: int = 256
    low_rank_rows: int = 64
    max_rank: int = 16
    additive_sites: tuple[Site, ...] = (Site.ATTENTION_OUTPUT, Site.BLOCK_OUTPUT)
    low_rank_sites: tuple[Site, ...] = (Site.BLOCK_OUTPUT,)
    per_request: int = 4
    max_scale: float = 8.0
    memory_gib: float = 8.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be a whole number from {least} up, got {getattr(self, name)!r}"
            for name, least in {"additive_rows": 1, "low_rank_rows": 0, "max_rank": 1, "per_request": 1}.items()
            if type(getattr(self, name)) is not int or getattr(self, name) < least
        ]
        for name, most in {"max_scale": MAX_SCALE, "memory_gib": MAX_MEMORY_GIB}.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= most:
                problems.append(f"{name} must be above 0 and at most {most:g}, got {value!r}")
        known = {site.value: site for site in Site}
        for name in ("additive_sites", "low_rank_sites"):
            sites = getattr(self, name)
            if isinstance(sites, (list, tuple)) and all(isinstance(site, str) and site in known for site in sites):
                object.__setattr__(self, name, tuple(sorted({known[site] for site in sites})))
            else:
                problems.append(f"{name} must be a list of {list(known)}, got {sites!r}")
        if problems:
            raise StartupRefused("steer_vllm settings: " + "; ".join(problems))
        if self.low_rank_rows == 0:
            object.__setattr__(self, "low_rank_sites", ())

    @property
    def additive_table_rows(self) -> int:
        """Rows of the additive tables: the identity, those the front counts, and the spare ones."""
        return 1 + self.additive_rows + SPARE_ROWS

    @property
    def low_rank_table_rows(self) -> int:
        """Rows of the low-rank tables, likewise."""
        return 1 + self.low_rank_rows + SPARE_ROWS if self.low_rank_rows else 1

    @property
    def memory_bytes(self) -> int:
        """`memory_gib` in bytes."""
        return int(self.memory_gib * (1 << 30))

    @property
    def max_segments(self) -> int:
        """Segments of one request: each component starts and stops at most two spans."""
        return 4 * self.per_request

    def share(self, servers: int) -> SteerConfig:
        """The rows that each of several fronts over the same tables may hand out.

        Errors: `StartupRefused` when a share could not serve every request that the whole could.
        """
        share = replace(self, additive_rows=self.additive_rows // servers, low_rank_rows=self.low_rank_rows // servers)
        for name in ("additive_rows", "low_rank_rows"):
            whole, part = getattr(self, name), getattr(share, name)
            if part < min(whole, self.max_segments):
                raise StartupRefused(
                    f"{name} {whole}: {servers} API servers get {part} each, and a request may need "
                    f"{self.max_segments}; set it to {servers * self.max_segments}, or lower per_request "
                    f"{self.per_request} or --api-server-count"
                )
        return share

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SteerConfig:
        """Read the JSON form. Errors: `StartupRefused` for unknown settings and bad values."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise StartupRefused(f"steer_vllm settings: unknown: {', '.join(sorted(unknown))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        plain = asdict(self)
        for name in ("additive_sites", "low_rank_sites"):
            plain[name] = [site.value for site in plain[name]]
        return plain
