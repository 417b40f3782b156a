"""The tokenizer, from the files inside the `.cvxq` file alone.

Most are read without transformers (`cvxq.lean.tokenizer`).  transformers reads the others from a
folder, so the verbatim files are written to a private temporary one for the moment of loading.
Code among them is never written, let alone run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cvxq_format import Reader
from cvxq_format.decoder_record import FILE_NAME as DECODER_FILE
from cvxq_format.unfinished import disk_error, temporary_folder

from cvxq.errors import ArgumentError, MissingPartError, UnsupportedModelError
from cvxq.extras import need
from cvxq.lean.tokenizer import read_tokenizer
from cvxq.parts import json_part
from cvxq.templates import chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHER_PARTS = {
    "config.json",
    "generation_config.json",
    "provenance.json",
    "report.json",
    "chat_template.json",
    DECODER_FILE,
}


class Tokenizer(Protocol):
    """What the runtime needs of a tokenizer, called as those of transformers are.

    special_tokens_map: what templates may know as `bos_token` and so on.
    """

    chat_template: Any
    special_tokens_map: dict[str, Any]
    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        """Return a mapping whose "input_ids" are the tokens of `text`."""

    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Return the text of the tokens."""


def load_tokenizer(reader: Reader) -> Tokenizer:
    """Build the tokenizer that the file carries, chat template included.

    Raises MissingPartError when the file has none, UnsupportedModelError when the installed
    transformers cannot build it without code from the checkpoint.
    """
    parts = [name for name in reader.files if not name.endswith((".py", ".pyc"))]
    own = [name for name in parts if name not in _OTHER_PARTS and not name.endswith(".jinja")]
    if not own:
        raise MissingPartError(
            "the file has no tokenizer, so text cannot be turned into tokens; "
            "convert it from a folder that has the tokenizer's files"
        )
    return read_tokenizer(reader) or _from_transformers(reader, parts, own)


def check_tokens(ids: Sequence[int], vocabulary: int, tokenizer: Tokenizer | None) -> None:
    """Raise ArgumentError for a token of a text that is none of a model's `vocabulary` tokens.

    Tokenizers may have more of them, added without training the model on them.
    """
    for token in ids:
        if not 0 <= token < vocabulary:
            spelling = f", {tokenizer.decode([token])!r}," if tokenizer and token > 0 else ""
            raise ArgumentError(
                f"the text has token {token}{spelling} but the model only knows tokens 0 to "
                f"{vocabulary - 1}; leave it out of the text"
            )


def _from_transformers(reader: Reader, parts: list[str], own: list[str]) -> PreTrainedTokenizerBase:
    need("convert", f"the tokenizer of {reader.path} ({', '.join(own)})")
    from transformers import AutoTokenizer

    from cvxq.config import read_config
    from cvxq.lean.fast_codec import check_growth

    with temporary_folder("cvxq-tokenizer") as folder:
        for name in parts:
            if name in own or name == "config.json":
                target = folder / name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(reader.file(name))
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # every kind of tokenizer fails in its own way
            if full := disk_error(error, folder):
                raise full from error
            if "config.json" in parts:  # which tokenizers look into
                read_config(json_part(reader, "config.json"), f"{reader.path}: config.json")
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UnsupportedModelError(
                f"the tokenizer in the file ({', '.join(own)}) cannot be built: {lines[0]}"
            ) from error
    if tokenizer.is_fast:
        check_growth(tokenizer.backend_tokenizer)
    tokenizer.chat_template = chat_template(reader) or tokenizer.chat_template
    return tokenizer
