"""A decoder's record is written only if a decoder that executes it computes what transformers does.

Both read the same random tokens with the weights that the file will hold, in float32. The text is
longer than every window and every length from which on text is turned in another way; where these
are long, they are made short in the live network for a second comparison, and nothing but they may
change in the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from cvxq_format import Codebook, CompandedTensor, FormatError, RawTensor, dequantize
from cvxq_format.decoder_record import DecoderRecord

from cvxq_converter.errors import NotDescribedError
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.source.blocks import Streamed, hollow
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.write.writing import as_stored

LEAST_PLACES, MOST_PLACES = 64, 256  # of the text
PAST = 16  # places after the end of a window
LARGEST_ERROR = 1e-3  # of a logit, or
LARGEST_SHARE = 1e-4  # of the range of the logits, whichever is more
LARGEST_KL = 1e-6  # nats per token
SEED = 20240921
TEXTS = 4  # of which one must be computed alike where experts are chosen
_ROWS = 16  # of logits that are compared at once, in float64

Floats = npt.NDArray[np.float32]


class StoredTensors:
    """The tensors that a file will hold, read as from the file."""

    def __init__(self, loaded: LoadedModel, result: Quantized) -> None:
        self.aliases: Mapping[str, str] = loaded.aliases
        self.scratch = loaded.streamed.scratch
        self._result = result
        self._raw = {name: as_stored(value) for name, value in loaded.unquantized()}
        self._raw |= {name: as_stored(value) for name, value in result.added_biases.items()}

    def read(self, name: str) -> RawTensor | CompandedTensor:
        """Return the tensor of this name or alias; raises KeyError if there is none."""
        name = self.aliases.get(name, name)
        if name in self._result.tensors:
            return self._result.tensors[name]
        value = self._raw[name]
        if value.dtype is torch.bfloat16:
            bits = value.view(torch.uint16).numpy()
            return RawTensor("bf16", tuple(value.shape), bits)
        kind = {torch.float16: "f16", torch.float32: "f32"}[value.dtype]
        return RawTensor(kind, tuple(value.shape), value.numpy())

    def codebook(self, index: int) -> Codebook:
        """Return the one codebook."""
        return self._result.codebook

    def dense(self, name: str) -> torch.Tensor:
        """Return a tensor as float32, matrices as (N, K)."""
        value = self.read(name)
        if isinstance(value, CompandedTensor):
            return torch.from_numpy(dequantize(value, self._result.codebook))
        return self._raw[self.aliases.get(name, name)].float()


class Decoder(Protocol):
    """What executes a record."""

    def logits(self, ids: Sequence[int]) -> Floats | torch.Tensor:
        """Return the logits (M, V) after each token of a text (M,)."""


OpenDecoder = Callable[[DecoderRecord, StoredTensors], Decoder]


@dataclass(frozen=True)
class Proof:
    """A record that was proved, or why there is none."""

    record: DecoderRecord | None
    error: Exception | None = None


@torch.no_grad()
def prove(loaded: LoadedModel, result: Quantized, open_decoder: OpenDecoder) -> Proof:
    """Describe the network's decoder, and compare what it computes with the network.

    open_decoder: makes a decoder of a record and tensors that computes in float32 throughout; it
    raises NotDescribedError or a FormatError where it cannot. Leaves the network as it was.
    """
    try:
        record = loaded.describe(result.added_biases)
        tensors = StoredTensors(loaded, result)
        with weights_as_stored(loaded, result, tensors):
            places = _places(record)
            _compare(loaded.streamed, record, tensors, open_decoder, places)
            if any(number >= places for number in _lengths(record)):
                with shortened(loaded.hollow, places):
                    short = loaded.describe(result.added_biases)
                    _check_only_lengths_differ(record, short, places)
                    _compare(loaded.streamed, short, tensors, open_decoder, places)
    except (NotDescribedError, FormatError) as error:
        return Proof(None, error)
    return Proof(record)


def _lengths(record: DecoderRecord) -> list[int]:
    """Every window, and every length of text up to which one set of frequencies holds."""
    windows = [layer.attention.window for layer in record.layers]
    return [n for n in (*windows, *(rope.switch for rope in record.ropes)) if n is not None]


def _places(record: DecoderRecord) -> int:
    """Tokens of the text: past every length that is not too long for it."""
    past = [n + PAST for n in _lengths(record) if n + PAST <= MOST_PLACES]
    return min(record.context, max(LEAST_PLACES, *past, 0))


def _short(number: int | None, places: int, divisor: int) -> int | None:
    """A length that a text of `places` tokens passes, in place of one that it does not."""
    return number if number is None or number < places else max(1, places // divisor)


def _short_window(number: int | None, places: int) -> int | None:
    return _short(number, places, 4)


def _short_switch(number: int | None, places: int) -> int | None:
    return _short(number, places, 2)


def _check_only_lengths_differ(record: DecoderRecord, short: DecoderRecord, places: int) -> None:
    layers = tuple(
        replace(y, attention=replace(y.attention, window=_short_window(y.attention.window, places)))
        for y in record.layers
    )
    ropes = tuple(replace(r, switch=_short_switch(r.switch, places)) for r in record.ropes)
    if short != replace(record, layers=layers, ropes=ropes):
        raise NotDescribedError("with shorter windows the network changes in more than these")


@contextmanager
def shortened(network: Any, places: int) -> Iterator[None]:
    """Let windows and switches of the live network be passed by a text of `places` tokens."""
    config = network.config
    window = getattr(config, "sliding_window", None)
    owners = [config, *network.modules()]
    owners = [o for o in owners if window is not None and _has(o, "sliding_window", window)]
    settings = [s for s in _rope_settings(config) if s.get("rope_type") == "longrope"]
    switches = [s["original_max_position_embeddings"] for s in settings]
    try:
        for owner in owners:
            owner.sliding_window = _short_window(window, places)
        for setting, switch in zip(settings, switches, strict=True):
            setting["original_max_position_embeddings"] = _short_switch(switch, places)
        yield
    finally:
        for owner in owners:
            owner.sliding_window = window
        for setting, switch in zip(settings, switches, strict=True):
            setting["original_max_position_embeddings"] = switch


def _has(owner: Any, name: str, value: int) -> bool:
    return bool(getattr(owner, name, None) == value)


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """The rotary settings, one set for all layers or one for each type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [item for item in given.values() if isinstance(item, dict)]
    return [given, *nested]


