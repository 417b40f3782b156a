"""One run of a model in a process of its own: by `cvxq bench`, or by llama.cpp's `llama-bench`."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_page import Sample
from peers.llamacpp import LlamaCpp


@dataclass(frozen=True)
class Amount:
    """Tokens that a run reads at once, and those it generates one by one."""

    prompt: int
    tokens: int


USUAL = Amount(prompt=128, tokens=64)


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


def measure_ours(path: Path, threads: int | None, amount: Amount = USUAL) -> Sample:
    """One container with `cvxq bench`; threads None: as many as it chooses."""
    command: list[object] = [sys.executable, "-m", "cvxq.cli", "bench", path, "--repeats", 1]
    command += ["--prompt-tokens", amount.prompt, "--tokens", amount.tokens]
    command += [] if threads is None else ["--threads", threads]
    got = json.loads(run(command).strip().splitlines()[-1])
    if got["path"] != "lean":
        raise SystemExit(f"cpu: {path} did not take the lean path but {got['path']}")
    return Sample(
        got["decode_tokens_per_second"]["mean"],
        got["prefill_tokens_per_second"]["mean"],
        got["peak_memory_bytes"],
        got["load_seconds"],
        got["overhead_seconds_per_layer"],
    )


def measure_theirs(path: Path, threads: int, peer: LlamaCpp, amount: Amount = USUAL) -> Sample:
    """One GGUF file with `llama-bench`, whose process is watched for its memory."""
    command: list[object] = [peer.tool("llama-bench"), "-m", path, "-t", threads, "-o", "json"]
    started = time.perf_counter()
    tests, peak = watch([*command, "-r", 1, "-p", amount.prompt, "-n", amount.tokens])
    spent = time.perf_counter() - started
    by_kind = {test["n_gen"] > 0: test for test in tests}
    measured = sum(sum(test["samples_ns"]) for test in tests) / 1e9
    warming = by_kind[False]["avg_ns"] / 1e9  # llama-bench warms up with a prompt of that length
    return Sample(
        by_kind[True]["avg_ts"],
        by_kind[False]["avg_ts"],
        peak,
        max(0.0, spent - measured - warming),
    )


def watch(command: Sequence[object]) -> tuple[list[dict[str, Any]], int]:
    """Run llama-bench: what it reports, and its peak memory in bytes."""
    words = [str(word) for word in command]
    peak = 0
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.05)
        said = process.stdout.read() if process.stdout else b""
    if process.returncode:
        raise SystemExit(f"cpu: {' '.join(words[:3])} failed")
    return json.loads(said), peak


def resident_bytes(process: int) -> int:
    """Resident memory of a running process; 0 once it has ended."""
    try:
        text = Path(f"/proc/{process}/statm").read_text()
    except OSError:
        return 0
    return int(text.split()[1]) * 4096
