"""A conversation of the API as chat templates take it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cvxq.serve.errors import ApiError
from cvxq.serve.schemas import CallMade, ChatRequest, Message, ToolChoice
from cvxq.serve.served import Served


def conversation_tokens(served: Served, messages: Sequence[Message], **variables: Any) -> list[int]:
    """Return the tokens of a prompt that ends where the answer begins, checked.

    Raises ChatError where the chat template refuses, what `Served.check` raises, and ApiError.
    """
    ids = served.turns.encode([_template_message(message) for message in messages], **variables)
    served.check(ids)
    return ids


def chat_tokens(served: Served, body: ChatRequest) -> list[int]:
    """Return the tokens of the prompt of a chat request, see `conversation_tokens`."""
    variables = dict(body.chat_template_kwargs)
    if body.reasoning_effort:
        variables["reasoning_effort"] = body.reasoning_effort
    if tools := offered_tools(body):
        if not served.turns.has_tools:
            raise ApiError(
                400,
                f"the chat template of {served.name} shows no tools to the model; leave tools out, "
                "or take another model",
                param="tools",
            )
        variables["tools"] = tools
    return conversation_tokens(served, body.messages, **variables)


def offered_tools(body: ChatRequest) -> list[dict[str, Any]]:
    """Return the tools that the model may use; ApiError for a choice that is none of them."""
    choice = body.tool_choice
    tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})
             for tool in body.tools]  # fmt: skip
    if isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        if not tools:
            raise ApiError(
                400,
                f"tool_choice: {choice.function.name!r} is none of tools; give one",
                param="tool_choice",
            )
    if choice == "required" and not tools:
        raise ApiError(
            400, "tool_choice is required, but there are no tools; give one", param="tool_choice"
        )
    return [] if choice == "none" else tools


def _template_message(message: Message) -> dict[str, Any]:
    """Return a message under the names that templates read, arguments of calls as objects."""
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    turn: dict[str, Any] = {"role": role, "content": message.text}
    if message.reasoning_content:
        turn["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        turn["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if value := getattr(message, name):
            turn[name] = value
    return turn


def _template_call(call: CallMade) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        raise ApiError(
            400,
            f"messages: the arguments of a call of {call.function.name} are no JSON object",
        ) from None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
