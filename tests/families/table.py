"""docs/models.md from what was observed: `python -m families.table`, in the folder `tests`, runs all and writes it.

Knows how the page looks; what is true is found by `observe`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from steer_vllm.edit import Site

from .observe import CASES, Observation, title

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_KINDS = {site: [kind for at, kind in CASES if at is site] for site in Site}

_HEAD = """# Model families

Each row is a tiny model of random weights, served by vLLM in float32 in one mixed batch: every site with additive and
low-rank edits (at the attention output also head offsets), on prompts and while decoding, composed and scaled, beside
requests without any. *Exact* means: the tokens of transformers with `steer_vllm.hf.steered`, its log-probabilities
within 1e-4, and on V1 in one rank for unsteered requests those of vLLM without the plugin to the last bit. A model
that is not listed is bound by the same rules, or refused with the layer, the site and the reason.

Written by `python -m families.table` in the folder `tests` and checked by `tests/families`.

"""

_FOOT = """
## Where the sites are

- **Attention output** is what the attention's output projection returns, with its bias, before a norm or a multiplier
  that follows (Gemma 2 and 3, OLMo 2, EXAONE 4; Granite, Falcon-H1). Head offsets come to `W_o v` there, which is what
  LoFiT defines.
- **MLP output** is what the layer's MLP, or its mixture of experts with shared experts, returns, before a norm or a
  multiplier that follows. OPT's is that of `fc2`. Where two modules add up to it (Granite MoE hybrids) there is no one
  place for it.
- **Block output** is the residual stream after the layer: what the next layer starts from. vLLM's layers with fused
  norms hand it on as two tensors, hidden and residual; whether their sum or hidden alone carries it is read from the
  layer (`engine/residual.py`).
- In parallel blocks (Falcon, GPT-NeoX, Command-R) attention and MLP read the same input: an edit of the attention
  output does not reach the MLP of its layer.

## What is refused

- A layer without attention heads (Mamba, linear attention, short convolutions) has no attention output: an artifact
  that names it there is refused when it is loaded. Its MLP and block outputs are served. Layers keep their numbers.
- Modules that several layers share are bound in none of them.
- An artifact whose heads are not those of the layer: the number of heads and their size are taken from the model's
  config, `v_head_dim` before `head_dim` (latent attention puts out fewer values than its queries have).
- Models whose layers return anything else than token rows, alone or with a residual.

## Quantised weights

Additive and low-rank edits do not touch weights. Head offsets are pushed through the quantised output projection, each
input by itself, so they are those of the weights as stored. A projection that also rounds its inputs (W8A8, fp8) does
so in every step, and the rounding of `z + v` is not that of `z`: there head offsets are approximate, within that
rounding. A worker warns when its projections are quantised. Offsets belong to the weights they were loaded with:
changing weights in place (`weight_transfer_config`) is refused. The family with 4-bit weights runs in float16, the only
kind vLLM's CPU kernel knows; *exact* means within 0.02 there.

## Tensor parallelism

Ranks push their own heads and add up. Where a layer leaves its sum to a later reduction (parallel blocks), offsets and
constants are added on one rank; the low-rank part is linear, so each rank edits its share.
"""


def page(observations: Sequence[Observation], second: Sequence[Observation], parallel: Sequence[Observation]) -> str:
    """The whole page. second: families that also ran on Runner V2; parallel: on two tensor-parallel ranks."""
    also = {observation.family for observation in second}
    on_ranks = {observation.family for observation in parallel}
    lines = [
        "| family | model code | attention output | MLP output | block output | runners | tensor parallel 2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in observations:
        cells = [_cell(found, site) for site in Site]
        runners = "V1, V2" if found.family in also else "V1"
        lines.append(
            f"| {found.family} | {found.code} | {' | '.join(cells)} | {runners} | "
            f"{'exact' if found.family in on_ranks else ''} |"
        )
    return _HEAD + "\n".join(lines) + "\n" + _FOOT


def _cell(found: Observation, site: Site) -> str:
    """What is exact at a site, and what was refused there."""
    names = {title(site, kind): kind for kind in _KINDS[site]}
    exact = [kind for name, kind in names.items() if name in found.exact]
    parts = [f"exact: {', '.join(exact)}"] if exact else []
    said = {name.removeprefix("lacking."): message for name, message in found.refusals.items()}
    refused = sorted({_reason(said[name]) for name in names if name in said})
    return "; ".join(parts + [f"refused in {reason}" for reason in refused]) or "not known"


def _reason(message: str) -> str:
    """`FOLDER: edits SITE of layer 0 (TYPE), which could not be bound: WHY` without its folder."""
    found = re.search(r"of (layer \d+ \(\w+\)), which could not be bound: (.*)", message)
    return f"{found[1]}: {found[2]}" if found else message


def main() -> int:
    import conftest  # noqa: F401  what it sets, the engines inherit

    from .everything import everything

    with tempfile.TemporaryDirectory() as folder:
        found = everything(Path(folder))
    every = (*found.first, *found.second, *found.parallel)
    faults = [f"{one.family}: {fault}" for one in every for fault in one.faults]
    print("\n".join(faults))
    if not faults:
        PAGE.write_text(page(found.first, found.second, found.parallel))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
