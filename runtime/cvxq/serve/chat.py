"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request

from cvxq.serve.decoding import Ended, Piece, Scored, generate_choices
from cvxq.serve.orders import ChatOrders
from cvxq.serve.replies import Part
from cvxq.serve.routing import post
from cvxq.serve.schemas import ChatRequest
from cvxq.serve.served import Served
from cvxq.serve.server import DONE, server_of
from cvxq.serve.usage import Usage, finish_reason


@post("/v1/chat/completions", ChatRequest)
async def chat_completions(body: ChatRequest, request: Request) -> Any:
    """Answer a conversation."""
    server = server_of(request)
    served = server.find(body.model)
    chat = await asyncio.to_thread(ChatOrders, served, body)
    job = server.submit(request, generate_choices(served, chat.orders))
    answer = ChatAnswer(served, chat, body)
    return await server.answer(request, job, answer.chunks if body.stream else None, answer.whole)


class ChatAnswer:
    """An answer as a stream of chunks, or as the one object that they add up to."""

    def __init__(self, served: Served, chat: ChatOrders, body: ChatRequest) -> None:
        """Begin an answer to `body`."""
        self._served = served
        self._choices = [_Choice(index, chat, served) for index in range(body.n)]
        self._usage = Usage()
        self._body = body
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
        }

    async def chunks(self, events: AsyncIterator[Any]) -> AsyncIterator[dict[str, Any] | str]:
        """Yield the chunks that `events` make, and what ends a stream."""
        head = {**self._head, "object": "chat.completion.chunk"}
        async for choice in self._deltas(events):
            yield {**head, "choices": [choice]}
        if self._body.stream_options.include_usage:
            yield {**head, "choices": [], "usage": self._usage.as_json()}
        yield DONE

    async def whole(self, events: AsyncIterator[Any]) -> dict[str, Any]:
        """Return the answer that the chunks add up to."""
        async for choice in self._deltas(events):
            self._choices[choice["index"]].add(choice)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice.as_json() for choice in self._choices],
            "usage": self._usage.as_json(),
        }

    async def _deltas(self, events: AsyncIterator[Any]) -> AsyncIterator[dict[str, Any]]:
        async for event in events:
            choice = self._choices[event.choice]
            deltas = choice.take(event) if isinstance(event, Piece) else choice.end(event)
            for delta in deltas:
                yield delta
            if isinstance(event, Ended):
                self._usage.add(event)


class _Choice:
    """One choice of an answer, while it comes."""

    def __init__(self, index: int, chat: ChatOrders, served: Served) -> None:
        self._index = index
        self._reader = chat.reader()
        self._served = served
        self._has_begun = False
        self._calls = 0
        self._scored: list[dict[str, Any]] = []  # of text that is held back
        # What the deltas add up to.
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._logprobs: list[dict[str, Any]] | None = None
        self._finish: str | None = None

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the choices of the chunks that a piece of text makes."""
        self._note(piece.scored)
        return [self._delta(part) for part in self._reader.push(piece.text)]

    def end(self, ended: Ended) -> list[dict[str, Any]]:
        """Return the choices of the last chunks."""
        self._note(ended.scored)
        deltas = [self._delta(part) for part in self._reader.finish()]
        finish = "tool_calls" if self._reader.has_calls else finish_reason(ended.finish)
        return [*deltas, self._chunk({}, finish)]

    def add(self, choice: dict[str, Any]) -> None:
        """Add the choice of a chunk to the message."""
        delta = choice["delta"]
        for name in ("content", "reasoning_content"):
            if name in delta:
                self._message[name] = (self._message.get(name) or "") + (delta[name] or "")
        for call in delta.get("tool_calls", ()):
            calls = self._message.setdefault("tool_calls", [])
            calls.append({key: value for key, value in call.items() if key != "index"})
        if choice["logprobs"] is not None:
            self._logprobs = (self._logprobs or []) + choice["logprobs"]["content"]
        self._finish = choice["finish_reason"] or self._finish

    def as_json(self) -> dict[str, Any]:
        """Return the choice of the whole answer."""
        message = dict(self._message)
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None
        elif message["content"] is None:
            message["content"] = ""
        return {
            "index": self._index,
            "message": message,
            "logprobs": None if self._logprobs is None else {"content": self._logprobs},
            "finish_reason": self._finish,
        }

    def _delta(self, part: Part) -> dict[str, Any]:
        if part.call is not None:
            call = {
                "index": self._calls,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": part.call.name, "arguments": part.call.arguments},
            }
            self._calls += 1
            return self._chunk({"tool_calls": [call]})
        if part.thought:
            return self._chunk({"reasoning_content": part.thought})
        return self._chunk({"content": part.text})

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        if not self._has_begun:
            delta = {"role": "assistant", **delta}
            self._has_begun = True
        scored, self._scored = self._scored, []
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": {"content": scored} if scored else None,
            "finish_reason": finish,
        }

    def _note(self, scored: Sequence[Scored]) -> None:
        self._scored += [
            {
                **self._token(item.token, item.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in item.top],
            }
            for item in scored
        ]

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._served.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
