"""The README.md of an artifact: what it does, what it was made of, results, how to serve it. Only text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..intervention import Intervention
from ..methods import Direction, LoFiT, LoReFT


def model_card(name: str, intervention: Intervention, plots: Mapping[str, str]) -> str:
    """Markdown with the Hub's front matter. plots: title and relative path of each picture."""
    card, base = intervention.card, intervention.base
    parts = [
        "---\nlibrary_name: steer-vllm\n"
        f"base_model: {json.dumps(card.base_model)}\ntags: [steer-vllm, {intervention.method.name}]\n---",
        f"# {name}",
        f"{card.description}\n\n"
        f"- base model: `{card.base_model}` ({base.num_layers} layers, {base.num_heads} heads, hidden size "
        f"{base.hidden_size}; weights `{(base.weights or 'unknown')[:12]}`)\n"
        f"- method: {describe(intervention)}\n"
        f"- numbers learnt: {sum(tensor.numel() for tensor in intervention.tensors.values()):,}\n"
        f"- positions: `{intervention.positions}`; default scale {intervention.default_scale:g}\n"
        f"- digest: `sha256:{intervention.digest}`",
    ]
    if card.prompt_format:
        parts.append(f"## Prompt format\n\n```text\n{card.prompt_format}\n```")
    parts.append(f"## Results\n\n{_results(card.metrics)}")
    parts += [f"![{title}]({path})" for title, path in plots.items()]
    parts.append(
        "## Use\n\n"
        f"```bash\nsteer-vllm serve {card.base_model} --artifact {name}=PATH_OF_THIS_FOLDER\n```\n\n"
        f"Then ask for the model `base:{name}`, or name it in the field "
        f'`interventions: [{{"name": "{name}", "scale": 1.0}}]` of any request.\n\n'
        "In transformers:\n\n"
        "```python\nfrom steer_vllm import Intervention\nfrom steer_vllm.hf import steered\n\n"
        'with steered(model, Intervention.load("PATH_OF_THIS_FOLDER")):\n    model.generate(...)\n```'
    )
    parts.append(f"## Training\n\n```json\n{json.dumps(dict(card.training), indent=2)}\n```")
    return "\n\n".join(parts) + "\n"


def describe(intervention: Intervention) -> str:
    """The method in a few words."""
    method = intervention.method
    if isinstance(method, LoFiT):
        heads = ", ".join(f"{layer}.{head}" for layer, head in method.heads)
        total = intervention.base.num_layers * intervention.base.num_heads
        return f"LoFiT offsets of {len(method.heads)} of {total} heads (layer.head: {heads})"
    if isinstance(method, LoReFT):
        return f"LoReFT of rank {method.rank}, layers {_list(method.layers)}, {'tied' if method.tied else 'untied'}"
    if isinstance(method, Direction):
        return (
            f"direction at the {method.site.value}, layers {_list(method.layers)}, coefficient {method.coefficient:g}"
        )
    return method.name


def _list(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _results(metrics: Mapping[str, Any]) -> str:
    """A table of base against steered where both were measured, else what is known."""
    base, steered = metrics.get("base"), metrics.get("steered")
    lines = [f"- {name}: {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float))]
    if base and steered:
        lines += ["", f"On `{metrics['eval_data']}`:", "", "| metric | base | steered |", "|---|---|---|"]
        lines += [f"| {name} | {base[name]:.4g} | {steered[name]:.4g} |" for name in base]
    return "\n".join(lines) or "Nothing was measured: give `--eval-data`."
