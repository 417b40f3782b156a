"""Which peers there are, and what each is asked to make of a model.

A cell is one point of a peer's that a user could pick, "3 bits, group 64". Where the peer leaves
a choice that does not change the rate by much, the cell has several settings, and the best of
them stands for the peer. Every recipe is the peer's own default otherwise. Symmetric grids of GPTQ
are left out: where they were tried, at 2, 3 and 4 bits, they lost to asymmetric ones of about the
same rate.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """One peer.

    key: names its module, environment and requirements; calibrates: whether it uses calibration
    sequences, so that seeds matter; package: its name on the package index; groups: all that it
    is asked for, if not every; once: by the first seed alone, because a result can take it minutes.
    """

    key: str
    label: str
    calibrates: bool
    package: str
    groups: tuple[int, ...] = ()
    once: bool = False


@dataclass(frozen=True, eq=False)
class Cell:
    """Settings by label, of which the best is taken; whole: of table B, embeddings included."""

    name: str
    settings: dict[str, Settings]
    whole: bool = False


RTN = Peer("rtn", "RTN", calibrates=False, package="cvxq")
PEERS = (
    RTN,
    Peer("hqq", "HQQ", calibrates=False, package="hqq"),
    Peer("gptq", "GPTQ (LLM Compressor)", calibrates=True, package="llmcompressor"),
    Peer(
        "gptqmodel",
        "GPTQ (GPTQModel)",
        calibrates=True,
        package="GPTQModel",
        groups=(64,),
        once=True,
    ),
    Peer("gguf", "llama.cpp + imatrix", calibrates=True, package="llama-cpp-python", once=True),
    Peer("autoround", "AutoRound", calibrates=True, package="auto-round", groups=(128,), once=True),
)
GRID: dict[str, dict[str, Settings]] = {
    "rtn": {"": {}},
    "hqq": {"groups along inputs": {"axis": 1}, "groups along outputs": {"axis": 0}},
    "gptq": {
        "asymmetric": {"symmetric": False, "shrink": 0.2},
        "asymmetric, deep clipping": {"symmetric": False, "shrink": 0.6},
    },
    "gptqmodel": {
        "asymmetric, group-aware order, clipping": {
            "symmetric": False,
            "desc_act": False,
            "mse": 2.4,
        },
        "asymmetric, activation order, clipping": {
            "symmetric": False,
            "desc_act": True,
            "mse": 2.4,
        },
    },
    "autoround": {
        "asymmetric": {"symmetric": False, "steps": 200},
    },
}
DEEP_BELOW = 4  # bits; from there on the search never clips so deep, and finds the same
SUPERBLOCK = 256  # weights of a row that llama.cpp's K- and I-quants take together
PURE = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K")
PURE_BLOCK = ("IQ4_NL", "Q4_0", "Q5_0")
MIXTURES = (
    *("IQ2_XS", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_M", "Q3_K_S", "Q3_K_M"),
    *("Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M"),
)
MIXTURES_BLOCK = ("IQ4_NL", "Q4_0", "Q5_0")
# llama-quantize names mixtures: what to call for one type alone
CALLED = {"IQ2_S": "IQ2_M", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}


def cells(
    peer: Peer, shapes: Collection[tuple[int, int]], bits: Sequence[int], groups: Sequence[int]
) -> list[Cell]:
    """What `peer` is asked for, on matrices of `shapes` (N, K)."""
    if peer.key == "gguf":
        return _gguf_cells({inputs for _, inputs in shapes})
    return [
        Cell(
            f"{depth} bits, group {group}",
            {
                label: {"bits": depth, "group": group, **extra}
                for label, extra in GRID[peer.key].items()
                if depth < DEEP_BELOW or "deep clipping" not in label
            },
        )
        for depth in bits
        for group in groups
        if not peer.groups or group in peer.groups
    ]


def _gguf_cells(lengths: Collection[int]) -> list[Cell]:
    """One cell per type and mixture; K-quants and their kin need rows of whole superblocks."""
    fits = all(length % SUPERBLOCK == 0 for length in lengths)
    pure = PURE + PURE_BLOCK[:1] if fits else PURE_BLOCK
    mixtures = MIXTURES if fits else MIXTURES_BLOCK
    alone = [(f"{name} alone", CALLED.get(name, name), True, False) for name in pure]
    mixed = [(name, name, False, False) for name in mixtures] if fits else []
    whole = [(name, name, False, True) for name in mixtures]
    return [
        Cell(name, {"": {"type": kind, "pure": is_pure, "whole": is_whole}}, is_whole)
        for name, kind, is_pure, is_whole in [*alone, *mixed, *whole]
    ]
