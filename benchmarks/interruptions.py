"""Conversions and measurements that are killed at random moments, and what they end with.

    python benchmarks/interruptions.py MODEL [--kills 20] [--seed 0] -- --bits 3 --threads 1
    python benchmarks/interruptions.py MODEL --command measure -- --sequences 16 --length 64

converts or measures MODEL once without interruption; then anew, killed (SIGKILL) so many times at
moments drawn so that the kills are spread over the work, the same command each time, and once to
the end. Prints when it was killed, what the next try began with, and whether the bytes are the
same.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTING = 12.0  # seconds until a try gets on, at most, with a small model


def command(name: str, model: str, output: Path, options: list[str]) -> list[str]:
    """The command to run again and again."""
    return [sys.executable, "-m", "cvxq.cli", name, model, "-o", str(output), *options]


def run(arguments: list[str], seconds: float | None) -> tuple[bool, float, str]:
    """Run for so long; returns whether it ended by itself, the seconds, and where it went on."""
    started = time.monotonic()
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            _, said = process.communicate()
    lines = said.decode().splitlines()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"exit code {process.returncode}: {lines[-1:]}")
    found = [line.partition(".journal: ")[2] for line in lines if "goes on from" in line]
    return process.returncode == 0, time.monotonic() - started, "".join(found)


def main() -> None:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--command", choices=("convert", "measure"), default="convert")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments, options = parser.parse_known_args()
    options = [option for option in options if option != "--"]
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        suffix = {"convert": "cvxq", "measure": "stats.safetensors"}[arguments.command]
        expected, output = Path(place) / f"expected.{suffix}", Path(place) / f"found.{suffix}"
        job = (arguments.command, arguments.model)
        _, whole, _ = run(command(*job, expected, options), None)
        print(f"without interruption: {whole:.0f} s", flush=True)
        kills, spent = 0, 0.0
        while True:
            longest = STARTING + 2 * whole / arguments.kills
            limit = draw.uniform(0, longest) if kills < arguments.kills else None
            is_done, seconds, found = run(command(*job, output, options), limit)
            spent += seconds
            ending = "ended" if is_done else "killed"
            print(f"{ending} after {seconds:.1f} s; began with: {found or 'nothing'}", flush=True)
            if is_done:
                break
            kills += 1
        same = output.read_bytes() == expected.read_bytes()
        left = [path.name for path in Path(place).iterdir()]
    print(f"{kills} kills, {spent:.0f} s in all, the same bytes: {same}, files left: {left}")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
