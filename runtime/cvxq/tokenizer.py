"""The tokenizer, from the files inside the `.cvxq` file alone.

transformers reads tokenizers from a folder, so the verbatim files are written to a private
temporary one for the moment of loading.  Code among them is never written, let alone run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cvxq_format import Reader

from cvxq.errors import MissingPartError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHER_PARTS = {"config.json", "generation_config.json", "provenance.json", "report.json"}
_TEMPLATE = "chat_template.jinja"


def load_tokenizer(reader: Reader) -> PreTrainedTokenizerBase:
    """Build the tokenizer that the file carries, chat template included.

    Raises MissingPartError when the file has none, UnsupportedModelError when the installed
    transformers cannot build it without code from the checkpoint.
    """
    from transformers import AutoTokenizer

    parts = [name for name in reader.files if not name.endswith((".py", ".pyc"))]
    own = [name for name in parts if name not in _OTHER_PARTS and not name.endswith(".jinja")]
    if not own:
        raise MissingPartError(
            "the file has no tokenizer, so text cannot be turned into tokens; "
            "convert it from a folder that has the tokenizer's files"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in parts:
            if name in own or name.endswith(".jinja") or name == "config.json":
                target = Path(folder, name)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(reader.file(name))
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UnsupportedModelError(
                f"the tokenizer in the file ({', '.join(own)}) cannot be built: {lines[0]}"
            ) from error
    if tokenizer.chat_template is None and _TEMPLATE in parts:
        tokenizer.chat_template = reader.file(_TEMPLATE).decode("utf-8")
    return tokenizer
