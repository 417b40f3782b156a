"""A loaded model: network, tokenizer and settings of one `.cvxq` file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cvxq_format import Reader
from transformers import GenerationConfig, PreTrainedModel

from cvxq.architecture import context_length
from cvxq.cache import Session
from cvxq.errors import ArgumentError
from cvxq.generate import Generation, generate_text
from cvxq.sample import SamplingSettings
from cvxq.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Model:
    """A model ready to run; made by `cvxq.load`.

    network: the transformers model, callable as any other; reader: the open file.  The tokenizer
    is built when first used, so a file without one still runs on token ids.
    """

    def __init__(self, network: PreTrainedModel, reader: Reader) -> None:
        """Join a filled network and the file it came from."""
        self.network = network
        self.reader = reader

    @property
    def config(self) -> Any:
        """The transformers config of the network."""
        return self.network.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The file's generation config."""
        return self.network.generation_config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The file's tokenizer; MissingPartError when it has none."""
        return load_tokenizer(self.reader)

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and answer together, or None without a limit."""
        return context_length(self.config)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text: those of the generation config, else of the config."""
        for source in (self.generation_config, self.config.get_text_config()):
            ids = getattr(source, "eos_token_id", None)
            if ids is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
        return frozenset()

    def session(self) -> Session:
        """Start an empty text; hand it to `generate` again to reuse what was computed."""
        return Session(self.network, self.context_length)

    def encode(self, text: str) -> list[int]:
        """Tokenize a prompt the way the tokenizer does by default (BOS if it adds one).

        An empty text becomes the token that begins texts.
        """
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        if not ids:
            for start in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
                if start is not None:
                    return [int(start)]
            raise ArgumentError("the prompt is empty, and the tokenizer has no token to begin with")
        return ids

    def generate(
        self,
        prompt: str | Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        session: Session | None = None,
    ) -> Generation:
        """Continue a prompt (text or token ids); `on_text` gets the text as it comes.

        Raises ContextError when the prompt is longer than the context.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return generate_text(
            session or self.session(),
            self.tokenizer,
            ids,
            settings or SamplingSettings(),
            self.end_ids,
            on_text,
        )

    def close(self) -> None:
        """Drop network and file; packed weights are views of the file, so both go together."""
        del self.network
        self.reader.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
