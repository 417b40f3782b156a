"""Load something to evaluate or to compare with: a `.cvxq` file or an ordinary checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvxq_format.model_config import context_length

from cvxq.errors import UnsupportedModelError
from cvxq.loading import Weights, load
from cvxq.parts import json_object
from cvxq.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cvxq.evaluate import Predictor


@dataclass(frozen=True)
class Subject:
    """What predicts, its tokenizer, and the most tokens it was built for, if stated.

    network: a network in float32 or a lean decoder; transformers_reason: why a `.cvxq` file has no
    lean decoder, None where it has or where none was asked for.
    """

    network: Predictor
    tokenizer: Tokenizer | None
    context_length: int | None
    transformers_reason: str | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens the network knows."""
        network: Any = self.network
        stated: int | None = getattr(network, "vocabulary", None)
        return stated or int(network.config.get_text_config().vocab_size)


def load_subject(
    source: str,
    *,
    weights: Weights = "dense",
    threads: int | None = None,
    device: str = "cpu",
    with_tokenizer: bool = True,
) -> Subject:
    """Load the `.cvxq` file, the model folder or the hub id `source`; never remote code.

    Raises what `cvxq.load` raises, FileNotFoundError for a path that does not exist, and
    UnsupportedModelError for a checkpoint that transformers cannot load completely.
    """
    path = Path(source)
    if path.is_file():
        model = load(path, weights=weights, device=device, threads=threads)
        tokenizer = model.tokenizer if with_tokenizer else None
        network = model.decoder or model.network
        return Subject(network, tokenizer, model.context_length, model.transformers_reason)
    network = load_checkpoint(source)
    found = _tokenizer(source) if with_tokenizer else None
    return Subject(network, found, context_length(network.config.get_text_config().to_dict()))


def load_checkpoint(source: str) -> PreTrainedModel:
    """Load a folder or hub id through transformers, in float32, every weight from the files."""
    import torch
    from transformers import AutoModelForCausalLM

    local = Path(source).is_dir()
    if local and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(2, "this folder has no config.json, so it is no model", source)
    if not local and (Path(source).is_absolute() or source.startswith(".") or _deep(source)):
        raise FileNotFoundError(2, "no such file or folder", source)
    try:
        network, info = AutoModelForCausalLM.from_pretrained(
            source, local_files_only=local, trust_remote_code=False, output_loading_info=True
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever the architecture's code makes of the files
        if local:
            _check_config(Path(source, "config.json"))
        raise UnsupportedModelError(_refusal(source, error)) from error
    for name in sorted(map(str, info["missing_keys"])):
        raise UnsupportedModelError(f"{source}: weight {name} is missing from the checkpoint")
    network = network.to(torch.float32).eval()
    network.requires_grad_(False)
    return network


def _check_config(path: Path) -> None:
    """Raise what `build_network` does for a config.json that is wrong in itself."""
    import torch

    from cvxq.architecture import build_network

    build_network(json_object(path.read_bytes(), str(path)), str(path), torch.float32)


def _deep(source: str) -> bool:
    """Whether `source` cannot be a hub id, which has at most one slash."""
    return source.count("/") > 1 or "\\" in source


def _tokenizer(source: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source, local_files_only=Path(source).is_dir(), trust_remote_code=False
        )
    except Exception as error:  # every kind of tokenizer fails in its own way
        raise UnsupportedModelError(_refusal(f"the tokenizer of {source}", error)) from error


def _refusal(what: str, error: BaseException) -> str:
    import transformers

    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{what}: transformers {transformers.__version__} cannot load it: {lines[0]}"
