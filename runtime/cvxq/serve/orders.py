"""From a request to what its choices are generated from."""

from __future__ import annotations

from typing import Any

from cvxq.serve.decoding import Order
from cvxq.serve.errors import ApiError
from cvxq.serve.messages import chat_tokens, conversation_tokens, offered_tools
from cvxq.serve.replies import ReplyReader
from cvxq.serve.schemas import ChatRequest, CompletionRequest, Message, ResponsesRequest
from cvxq.serve.served import Served
from cvxq.thinking import Marks, opened_marks

_TAIL = 16  # tokens at the end of a prompt, in which a mark of thinking may stand


def completion_orders(served: Served, body: CompletionRequest) -> list[Order]:
    """Return an order for each choice of each prompt, in this order."""
    check_biases(served, body.logit_bias)
    orders: list[Order] = []
    for prompt in body.prompts:
        ids = served.model.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, "prompt has no tokens; give at least one", param="prompt")
        served.check(ids, answer_tokens=min(1, body.max_tokens))
        end_ids = served.model.text_end_ids(ids)
        orders += [
            Order(
                ids,
                body.sampling(len(orders) + choice, max(1, body.max_tokens)),
                end_ids,
                top=body.logprobs,
            )
            for choice in range(body.n)
        ]
    return orders


class ChatOrders:
    """The orders of a chat's choices, and how their replies are read."""

    def __init__(self, served: Served, body: ChatRequest) -> None:
        """Render the prompt; raises what is wrong with the request."""
        check_biases(served, body.logit_bias)
        ids = chat_tokens(served, body)
        tools = offered_tools(body)
        turns, style = served.turns, served.tool_style if tools else None
        self._marks, self._opened = turns.thinking, _opened(served, ids)
        self._style, self._one_call = style, not body.parallel_tool_calls
        schema = body.response_format.schema_of_answer
        after = self._opened.closing if self._opened else ""
        grammar = None
        if tools and body.tool_choice not in (None, "auto"):
            assert style is not None
            grammar = served.grammars.of_calls(style, tools, after)
        elif schema is not None:
            grammar = served.grammars.of_schema(schema, after)
        max_tokens = body.max_completion_tokens or body.max_tokens
        stop = (*turns.stop, *(style.stop if style else ()))
        self.orders = [
            Order(
                ids,
                body.sampling(choice, max_tokens, stop=stop),
                served.end_ids | turns.end_ids,
                kept=(*_flat(turns.thinking), *(style.marks if style else ())),
                top=body.top_logprobs if body.logprobs else None,
                grammar=grammar,
            )
            for choice in range(body.n)
        ]

    def reader(self) -> ReplyReader:
        """Return what reads the reply of one choice."""
        return ReplyReader(self._marks, self._opened, self._style, self._one_call)


class ResponseOrder:
    """The order of a response, and how its reply is read."""

    def __init__(self, served: Served, body: ResponsesRequest) -> None:
        """Render the prompt; raises what is wrong with the request."""
        messages = body.input
        if isinstance(messages, str):
            messages = [Message.of("user", messages)]
        if body.instructions:
            messages = [Message.of("system", body.instructions), *messages]
        if not messages:
            raise ApiError(400, "input has no messages; give at least one", param="input")
        variables: dict[str, Any] = {}
        if body.reasoning.effort:
            variables["reasoning_effort"] = body.reasoning.effort
        ids = conversation_tokens(served, messages, **variables)
        turns, self._opened = served.turns, _opened(served, ids)
        self._marks = turns.thinking
        form = body.text.format
        grammar = None
        if form.type != "text":
            after = self._opened.closing if self._opened else ""
            grammar = served.grammars.of_schema(form.schema_, after)
        self.order = Order(
            ids,
            body.sampling(0, body.max_output_tokens, stop=turns.stop),
            served.end_ids | turns.end_ids,
            kept=_flat(turns.thinking),
            grammar=grammar,
        )

    def reader(self) -> ReplyReader:
        """Return what reads the reply."""
        return ReplyReader(self._marks, self._opened, None, False)


def check_biases(served: Served, biases: dict[int, float]) -> None:
    """Raise ApiError for a bias on a token that the model lacks."""
    for token in biases:
        if not 0 <= token < served.model.vocabulary:
            raise ApiError(
                400,
                f"logit_bias: token {token}, allowed: 0 to {served.model.vocabulary - 1}",
                param="logit_bias",
            )


def _opened(served: Served, ids: list[int]) -> Marks | None:
    end = served.tokenizer.decode(ids[-_TAIL:], skip_special_tokens=False)
    return opened_marks(end, served.turns.thinking)


def _flat(marks: tuple[Marks, ...]) -> tuple[str, ...]:
    return tuple(mark for pair in marks for mark in pair)
