"""What an answer has to follow: a JSON schema, or the form of a tool call; by llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from cvxq.lean.tokenizer import LeanTokenizer
from cvxq.model import Model
from cvxq.sample import Constraint, Floats
from cvxq.serve.errors import ApiError
from cvxq.serve.tool_calls import Style
from cvxq.specials import hidden_tokens
from cvxq.tokenizer import Tokenizer

# One way to write white space: given the choice, a poor model writes it for ever.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TAIL = 16  # tokens in which the end of thinking is looked for


class Grammars:
    """Grammars over the tokens of one model."""

    def __init__(self, model: Model) -> None:
        """Read the vocabulary, which takes a second for a large one."""
        self._tokenizer = model.tokenizer
        self._vocabulary = model.vocabulary
        self._tokens = llguidance.LLTokenizer(
            _tokenizer_json(model), n_vocab=model.vocabulary, eos_token=sorted(model.end_ids)
        )

    def of_schema(self, schema: dict[str, Any], after: str) -> Callable[[], Constraint]:
        """Return what makes the constraint to JSON of `schema`.

        after: what ends the thinking before it, "" where there is none.
        """
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_JSON)
        return self._maker(grammar, "response_format", after)

    def of_calls(
        self, style: Style, tools: Sequence[dict[str, Any]], after: str
    ) -> Callable[[], Constraint]:
        """Return what makes the constraint to one call of one of `tools`."""
        if not style.arguments:
            raise ApiError(
                400,
                "this model's tool calls cannot be forced, since it does not write them in JSON; "
                "set tool_choice to auto",
                param="tool_choice",
            )
        call: dict[str, Any] = {"anyOf": [_call_schema(tool, style.arguments) for tool in tools]}
        if style.is_list:
            call = {"type": "array", "items": call, "minItems": 1, "maxItems": 1}
        options = json.dumps({**call, "x-guidance": _JSON})
        opening, closing = (self._mark(mark) for mark in (style.opening, style.closing))
        lark = f"start: {opening} call {closing}\ncall: %json {options}\n"
        return self._maker(llguidance.LLMatcher.grammar_from_lark(lark), "tools", after)

    def _mark(self, mark: str) -> str:
        """Return a mark in Lark's language: a special token by its number, else the text."""
        for token, spelling in hidden_tokens(self._tokenizer, mark).items():
            if spelling == mark:
                return f"<[{token}]>"
        return json.dumps(mark) if mark else ""

    def _maker(self, grammar: str, param: str, after: str) -> Callable[[], Constraint]:
        is_wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokens
        )
        if is_wrong:
            raise ApiError(400, f"{param}: {messages[0]}", param=param)
        return lambda: _Following(
            llguidance.LLMatcher(self._tokens, grammar, log_level=0),
            self._vocabulary,
            self._tokenizer,
            after,
        )


class _Following:
    """A grammar that a text follows, from where its thinking ends."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocabulary: int, tokenizer: Tokenizer, after: str
    ) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._after = after
        self._thought: list[int] = []
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocabulary)

    def allow(self, logits: Floats) -> Floats:
        """Return logits (V,), −inf for tokens that the grammar has no place for."""
        if self._after:
            return logits
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error():
            raise RuntimeError(f"grammar: {self._matcher.get_error()}")
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(logits)]
        return np.where(bits == 1, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Note that `token` came next."""
        if not self._after:
            self._matcher.consume_token(token)
            return
        self._thought = [*self._thought[-_TAIL:], token]
        if self._after in self._tokenizer.decode(self._thought, skip_special_tokens=False):
            self._after = ""


def _call_schema(tool: dict[str, Any], arguments: str) -> dict[str, Any]:
    function = tool["function"]
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, arguments: function["parameters"]},
        "required": ["name", arguments],
        "additionalProperties": False,
    }


def _tokenizer_json(model: Model) -> str:
    """Return tokenizer.json, as it is or as transformers made it; ApiError where there is none."""
    if isinstance(model.tokenizer, LeanTokenizer):
        return model.reader.file("tokenizer.json").decode("utf-8")
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ApiError(
            400, "the model's tokenizer is none that grammars can be used with; ask for plain text"
        )
    return str(backend.to_str())
