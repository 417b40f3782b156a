"""The tokenizer of a checkpoint: as a file to carry, and as an object to calibrate with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from cvxq_format.unfinished import disk_error, temporary_folder

from cvxq_converter.errors import ConversionError, one_line
from cvxq_converter.source.folder import quiet_transformers
from cvxq_converter.source.source import Source

_OTHER_KINDS = (  # of which transformers can make a tokenizer.json
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_MADE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def made_tokenizer(folder: Path, **options: str) -> tuple[dict[str, bytes], str | None]:
    """The files in which transformers writes a tokenizer of another kind, and why there are none.

    options: of AutoTokenizer, to read it from a GGUF file.
    """
    if not options and not any((folder / file).is_file() for file in _OTHER_KINDS):
        return {}, None
    with quiet_transformers(), temporary_folder("cvxq-tokenizer") as place:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **options
            )
            tokenizer.save_pretrained(place)
        except Exception as error:  # tokenizers of all kinds fail in all ways
            if full := disk_error(error, place):
                raise full from error
            return {}, one_line(error)
        found = {name: place / name for name in _MADE}
        return {name: path.read_bytes() for name, path in found.items() if path.is_file()}, None


def has_tokenizer(files: Iterable[str]) -> bool:
    """Whether there is a tokenizer among files of these names."""
    return any(file.startswith(("tokenizer", "vocab", "spiece")) for file in files)


def load_tokenizer(source: Source) -> Any | None:
    """Return the tokenizer that a container will carry, or None if there is none."""
    carried = dict(source.carried())
    if not has_tokenizer(carried):
        return None
    with quiet_transformers(), temporary_folder("cvxq-tokenizer") as place:
        for file, data in carried.items():
            path = place / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        try:
            return transformers.AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
            if full := disk_error(error, place):
                raise full from error
            raise ConversionError(
                f"{source.name}: its tokenizer cannot be loaded: {one_line(error)}"
            ) from error
