"""Several processes at one conversion: the same bytes as one, and an end with a reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cvxq_converter.job import convert
from cvxq_converter.measure.sums import laps, shards_of
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import preflight
from cvxq_converter.ranks import ALONE, Ranks
from cvxq_converter.source.checkpoint import open_source

Save = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ("--bits", "4", "--group-size", "16", "--sequences", "12", "--length", "16")


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "cvxq.cli", "convert", str(folder), "-o", str(output)),
        *(*OPTIONS, "--threads", "1", *more),
    ]


def options(**choices: Any) -> ConversionOptions:
    """The same as those of the command."""
    given = {"bits": 4.0, "group_size": 16, "sequences": 12, "length": 16}
    return ConversionOptions.of(**{**given, **choices})


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


# --- shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 8, 9, 127])
def test_shards_hold_every_sequence_in_order(count: int) -> None:
    shards = shards_of(count)
    assert [s for shard in shards for s in shard] == [*range(count)]
    assert len(shards) == min(8, count)
    sizes = {len(shard) for shard in shards}
    assert not sizes or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 9])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_laps_deal_every_shard_to_one_rank(world: int, count: int) -> None:
    shards = shards_of(count)
    dealt = [[*laps(shards, Ranks(rank, world))] for rank in range(world)]
    for lap, first in zip(zip(*dealt, strict=True), range(0, len(shards), world), strict=True):
        taken = [shard for shard, _ in lap if shard]
        assert taken == shards[first : first + world]  # so that their order is that of the ranks
        assert {among for _, among in lap} == {len(taken)}
    assert [shard for shard, _ in laps(shards, ALONE)] == shards


# --- conversions --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_and_four_ranks_write_what_one_does(
    build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    """Two under torchrun, which has processes of its own, four that the command starts.

    The four have a smaller disk, for which Hessians of some experts are gathered at a time.
    """
    folder = tmp_path / "model"
    build_mixture("Mixtral", num_hidden_layers=2).save_pretrained(folder)
    ample = options(disk=1 << 40)
    disk = preflight(open_source(str(folder)), ample).scratch_bytes // 2
    parts = preflight(open_source(str(folder)), ample.having(disk=disk))
    assert parts.room is not None
    one, two, four = (tmp_path / f"{n}.cvxq" for n in (1, 2, 4))
    convert(str(folder), one, ample)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for arguments in (
        [*launcher, *command(folder, two)[1:]],
        command(folder, four, "--ranks", "4", "--disk", f"{disk}B"),
    ):
        done = run(arguments)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("calibration 12 × 16 tokens") == 1  # only the first one speaks
    assert one.read_bytes() == two.read_bytes() == four.read_bytes()
    assert {path.suffix for path in tmp_path.iterdir()} == {".cvxq", ""}


def children(parent: int) -> list[int]:
    """Processes that another one has started."""
    ps = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    pairs = (line.split() for line in ps.stdout.splitlines())
    return [int(pid) for pid, its_parent in pairs if int(its_parent) == parent]


def test_a_rank_that_dies_ends_the_job_and_the_journal_serves_the_next_try(
    save_network: Save, tmp_path: Path, read_until: Callable[[Any, bytes], None]
) -> None:
    folder, output = save_network("llama"), tmp_path / "a.cvxq"
    arguments = command(folder, output, "--sequences", "128")
    with subprocess.Popen([*arguments, "--ranks", "2"], stderr=subprocess.PIPE) as first:
        assert first.stderr is not None
        read_until(first.stderr, b"measure")
        (other,) = children(first.pid)
        os.kill(other, signal.SIGKILL)
        _, rest = first.communicate(timeout=120)
    assert first.returncode == 6
    *_, kept, last = rest.decode().splitlines()
    assert last.startswith("cvxq: rank 1 was killed (SIGKILL); ")
    assert "the same command goes on" in kept
    assert not output.exists()
    lines: list[str] = []
    convert(str(folder), output, options(sequences=128), announce=lines.append)
    assert "goes on from" in lines[-1]
    convert(str(folder), tmp_path / "anew.cvxq", options(sequences=128))
    assert output.read_bytes() == (tmp_path / "anew.cvxq").read_bytes()


@pytest.mark.slow
def test_the_others_end_with_the_first(save_network: Save, tmp_path: Path) -> None:
    arguments = command(save_network("llama"), tmp_path / "a.cvxq", "--sequences", "4096")
    with subprocess.Popen([*arguments, "--ranks", "2"], stderr=subprocess.PIPE) as first:
        assert first.stderr is not None
        while b"calibrate" not in first.stderr.readline():
            pass
        (other,) = children(first.pid)
        first.kill()
    until = time.monotonic() + 30
    while Path(f"/proc/{other}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{other}").exists()
