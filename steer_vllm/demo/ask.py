"""Questions to a server through the openai client, all at once in one mixed batch.

Knows models and prompts as text; what the answers should be is not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

_AT_ONCE = 256  # connections; vLLM batches what arrives together
_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """A prompt, and who is to answer it. interventions: the request's field, or None to leave it out."""

    prompt: str
    model: str
    interventions: tuple[dict[str, Any], ...] | None = None
    stream: bool = False


def ask(url: str, questions: Sequence[Question]) -> list[str]:
    """The greedy answers, in order. Errors: the openai client's."""
    return asyncio.run(_ask(url, questions))


async def _ask(url: str, questions: Sequence[Question]) -> list[str]:
    free = asyncio.Semaphore(_AT_ONCE)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:

        async def one(question: Question) -> str:
            async with free:
                return await _answer(client, question)

        return list(await asyncio.gather(*map(one, questions)))


async def _answer(client: AsyncOpenAI, question: Question) -> str:
    asked: dict[str, Any] = {
        "model": question.model,
        "prompt": question.prompt,
        "max_tokens": _TOKENS,
        "temperature": 0,
        "extra_body": {} if question.interventions is None else {"interventions": list(question.interventions)},
    }
    if not question.stream:
        text: str = (await client.completions.create(**asked)).choices[0].text
        return text.strip()
    chunks = await client.completions.create(**asked, stream=True)
    return "".join([chunk.choices[0].text async for chunk in chunks]).strip()
