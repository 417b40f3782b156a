"""What every peer's process does: read the jobs, quantize, time it, leave the results.

    python -m peers.NAME MODEL --jobs jobs.json [--sequences ids.safetensors] [--tools FOLDER]

One process does all the jobs of a peer, because importing some of them takes longer than they
take. `jobs.json` is a list of `{"out": FOLDER, "settings": {…}}`. Written to each FOLDER:

    matrices.safetensors   checkpoint name -> dequantized weights, float32 (outputs, inputs)
    summary.json           bits of the packed matrices by part, seconds, settings, versions

The summary is written last: a folder that has one is complete.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peers.grid import Parts


@dataclass(frozen=True, eq=False)
class Inputs:
    """What all jobs share.

    model: Hugging Face folder; sequences: calibration tokens (S, L), empty without calibration;
    tools: folder of command-line programs, for the peer that is made of them.
    """

    model: Path
    sequences: torch.Tensor
    tools: Path | None


@dataclass(frozen=True)
class Result:
    """One quantized model.

    matrices: checkpoint name -> dequantized float32 weights (N, K); parts: bits that the matrices
    take; file_bytes: of all tensors of the peer's own file, where it writes one.
    """

    matrices: dict[str, torch.Tensor]
    parts: Parts
    file_bytes: int | None = None


def work(quantize: Callable[[Inputs, dict[str, Any]], Result], packages: Sequence[str]) -> None:
    """Do the jobs that the command line names; `quantize` does one, from its settings."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--sequences", type=Path, help="safetensors with `ids`")
    parser.add_argument("--tools", type=Path, help="folder of the peer's programs")
    parser.add_argument("--jobs", type=Path, required=True)
    options = parser.parse_args()
    nothing = torch.empty(0, 0, dtype=torch.int64)
    sequences = load_file(options.sequences)["ids"] if options.sequences else nothing
    inputs = Inputs(options.model, sequences, options.tools)
    versions = {package: version(package) for package in packages}
    for job in json.loads(options.jobs.read_text()):
        print(f"job {job}", file=sys.stderr, flush=True)
        torch.manual_seed(0)
        started = time.perf_counter()
        result = quantize(inputs, job["settings"])
        seconds = time.perf_counter() - started
        out = Path(job["out"])
        out.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: weight.contiguous() for name, weight in result.matrices.items()},
            out / "matrices.safetensors",
        )
        summary = {
            "bits": asdict(result.parts),
            "file_bytes": result.file_bytes,
            "seconds": seconds,
            "settings": job["settings"],
            "versions": versions,
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
