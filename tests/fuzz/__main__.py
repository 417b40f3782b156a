"""Hostile files on every path: python -m tests.fuzz --seed 0 --count 2000 --jobs 2 --path lean

Prints what became of each kind of file, and everything found; the exit code is 1 if anything was,
or if so few files still load that the search is blind. Case N of a seed is always the same file:
`--first` goes on where an earlier run ended, `--keep` leaves the files that were found in a folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from tests.fuzz import corpus
from tests.fuzz.mutations import hostile_file, kind_of
from tests.fuzz.trials import PATHS
from tests.fuzz.workers import Result, as_record, run_cases

_BATCHES = {"files": 2000, "lean": 200, "transformers": 40}
_LEAST_LOADED = 0.1


def main() -> int:
    """Run the cases that the command line names."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        paths = corpus.build(Path(options.corpus or folder))
        if options.path != "files":
            left_out = corpus.NOT_LEAN if options.path == "lean" else ()
            paths = [p for p in paths if p.parent != corpus.VECTORS and p.stem not in left_out]
        files = [path.read_bytes() for path in paths]
    prepare, trial = PATHS[options.path]
    os.environ["RUST_BACKTRACE"] = "0"
    prepare()
    if options.sanitized:
        from tests.fuzz.sanitized import use_library

        use_library(Path(options.sanitized))
    gc.freeze()  # children share these pages

    def case(index: int) -> tuple[str, bytes]:
        return hostile_file(options.seed, index, files)

    indices = range(options.first, options.first + options.count)
    begin, counts = time.monotonic(), _Counts()
    for result in run_cases(
        indices,
        _BATCHES[options.path],
        options.jobs,
        case,
        partial(kind_of, options.seed),
        trial,
        not options.sanitized,
    ):
        counts.add(result)
        if options.log:  # at once, so that a run that is stopped has told what it tried
            with Path(options.log).open("a", encoding="utf-8") as log:
                log.write(json.dumps(as_record(result)) + "\n")
        if result.verdict.outcome == "found":
            print(f"case {result.number} ({result.kind}): {result.verdict.text}\n", flush=True)
            if options.keep:
                keep = Path(options.keep)
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{options.seed}-{result.number}.cvxq").write_bytes(case(result.number)[1])
    return _report(options, counts, time.monotonic() - begin)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--path", choices=PATHS, default="lean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--corpus", help="folder of the sound files, made there if need be")
    parser.add_argument("--keep", help="folder for the files that were found")
    parser.add_argument("--log", help="file that gets one JSON line per case")
    parser.add_argument("--sanitized", help="folder for a native library with sanitizers")
    return parser.parse_args()


class _Counts:
    """What became of the cases so far, by their first mutation; the most seconds of one."""

    def __init__(self) -> None:
        self.table: dict[str, Counter[str]] = {}
        self.slowest = 0.0

    def add(self, result: Result) -> None:
        first = result.kind.partition("+")[0]
        self.table.setdefault(first, Counter())[result.verdict.outcome] += 1
        self.slowest = max(self.slowest, result.seconds)


def _report(options: argparse.Namespace, done: _Counts, seconds: float) -> int:
    table = done.table
    print(f"{'kind':20} {'cases':>7} {'loaded':>7} {'refused':>7} {'found':>6}")
    for kind, counts in sorted(table.items()):
        numbers = (counts.total(), counts["loaded"], counts["refused"], counts["found"])
        print("{:20} {:7} {:7} {:7} {:6}".format(kind, *numbers))
    total: Counter[str] = sum(table.values(), Counter())
    cases = total.total()
    loaded = total["loaded"] / max(1, cases)
    print(
        f"{options.path}, seed {options.seed}, cases {options.first} to "
        f"{options.first + options.count - 1}: {loaded:.1%} loaded, {total['found']} found, "
        f"{seconds:.0f} s, {cases / max(seconds, 1e-9):.0f} cases/s, "
        f"the slowest took {done.slowest:.1f} s"
    )
    if loaded < _LEAST_LOADED:
        print(f"blind: at least {_LEAST_LOADED:.0%} of the files have to load")
    return int(total["found"] > 0 or loaded < _LEAST_LOADED)


if __name__ == "__main__":
    sys.exit(main())
