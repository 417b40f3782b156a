"""Several processes at one job: who they are, and how what one of them has comes to the others.

All run the same program and come to the same steps in the same order; what is divided among them is
said where it is divided (`journal`, `measure.gathering`). Only the first one speaks and writes.

What they exchange lies in memory and in files, so gloo does for GPUs as well, which need not know
of each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from cvxq_converter.errors import CutShortError

_PIECE = 1 << 26  # bytes of a file that are sent at once
_PATIENCE = timedelta(days=365)  # one may work for hours while the others wait


class LostRankError(CutShortError):
    """Another process has ended before the work was done; it knows why."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a job. rank: the number of this one; local: its number on its machine.

    world: how many there are; here: how many on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    here: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What each of them has, in their order; all wait for all."""
        found: list[Any] = [value]
        if self.world > 1:
            found = [None] * self.world
            with self._exchange():
                distributed.all_gather_object(found, value, group=self.group)
        return found

    def add_in_order(self, total: Tensor, part: Tensor, count: int) -> None:
        """Add the parts of the first `count` ranks to the total of the first one, in their order.

        total, part: on the CPU, of one shape and type.
        """
        if self.is_first:
            total.add_(part)
        with self._exchange():
            for rank in range(1, count):
                if self.is_first:
                    received = torch.empty_like(total)
                    distributed.recv(received, rank, group=self.group)
                    total.add_(received)
                elif rank == self.rank:
                    distributed.send(part.contiguous(), 0, group=self.group)

    def send_file(self, path: Path, owner: int) -> None:
        """Bring a file of one of them, of the same path for all, to those that do not see it."""
        size = self.gather(path.stat().st_size if self.rank == owner else 0)[owner]
        lacks = not path.exists()
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
        with (unfinished if lacks else path).open("w+b" if lacks else "rb") as file:
            for start in range(0, size, _PIECE):
                piece = torch.empty(min(_PIECE, size - start), dtype=torch.uint8)
                if self.rank == owner:
                    file.readinto(piece.numpy())  # type: ignore[attr-defined]
                with self._exchange():
                    distributed.broadcast(piece, owner, group=self.group)
                if lacks:
                    file.write(piece.numpy().tobytes())
        if lacks:
            unfinished.rename(path)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # of torch.distributed, whatever has become of the others
            raise LostRankError(f"rank {self.rank}: another rank has ended") from None


ALONE = Ranks()


def join() -> Ranks:
    """Take part in the job that the environment tells of, as `torchrun` sets it; or work alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", timeout=timedelta(minutes=10))
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    local, here = (os.environ.get(f"LOCAL_{name}") for name in ("RANK", "WORLD_SIZE"))
    return Ranks(rank, world, int(local or rank), int(here or world), group)
