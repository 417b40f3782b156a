"""Decoders for the Llama family and OPT that need neither transformers nor its modules."""

from __future__ import annotations

from cvxq_format import Reader

from cvxq.lean.decoder import Decoder
from cvxq.lean.errors import NotLeanError
from cvxq.lean.spec import read_spec
from cvxq.lean.weights import find_weights
from cvxq.parts import json_part, needed_part

__all__ = ["Decoder", "NotLeanError", "open_decoder"]


def open_decoder(reader: Reader, device: str = "cpu", threads: int | None = None) -> Decoder:
    """Make the decoder of an open file; the file may be closed afterwards.

    device: "cpu", "cuda" or "cuda:N", already checked; threads: of the CPU, as many as help if
    None.
    Raises NotLeanError, with the reason in one line, where transformers has to run the model.
    """
    needed_part(reader, "config.json")
    config = json_part(reader, "config.json")
    spec = read_spec(config)
    weights = find_weights(spec, reader)
    if device != "cpu":
        from cvxq.lean.cuda.opening import open_torch_decoder

        return open_torch_decoder(spec, weights, reader, device, config)
    from cvxq.lean.native_decoder import NativeDecoder

    return NativeDecoder(spec, weights, reader, threads)
