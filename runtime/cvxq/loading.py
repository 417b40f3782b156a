"""Load a `.cvxq` file: nothing but the file and the installed packages is needed.

A lean decoder runs the model where one implements its architecture; it needs neither torch (on a
CPU) nor transformers, which take seconds to import.  Everything else, and whatever asks for the
network itself, goes through transformers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from cvxq_format import Reader
from cvxq_kernels.cpu import check_kernels, crc32, is_available

from cvxq.beside import Beside
from cvxq.device import resolve_device
from cvxq.errors import ArgumentError, UnsupportedModelError
from cvxq.lean import NotLeanError, open_decoder
from cvxq.model import Model, NetworkOptions
from cvxq.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

LONGEST_CONTEXT = 1 << 24  # tokens; more than any model was made for
Weights = Literal["packed", "dense"]


def load(
    path: str | os.PathLike[str],
    *,
    weights: Weights = "packed",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    context: int | None = None,
    check: bool = True,
    tokenizer: bool = False,
) -> Model:
    """Load the model in the `.cvxq` file at `path`, ready to generate text.

    weights: "packed" keeps matrices packed; "dense" expands all of them while loading and runs
    them through transformers, as does a dtype, the floating type to compute in (None: float32).
    device: "cpu", "cuda" or "cuda:N".  threads: of the CPU, as many as help if None.
    context: the most tokens of a text, what the model was made for if None; it may be more.
    check: compare every tensor with its checksum as it is read (the header always is), and the
    CPU's kernels, once, with the formula.
    tokenizer: read it beside the weights, for whoever is going to use it; else when first used.
    Raises OSError when the file cannot be read, `cvxq_format.FormatError` when it is not a sound
    container, ArgumentError for an argument out of its range, UnsupportedModelError when
    transformers lacks the architecture or the kernels fail their check, MissingExtraError when
    transformers is needed and missing, and InconsistentFileError when tensors and architecture do
    not fit each other.
    """
    if weights not in ("packed", "dense"):
        raise ArgumentError(f"weights is {weights!r}, allowed: 'packed', 'dense'")
    if context is not None and not 2 <= context <= LONGEST_CONTEXT:
        raise ArgumentError(f"context is {context} tokens, allowed: 2 to {LONGEST_CONTEXT}")
    place = resolve_device(str(device))
    options = NetworkOptions(weights == "packed", place, dtype, threads)
    if check and is_available():
        _check_kernels()
    reader = Reader(path, check=check, crc32=crc32)
    decoder, reason = None, None
    reading = Beside(lambda: load_tokenizer(reader))
    beside = reading.begin if tokenizer else None
    try:
        if weights == "packed" and dtype is None:
            try:
                decoder = open_decoder(reader, place, threads, context, beside)
            except NotLeanError as error:
                reason = str(error)
        model = Model(reader, decoder, reason, options, context, reading)
        if decoder is None:
            model.check_positions()  # builds the network, so that what is wrong with it shows here
    except BaseException:
        reading.finish()
        reader.close()
        raise
    return model


def _check_kernels() -> None:
    try:
        check_kernels()
    except RuntimeError as error:
        raise UnsupportedModelError(str(error)) from error
