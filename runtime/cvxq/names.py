"""Which tensor of the file belongs to which parameter of the network.

A file names tensors as the source checkpoint did.  Checkpoints differ from the network's own
names in one way that matters: they may lack, or have, the prefix of the base model
(`h.0.ln_1.weight` for `transformer.h.0.ln_1.weight` in GPT-2's).  GPT-NeoX's output head is
`embed_out` in checkpoints, but `lm_head` in transformers.  Every parameter must find its tensor and
every tensor its parameter; constants that old checkpoints carried along (attention masks, rotary
frequencies) are the only ones left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from cvxq.errors import InconsistentFileError

_CONSTANTS = re.compile(
    r"(^|\.)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
)

_HEADS = ("lm_head", "embed_out")


def match_names(
    tensors: Iterable[str],
    parameters: Collection[str],
    tied: Sequence[Collection[str]],
    *,
    prefix: str,
    added_biases: Collection[str] = (),
    optional: Collection[str] = (),
    network: str = "the network",
) -> dict[str, str]:
    """Map every parameter name to the file's name (tensor or alias) that supplies it.

    tensors: names in the file, aliases included; parameters: names in the network, all names of
    a shared parameter included; tied: groups of names that share one parameter; prefix: the base
    model's, without the dot; added_biases: tensors that name biases the source lacked (their
    parameter need not exist); optional: buffers that the network can do without.
    Raises InconsistentFileError for a parameter without tensor or a tensor without parameter.
    """
    places = {*parameters, *optional}
    found: dict[str, str] = {}
    strangers = []
    for tensor in tensors:
        place = _place(tensor, places, prefix, tensor in added_biases)
        if place is None:
            if not _CONSTANTS.search(tensor):
                strangers.append(tensor)
        elif place in found:
            raise InconsistentFileError(
                f"tensors {found[place]!r} and {tensor!r} both belong to {place!r} of {network}; "
                "only one of them can"
            )
        else:
            found[place] = tensor
    for group in tied:
        present = [name for name in group if name in found]
        if present:
            found.update({name: found[present[0]] for name in group if name not in found})
    missing = [name for name in parameters if name not in found]
    if missing:
        raise InconsistentFileError(f"{network} needs tensor {_few(missing)}, not in the file")
    if strangers:
        raise InconsistentFileError(
            f"tensor {_few(strangers)} of the file has no place in {network}; "
            "the config is of another model"
        )
    return found


def tied_groups(named: Iterable[tuple[str, object]]) -> list[list[str]]:
    """Group the names of `named` that stand for the very same object; single names are left out."""
    groups: dict[int, list[str]] = {}
    for name, value in named:
        groups.setdefault(id(value), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def resolve_alias(name: str, aliases: Mapping[str, str]) -> str:
    """Return the tensor that `name` stands for (aliases point at tensors, never at aliases)."""
    return aliases.get(name, name)


def _place(tensor: str, places: Collection[str], prefix: str, added: bool) -> str | None:
    """Return the parameter that `tensor` fills, or None."""
    for name in _spellings(tensor, prefix):
        if name in places:
            return name
        if added and name.removesuffix(".bias") + ".weight" in places:
            return name
    return None


def _spellings(tensor: str, prefix: str) -> list[str]:
    """`tensor` as it is, with the base model's prefix, without it, and a head's other name."""
    spellings = [tensor]
    if prefix:
        spellings += [f"{prefix}.{tensor}", tensor.removeprefix(prefix + ".")]
    head, _, attribute = tensor.rpartition(".")
    if head in _HEADS:
        spellings += [f"{other}.{attribute}" for other in _HEADS]
    return spellings


def _few(names: list[str]) -> str:
    """Name the first of several, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"
