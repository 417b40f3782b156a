"""A chat's answer in its parts: what the model thought, what it says, which tools it calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cvxq.serve.tool_calls import Style, ToolCall, ToolCallReader
from cvxq.thinking import Marks, Reply


@dataclass(frozen=True)
class Part:
    """What came of one kind: a piece of thinking, of the answer, or a whole call."""

    thought: str = ""
    text: str = ""
    call: ToolCall | None = None


class ReplyReader:
    """Parts a reply that arrives in pieces."""

    def __init__(
        self, marks: Sequence[Marks], opened: Marks | None, style: Style | None, one_call: bool
    ) -> None:
        """Expect thinking between `marks`, see `Reply`; look for tool calls in `style`, if any."""
        self._reply = Reply(marks, opened)
        self._thought = Trimmed()
        self._calls = ToolCallReader(style) if style else None
        self._one_call = one_call
        self.has_calls = False

    def push(self, text: str) -> list[Part]:
        """Add text; return the parts that can be shown now."""
        return self._parts(self._reply.push(text))

    def finish(self) -> list[Part]:
        """Return what was held back, now that the reply has ended."""
        parts = self._parts(self._reply.finish())
        return [*parts, *self._called(*self._calls.finish())] if self._calls else parts

    def _parts(self, pieces: list[tuple[str, bool]]) -> list[Part]:
        parts: list[Part] = []
        for text, is_thought in pieces:
            if is_thought:
                thought = self._thought.push(self._reply.without_marks(text))
                parts += [Part(thought=thought)] if thought else []
            else:
                parts += self._called(*(self._calls.push(text) if self._calls else (text, [])))
        return parts

    def _called(self, text: str, calls: list[ToolCall]) -> list[Part]:
        if self.has_calls or calls:  # white space between calls is not worth a part
            text = text if text.strip() else ""
        parts = [Part(text=text)] if text else []
        for call in calls:
            if not (self.has_calls and self._one_call):
                parts.append(Part(call=call))
            self.has_calls = True
        return parts


class Trimmed:
    """Passes text on without the white space at its ends."""

    def __init__(self) -> None:
        self._held = ""
        self._has_begun = False

    def push(self, text: str) -> str:
        """Add text; return what is certainly not at an end."""
        self._held += text
        if not self._has_begun:
            self._held = self._held.lstrip()
        shown = self._held.rstrip()
        self._held = self._held[len(shown) :]
        self._has_begun = self._has_begun or bool(shown)
        return shown
