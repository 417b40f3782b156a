"""A loaded model: how it predicts, its tokenizer and settings, all of one `.cvxq` file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from cvxq_format import Reader
from cvxq_format.model_config import context_length
from cvxq_format.text import start_tokens

from cvxq.beside import Beside
from cvxq.cache_size import full_context
from cvxq.errors import ArgumentError, MissingPartError, no_positions
from cvxq.extras import need
from cvxq.generate import Generation, generate_text
from cvxq.lean import Decoder, record_of
from cvxq.lean.session import LeanSession
from cvxq.parts import json_part, stated_end_ids
from cvxq.sample import SamplingSettings
from cvxq.session import Session
from cvxq.tokenizer import Tokenizer, check_tokens, load_tokenizer
from cvxq.turns import TurnFormat, turn_format

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel


class NetworkOptions(NamedTuple):
    """How the transformers network is to be built, see `cvxq.load`."""

    keep_packed: bool = True
    device: str = "cpu"
    dtype: torch.dtype | None = None
    threads: int | None = None


class Model:
    """A model ready to run; made by `cvxq.load`.

    reader: the open file; decoder: the lean decoder that generates, or None where transformers
    does; transformers_reason: why there is none, or None where it was not asked for; context: the
    most tokens of a text that were asked for; tokenizer: what may be in the making.  The tokenizer
    and the network are built when first used, so a file without a tokenizer still runs on token
    ids, and one with a decoder without transformers.
    """

    def __init__(
        self,
        reader: Reader,
        decoder: Decoder | None,
        transformers_reason: str | None,
        options: NetworkOptions,
        context: int | None = None,
        tokenizer: Beside[Tokenizer] | None = None,
    ) -> None:
        """Join an open file and the decoder made of it, if any."""
        self.reader = reader
        self.decoder = decoder
        self.transformers_reason = transformers_reason
        self._options = options
        self._context = context
        self._tokenizer = tokenizer or Beside(lambda: load_tokenizer(reader))

    @cached_property
    def network(self) -> PreTrainedModel:
        """The transformers network, callable as any other."""
        reason = f": {self.transformers_reason}" if self.transformers_reason else ""
        need("convert", f"{self.reader.path} runs through transformers{reason}; that")
        from cvxq.network import load_network

        keep_packed, device, dtype, threads = self._options
        return load_network(self.reader, keep_packed, device, dtype, threads)

    @property
    def device(self) -> str:
        """Where the model computes: "cpu" or "cuda:N"."""
        return self._options.device

    @property
    def config(self) -> Any:
        """The transformers config of the network."""
        return self.network.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The file's generation config."""
        return self.network.generation_config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer; MissingPartError when it has none."""
        return self._tokenizer.result()

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and answer together, or None without a limit."""
        if self.decoder is not None:
            return self.decoder.capacity
        return self._context or self.full_context

    @cached_property
    def full_context(self) -> int | None:
        """The most tokens that the model was made for, or None where none are stated."""
        if self.decoder is not None:
            return full_context(json_part(self.reader, "config.json"), record_of(self.reader))
        return context_length(self.config.get_text_config().to_dict())

    def check_positions(self) -> None:
        """Raise ArgumentError where transformers lacks positions for the context asked for."""
        names = (name for name, _ in self.network.named_buffers())
        if any(name.endswith("inv_freq") for name in names):
            return  # angles of any place
        context, full = self._context, self.full_context
        if context is not None and full is not None and context > full:
            raise ArgumentError(no_positions(context, full))

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        if self.decoder is not None:
            return self.decoder.vocabulary
        size: int = self.config.get_text_config().vocab_size
        return size

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end any text: of generation config and config together, and the tokenizer's.

        Where neither config says, it is what the architecture has by default.
        Raises InconsistentFileError where the file names something else than tokens.
        """
        ids = stated_end_ids(self.reader) or self._default_end_ids()
        try:
            last = self.tokenizer.eos_token_id
        except MissingPartError:
            return ids
        return ids if last is None else ids | {last}

    def _default_end_ids(self) -> frozenset[int]:
        if self.decoder is not None:
            return self.decoder.end_tokens
        ids = getattr(self.config.get_text_config(), "eos_token_id", None)
        return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)

    @cached_property
    def turns(self) -> TurnFormat:
        """How the model takes the turns of a conversation."""
        return turn_format(self.tokenizer)

    def session(self, *, shift: bool = False, apart: bool = False) -> Session:
        """Start an empty text; hand it to `generate` again to reuse what was computed.

        shift: when the context is full, go on without the oldest half of the text, but for the
        tokens that the tokenizer puts at its beginning.  apart: keep the text beside those of
        other sessions, in memory of its own, where otherwise they take turns in one.
        """
        session: Session
        if self.decoder is not None:
            session = LeanSession(self.decoder.sibling() if apart else self.decoder)
        else:
            from cvxq.cache import NetworkSession

            session = NetworkSession(self.network, self.context_length)
        if shift:
            session.keep = len(start_tokens(self.tokenizer))
        return session

    def encode(self, text: str) -> list[int]:
        """Tokenize a prompt the way the tokenizer does by default (BOS if it adds one).

        An empty text becomes the token that begins texts.
        """
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        if not ids:
            for start in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
                if start is not None:
                    return [int(start)]
            raise ArgumentError(
                "the prompt is empty, and the tokenizer has no token to begin with; give it a text"
            )
        return ids

    def text_end_ids(self, ids: Collection[int]) -> frozenset[int]:
        """Return what ends a text that goes on after the tokens `ids`.

        That is what ends any, and what ends an answer in the chat template if it is among them.
        """
        return self.end_ids | self._turn_end_ids(ids)

    def _turn_end_ids(self, ids: Collection[int]) -> frozenset[int]:
        inner = list(set(ids) - self.end_ids - {self.tokenizer.bos_token_id})
        spelled, plain = (self.tokenizer.decode(inner, skipped) for skipped in (False, True))
        if spelled == plain:  # no special tokens, and trying templates takes a quarter of a second
            return frozenset()
        return self.turns.end_ids.intersection(inner)

    def generate(
        self,
        prompt: str | Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        session: Session | None = None,
        end_ids: Collection[int] | None = None,
        kept: Sequence[str] = (),
    ) -> Generation:
        """Continue a prompt (text or token ids); `on_text` gets the text as it comes.

        end_ids: tokens that end the text; None: the model's, and the one that ends an answer in
        its chat template, if the prompt has that, too.  kept: texts whose special tokens are shown.
        Raises ContextError when the prompt is longer than the context, ArgumentError for a token
        that the model does not know.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_tokens(ids, self.vocabulary, self.tokenizer)
        if end_ids is None:
            end_ids = self.text_end_ids(ids)
        return generate_text(
            session or self.session(),
            self.tokenizer,
            ids,
            settings or SamplingSettings(),
            end_ids,
            on_text,
            kept,
        )

    def close(self) -> None:
        """Drop decoder, network and file; packed weights may be views of the file."""
        self.decoder = None
        self.__dict__.pop("network", None)
        self._tokenizer.finish()
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
