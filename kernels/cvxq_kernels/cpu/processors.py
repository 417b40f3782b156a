"""How many processors this process may keep busy: by its affinity, and by quotas of its cgroups.

A container with half a core still sees all of the machine's: threads for each of them would be
stopped together as soon as they have used up the quota, most of every period. Linux keeps quotas in
files, of which there are two kinds; a process may stand in groups of both.

- version 2, `cpu.max`: microseconds allowed per period, or `max`, and the period;
- version 1, `cpu.cfs_quota_us`: the same, or −1, and `cpu.cfs_period_us`.

A group's quota binds all groups below it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_processors(root: Path = Path("/")) -> int:
    """The most threads that can run at once, 1 or more; a part of a processor does not count.

    root: where `/proc` and the mount points are, for tests.
    """
    # Python's own count of these (3.13) knows nothing of quotas.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min([allowed or 1, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Processors that each group of this process, and each group above, allows it."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux, or hidden
        return
    for line in groups:
        _, controllers, group = line.split(":", 2)
        is_second = not controllers
        if not is_second and "cpu" not in controllers.split(","):
            continue
        for top, shown in _mount_points(mounts, is_second):
            # Where a container does not see its group's place, its own group is mounted at the top.
            below = PurePosixPath(group)
            inside = below.relative_to(top) if below.is_relative_to(top) else PurePosixPath()
            folder = root / shown.lstrip("/")
            for part in (inside, *inside.parents):
                yield from _quota(folder / part, is_second)


def _mount_points(mounts: list[str], is_second: bool) -> Iterator[tuple[str, str]]:
    """Which group each mounted tree of groups begins with, and where it is mounted."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" if is_second else kind == "cgroup" and "cpu" in options.split(","):
            yield before.split(" ")[3], before.split(" ")[4]


def _quota(folder: Path, is_second: bool) -> Iterator[float]:
    """Processors that one group allows, if it limits them."""
    try:
        if is_second:
            amount, period = (folder / "cpu.max").read_text().split()
        else:
            amount = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        if amount != "max" and int(amount) > 0:
            yield int(amount) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # the top has no quota
        return
