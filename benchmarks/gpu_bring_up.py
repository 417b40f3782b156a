"""The first minutes on a device: stages that each end with a line that says what was found.

A stage is a command of its own with a limit of minutes, so that one that hangs or crashes the
driver's context takes no other with it.  Its output goes to a file.  Where it fails, the line says
what that means and what to look at next; stages that would say nothing then are left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = str(ROOT / "benchmarks" / "gpu_kernels.py")
TAIL = 15  # lines of a failed stage's output that are shown


@dataclass(frozen=True)
class Stage:
    """A command and what its failure means.

    after: stages without which this one says nothing. tool: a program that it needs, which not
    every machine has. interpreted: a dry run can run it, in Triton's interpreter.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    shows: str
    means: str
    after: tuple[str, ...] = ()
    tool: str | None = None
    interpreted: bool = False


def _pytest(*folders: str) -> tuple[str, ...]:
    return sys.executable, "-m", "pytest", "-q", "-m", "gpu", *folders


_MACHINE = """
import platform, torch, triton
from cvxq_kernels.gpu.overlap import overlaps
device = torch.device("cuda", 0)
properties = torch.cuda.get_device_properties(device)
print(f"{properties.name}, sm_{properties.major}{properties.minor}, "
      f"{properties.multi_processor_count} processors, L2 {properties.L2_cache_size >> 20} MiB, "
      f"{properties.total_memory >> 30} GiB; Python {platform.python_version()}, "
      f"torch {torch.__version__} with CUDA {torch.version.cuda}, Triton {triton.__version__}; "
      f"launches overlap: {overlaps(device)}")
"""

_TEXTS = """
import sys
import cvxq, torch
from cvxq.evaluate import Window, perplexity
import numpy as np
ids = np.random.default_rng(0).integers(0, 200, 200)
found = {}
for device in ("cpu", "cuda"):
    with cvxq.load(sys.argv[1], device=device) as model:
        found[device] = perplexity(model.decoder, [Window(ids, 1)]).perplexity
print(found)
sys.exit(abs(found["cuda"] / found["cpu"] - 1) > 0.02)
"""

STAGES = (
    Stage(
        "machine", (sys.executable, "-c", _MACHINE), 2,
        "what the device and the libraries are",
        "PyTorch has no CUDA build, or the driver is older than it: nothing else can run",
    ),
    Stage(
        "values", (sys.executable, KERNELS, "--dry-run"), 5,
        "every kind of kernel compiles and multiplies rightly on small matrices",
        "a kernel does not compile here, or computes wrongly; the first lines name it. Set "
        "uses_ptx in cvxq_kernels/gpu/launch.py to False: if it passes then, a snippet is wrong",
        after=("machine",), interpreted=True,
    ),
    Stage(
        "kernel tests", _pytest("tests/kernels/gpu", "tests/kernels/decode"), 9,
        "all kernels agree with their references, captured in a graph too",
        "the test's name says which kernel and shape; one that fails under a graph only reads "
        "memory that moved, or that an overlapping launch had not finished",
        after=("machine",),
    ),
    Stage(
        "memory checks",
        ("compute-sanitizer", "--error-exitcode", "9", sys.executable, KERNELS, "--dry-run"), 9,
        "no kernel touches what is not its own",
        "the address and the kernel are named: an index past a table, most likely at an odd size",
        after=("values",), tool="compute-sanitizer",
    ),
    Stage(
        "race checks",
        ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", sys.executable,
         KERNELS, "--dry-run"), 9,
        "no two threads race for shared memory",
        "a barrier is missing between a program's stages",
        after=("values",), tool="compute-sanitizer",
    ),
    Stage(
        "decoder tests", _pytest("tests/runtime/lean/cuda"), 9,
        "whole models equal transformers, captured or not, in bounded memory",
        "kernels are right by themselves, so look at what joins them: the order of fused outputs, "
        "the position in device memory, a cache that grew under a captured graph",
        after=("kernel tests",),
    ),
    Stage(
        "a text", (sys.executable, "-c", _TEXTS, "{file}"), 9,
        "the perplexity on the device is the CPU's, within 2 %",
        "activations of eight bits cost under 1 %: more is a fault in a layer that tests do not "
        "have; compare the logits of the first layers",
        after=("decoder tests",),
    ),
    Stage(
        "speed", (sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--part", "decoding"), 9.5,
        "tokens per second, and the share of the bound, beside the goals",
        "slower than tools/model_gpu.py expects: the next stage says where the time goes",
        after=("decoder tests",),
    ),
    Stage(
        "counters",
        ("ncu", "--kernel-name", "matvec_kernel", "--launch-skip", "20", "--launch-count", "8",
         "--section", "SpeedOfLight", "--section", "WarpStateStats", sys.executable, KERNELS,
         "--minutes", "1"), 9,
        "what bounds the matvec: a low share of DRAM with long scoreboards is latency (look "
        "ahead further), few warps late are unequal shares, a high issue rate is instructions",
        "the profiler may not be allowed here; nothing is wrong with the kernels",
        after=("values",), tool="ncu",
    ),
)  # fmt: skip


def bring_up(
    stages: Sequence[Stage], work: Path, file: Path | None, dry: bool, say: Callable[[str], None]
) -> bool:
    """Run all stages and say what each found; return whether none failed.

    work: folder for their output; file: a `.cvxq` model; dry: only what needs no device.
    """
    work.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    for number, stage in enumerate(stages, 1):
        title = f"{number}/{len(stages)} {stage.name}"
        reason = _left_out(stage, failed, file, dry)
        if reason:
            say(f"{title}: left out, {reason}.")
            continue
        log = work / f"{number}-{stage.name.replace(' ', '-')}.txt"
        begin = time.monotonic()
        problem = _run(stage, log, file, dry)
        seconds = time.monotonic() - begin
        if problem is None:
            say(f"{title}: passed in {seconds:.0f} s: {stage.shows}.")
            continue
        failed.add(stage.name)
        say(
            "\n".join(
                f"    {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL:]
            )
        )
        say(f"{title}: {problem} after {seconds:.0f} s. It means: {stage.means}. All of it: {log}")
    return not failed


def _left_out(stage: Stage, failed: set[str], file: Path | None, dry: bool) -> str | None:
    """Say why a stage is not run, or None."""
    if dry and not stage.interpreted:
        return "it needs a device"
    missing = [name for name in stage.after if name in failed]
    if missing:
        failed.add(stage.name)
        return f"since {missing[0]} failed"
    if stage.tool is not None and shutil.which(stage.tool) is None:
        return f"there is no {stage.tool} here"
    if "{file}" in stage.command and file is None:
        return "no model was named with --file"
    return None


def _run(stage: Stage, log: Path, file: Path | None, dry: bool) -> str | None:
    """Run a stage's command with its output in `log`; return what went wrong, or None."""
    command = [str(file) if word == "{file}" else word for word in stage.command]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if dry else {})
    with log.open("wb") as output:
        try:
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                timeout=60 * stage.minutes, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {stage.minutes:g} minutes"
    return None if status == 0 else f"failed with status {status}"
