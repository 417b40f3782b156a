"""Which rows or columns of which matrix a layer of one rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from cvxq.errors import UnsupportedModelError


@dataclass(frozen=True)
class Place:
    """Outputs `start` to `stop` of matrix number `matrix` of those that a layer was given."""

    matrix: int
    start: int
    stop: int


def places_of(
    heights: Sequence[int], own: Sequence[int], whole: Sequence[int], rank: int, size: int
) -> list[Place]:
    """Say what makes up the outputs of a layer, in its order.

    heights: outputs of each matrix that the layer was given: one for each part of the layer (query,
    key and value), or one for all of them.  own: outputs of each part that this rank has.  whole:
    those that all `size` ranks have; where there are fewer shares of a part than ranks (key and
    value of few heads), neighbours have the same one.
    Raises UnsupportedModelError for matrices of other sizes.
    """
    if len(heights) == len(own):
        starts, sizes = [0] * len(own), list(heights)
    else:
        starts, sizes = [0, *accumulate(whole)][:-1], list(whole)
    complete = sum(sizes) == sum(heights) and len(heights) in (1, len(own))
    if not complete or any(all_ % part for all_, part in zip(sizes, own, strict=True)):
        raise UnsupportedModelError(
            f"matrices of {_listed(heights)} outputs for a layer that has {_listed(own)} of "
            f"{_listed(whole)} on each of {size} ranks; use another number of ranks"
        )
    found = []
    for index, (start, all_, part) in enumerate(zip(starts, sizes, own, strict=True)):
        first = start + rank * (all_ // part) // size * part
        found.append(Place(min(index, len(heights) - 1), first, first + part))
    return found


def _listed(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts))
