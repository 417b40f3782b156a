"""Decoding and prefill on the CPU, side by side with llama.cpp on the same random weights.

    python benchmarks/cpu.py                        # all of it: an hour to prepare, minutes to run
    python benchmarks/cpu.py --prepare              # only make the models and build the peer
    python benchmarks/cpu.py --output docs/cpu.md   # measure, and write the page
    python benchmarks/cpu.py --kernel               # only the products, without a decoder

A Llama of 1.1 billion random weights (`random_model.py`) is converted at several rates without
calibration, and made into llama.cpp's types. Everything is measured in one run, model after model,
each in a process of its own: `cvxq bench` and `llama-bench`, with the same threads, prompt and
number of tokens. Bits per weight are 8 · file bytes / weights for both. Bandwidth is bytes of
weights per token times tokens per second, as a share of what plain loads reach in the same run.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cvxq_format import CompandedTensor, Reader
from cvxq_kernels.cpu import Matrix, Pool, isa
from cvxq_kernels.cpu.loader import native
from cvxq_kernels.cpu.matrix import matmul_many
from packing import cpu_name
from peers.llamacpp import FOLDER, LlamaCpp, build
from random_model import histogram_line

BENCHMARKS = Path(__file__).resolve().parent
WORK = Path.home() / ".cache" / "cvxq-peers" / "cpu"
RATES = (2.2, 3.2, 4.25, 8.0)
TYPES = ("Q2_K", "IQ3_S", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q8_0")
PROMPT, TOKENS, REPEATS = 128, 64, 3
GB = 1e9


@dataclass(frozen=True)
class Row:
    """One model of the table; speeds in tokens/s with their deviations, sizes in bytes."""

    name: str
    bits: float
    file_bytes: int
    decode: tuple[float, float]
    prefill: tuple[float, float]
    resident_bytes: int
    load_seconds: float


def say(text: str) -> None:
    print(f"cpu: {text}", file=sys.stderr, flush=True)


def run(command: Sequence[object], **options: Any) -> str:
    """Run a command and return what it printed; it ends this program if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise SystemExit(f"cpu: {' '.join(words[:3])} … failed, saying {said!r}")
    return done.stdout


def prepare(
    work: Path, rates: Sequence[float], types: Sequence[str]
) -> tuple[list[Path], list[Path], LlamaCpp]:
    """Make whatever is missing: containers, GGUF files, llama.cpp; returns where they are."""
    model = work / "model"
    if not (model / "model.safetensors.index.json").exists():
        say("making the random model")
        run([sys.executable, BENCHMARKS / "random_model.py", model])
    ours = [work / f"cvxq-{rate:g}.cvxq" for rate in rates]
    for rate, path in zip(rates, ours, strict=True):
        if not path.exists():
            say(f"converting to {rate:g} bits")
            options = ["--bits", f"{rate:g}", "--calibration", "none"]
            run([sys.executable, "-m", "cvxq.cli", "convert", model, "-o", path, *options])
    peer = build(FOLDER)
    source = work / "F16.gguf"
    if not source.exists():
        say("making the GGUF file")
        module = [sys.executable, "-m", "peers.plain_gguf", model, source, peer.gguf_package]
        run(module, cwd=BENCHMARKS)
    theirs = [work / f"{kind}.gguf" for kind in types]
    for kind, path in zip(types, theirs, strict=True):
        if not path.exists():
            say(f"quantizing to {kind}")
            part = path.with_suffix(".part")
            run([peer.tool("llama-quantize"), source, part, kind])
            part.rename(path)
    return ours, theirs, peer


def weight_count(path: Path) -> int:
    """Weights of the model in a container."""
    with Reader(path, check=False) as reader:
        return sum(int(np.prod(reader.entry(name).shape)) for name in reader.names)


def measure_ours(path: Path, weights: int, threads: int) -> Row:
    """One container with `cvxq bench`."""
    command: list[object] = [sys.executable, "-m", "cvxq.cli", "bench", path]
    command += ["--threads", threads, "--prompt-tokens", PROMPT]
    command += ["--tokens", TOKENS, "--repeats", REPEATS]
    got = json.loads(run(command).strip().splitlines()[-1])
    if got["path"] != "lean":
        raise SystemExit(f"cpu: {path} did not take the lean path but {got['path']}")
    decode, prefill = got["decode_tokens_per_second"], got["prefill_tokens_per_second"]
    size = path.stat().st_size
    return Row(
        path.stem.replace("-", " "),
        8 * size / weights,
        size,
        (decode["mean"], decode["deviation"]),
        (prefill["mean"], prefill["deviation"]),
        got["peak_memory_bytes"],
        got["load_seconds"],
    )


