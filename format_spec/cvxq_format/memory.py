"""How much memory can still be had, for whoever plans to hold a model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

# Of control groups, versions 2 and 1: where they lie, the files that hold limit and use, and what
# in memory.stat counts pages of files, which count as used and are given back on demand.
_UNIFIED = ("sys/fs/cgroup", "memory.max", "memory.current", r"^(?:in)?active_file (\d+)$")
_LEGACY = (
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    r"^total_(?:in)?active_file (\d+)$",
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still have, None where the system does not tell.

    That is what the machine has free, or less if control groups (containers, systemd) or a limit of
    data (`ulimit -d`) allow less. root: where /proc and /sys lie.
    """
    free = [*_of_machine(root), *_of_groups(root), *_of_process(root)]
    return max(0, min(free)) if free else None


def _of_machine(root: Path) -> Iterator[int]:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.M)
        if found:
            yield int(found[1]) * 1024
    except OSError:
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        if all(name in os.sysconf_names for name in names):
            yield os.sysconf(names[0]) * os.sysconf(names[1])


def _of_groups(root: Path) -> Iterator[int]:
    """What the process's own control group and those around it have left."""
    try:
        lines = _text(root / "proc/self/cgroup").splitlines()
    except OSError:
        return
    for number, controllers, group in (line.split(":", 2) for line in lines):
        if number == "0" and not controllers:
            yield from _of_group(root, Path(group.lstrip("/")), *_UNIFIED)
        elif "memory" in controllers.split(","):
            yield from _of_group(root, Path(group.lstrip("/")), *_LEGACY)


def _of_group(
    root: Path, group: Path, place: str, limit: str, used: str, files: str
) -> Iterator[int]:
    """In a container the path may be that of the host, of which only the root is seen."""
    for path in (root / place / group, *(root / place / parent for parent in group.parents)):
        try:
            held = sum(map(int, re.findall(files, _text(path / "memory.stat"), re.M)))
            yield int(_text(path / limit)) - int(_text(path / used)) + held
        except (OSError, ValueError):
            pass  # no such group, or no limit


def _of_process(root: Path) -> Iterator[int]:
    """What `ulimit -d` leaves for memory that lies in no file."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        held = re.search(r"^VmData:\s*(\d+) kB", _text(root / "proc/self/status"), re.M)
    except OSError:
        return
    if limit != resource.RLIM_INFINITY and held:
        yield limit - int(held[1]) * 1024


def _text(path: Path) -> str:
    return path.read_text("ascii", "replace")
