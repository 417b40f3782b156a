"""Tool calls in what a model writes, by the marks that its family uses.

    ChatML, Qwen, SmolLM  <tool_call>{"name": …, "arguments": {…}}</tool_call>, or in it
                          <function=…><parameter=…>…</parameter></function>
    Llama 3               <|python_tag|>{"name": …, "parameters": {…}}, or just the object
    Mistral               [TOOL_CALLS][{"name": …, "arguments": {…}}], or
                          [TOOL_CALLS]name[ARGS]{…}
    Gemma                 <start_function_call>call:name{key:<escape>text<escape>}
                          <end_function_call>, all on a line, or
                          <|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>

Which family it is shows in the chat template.  What stands between marks and is no call is shown
as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cvxq.stream import possible_start


@dataclass(frozen=True)
class ToolCall:
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


Parse = Callable[[str], list[ToolCall]]


@dataclass(frozen=True)
class Style:
    """How a family writes calls.

    opening, closing: marks around one (closing "": until the next opening mark or the end); parse:
    makes calls of what stands between them, ValueError where it is none; further: other special
    tokens inside; stop: texts that end an answer with calls; arguments: the name of these in JSON,
    "" where a call is not written in JSON; is_list: calls stand in a list; bare: an answer that is
    one JSON object is a call.
    """

    opening: str
    closing: str
    parse: Parse
    further: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    arguments: str = "arguments"
    is_list: bool = False
    bare: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts whose special tokens have to be seen."""
        return tuple(mark for mark in (self.opening, self.closing, *self.further) if mark)


def tool_style(template: str) -> Style:
    """Return the style of the family that a chat template belongs to; ChatML's if it is unknown."""
    return next((style for mark, style in _STYLES if mark in template), CHATML)


class ToolCallReader:
    """Takes the calls out of an answer that arrives in pieces."""

    def __init__(self, style: Style) -> None:
        """Look for calls in `style`."""
        self._style = style
        self._held = ""
        self._is_inside = False
        self._has_begun = not style.bare
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; return what of it is no call, and the calls that it completes."""
        self._held += text
        shown: list[str] = []
        calls: list[ToolCall] = []
        while self._step(shown, calls):
            pass
        return "".join(shown), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return what was held back, now that the answer has ended."""
        held, self._held = self._held, ""
        if not self._is_inside and self._has_begun:
            return held, []
        return self._parsed(held, "")

    def _step(self, shown: list[str], calls: list[ToolCall]) -> bool:
        """Go on to the next mark; return whether there may be another one."""
        style = self._style
        if not self._has_begun:
            start = self._held.lstrip()
            if not start or start.startswith("{"):
                return False  # all of it may be one call, which only its end can tell
            self._has_begun = True
        if not self._is_inside:
            before, found, rest = self._held.partition(style.opening)
            keep = 0 if found else possible_start(before, (style.opening,))
            shown.append(before[: len(before) - keep])
            self._held = rest if found else before[len(before) - keep :]
            self._is_inside = bool(found)
            return self._is_inside
        end = style.closing or style.opening
        inner, found, rest = self._held.partition(end)
        if not found:
            return False
        text, new = self._parsed(inner, style.closing)
        shown.append(text)
        calls += new
        self._held, self._is_inside = rest, not style.closing
        return True

    def _parsed(self, inner: str, closing: str) -> tuple[str, list[ToolCall]]:
        try:
            calls = self._style.parse(inner.strip())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            opening = self._style.opening if self._is_inside else ""
            return opening + inner + closing, []
        self.calls += len(calls)
        return "", calls


def _of_json(value: Any) -> list[ToolCall]:
    """Return the calls of one JSON object, or a list of them."""
    if isinstance(value, list):
        return [call for item in value for call in _of_json(item)]
    value = value.get("function", value) if isinstance(value.get("function"), dict) else value
    name = value["name"]
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("no call")
    return [ToolCall(name, json.dumps(arguments, ensure_ascii=False))]


def _chatml(text: str) -> list[ToolCall]:
    if text.startswith("<function="):
        return [_of_tags(match) for match in _FUNCTION.finditer(text)]
    return _of_json(json.loads(text))


_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _of_tags(match: re.Match[str]) -> ToolCall:
    arguments = {name: _value(text) for name, text in _PARAMETER.findall(match[2])}
    return ToolCall(match[1], json.dumps(arguments, ensure_ascii=False))


def _value(text: str) -> Any:
    """Return a JSON value, or the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _llama(text: str) -> list[ToolCall]:
    """Return the calls of objects that follow each other, with or without semicolons."""
    decoder, calls = json.JSONDecoder(), []
    while text:
        value, end = decoder.raw_decode(text)
        if not {"name", "parameters"} <= value.keys() and not {"name", "arguments"} <= value.keys():
            raise ValueError("no call")
        calls += _of_json(value)
        text = text[end:].lstrip(" ;\n")
    return calls


def _mistral(text: str) -> list[ToolCall]:
    head, found, arguments = text.partition("[ARGS]")
    if not found:
        return _of_json(json.loads(text))
    return _of_json({"name": head.partition("[CALL_ID]")[0].strip(), "arguments": arguments})


def _gemma(quote: str) -> Parse:
    """Return what reads `call:name{key:value, …}`, texts between `quote`s."""
    token = re.compile(rf"{re.escape(quote)}(.*?){re.escape(quote)}|([{{}}\[\],:])|([^{{}}\[\],:]+)", re.DOTALL)  # fmt: skip # noqa: E501

    def parse(text: str) -> list[ToolCall]:
        if not text.startswith("call:"):
            raise ValueError("no call")
        name, brace, rest = text.removeprefix("call:").partition("{")
        # As JSON: keys and texts quoted, everything else as it stands.
        parts = []
        for match in token.finditer(brace + rest):
            quoted, mark, bare = match.groups()
            if quoted is not None:
                parts.append(json.dumps(quoted))
            elif mark is not None:
                parts.append(mark)
            elif bare.strip():
                is_literal = re.fullmatch(r'-?\d[\d.eE+-]*|true|false|null|".*"', bare.strip())
                parts.append(bare if is_literal else json.dumps(bare.strip()))
        return _of_json({"name": name.strip(), "arguments": json.loads("".join(parts))})

    return parse


CHATML = Style("<tool_call>", "</tool_call>", _chatml)
LLAMA = Style("<|python_tag|>", "", _llama, arguments="parameters", bare=True)
MISTRAL = Style("[TOOL_CALLS]", "", _mistral, ("[ARGS]", "[CALL_ID]"), is_list=True)
GEMMA = Style(
    "<start_function_call>",
    "<end_function_call>",
    _gemma("<escape>"),
    ("<escape>",),
    ("<start_function_response>",),
    arguments="",
)
GEMMA_4 = Style("<|tool_call>", "<tool_call|>", _gemma('<|"|>'), ('<|"|>',), arguments="")
_STYLES: Sequence[tuple[str, Style]] = (
    (GEMMA_4.opening, GEMMA_4),
    (GEMMA.opening, GEMMA),
    (CHATML.opening, CHATML),
    (MISTRAL.opening, MISTRAL),
    (LLAMA.opening, LLAMA),
    ("ipython", LLAMA),
)
