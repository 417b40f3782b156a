"""POST /v1/completions: texts, or token ids, continued as they are."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request

from cvxq.serve.decoding import (
    Ended,
    Order,
    Piece,
    Scored,
    generate_choice,
    score_prompt,
)
from cvxq.serve.engine import Job
from cvxq.serve.orders import completion_orders
from cvxq.serve.routing import post
from cvxq.serve.schemas import CompletionRequest
from cvxq.serve.served import Served
from cvxq.serve.server import DONE, server_of
from cvxq.serve.usage import Usage, finish_reason


@post("/v1/completions", CompletionRequest)
async def completions(body: CompletionRequest, request: Request) -> Any:
    """Continue one or several texts."""
    server = server_of(request)
    served = server.find(body.model)
    orders = await asyncio.to_thread(completion_orders, served, body)
    job = server.submit(request, _work(served, orders, body))
    answer = CompletionAnswer(served, body, len(orders))
    return await server.answer(request, job, answer.chunks if body.stream else None, answer.whole)


def _work(
    served: Served, orders: Sequence[Order], body: CompletionRequest
) -> Callable[[Job], None]:
    def work(job: Job) -> None:
        for choice, order in enumerate(orders):
            if body.echo:
                scored = () if order.top is None else tuple(score_prompt(served, order, job))
                text = served.tokenizer.decode(list(order.ids), skip_special_tokens=True)
                job.emit(Piece(choice, text, scored))
            if body.max_tokens:
                generate_choice(served, order, choice, job)
            else:
                served.count(len(order.ids), 0, 0)
                job.emit(Ended(choice, "length", (), len(order.ids), 0, 0))

    return work


class CompletionAnswer:
    """An answer as a stream of chunks, or as the one object that they add up to."""

    def __init__(self, served: Served, body: CompletionRequest, choices: int) -> None:
        """Begin an answer of so many choices to `body`."""
        self._served = served
        self._body = body
        self._usage = Usage()
        self._offsets = [0] * choices
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    async def chunks(self, events: AsyncIterator[Any]) -> AsyncIterator[dict[str, Any] | str]:
        """Yield the chunks that `events` make, and what ends a stream."""
        async for event in events:
            yield {**self._head, "choices": [self._choice(event)]}
        if self._body.stream_options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage.as_json()}
        yield DONE

    async def whole(self, events: AsyncIterator[Any]) -> dict[str, Any]:
        """Return the answer that the chunks add up to."""
        choices: list[dict[str, Any]] = []
        async for event in events:
            new = self._choice(event)
            if new["index"] == len(choices):
                choices.append(new)
                continue
            choice = choices[new["index"]]
            choice["text"] += new["text"]
            choice["finish_reason"] = new["finish_reason"]
            for name, values in (new["logprobs"] or {}).items():
                choice["logprobs"][name] += values
        return {**self._head, "choices": choices, "usage": self._usage.as_json()}

    def _choice(self, event: Piece | Ended) -> dict[str, Any]:
        if isinstance(event, Ended):
            self._usage.add(event, event.choice // self._body.n)
        return {
            "index": event.choice,
            "text": event.text if isinstance(event, Piece) else "",
            "logprobs": self._logprobs(event.choice, event.scored),
            "finish_reason": finish_reason(event.finish) if isinstance(event, Ended) else None,
        }

    def _logprobs(self, choice: int, scored: Sequence[Scored]) -> dict[str, list[Any]] | None:
        if self._body.logprobs is None:
            return None
        tokens = [self._text(item.token) for item in scored]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [item.logprob for item in scored],
            "top_logprobs": [self._top(item) for item in scored],
            "text_offset": offsets,
        }

    def _top(self, item: Scored) -> dict[str, float] | None:
        if item.logprob is None:
            return None
        return {self._text(token): logprob for token, logprob in item.top}

    def _text(self, token: int) -> str:
        return self._served.tokenizer.decode([token])
