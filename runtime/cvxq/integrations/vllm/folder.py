"""The folder that stands for a bare `.cvxq` file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cvxq_format.unfinished import UnfinishedFolder

from cvxq.export import FOLDER_VERSION, export_rest
from cvxq.hub import MODEL_FILE


def folder_of(file: Path, cache: Path) -> Path:
    """Return the folder in `cache` that stands for a file, made if there is none yet."""
    file = file.resolve()
    state = file.stat()
    key = f"{FOLDER_VERSION} {file} {state.st_size} {state.st_mtime_ns}"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    made = UnfinishedFolder(folder)
    try:
        export_rest(file, made.path)
        (made.path / MODEL_FILE).symlink_to(file)
        made.finish()
    except BaseException as error:
        made.abandon()
        if not (isinstance(error, OSError) and folder.exists()):  # another process was faster
            raise
    return folder
