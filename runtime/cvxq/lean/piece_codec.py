"""A Llama's tokenizer.model through sentencepiece, to the same tokens as transformers gives.

transformers turns the model into a byte-pair encoder of its own, which differs from sentencepiece
around it: spaces are kept as they are; one is put in front of a text unless there is one; special
tokens written in a text count as such; decoding is done by the `tokenizers` library.  With the old
behaviour (`legacy`), its versions differ among themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders

_SPACE = "▁"  # how pieces spell a space


class PieceCodec:
    """A byte-pair sentencepiece model; see `cvxq.lean.tokenizer.Codec`."""

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        special: Mapping[str, int],
        whole: Mapping[str, int],
        begin: list[int],
        end: list[int],
    ) -> None:
        """Put `begin` and `end` around texts.

        special, whole: tokens that texts are cut at, with their ids; whole ones are ordinary text.
        """
        self._processor = processor
        self._special = dict(special)
        self._ids = frozenset(special.values())
        self._begin, self._end = begin, end
        self._cuts = {**special, **whole}
        longest_first = sorted(self._cuts, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
        self._decoder = decoders.Sequence(
            [
                decoders.Replace(_SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1),
            ]
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the tokens of `text`, special tokens written in it included."""
        ids = list(self._begin) if add_special_tokens else []
        for index, stretch in enumerate(self._split.split(text)):
            if stretch in self._cuts:
                ids.append(self._cuts[stretch])
            elif stretch:
                if index == 0 and not stretch.startswith((" ", _SPACE)):
                    stretch = " " + stretch
                ids += self._processor.encode(stretch)
        return ids + self._end if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of the tokens; ids beyond the vocabulary have none."""
        left_out = self._ids if skip_special_tokens else frozenset()
        pieces = self._pieces
        text: str = self._decoder.decode(
            [pieces[i] for i in ids if i not in left_out and i < len(pieces)]
        )
        return text

    def token_id(self, token: str) -> int | None:
        """Return the id of a special token, None if it is not one."""
        return self._special.get(token)


def read_piece_codec(
    blob: bytes, config: Mapping[str, Any], named: Mapping[str, str], model_type: object
) -> PieceCodec | None:
    """Read a tokenizer.model, or return None for one that transformers treats in another way."""
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if kind != "LlamaTokenizer" or model_type != "llama":
        return None
    if config.get("legacy") is not False or config.get("add_prefix_space") is not None:
        return None
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(blob)
    except Exception:  # protobuf's own error; transformers will say what is wrong
        return None
    if not _is_plain(proto):
        return None
    kinds = type(proto.pieces[0])
    special = _ids(proto, (kinds.UNKNOWN, kinds.CONTROL))
    whole = _ids(proto, (kinds.USER_DEFINED,))
    listed = {entry["content"] for entry in (config.get("added_tokens_decoder") or {}).values()}
    if set(named) < {"bos_token", "eos_token", "unk_token"}:
        return None
    if not listed | set(named.values()) <= set(special):
        return None
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    ends = [
        [special[named[f"{name}_token"]]] if config.get(f"add_{name}_token", default) else []
        for name, default in (("bos", True), ("eos", False))
    ]
    return PieceCodec(processor, special, whole, ends[0], ends[1])


def _is_plain(proto: Any) -> bool:
    """Whether the model is byte-pair encoding with bytes for unknown characters and no more."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return (
        len(proto.pieces) > 0
        and trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and not normalizer.precompiled_charsmap
        and normalizer.escape_whitespaces
        and all(piece.type != type(piece).UNUSED for piece in proto.pieces)
    )


def _ids(proto: Any, kinds: tuple[int, ...]) -> dict[str, int]:
    """Return the pieces of some kinds and their ids."""
    return {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type in kinds}