@contextmanager
def weights_as_stored(
    loaded: LoadedModel, result: Quantized, tensors: StoredTensors
) -> Iterator[None]:
    """Give the network, in float32, exactly the weights that the file will hold."""
    names = dict(loaded.names)
    flipped = set()
    for matrix in loaded.matrices:
        if matrix.bias_name in result.added_biases:
            names[f"{matrix.input_module_name}.bias"] = matrix.bias_name
        names[f"{matrix.module_name}.weight"] = matrix.name
        if matrix.kind == "conv1d":
            flipped.add(f"{matrix.module_name}.weight")
    dtype = loaded.matrices[0].parameter.dtype
    streamed, network = loaded.streamed, loaded.hollow
    values = streamed.values
    before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def stored(name: str, _: torch.nn.Parameter) -> torch.Tensor:
        value = tensors.dense(names[name])
        return value.T.contiguous() if name in flipped else value

    try:
        for name, parameter in network.named_parameters():
            before.append((parameter, parameter.data))
            if parameter.ndim > 1:
                parameter.data = hollow(parameter, torch.float32)
            else:
                parameter.data = stored(name, parameter).to(parameter.device)
        for buffer in network.buffers():
            if buffer.is_floating_point() and buffer.ndim == 0:  # rounded where it is used
                before.append((buffer, buffer.data))
                buffer.data = buffer.data.to(dtype).float()
        streamed.values = stored
        yield
    finally:
        streamed.values = values
        for tensor, data in before:
            tensor.data = data


def _compare(
    streamed: Streamed,
    record: DecoderRecord,
    tensors: StoredTensors,
    open_decoder: OpenDecoder,
    places: int,
) -> None:
    """Raise NotDescribedError unless both compute the same logits, but for rounding.

    Where a token's experts are nearly equal, rounding may choose another one: another text decides.
    """
    table = record.positions is not None  # it has a row for every place of the context
    decoder = open_decoder(record if table else replace(record, context=places), tensors)
    routed = any(layer.feed_forward.experts is not None for layer in record.layers)
    for left in reversed(range(TEXTS if routed else 1)):
        generator = torch.Generator().manual_seed(SEED + left)
        ids = torch.randint(record.vocabulary, (places,), generator=generator)
        try:
            _compare_text(streamed, decoder, ids)
        except NotDescribedError:
            if not left:
                raise
        else:
            break


def _compare_text(streamed: Streamed, decoder: Decoder, ids: torch.Tensor) -> None:
    found = torch.as_tensor(decoder.logits(ids.tolist()))
    low, high, error, divergence = math.inf, -math.inf, 0.0, 0.0
    for _, part, logits in streamed.all_logits(ids[None]):
        expected = logits.float().cpu()
        low, high = min(low, float(expected.min())), max(high, float(expected.max()))
        for ours, theirs in zip(found[part].split(_ROWS), expected.split(_ROWS), strict=True):
            a, b = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
            worst = float((ours - theirs).abs().max())
            error = worst if math.isnan(worst) else max(error, worst)
            divergence += float((a.exp() * (a - b)).sum()) / len(ids)
    limit = max(LARGEST_ERROR, LARGEST_SHARE * (high - low))
    if not (error <= limit and abs(divergence) <= LARGEST_KL):  # also for NaN
        raise NotDescribedError(
            f"the decoder computes something else than {type(streamed.network).__name__}: "
            f"logits differ by {error:.1g}, allowed {limit:.1g}"
        )
