"""Room on a disk for the experts of a file that is larger than memory.

The CPU's kernels repack matrices when they are loaded, so they do not read the file itself.  Where
memory does not hold them all, the repacked experts lie in a temporary file without a name, beside
the model's: the system keeps in memory those that were used last.  What every token needs stays in
memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cvxq_format import Reader
from cvxq_format.decoder_record import DecoderRecord
from cvxq_format.memory import available_memory
from cvxq_format.model_config import expert_pool

_REPACKED = 1.15  # of the stored size, at most, by what was seen


@contextmanager
def scratch_for_experts(record: DecoderRecord, reader: Reader) -> Iterator[int]:
    """Give the descriptor of a file for the experts, −1 where there are none or memory holds them.

    Raises MemoryError where neither memory nor the disk does.
    """
    has_experts = any(layer.feed_forward.experts is not None for layer in record.layers)
    free = available_memory() if has_experts else None
    if free is None or reader.path.stat().st_size <= free:
        yield -1
        return
    experts = sum(entry.size for entry in reader.header.tensors if expert_pool(entry.name))
    folder = _folder(reader.path)
    room = shutil.disk_usage(folder).free
    if room < _REPACKED * experts:
        raise MemoryError(
            f"{reader.path.name}: its experts take {experts / 1e9:.1f} GB, memory has "
            f"{free / 1e9:.1f} GB free and {folder} {room / 1e9:.1f} GB; "
            "free some of either, or set TMPDIR to a folder on another disk"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        yield file.fileno()


def _folder(model: Path) -> Path:
    """Beside the model, which is on a disk; elsewhere if that cannot be written to."""
    beside = model.resolve().parent
    return beside if os.access(beside, os.W_OK) else Path(tempfile.gettempdir())
