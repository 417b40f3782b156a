"""How much longer a tokenizer.json may make a text before it is cut into tokens, or after.

Its steps replace one text by another, in turn.  Ten that make a hundred letters of each would fill
any memory, so what a file asks for is computed before any text is given to it.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

MOST_GROWTH = 1024  # bytes for one byte; a usual tokenizer has up to about 250
_NESTED = ("normalizers", "pretokenizers", "decoders")
_FIXED = {"ByteLevel": 2.0, "NFKC": 4.0, "NFKD": 4.0, "NFC": 3.0, "NFD": 3.0, "Metaspace": 3.0}


def growth(tokenizer: Tokenizer) -> float:
    """Return the most bytes that normalizing and splitting, or decoding, can make of one."""
    stages = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    before, split, after = (math.prod(_factors(_described(stage))) for stage in stages)
    return max(before * split, after)


def _described(stage: Any) -> Mapping[str, Any]:
    described: Mapping[str, Any] = {} if stage is None else json.loads(stage.__getstate__())
    return described


def _factors(step: Mapping[str, Any]) -> Iterator[float]:
    """Yield the growth of each step, nested ones included."""
    for name in _NESTED:
        for inner in step.get(name, ()):
            yield from _factors(inner)
    if step.get("type") == "Replace":
        yield _of_replacing(step)
    elif step.get("type") == "Precompiled":
        yield _of_charsmap(base64.b64decode(step["precompiled_charsmap"]))
    else:
        yield _FIXED.get(str(step.get("type")), 1.0)


def _of_replacing(step: Mapping[str, Any]) -> float:
    content, found = len(step["content"].encode()), step["pattern"].get("String")
    if found:
        return max(1.0, content / len(found.encode()))
    return 1.0 + content  # a pattern may find nothing, at every place


def _of_charsmap(blob: bytes) -> float:
    """The longest text of a SentencePiece character map: a trie's size, the trie, the texts."""
    texts = blob[4 + int.from_bytes(blob[:4], "little") :]
    return max(1.0, *(float(len(text)) for text in texts.split(b"\0")))
