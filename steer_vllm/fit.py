"""Whether an engine can serve an artifact: the one check that every front and every rank makes.

Knows limits and shapes; weights only as zeros.
"""

from __future__ import annotations

from .config import SteerConfig
from .errors import ArtifactInvalid
from .fingerprint import Fingerprint
from .intervention import Intervention
from .packed import check_tables


def check_fit(intervention: Intervention, base: Fingerprint, config: SteerConfig, where: str) -> None:
    """Refuse another base model, a default scale beyond the limit, sites and ranks without tables.

    Errors: `ArtifactInvalid` naming what was found and what is served.
    """
    intervention.check_base(base, where)
    if abs(intervention.default_scale) > config.max_scale:
        raise ArtifactInvalid(
            f"{where}: default_scale {intervention.default_scale:g}, max_scale is {config.max_scale:g}"
        )
    parts = intervention.compile(lambda layer, heads: heads.new_zeros(base.hidden_size))
    check_tables(parts, config, where)
