"""Sequences to calibrate on: sampled from the model itself or a copy, or cut from a text.

Self-calibration samples at temperature 1 without truncation, so that the sequences follow the
model's own distribution, the one whose change is being measured. Every document begins with the
start token (BOS, else EOS, else a random token); after an EOS a new document begins in the same
sequence, as in packed training data. A model that memory has no room for is sampled from by a
decoder of a copy in 6 bits, which calibrates as well as its own text does. A sequence cut from a
text begins with the start token, too, where the tokenizer puts one before a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cvxq_format.model_config import context_length
from cvxq_format.text import decode_text, start_tokens
from torch import Tensor

from cvxq_converter.errors import ConversionError, NoSuchFileError
from cvxq_converter.journal import Journal
from cvxq_converter.measure.seeds import draw_each, draw_one, generator_of
from cvxq_converter.options import Calibration
from cvxq_converter.stages import Done

if TYPE_CHECKING:
    from cvxq.lean.decoder import Batch

_CACHE_BYTES = 1 << 31  # keys and values of one sampling batch
_COPY_CACHE_BYTES = 1 << 30  # of one that a copy draws
_TEXTS = 16  # most that it draws side by side


def make_sequences(
    network: Any,
    tokenizer: Any | None,
    calibration: Calibration,
    progress: Done | None = None,
    journal: Journal | None = None,
) -> Tensor:
    """Return calibration tokens (S, L) int64; (0, L) for "none". See `sample_copy` for "copy".

    calibration: with its number of sequences and their length; L is that, or the model's context if
    that is smaller. A text gives non-overlapping windows spread evenly over it, and must be long
    enough for all of them.
    Raises ConversionError for a text that is missing, empty, too short or wrongly encoded.
    """
    source, count, length = calibration.source, calibration.sequences or 0, calibration.length or 0
    if count < 1 or length < 2:
        raise ConversionError(
            f"calibration: {count} sequences of {length} tokens; expected at least 1 of at least 2"
        )
    stated = context_length(network.config.get_text_config().to_dict())
    length = min(length, stated or length)
    if source == "none":
        return torch.empty(0, length, dtype=torch.int64)
    if source == "self":
        seed, steps = calibration.seed, journal or Journal()
        return _sample(network, tokenizer, count, length, seed, progress, steps)
    if tokenizer is None:
        raise ConversionError(f"{source}: the model has no tokenizer; use --calibration self")
    tokens = _tokenize(network, tokenizer, read_documents(source))
    return _cut(tokens, start_tokens(tokenizer), count, length, source)


# --- text ---------------------------------------------------------------------------------------


def read_documents(source: str) -> list[str]:
    """Read a .jsonl file ({"text": …} per line) or a text file (one document), as UTF-8."""
    path = Path(source)
    try:
        text = decode_text(path.read_bytes())
    except FileNotFoundError:
        raise NoSuchFileError(
            f"{source}: no such file; --calibration takes self, copy, none, a .txt or a .jsonl file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{source}: byte {error.start} is not UTF-8; convert the file to UTF-8 first"
        ) from error
    except OSError as error:
        raise ConversionError(f"{source}: cannot be read: {error.strerror}") from error
    documents = _json_lines(text, source) if path.suffix == ".jsonl" else [text]
    if not any(document.strip() for document in documents):
        raise ConversionError(f"{source}: no text in it; calibration needs some")
    return documents


def _json_lines(text: str, source: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            raise ConversionError(
                f"{source}, line {number}: not JSON; expected an object on every line"
            ) from None
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise ConversionError(
                f'{source}, line {number}: no text; expected {{"text": "…"}} on every line'
            )
        documents.append(item["text"])
    return documents


def _tokenize(network: Any, tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """Join the documents' tokens, each with the special tokens that the tokenizer adds."""
    pieces = [
        torch.tensor(tokenizer(document, verbose=False)["input_ids"], dtype=torch.int64)
        for document in documents
        if document
    ]
    tokens = torch.cat(pieces)
    size = network.get_input_embeddings().weight.shape[0]
    if len(tokens) and int(tokens.max()) >= size:
        raise ConversionError(
            f"calibration: the tokenizer gives token {int(tokens.max())}, the model has {size}; "
            "use --calibration self"
        )
    return tokens


