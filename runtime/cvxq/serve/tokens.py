"""Texts and conversations to tokens, and back."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request

from cvxq.serve.errors import ApiError
from cvxq.serve.messages import conversation_tokens
from cvxq.serve.routing import post
from cvxq.serve.schemas import DetokenizeRequest, TokenizeRequest
from cvxq.serve.served import Served
from cvxq.serve.server import server_of
from cvxq.tokenizer import check_tokens


@post("/tokenize", TokenizeRequest)
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Return the tokens of a text, or of a conversation up to where its answer begins."""
    served = server_of(request).find(body.model)
    ids = await asyncio.to_thread(_tokens, served, body)
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": served.model.context_length,
        "tokens": ids,
    }
    if body.return_token_strs:
        answer["token_strs"] = [served.tokenizer.decode([token]) for token in ids]
    return answer


def _tokens(served: Served, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (not body.messages):
        raise ApiError(400, "give either prompt or messages")
    if body.prompt is None:
        return conversation_tokens(served, body.messages)
    found = served.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens, verbose=False)
    return list(found["input_ids"])


@post("/detokenize", DetokenizeRequest)
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """Return the text of tokens, special ones included."""
    served = server_of(request).find(body.model)
    check_tokens(body.tokens, served.model.vocabulary, None)
    return {"prompt": served.tokenizer.decode(body.tokens)}
