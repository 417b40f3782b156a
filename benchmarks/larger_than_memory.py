"""A mixture of experts that memory does not hold, run under a limit of memory.

    python benchmarks/larger_than_memory.py MIXTURE.cvxq --gigabytes 6 --memory 3

The layers of a file are repeated until it is that large, beside it, and `cvxq bench` runs the
result with `ulimit -d`, so that no more memory can be had than is said; the file is removed in the
end. What counts is that it runs; a token's experts come from the disk unless the system has memory
left for files, which it has on a machine that is not full.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cvxq_format import CompandedTensor, Reader, Writer
from peak import peaks_of

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def repeat_layers(source: Path, target: Path, least_bytes: int) -> int:
    """Write a file with the layers of another over and over; returns how many there are."""
    with Reader(source, check=False) as reader:
        record = json.loads(reader.file("decoder.json"))
        config = json.loads(reader.file("config.json"))
        layers = len(record["layers"])
        inside = [name for name in reader.names if _LAYER.search(name)]
        size = sum(reader.entry(name).size for name in inside)
        times = max(1, -(-(least_bytes - source.stat().st_size) // size) + 1)
        record["layers"] = [
            json.loads(_LAYER.sub(str(layer), json.dumps(record["layers"][layer % layers])))
            for layer in range(times * layers)
        ]
        config["num_hidden_layers"] = times * layers
        count = len(reader.header.codebooks)
        with Writer(target, [reader.codebook(i) for i in range(count)]) as writer:
            writer.add_file("config.json", json.dumps(config).encode())
            writer.add_file("decoder.json", json.dumps(record).encode())
            for name, stored in _names(reader, layers, times):
                value = reader.read(stored)
                if isinstance(value, CompandedTensor):
                    writer.add_companded(name, value)
                else:
                    writer.add_raw(name, value.data.reshape(value.shape), value.dtype)
            for name, stored in reader.aliases.items():
                writer.add_alias(name, stored)
    return times * layers


def _names(reader: Reader, layers: int, times: int) -> Iterator[tuple[str, str]]:
    """The tensors to write, and which of the file's each one is."""
    for turn in range(times):
        for stored in reader.names:
            found = _LAYER.search(stored)
            if found:
                yield _LAYER.sub(str(int(found[0]) + turn * layers), stored), stored
            elif turn == 0:
                yield stored, stored


def main() -> int:
    """Make the file, run it, say what that took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--gigabytes", type=float, default=6, help="of the file")
    parser.add_argument("--memory", type=float, default=3, help="gigabytes that may be had")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    large = options.file.with_name(f"{options.file.stem}-large.cvxq")
    try:
        layers = repeat_layers(options.file, large, int(options.gigabytes * 1e9))
        size = large.stat().st_size
        kilobytes = int(options.memory * 1e9 / 1024)
        bench = [sys.executable, "-m", "cvxq.cli", "bench", str(large), "--repeats", "1"]
        bench += ["--prompt-tokens", "16", "--tokens", str(options.tokens), "--context", "512"]
        limited = ["sh", "-c", f'ulimit -d {kilobytes} && exec "$@"', "sh", *bench]
        found = peaks_of(limited)
    finally:
        large.unlink(missing_ok=True)
    print(f"{layers} layers, {size / 1e9:.2f} GB, at most {options.memory:g} GB of memory:")
    print(found.line())
    return found.code


if __name__ == "__main__":
    sys.exit(main())
