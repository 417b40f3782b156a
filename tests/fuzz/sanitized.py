"""The native library under sanitizers, in place of the one that was built.

    LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
        python -m tests.fuzz --path lean --sanitized FOLDER
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from cvxq_kernels.cpu import loader

_FLAGS = ("-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wno-psabi")
_CHECKS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def use_library(folder: Path) -> None:
    """Build the library with sanitizers in `folder`, unless it is there, and have it loaded."""
    library = folder / "_native_sanitized.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        native = loader.FOLDER / "native"
        sources = sorted(str(path) for path in native.glob("*.c"))
        options = [*_FLAGS, *_CHECKS, "-O1", "-g", "-fPIC", "-shared", "-lm", "-o", str(library)]
        environment = {name: os.environ[name] for name in ("PATH",)}
        subprocess.run(["cc", *sources, *options], env=environment, check=True)
    loader.find_library = lambda: library