def _cut(tokens: Tensor, start: list[int], sequences: int, length: int, source: str) -> Tensor:
    """Return sequences (S, L) spread evenly over `tokens`, every one beginning with `start`."""
    first = torch.tensor(start[: length - 1], dtype=torch.int64)
    windows = list(_windows(tokens, first, length))
    if len(windows) < sequences:
        raise ConversionError(
            f"{source}: too short: {len(tokens)} tokens, enough for {len(windows)} sequences of "
            f"{length}, {sequences} are needed; use a longer text, or fewer or shorter sequences"
        )
    chosen = [windows[index * len(windows) // sequences] for index in range(sequences)]
    return torch.stack(chosen)


def _windows(tokens: Tensor, start: Tensor, length: int) -> Iterator[Tensor]:
    """Cut `tokens` end to end into windows (L,), `start` put before those that lack it."""
    place = 0
    while True:
        begins = torch.equal(tokens[place : place + len(start)], start)  # a document does here
        before = start[:0] if begins else start
        window = torch.cat([before, tokens[place : place + length - len(before)]])
        if len(window) < length:
            return
        yield window
        place += length - len(before)


# --- the model's own text -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Specials:
    start: int | None  # None: a random token
    ends: tuple[int, ...]


def _special_tokens(network: Any, tokenizer: Any | None) -> _Specials:
    """Find the start token (BOS, else EOS) and all EOS ids, within the vocabulary."""
    size = network.get_input_embeddings().weight.shape[0]
    places = [network.generation_config, network.config.get_text_config(), tokenizer]

    def find(name: str) -> list[int]:
        for place in places:
            value = getattr(place, name, None)
            given = value if isinstance(value, list | tuple) else [value]
            ids = [int(item) for item in given if item is not None and 0 <= int(item) < size]
            if ids:
                return ids
        return []

    ends = find("eos_token_id")
    begin = find("bos_token_id") or ends
    return _Specials(begin[0] if begin else None, tuple(ends))


def cache_bytes(config: Any, length: int, element_bytes: int) -> int:
    """Return the size of one sequence's keys and values."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * length * element_bytes)


def sampling_batch(config: Any, length: int, element_bytes: int) -> int:
    """Sequences per batch so that the cache stays bounded; a function of shapes only.

    Free memory takes no part: another batch size gives other rounding, hence other samples.
    """
    return max(1, min(64, _CACHE_BYTES // cache_bytes(config, length, element_bytes)))


def _sample(
    network: Any,
    tokenizer: Any | None,
    sequences: int,
    length: int,
    seed: int,
    progress: Done | None,
    journal: Journal,
) -> Tensor:
    parameter = next(network.parameters())
    specials = _special_tokens(network, tokenizer)
    batch = sampling_batch(network.config, length, parameter.element_size())
    generator = torch.Generator(device=parameter.device).manual_seed(seed)
    parts: list[Tensor] = []
    for first in range(0, sequences, batch):
        count = min(batch, sequences - first)

        def report(position: int, first: int = first, count: int = count) -> None:
            if progress is not None:
                progress(first * length + count * position, sequences * length)

        def draw(count: int = count, report: Callable[[int], None] = report) -> tuple[Tensor, ...]:
            tokens = _sample_batch(network, specials, count, length, generator, report)
            return tokens.cpu(), generator.get_state()

        tokens, state = journal.step(f"sampled.{first}", draw)
        generator.set_state(state)
        parts.append(tokens)
    return torch.cat(parts)


def copy_batch(config: Any, length: int) -> int:
    """Sequences that a copy draws side by side; a function of shapes only, as `sampling_batch`."""
    return max(1, min(_TEXTS, _COPY_CACHE_BYTES // cache_bytes(config, length, 4)))


def sample_copy(
    open_batch: Callable[[int], Batch],
    network: Any,
    tokenizer: Any | None,
    calibration: Calibration,
    progress: Done | None = None,
    journal: Journal | None = None,
) -> Tensor:
    """Return tokens (S, L) int64 that a copy of the network draws, some sequences side by side.

    open_batch: gives so many texts of a decoder of the copy, and is called when a sequence is to be
    drawn. network: tells the special tokens; it does not run.
    """
    count, length = calibration.sequences or 0, calibration.length or 0
    length = min(length, context_length(network.config.get_text_config().to_dict()) or length)
    together = min(count, copy_batch(network.config, length))
    specials = _special_tokens(network, tokenizer)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    opened: list[Batch] = []

    def start(generator: torch.Generator) -> int:
        if specials.start is not None:
            return specials.start
        return int(torch.randint(vocabulary, (), generator=generator))

    def sample(numbers: range) -> Tensor:
        if not opened:
            opened.append(open_batch(together))
        (batch,), texts = opened, range(len(numbers))
        generators = [generator_of(calibration.seed, s) for s in numbers]
        sequences = torch.empty(len(numbers), length, dtype=torch.int64)
        for text in texts:
            batch.rewind(text, 0)
            sequences[text, 0] = start(generators[text])
        for position in range(1, length):
            previous = sequences[:, position - 1].tolist()
            logits = torch.as_tensor(batch.read([(text, [previous[text]]) for text in texts]))
            sequences[:, position] = draw_each(logits.float().softmax(-1), generators)
            for text in texts:
                if previous[text] in specials.ends and previous[text] != specials.start:
                    sequences[text, position] = start(generators[text])
            if progress is not None and (position % 16 == 15 or position == length - 1):
                drawn = numbers.start * length + len(numbers) * (position + 1)
                progress(drawn, count * length)
        return sequences

    groups = [range(first, min(first + together, count)) for first in range(0, count, together)]
    names = [f"sequences.{numbers.start}" for numbers in groups]
    found = (journal or Journal()).each(names, [partial(sample, numbers) for numbers in groups])
    return torch.cat([*found])


@torch.inference_mode()
def _sample_batch(
    network: Any,
    specials: _Specials,
    count: int,
    length: int,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> Tensor:
    """Sample `count` sequences side by side, one token of each per step."""
    device = next(network.parameters()).device
    vocabulary = network.get_input_embeddings().weight.shape[0]
    tokens = torch.empty(count, length, dtype=torch.int64, device=device)
    ends = torch.tensor(specials.ends, dtype=torch.int64, device=device)

    def starts() -> Tensor:
        if specials.start is not None:
            return torch.full((count,), specials.start, device=device)
        return torch.randint(vocabulary, (count,), generator=generator, device=device)

    tokens[:, 0] = starts()
    cache = None
    for position in range(1, length):
        previous = tokens[:, position - 1]
        output = network(input_ids=previous[:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        share = torch.softmax(output.logits[:, -1], dim=-1, dtype=torch.float32)
        if not torch.isfinite(share[:, 0]).all():  # of a row all are finite, or none
            raise ConversionError("logits are not finite; use --dtype bfloat16 or float32")
        drawn = draw_one(share, generator)
        # An EOS that is also the start token has begun the next document already.
        restart = torch.isin(previous, ends) & (previous != specials.start)
        tokens[:, position] = torch.where(restart, starts(), drawn)
        if position % 16 == 15 or position == length - 1:
            report(position + 1)
    return tokens
