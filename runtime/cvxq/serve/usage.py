"""How answers end and what they took, as OpenAI says it."""

from __future__ import annotations

from typing import Any

from cvxq.generate import FinishReason
from cvxq.serve.decoding import Ended


def finish_reason(finish: FinishReason) -> str:
    """Return "stop" for a text that came to its end, "length" for one that was cut."""
    return "stop" if finish in ("end", "stop") else "length"


class Usage:
    """The tokens of an answer; a prompt of several choices counts once."""

    def __init__(self) -> None:
        """Start with none."""
        self._prompts: dict[int, tuple[int, int]] = {}
        self._drawn = 0

    def add(self, ended: Ended, prompt: int = 0) -> None:
        """Add a choice of the prompt with this number."""
        self._prompts.setdefault(prompt, (ended.prompt_tokens, ended.reused_tokens))
        self._drawn += ended.drawn_tokens

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens of prompts, of these reused, and drawn."""
        totals = [sum(column) for column in zip(*self._prompts.values(), strict=True)] or [0, 0]
        return totals[0], totals[1], self._drawn

    def as_json(self) -> dict[str, Any]:
        """Return it as chat and completions have it."""
        prompt, reused, drawn = self.counts
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": reused},
        }
