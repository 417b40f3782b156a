"""What `cvxq perplexity` measures or compares with: a `.cvxq` file, or a checkpoint.

Checkpoints are read by the converter, so that conversion and measurement see the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cvxq.cli.conversion import announce
from cvxq.cli.options import load_model, model_file, quiet_transformers
from cvxq.extras import need

if TYPE_CHECKING:
    from cvxq_converter.source.source import Source

    from cvxq.evaluate import Predictor
    from cvxq.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """What predicts, how many tokens it knows, and the most it was made for, if stated.

    network: in float32, or a lean decoder. read_tokenizer: MissingPartError where there is none.
    """

    network: Predictor
    vocabulary: int
    context_length: int | None
    read_tokenizer: Callable[[], Tokenizer]


def cvxq_file(source: str) -> Path | None:
    """Return the `.cvxq` file that `source` names, of the hub downloaded; None for a checkpoint.

    Raises FileProblem for a missing `.cvxq` file, HubError where the hub does not give it.
    """
    from cvxq.hub import find, hub_file

    wanted = hub_file(source)
    if wanted is not None:
        return find(wanted)
    return model_file(source) if _is_cvxq_file(Path(source)) else None


def _is_cvxq_file(path: Path) -> bool:
    """Whether `path` is a `.cvxq` file by its name, be it there or not, or by how it begins."""
    from cvxq_format.limits import MAGIC

    if path.suffix == ".cvxq":
        return not path.is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def load_subject(
    source: str, weights: str = "dense", device: str = "cpu", threads: int | None = None
) -> Subject:
    """Load a `.cvxq` file, here or on the hub, or a checkpoint: a folder, a GGUF file, a hub id.

    weights: of a `.cvxq` file, see `cvxq.load`; threads: of the CPU. Says on stderr what is not as
    one may think. Raises what `cvxq_file` and `cvxq.load` raise; ConversionError for a checkpoint
    that conversion refuses, too.
    """
    file = cvxq_file(source)
    if file is None:
        return _load_checkpoint(source, device, threads)
    model = load_model(file, weights, device, threads)
    network = model.decoder or model.network
    return Subject(network, model.vocabulary, model.context_length, lambda: model.tokenizer)


def _load_checkpoint(model: str, device: str, threads: int | None) -> Subject:
    need("convert", f"{model}, a checkpoint,")
    import torch
    from cvxq_converter.source.checkpoint import load_network, open_source, source_names
    from cvxq_converter.source.leftovers import leftover_notice
    from cvxq_format.model_config import context_length

    from cvxq.device import resolve_device
    from cvxq.threads import set_torch_threads

    device = resolve_device(device)
    set_torch_threads(threads)
    quiet_transformers()
    source = open_source(model)
    for notice in source.notices:
        announce(notice)
    network = load_network(source, torch.float32, device)
    leftovers = leftover_notice(source, network, source_names(source, network))
    if leftovers:
        announce(leftovers)
    config = network.config.get_text_config()
    length = context_length(config.to_dict())
    return Subject(network, config.vocab_size, length, lambda: _read_tokenizer(source))


def _read_tokenizer(source: Source) -> Tokenizer:
    from cvxq_converter.source.tokenizer import load_tokenizer

    from cvxq.errors import MissingPartError

    tokenizer: Tokenizer | None = load_tokenizer(source)
    if tokenizer is None:
        raise MissingPartError(
            f"{source.name}: no tokenizer, so text cannot be turned into tokens; expected "
            "tokenizer.json or its like beside the weights"
        )
    return tokenizer
