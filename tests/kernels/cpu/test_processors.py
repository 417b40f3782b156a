"""How many processors affinity and the quotas of cgroups leave, from files made up."""

import os
from pathlib import Path

import pytest
from cvxq_kernels.cpu.processors import available_processors

SECOND = "31 23 0:28 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
FIRST = "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct"


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def machine(root: Path, groups: str, mount: str, top: str, files: dict[str, str]) -> Path:
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups + "\n")
    (proc / "mountinfo").write_text(mount.format(top=top) + "\n")
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("quota", "processors"),
    [
        ("max 100000", 8),
        ("50000 100000", 1),
        ("150000 100000", 1),
        ("200000 100000", 2),
        ("900000 100000", 8),
        ("20000 10000", 2),
        ("nonsense", 8),
    ],
)
def test_version_two(tmp_path: Path, quota: str, processors: int) -> None:
    root = machine(tmp_path, "0::/a/b", SECOND, "/", {"a/b/cpu.max": quota})
    assert available_processors(root) == processors


def test_a_quota_binds_the_groups_below(tmp_path: Path) -> None:
    files = {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "c/cpu.max": "1000 100000"}
    assert available_processors(machine(tmp_path, "0::/a/b", SECOND, "/", files)) == 3


@pytest.mark.parametrize(("quota", "processors"), [("-1", 8), ("50000", 1), ("400000", 4)])
def test_version_one(tmp_path: Path, quota: str, processors: int) -> None:
    files = {
        "cpu,cpuacct/a/cpu.cfs_quota_us": quota,
        "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
    }
    groups = "5:memory:/m\n4:cpu,cpuacct:/a\n0::/"
    assert available_processors(machine(tmp_path, groups, FIRST, "/", files)) == processors


@pytest.mark.parametrize("top", ["/", "/docker/123"])
def test_a_container_finds_its_own_group_at_the_top(tmp_path: Path, top: str) -> None:
    """Its place is that on the host, mounted or out of sight."""
    files = {"cpu.max": "200000 100000"}
    assert available_processors(machine(tmp_path, "0::/docker/123", SECOND, top, files)) == 2


def test_affinity_counts_where_there_are_no_groups(tmp_path: Path) -> None:
    assert available_processors(tmp_path) == 8
