"""Where the residual stream is when a decoder layer of vLLM returns a pair: in the sum of both, or in the first alone.

Models with fused norms hand on (hidden, residual), and the next layer adds them. Others return a pair of the same look,
yet the next layer starts from hidden and overwrites the residual it was given (Command-R, EXAONE 4, Granite hybrid,
PhiMoE). An edit of that residual would be lost without a trace, so the layer's own source decides. It does not
know edits.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from enum import Enum
from functools import cache
from typing import Any

from torch import nn

NAME = "residual"
"""What vLLM's layers call the parameter."""


class Stream(Enum):
    """What carries the residual stream out of a layer that returns a pair of tensors."""

    SUM = "hidden + residual"
    HIDDEN = "hidden"
    UNKNOWN = "not known"


def stream_of(layer: nn.Module) -> Stream:
    """SUM where the layer reads the residual it is given, HIDDEN where it overwrites it unread or takes none.

    UNKNOWN where it never uses it, its branches differ (Cohere 2 MoE in 0.33), or there is no source.
    """
    return _stream_of(inspect.unwrap(type(layer).forward))


@cache
def _stream_of(forward: Callable[..., Any]) -> Stream:
    parameters = set(inspect.signature(forward).parameters)
    if NAME not in parameters:
        takes_no_second = parameters <= {"self", "positions", "position_ids", "hidden_states"}
        return Stream.HIDDEN if takes_no_second else Stream.UNKNOWN
    try:
        source = inspect.getsource(forward)
    except OSError:
        return Stream.UNKNOWN
    tree = ast.parse(textwrap.dedent(source))
    uses = _first_uses(tree.body[0].body)  # type: ignore[attr-defined]
    return {frozenset({_READ}): Stream.SUM, frozenset({_WRITTEN}): Stream.HIDDEN}.get(uses, Stream.UNKNOWN)


_READ, _WRITTEN, _NEITHER = "read", "written", "neither"


def _first_uses(nodes: Iterable[ast.AST]) -> frozenset[str]:
    """How the residual is used first when these are evaluated in this order; one entry for each way through them."""
    uses = frozenset({_NEITHER})
    for node in nodes:
        if _NEITHER in uses:
            uses = uses - {_NEITHER} | _first_use(node)
    return uses


def _first_use(node: ast.AST) -> frozenset[str]:
    if isinstance(node, ast.Name):
        use = _READ if isinstance(node.ctx, ast.Load) else _WRITTEN
        return frozenset({use if node.id == NAME else _NEITHER})
    if isinstance(node, ast.If | ast.IfExp):
        body, orelse = ((node.body,), (node.orelse,)) if isinstance(node, ast.IfExp) else (node.body, node.orelse)
        return _first_uses([node.test, *body]) | _first_uses([node.test, *orelse])
    if isinstance(node, ast.BoolOp):  # may stop after any of its values
        return frozenset().union(*(_first_uses(node.values[: i + 1]) for i in range(len(node.values))))
    if isinstance(node, ast.For | ast.While):
        head = node.test if isinstance(node, ast.While) else node.iter
        return _first_uses([head]) | _first_uses([head, *node.body])
    if isinstance(node, ast.AugAssign):  # reads its target first
        return _first_uses([_as_read(node.target), node.value])
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if node.value else []
        return _first_uses([*([node.value] if node.value else []), *targets])
    return _first_uses(ast.iter_child_nodes(node))


def _as_read(target: ast.expr) -> ast.expr:
    return ast.Name(target.id, ast.Load()) if isinstance(target, ast.Name) else target
