"""How much memory can still be had, for whoever plans to hold a model."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory() -> int | None:
    """Return the bytes that this process can still have, None where the system does not tell."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        if all(name in os.sysconf_names for name in names):
            limits.append(os.sysconf(names[0]) * os.sysconf(names[1]))
    try:  # a container may be allowed less than the machine has
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text("ascii"))
        limits.append(limit - int((group / "memory.current").read_text("ascii")))
    except (OSError, ValueError):
        pass  # no such limit
    return min(limits) if limits else None
