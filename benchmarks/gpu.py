"""Everything that is measured on a GPU, in one run of less than ten minutes: benchmarks/gpu.py

Prints a page of tables as they become ready: decoding at batch 1 with a model of Llama-2-7B's
shape at 3, 4 and 8 bits, as a share of what the memory's bandwidth allows, beside float16; then
the kernels, by `gpu_kernels.py`, with what is left of the time.  `--conversion` instead measures a
whole conversion of that shape, calibrated on 128 sequences of 2048 tokens, in minutes per stage.
`--bring-up` is what a device runs first (`gpu_bring_up.py`): from the driver to the speed of
decoding in stages of less than ten minutes, each of which says what it found or what its failure
means; `--stages` runs some of them only.
`--dry-run` goes through all of it on the CPU with tiny shapes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_bring_up import STAGES, bring_up

if TYPE_CHECKING:  # what takes seconds to load is imported where there is something to measure
    import torch
    from gpu_decoding import Decoding, Setting
    from random_model import Shape

HERE = Path(__file__).resolve().parent
BITS = (3, 4, 8)
GOALS = {3: 0.4, 4: 0.5}  # share of the bandwidth bound that decoding is to reach
GIGABYTE = 1e9


class StepError(Exception):
    """A step that failed; one line."""


# Enough calibration for depths to differ as on a trained model: without any, all weights get one.
LITTLE = {"sequences": 2, "length": 16, "feedback": False, "gain": 0.25}


def say(text: str) -> None:
    """Print a line of the page at once."""
    print(text, flush=True)


def convert_to(bits: int, model: Path, output: Path, **options: Any) -> dict[str, float]:
    """Convert; return the seconds of every stage."""
    from cvxq_converter.job import convert
    from cvxq_converter.options import ConversionOptions

    report = convert(str(model), output, ConversionOptions.of(bits=bits, **options))
    return report.stage_seconds


def measure_kernels(dry: bool, seconds: float) -> None:
    """Let `gpu_kernels.py` print its tables; StepError if it fails or takes too long."""
    words = [sys.executable, str(HERE / "gpu_kernels.py"), "--minutes", f"{seconds / 60 - 0.3:.1f}"]
    words += ["--dry-run"] if dry else []
    try:
        # Without a GPU, Triton's interpreter runs the kernels.
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if dry else {})
        status = subprocess.run(words, timeout=seconds, check=False, env=environment).returncode
    except subprocess.TimeoutExpired:
        raise StepError(f"gpu_kernels.py took over the {seconds:.0f} s that were left") from None
    if status:
        raise StepError(f"gpu_kernels.py failed with status {status}")


def measure_decoding(shape: Shape, setting: Setting, device: str, work: Path) -> None:
    """Convert a few layers at each rate, decode with all layers, print the table."""
    from gpu_decoding import (
        DISTINCT_LAYERS,
        copy_bandwidth,
        measure_lean,
        measure_transformers,
        open_repeated,
    )
    from random_model import histogram_line, make_model

    few = replace(shape, layers=min(DISTINCT_LAYERS, shape.layers))
    begin = time.perf_counter()
    make_model(work / "model", few)
    say(f"Made {few.layers} random layers in {time.perf_counter() - begin:.0f} s.")
    files = {bits: work / f"{bits}.cvxq" for bits in BITS}
    for bits, file in files.items():
        place = {"device": device, "dtype": dtype_on(device)}
        seconds = convert_to(bits, work / "model", file, **LITTLE, **place)
        stages = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if value >= 1)
        say(f"Converted them to {bits} bits: {stages or 'under a second'}.")
        say(f"Depths at {bits} bits: {histogram_line(file)}")
    bandwidth = copy_bandwidth(device, 1 << 30 if device != "cpu" else 1 << 22)
    say(f"\nCopy bandwidth: {bandwidth / GIGABYTE:.0f} GB/s read plus written.\n")
    say(
        f"Decoding at batch 1: {shape.layers} layers that repeat {few.layers}, prompt of "
        f"{setting.prompt} tokens, {setting.tokens} tokens, {setting.repeats} repeats; GB of "
        "weights, keys and values.\n"
    )
    say(
        "| weights | tokens/s | prefill tokens/s | GB per token | share of bound | GB held | peak |"
    )
    say("|---|---:|---:|---:|---:|---:|---:|")
    shares = {}
    ways = [(f"{bits} bits, packed", file, True) for bits, file in files.items()]
    ways.append((f"{half_on(device)}, same decoder", files[BITS[-1]], False))
    for name, file, packed in ways:
        load = partial(open_repeated, file, shape.layers, device, packed)
        row = measure_lean(name, load, setting, device)
        shares[name] = row.share(bandwidth)
        say(table_row(row, bandwidth))
    config = json.loads((work / "model" / "config.json").read_text())
    config["num_hidden_layers"] = shape.layers
    say(table_row(measure_transformers(config, setting, device), bandwidth))
    say("")
    for bits, goal in GOALS.items():
        share = shares[f"{bits} bits, packed"]
        verdict = "reached" if share >= goal else "missed"
        say(f"Goal of {goal:.0%} of the bound at {bits} bits: {verdict} ({share:.1%}).")


def half_on(device: str) -> str:
    """Name the type in which the decoder computes a model of float16."""
    return "float32" if device == "cpu" else "float16"


def dtype_on(device: str) -> torch.dtype:
    """The type that conversions compute in."""
    import torch

    return torch.float32 if device == "cpu" else torch.bfloat16


def table_row(row: Decoding, bandwidth: float) -> str:
    """One line of the table of `measure_decoding`."""
    return (
        f"| {row.name} | {row.tokens_per_second:.1f} ± {row.deviation:.1f} "
        f"| {row.prefill_tokens_per_second:.0f} | {row.read_bytes / GIGABYTE:.3f} "
        f"| {row.share(bandwidth):.1%} | {row.held_bytes / GIGABYTE:.3f} "
        f"| {row.peak_bytes / GIGABYTE:.3f} |"
    )


def measure_conversion(shape: Shape, sequences: int, length: int, device: str, work: Path) -> None:
    """Convert the whole shape with full calibration and print the minutes of every stage."""
    from random_model import histogram_line, make_model

    begin = time.perf_counter()
    make_model(work / "model", shape)
    say(f"Made the random model in {time.perf_counter() - begin:.0f} s.")
    begin = time.perf_counter()
    seconds = convert_to(
        3,
        work / "model",
        work / "full.cvxq",
        sequences=sequences,
        length=length,
        device=device,
        dtype=dtype_on(device),
    )
    total = time.perf_counter() - begin
    say(f"\nConversion to 3 bits, calibrated on {sequences} sequences of {length} tokens:\n")
    say("| stage | minutes |")
    say("|---|---:|")
    for stage, value in seconds.items():
        say(f"| {stage} | {value / 60:.2f} |")
    say(f"| all | {total / 60:.2f} |")
    say(f"\nDepths: {histogram_line(work / 'full.cvxq')}")


def heading(device: str, dry: bool) -> None:
    """Say what was run, on what."""
    import torch

    machine = torch.cuda.get_device_name(device) if device != "cpu" else "CPU"
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "triton"))
    say(f"# GPU measurements, {today}: {machine}\n")
    if dry:
        say("**A dry run with tiny shapes: none of these figures means anything.**\n")
    say(f"    python benchmarks/gpu.py {' '.join(sys.argv[1:])}\n")
    say(f"Python {platform.python_version()}, {packages}.\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument(
        "--conversion", action="store_true", help="measure a calibrated conversion instead"
    )
    parser.add_argument("--bring-up", action="store_true", help="stages for a new device")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE")
    parser.add_argument("--file", type=Path, help="a .cvxq file for the bring-up to compare texts")
    parser.add_argument("--part", choices=("all", "decoding", "kernels"), default="all")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for all of it")
    parser.add_argument("--work", type=Path, help="folder for models; default: a temporary one")
    return parser.parse_args()


def has_device() -> bool:
    """Say whether there is a GPU to measure."""
    import torch

    return torch.cuda.is_available()


def main() -> int:
    options = arguments()
    end = time.monotonic() + 60 * options.minutes
    dry = options.dry_run
    if not dry and not has_device():
        print(
            "gpu: there is no CUDA device here; --dry-run shows that the script works",
            file=sys.stderr,
        )
        return 1
    if options.bring_up:
        chosen = [stage for stage in STAGES if stage.name in options.stages]
        work = options.work or Path("build") / "gpu-bring-up"
        return 0 if bring_up(chosen, work, options.file, dry, say) else 1

    from gpu_decoding import Setting
    from random_model import SHAPES, Shape

    tiny = Shape(hidden=64, layers=4, heads=4, kv_heads=2, ffn=96, vocabulary=128, context=128)
    device = "cpu" if dry else "cuda"
    shape = tiny if dry else SHAPES["7b"]
    setting = Setting(16, 8, 2) if dry else Setting(128, 256, 5)
    work = options.work or Path(tempfile.mkdtemp(prefix="cvxq-gpu-"))
    heading(device, dry)
    try:
        if options.conversion:
            sequences, length = (2, 32) if dry else (128, 2048)
            measure_conversion(shape, sequences, length, device, work)
            return 0
        if options.part != "kernels":
            measure_decoding(shape, setting, device, work)
        if options.part != "decoding":
            say("\n## Kernels\n")
            measure_kernels(dry, max(60.0, end - time.monotonic()))
    except StepError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
