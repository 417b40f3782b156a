"""A model that is served, and all that its requests share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from cvxq.errors import ContextError
from cvxq.model import Model
from cvxq.serve.caches import Caches
from cvxq.serve.metrics import Metrics
from cvxq.serve.tool_calls import Style, tool_style
from cvxq.tokenizer import Tokenizer, check_tokens
from cvxq.turns import TurnFormat

if TYPE_CHECKING:
    from cvxq.serve.grammar import Grammars


class Served:
    """A loaded model by its name; `sessions` texts are kept to go on from."""

    def __init__(self, name: str, model: Model, sessions: int, metrics: Metrics) -> None:
        """Read the tokenizer and try the chat template, so that no request has to wait for it."""
        self.name = name
        self.model = model
        self.metrics = metrics
        self.created = int(time.time())
        self.tokenizer: Tokenizer = model.tokenizer
        self.turns: TurnFormat = model.turns
        self.caches = Caches(model, sessions)
        self.end_ids = model.end_ids

    @cached_property
    def tool_style(self) -> Style:
        """How the model writes tool calls."""
        return tool_style(str(self.tokenizer.chat_template or ""))

    @cached_property
    def grammars(self) -> Grammars:
        """What makes answers follow a schema; reads the vocabulary when first used."""
        from cvxq.serve.grammar import Grammars

        return Grammars(self.model)

    def check(self, ids: Sequence[int], answer_tokens: int = 1) -> None:
        """Raise ArgumentError for tokens that the model lacks, ContextError for too many."""
        context = self.model.context_length
        if context is not None and len(ids) + answer_tokens > context:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, but the model's context of {context} has to "
                "hold it and an answer; shorten it"
            )
        check_tokens(ids, self.model.vocabulary, self.tokenizer)

    def count(self, prompt_tokens: int, reused_tokens: int, drawn_tokens: int) -> None:
        """Add the tokens of an answer to what is counted."""
        self.metrics.prompt_tokens.inc(prompt_tokens)
        self.metrics.reused_tokens.inc(reused_tokens)
        self.metrics.drawn_tokens.inc(drawn_tokens)