def measure_theirs(path: Path, weights: int, threads: int, peer: LlamaCpp) -> Row:
    """One GGUF file with `llama-bench`, whose process is watched for its memory.

    Prefill is measured apart and is NaN where llama-bench crashes in it, as the version of 2026-11
    does for types that it puts on AMX.
    """
    command: list[object] = [peer.tool("llama-bench"), "-m", path, "-t", threads, "-o", "json"]
    command += ["-r", REPEATS]
    started = time.perf_counter()
    decode, peak = watch([*command, "-p", 0, "-n", TOKENS])
    spent = time.perf_counter() - started
    if decode is None:
        raise SystemExit(f"cpu: llama-bench failed on {path}")
    prefill, peak_prefill = watch([*command, "-p", PROMPT, "-n", 0])
    size = path.stat().st_size
    return Row(
        path.stem,
        8 * size / weights,
        size,
        (decode["avg_ts"], decode["stddev_ts"]),
        (prefill["avg_ts"], prefill["stddev_ts"]) if prefill else (math.nan, math.nan),
        max(peak, peak_prefill),
        max(0.0, spent - sum(decode["samples_ns"]) / 1e9),
    )


def watch(command: Sequence[object]) -> tuple[dict[str, Any] | None, int]:
    """Run llama-bench for one measurement: what it reports, None if it fails, and peak memory."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.05)
    said = process.stdout.read() if process.stdout else b""
    return (None if process.returncode else json.loads(said)[0]), peak


def resident_bytes(process: int) -> int:
    """Resident memory of a running process; 0 once it has ended."""
    try:
        text = Path(f"/proc/{process}/statm").read_text()
    except OSError:
        return 0
    return int(text.split()[1]) * 4096


def read_bandwidth(pool: Pool, repeats: int = 5) -> float:
    """Bytes/s that loads reach on a gigabyte, the best of `repeats`."""
    memory = np.ones(1 << 27, np.uint64)
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        native().cvxq_read_through(pool.handle, memory.ctypes.data, memory.nbytes)
        best = max(best, memory.nbytes / (time.perf_counter() - started))
    return best


def load_matrices(path: Path, pool: Pool) -> list[Matrix]:
    """Repack every matrix of a container except the embeddings, which are not multiplied."""
    weights = []
    with Reader(path, check=False) as reader:
        for name in reader.names:
            entry = reader.entry(name)
            value = reader.read(name)
            if isinstance(value, CompandedTensor) and "embed" not in name:
                codebook = reader.codebook(entry.codebook)  # type: ignore[union-attr]
                weights.append(Matrix.from_tensor(value, codebook, pool=pool))
    return weights


def measure_kernel(path: Path, threads: int) -> str:
    """A line on the products of all matrices with one input, beside the read bandwidth."""
    pool = Pool(threads)
    started = time.perf_counter()
    weights = load_matrices(path, pool)
    loading = time.perf_counter() - started
    packed = sum(weight.nbytes for weight in weights)
    rng = np.random.default_rng(0)
    sizes = {weight.shape[1] for weight in weights}
    inputs = {k: rng.standard_normal((1, k)).astype(np.float32) for k in sizes}
    outputs = [[np.empty((1, weight.shape[0]), np.float32)] for weight in weights]
    shares, speeds = [], []
    for _ in range(8):
        bandwidth = read_bandwidth(pool, repeats=2)  # beside each pass: other tenants come and go
        native().cvxq_pool_begin(pool.handle)
        started = time.perf_counter()
        for weight, out in zip(weights, outputs, strict=True):
            matmul_many([weight], inputs[weight.shape[1]], pool=pool, out=out)
        seconds = time.perf_counter() - started
        native().cvxq_pool_end(pool.handle)
        shares.append(packed / seconds / bandwidth)
        speeds.append(packed / seconds)
    count = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    return (
        f"| {path.stem.replace('-', ' ')} | {8 * packed / count:.2f} | {max(speeds) / GB:.1f} "
        f"| {np.median(shares):.0%} | {max(speeds) / packed * count / GB:.0f} "
        f"| {packed / GB / loading:.2f} | {histogram_line(path)} |"
    )


KERNEL_COLUMNS = (
    "model",
    "bits held per weight",
    "GB/s, best",
    "share of reading, median",
    "Gweights/s",
    "repacked, GB/s",
    "share of weights at each depth",
)
MODEL_COLUMNS = (
    "model",
    "bits per weight",
    "file, MB",
    "decode, tokens/s",
    "GB/s",
    "share of reading",
    "prefill, tokens/s",
    "resident, MB",
    "load, s",
)


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]


READING = """\
Bits held per weight count everything that a product reads: codes padded to whole units, a byte for
each group's scale, four bytes per row. The kernels' share of reading is a median over passes, each
beside plain loads in the same second, because on a shared machine other tenants take bandwidth and
clock. Bounds, counted in instructions: at depths 1 to 4 a product needs 2.3 to 2.7 vector
instructions per 64 weights and waits for memory; at 7 and 8 it needs some ten, which is about what
memory delivers. What remains is the rounding of the inputs for every cluster of 64 rows."""


def model_line(row: Row, bandwidth: float) -> str:
    """One row of the table of models."""
    reading = row.decode[0] * row.file_bytes
    is_measured = not math.isnan(row.prefill[0])
    prefill = f"{row.prefill[0]:.0f} ± {row.prefill[1]:.0f}" if is_measured else "crashes"
    return (
        f"| {row.name} | {row.bits:.2f} | {row.file_bytes / 1e6:.0f} "
        f"| {row.decode[0]:.1f} ± {row.decode[1]:.1f} | {reading / GB:.1f} "
        f"| {reading / bandwidth:.0%} | {prefill} "
        f"| {row.resident_bytes / 1e6:.0f} | {row.load_seconds:.2f} |"
    )


def claims(rows: Sequence[Row]) -> list[str]:
    """What was aimed at, and what came out."""
    ours = {row.name.removeprefix("cvxq "): row for row in rows if row.name.startswith("cvxq")}
    theirs = [row for row in rows if not row.name.startswith("cvxq")]
    lines = []
    for rate, low, high, factor in (("3.2", 2.9, 3.6, 1.7), ("4.25", 3.9, 4.9, 1.2)):
        peers = [row for row in theirs if low <= row.bits <= high]
        if rate in ours and peers:
            best = max(peers, key=lambda row: row.decode[0])
            ratio = ours[rate].decode[0] / best.decode[0]
            quick = max((row.prefill[0] for row in peers if row.prefill[0] > 0), default=math.nan)
            lines.append(
                f"- {rate} bits: decodes {ratio:.2f} times as fast as {best.name} (wanted "
                f"{factor}), prefill {ours[rate].prefill[0] / quick:.2f} times the fastest"
            )
    eight = [row for row in theirs if row.name == "Q8_0"]
    if "8" in ours and eight:
        ratio = ours["8"].decode[0] / eight[0].decode[0]
        quick = ours["8"].prefill[0] / eight[0].prefill[0]
        lines.append(
            f"- 8 bits: decodes {ratio:.2f} times as fast as Q8_0 (wanted 1.0), prefill {quick:.2f}"
        )
    if {"2.2", "3.2"} <= set(ours):
        ratio = ours["2.2"].decode[0] / ours["3.2"].decode[0]
        lines.append(f"- 2.2 bits: decodes {ratio:.2f} times as fast as 3.2 bits (wanted above 1)")
    return lines


def page(kernel: list[str], rows: list[Row], bandwidth: float, threads: int, peer: str) -> str:
    """The document: how it was made, and the tables."""
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    lines = [
        "# Speed on the CPU",
        "",
        f"Made on {today} by `python {' '.join(['benchmarks/cpu.py', *sys.argv[1:]])}` on",
        f"{cpu_name()}, {threads} threads, {isa()} kernels.",
        f"Reading memory reached {bandwidth / GB:.1f} GB/s.",
    ]
    if kernel:
        lines += ["", "## Products alone", "", *head(KERNEL_COLUMNS), *kernel, "", READING]
    if rows:
        lines += ["", f"## Whole models, beside llama.cpp (llama-cpp-python {peer})", ""]
        lines += [f"{PROMPT} tokens of prompt, {TOKENS} generated, {REPEATS} repeats.", ""]
        lines += [
            *head(MODEL_COLUMNS),
            *(model_line(row, bandwidth) for row in rows),
            "",
            *claims(rows),
        ]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="folder of models (20 GB)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="only these of ours")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, help="only these peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only make what is missing")
    parser.add_argument("--kernel", action="store_true", help="only measure the products")
    parser.add_argument("--output", type=Path, help="write the page here, too")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.kernel:
        ours = [options.work / f"cvxq-{rate:g}.cvxq" for rate in options.rates]
        theirs: list[Path] = []
        peer = None
    else:
        ours, theirs, peer = prepare(options.work, options.rates, options.types)
    if options.prepare:
        return 0
    pool = Pool(options.threads)
    bandwidth = read_bandwidth(pool)
    kernel, rows = [], []
    for path in ours:
        say(f"products of {path.stem}")
        kernel.append(measure_kernel(path, options.threads))
    if peer is not None:
        weights = weight_count(ours[0])
        for path in ours:
            say(path.stem)
            rows.append(measure_ours(path, weights, options.threads))
        for path in theirs:
            say(path.stem)
            rows.append(measure_theirs(path, weights, options.threads, peer))
    text = page(kernel, rows, bandwidth, options.threads, peer.version if peer else "")
    print(text)
    if options.output:
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
