"""POST /v1/responses, for text; nothing is kept on the server."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from cvxq.serve.decoding import Ended, Piece, generate_choices
from cvxq.serve.errors import as_api_error
from cvxq.serve.orders import ResponseOrder
from cvxq.serve.routing import post
from cvxq.serve.schemas import ResponsesRequest
from cvxq.serve.served import Served
from cvxq.serve.server import server_of
from cvxq.serve.usage import Usage, finish_reason


@post("/v1/responses", ResponsesRequest)
async def responses(body: ResponsesRequest, request: Request) -> Any:
    """Answer a text or a list of messages."""
    server = server_of(request)
    served = server.find(body.model)
    asked = await asyncio.to_thread(ResponseOrder, served, body)
    job = server.submit(request, generate_choices(served, [asked.order]))
    answer = ResponseAnswer(served, asked, body)
    return await server.answer(request, job, answer.events if body.stream else None, answer.whole)


class ResponseAnswer:
    """An answer as a stream of events, or as the response that the last of them has."""

    def __init__(self, served: Served, asked: ResponseOrder, body: ResponsesRequest) -> None:
        """Begin an answer to `body`."""
        self._reader = asked.reader()
        self._usage = Usage()
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._numbers = itertools.count()
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": served.name,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions or None,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text.format.told()},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    async def whole(self, events: AsyncIterator[Any]) -> dict[str, Any]:
        """Return the response once it is complete."""
        async for event in events:
            self._take(event)
        return self._response

    async def events(self, events: AsyncIterator[Any]) -> AsyncIterator[dict[str, Any] | str]:
        """Yield the events of a response in OpenAI's order."""
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        item = {**self._message("in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=self._part(""))
        try:
            async for event in events:
                for delta in self._take(event):
                    yield self._event(
                        "response.output_text.delta", **self._place, delta=delta, logprobs=[]
                    )
        except Exception as error:
            failure = as_api_error(error)
            self._response |= {
                "status": "failed",
                "error": {"code": failure.code or "server_error", "message": str(failure)},
            }
            yield self._event("response.failed", response=self._response)
            return
        text, status = "".join(self._texts), self._response["status"]
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=self._part(text))
        item = self._message(status)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{status}", response=self._response)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _take(self, event: Piece | Ended) -> list[str]:
        """Note an event of the decoder; return the pieces of text that it brings."""
        is_end = isinstance(event, Ended)
        parts = self._reader.push(event.text) if isinstance(event, Piece) else []
        parts += self._reader.finish() if is_end else []
        deltas = [part.text for part in parts if part.text]
        self._texts += deltas
        self._thoughts += [part.thought for part in parts if part.thought]
        if isinstance(event, Ended):
            self._complete(event)
        return deltas

    def _complete(self, ended: Ended) -> None:
        self._usage.add(ended)
        prompt, reused, drawn = self._usage.counts
        is_whole = finish_reason(ended.finish) == "stop"
        status = "completed" if is_whole else "incomplete"
        output = [self._message(status)]
        if self._thoughts:
            output.append(self._reasoning())
        self._response |= {
            "status": status,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": output,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": reused},
                "output_tokens": drawn,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + drawn,
            },
        }

    def _message(self, status: str) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part("".join(self._texts))],
        }

    def _reasoning(self) -> dict[str, Any]:
        text = {"type": "reasoning_text", "text": "".join(self._thoughts)}
        return {
            "id": f"rs_{uuid.uuid4().hex}",
            "type": "reasoning",
            "summary": [],
            "content": [text],
        }

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
