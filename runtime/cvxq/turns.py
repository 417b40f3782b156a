"""How the turns of a conversation become a prompt: by the model's chat template, or plainly.

A template is a program, and does not say what it expects.  So it is tried on words that no template
knows: whether it takes a turn's content as a string or as a list of parts, whether it has a system
role, whether it shows tools, what ends an answer, and what stands around the thinking before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from cvxq.errors import ChatError
from cvxq.rendering import TemplateError, TemplateLimitError, render
from cvxq.specials import hidden_tokens
from cvxq.stream import shared_length
from cvxq.thinking import KNOWN_MARKS, USUAL_MARKS, Marks

Message = dict[str, Any]


class Render(Protocol):
    """A template as a function."""

    def __call__(self, messages: Sequence[Message], is_prompt: bool, /, **variables: Any) -> str:
        """Return the text of messages, which an answer is to follow if they are a prompt."""


class Encode(Protocol):
    """From messages to tokens."""

    def __call__(self, messages: Sequence[Message], /, **variables: Any) -> list[int]:
        """Return the tokens of a prompt; variables: what the template may know beside messages."""


_QUESTION, _ANSWER, _SYSTEM, _THOUGHT = "cvxquestion", "cvxanswer", "cvxsystem", "cvxthought"
_USER = {"role": "user", "content": _QUESTION}
_ASSISTANT = {"role": "assistant", "content": _ANSWER}
_TOOL = {"type": "function", "function": {"name": "cvxtool", "description": "cvxdescription",
         "parameters": {"type": "object", "properties": {}}}}  # fmt: skip
_LEAVES_OUT = (
    "the model's chat template leaves out what the user says, be it a text or a list of parts; "
    "put one that works into chat_template.jinja of the source and convert it again"
)
_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_LAST_MARK = re.compile(rf"({_MARK.pattern})\s*$")


@dataclass(frozen=True)
class TurnFormat:
    """How messages become the tokens of a prompt that ends where the answer begins.

    A message has "role" and "content", an answer also its "reasoning_content" if the model thought,
    and "tool_calls" if it made any; `encode` takes what the template may know beside them.
    end_ids: special tokens that end an answer, beside those that end any text of the model; stop:
    texts that do; has_system: whether there is a system role, whose text otherwise goes in front
    of the first message; has_tools: whether the template shows `tools` to the model; thinking: what
    may stand around thinking, the likeliest first.
    """

    name: str
    encode: Encode
    stop: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()
    has_system: bool = True
    has_tools: bool = False
    thinking: tuple[Marks, ...] = (USUAL_MARKS,)


def turn_format(tokenizer: Any) -> TurnFormat:
    """Return the tokenizer's chat template as a turn format, or the plain one if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return TurnFormat(
            "plain turns", lambda turns, /, **_: _encode_plain(tokenizer, turns), ("\nUser:",)
        )

    def render_turns(messages: Sequence[Message], is_prompt: bool, /, **variables: Any) -> str:
        return render(template, messages, tokenizer.special_tokens_map, is_prompt, variables)

    try:
        return _tried(tokenizer, template, render_turns)
    except TemplateLimitError as error:
        return TurnFormat("chat template", partial(_refuse, error))


def _tried(tokenizer: Any, template: str, render: Render) -> TurnFormat:
    """Return what a template turns out to expect."""
    content = _content_form(render)
    if content is None:
        return TurnFormat("chat template", partial(_refuse, ChatError(_LEAVES_OUT)))

    def render_content(messages: Sequence[Message], is_prompt: bool, /, **variables: Any) -> str:
        turns = [{**m, "content": content(m["content"])} for m in messages]
        return render(turns, is_prompt, **variables)

    def encode(messages: Sequence[Message], /, **variables: Any) -> list[int]:
        turns = messages if form.has_system else _without_system(messages)
        # The template writes the special tokens itself.
        text = render_content(turns, True, **variables)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    end_ids, stop = _turn_end(tokenizer, render_content)
    form = TurnFormat(
        "chat template",
        encode,
        stop,
        end_ids,
        _has_system(render_content),
        _has_tools(render_content),
        _thinking_marks(render_content, template),
    )
    return form


def _encode_plain(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    labels = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    turns = [labels[message["role"]] + message["content"].strip() for message in messages]
    return list(tokenizer("\n".join([*turns, "Assistant:"]))["input_ids"])


def _refuse(why: ChatError, messages: Sequence[Message], /, **variables: Any) -> list[int]:
    raise why


def _content_form(render: Render) -> Callable[[str], Any] | None:
    """Return what makes of a text the content that the template takes; None if it takes none.

    A template that refuses even one plain question shall say so itself, when it is used.
    """

    def as_it_is(text: str) -> Any:
        return text

    def in_parts(text: str) -> Any:
        return [{"type": "text", "text": text}]

    tried = [_try(render, [{**_USER, "content": f(_QUESTION)}], True) for f in (as_it_is, in_parts)]
    for text, form in zip(tried, (as_it_is, in_parts), strict=True):
        if text is not None and _QUESTION in text:
            return form
    return as_it_is if tried[0] is None else None


def _has_system(render: Render) -> bool:
    """Whether a system message's text gets into the prompt, without being refused."""
    text = _try(render, [{"role": "system", "content": _SYSTEM}, _USER], True)
    return text is not None and _SYSTEM in text


def _has_tools(render: Render) -> bool:
    """Whether a tool that is offered gets into the prompt."""
    text = _try(render, [_USER], True, tools=[_TOOL])
    return text is not None and "cvxtool" in text


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Put the system text in front of the first user's message."""
    if messages[0]["role"] != "system":
        return list(messages)
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _turn_end(tokenizer: Any, render: Render) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the mark that closes an answer, as a special token or, where it is none, as a text.

    A template that closes the last answer with nothing may close earlier ones, or open the next
    turn with a mark.
    """
    for turns in ([_USER, _ASSISTANT], [_USER, _ASSISTANT, _USER]):
        _, answer, rest = (_try(render, turns, False) or "").rpartition(_ANSWER)
        if answer and (mark := _MARK.match(rest.lstrip())):
            hidden = hidden_tokens(tokenizer, mark[0])
            ids = frozenset(token for token, name in hidden.items() if name == mark[0])
            return (ids, ()) if ids else (ids, (mark[0],))
    return frozenset(), ()


def _thinking_marks(render: Render, template: str) -> tuple[Marks, ...]:
    """Return the marks that the template writes around thinking, and known ones that it names.

    The opening one follows where a prompt ends, or is the end of it.
    """
    marks = [pair for pair in KNOWN_MARKS if all(mark in template for mark in pair)]
    prompt = _try(render, [_USER], True) or ""
    thoughtful = {**_ASSISTANT, "reasoning_content": _THOUGHT}
    head, thought, rest = (_try(render, [_USER, thoughtful], False) or "").partition(_THOUGHT)
    closing, answer, _ = rest.partition(_ANSWER)
    opening = head[shared_length(prompt, head) :].strip()
    if not opening and (last := _LAST_MARK.search(head)):
        opening = last[1]
    if thought and answer and opening and closing.strip():
        marks.insert(0, Marks(opening, closing.strip()))
    return tuple(dict.fromkeys([*marks, USUAL_MARKS]))


def _try(
    render: Render, messages: Sequence[Message], is_prompt: bool, **variables: Any
) -> str | None:
    try:
        return render(messages, is_prompt, **variables)
    except TemplateLimitError:
        raise
    except TemplateError:
        return None
