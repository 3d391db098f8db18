"""Which tokens of a request an intervention edits.

Positions are absolute token indices of the request and are resolved once, when the prompt's length is known; nothing
here looks at a token, a batch or a step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from .errors import InvalidIntervention

OPEN = 2**31 - 1
"""The stop of a span without an end; fits the int32 tables."""

_KINDS = ("all", "prompt", "generated", "response", "first_last")
_FIRST_LAST = re.compile(r"f(\d{1,5})\+l(\d{1,5})(/untied)?", re.ASCII)
_MOST = 99_999
"""Largest first and last: what the text form has room for."""


class Span(NamedTuple):
    """Positions start <= p < stop, edited by one part of an intervention."""

    start: int
    stop: int
    part: int


@dataclass(frozen=True)
class Positions:
    """A choice of tokens.

    all        every token
    prompt     the prompt
    generated  the tokens after the prompt
    response   the tokens that predict the answer: the prompt's last one and all after it (ITI's "last position")
    first_last the prompt's first `first` and last `last` tokens (ReFT, Wu et al. 2024, section 4.1); tied: one edit
               for both; untied: part 0 edits the first, part 1 the last
    """

    kind: str
    first: int = 0
    last: int = 0
    tied: bool = True

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InvalidIntervention(
                f"positions: {self.kind!r} is none of {', '.join(_KINDS[:4])} or f<first>+l<last>", param="positions"
            )
        if self.kind != "first_last" and (self.first or self.last or not self.tied):
            raise InvalidIntervention(f"positions: {self.kind!r} takes no first, last or tied", param="positions")
        if self.kind == "first_last" and (self.first < 0 or self.last < 0 or self.first + self.last == 0):
            raise InvalidIntervention("positions: f<first>+l<last> needs at least one token", param="positions")
        if max(self.first, self.last) > _MOST:
            raise InvalidIntervention(f"positions: first and last are at most {_MOST}", param="positions")

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Read `all`, `prompt`, `generated`, `response`, `f7+l7` or `f7+l7/untied`.

        Errors: `InvalidIntervention` for anything else.
        """
        if not isinstance(text, str):
            raise InvalidIntervention(f"positions: expected text, got {type(text).__name__}", param="positions")
        match = _FIRST_LAST.fullmatch(text)
        if match:
            return cls("first_last", int(match[1]), int(match[2]), tied=match[3] is None)
        if text == "first_last":
            raise InvalidIntervention("positions: write f<first>+l<last>, for example f7+l7", param="positions")
        return cls(text)

    def __str__(self) -> str:
        if self.kind != "first_last":
            return self.kind
        return f"f{self.first}+l{self.last}" + ("" if self.tied else "/untied")

    @property
    def parts(self) -> int:
        """How many separate edits these positions need."""
        return 1 if self.tied else 2

    @property
    def needs_prompt_end(self) -> bool:
        """Whether the tokens depend on where the prompt ends, which scored text does not tell."""
        return self.kind != "all"

    def spans(self, prompt_len: int) -> list[Span]:
        """The spans for a prompt of `prompt_len` tokens (at least 1), in order, without overlap or empty ones."""
        n = prompt_len
        if self.kind == "all":
            spans = [Span(0, OPEN, 0)]
        elif self.kind == "prompt":
            spans = [Span(0, n, 0)]
        elif self.kind == "generated":
            spans = [Span(n, OPEN, 0)]
        elif self.kind == "response":
            spans = [Span(n - 1, OPEN, 0)]
        else:
            first, last = min(self.first, n // 2), min(self.last, (n + 1) // 2)
            spans = [Span(0, first, 0), Span(n - last, n, 0 if self.tied else 1)]
        return [span for span in spans if span.start < span.stop]
