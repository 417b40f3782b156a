"""The folder that stands for a bare `.cvxq` file."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

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
    made = Path(tempfile.mkdtemp(dir=cache))
    try:
        export_rest(file, made)
        (made / MODEL_FILE).symlink_to(file)
        os.rename(made, folder)  # noqa: PTH104 a process that was faster makes it fail
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
