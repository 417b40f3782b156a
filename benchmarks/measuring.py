"""Make quantized models with cvxq's command line and with a peer, and measure them all alike."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from comparison import Cost, Row
from cvxq import evaluate
from cvxq.original import load_subject
from cvxq_converter.calibration import CalibrationOptions, make_sequences
from cvxq_converter.matrices import find_matrices
from cvxq_format import Reader
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

BENCHMARKS = Path(__file__).resolve().parent
ATTACHED = {".json", ".model", ".jinja"}  # files beside the weights that every format carries


class BenchmarkError(Exception):
    """Why a step failed: one line."""


def say(text: str) -> None:
    """Tell the progress on stderr."""
    print(f"quality: {text}", file=sys.stderr, flush=True)


def run_measured(command: Sequence[str], log: Path) -> Cost:
    """Run a command to its end; BenchmarkError with the last line it printed if it fails.

    What it prints goes to `log`. Peak memory is that of the process itself, whatever it shares
    with others included.
    """
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise BenchmarkError(f"{' '.join(command)} failed, saying {said[-1]!r} (all: {log})")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return Cost(time.perf_counter() - started, usage.ru_maxrss * unit)


@dataclass(frozen=True)
class Sampling:
    """How the original is sampled for calibration: the same for cvxq and its peers."""

    count: int
    length: int
    seed: int


class Bench:
    """The original, the evaluation windows and the folder that everything is written to."""

    def __init__(self, model: Path, text: Path, context: int, sampling: Sampling, work: Path):
        """Load the original and cut the text into windows of at most `context` tokens."""
        work.mkdir(parents=True, exist_ok=True)
        self.model, self.work, self.sampling = str(model.resolve()), work, sampling
        subject = load_subject(self.model)
        self.original, self.tokenizer = subject.network, subject.tokenizer
        self.context = min(context, subject.context_length or context)
        ids = evaluate.token_ids(self.tokenizer, text.read_text(encoding="utf-8"))
        self.windows = evaluate.windows(ids, self.context)
        self.parameters = sum(p.numel() for p in self.original.parameters())
        self.kept, self.quantized = self._matrices()
        self.attached_bytes = sum(
            f.stat().st_size
            for f in model.iterdir()
            if f.suffix in ATTACHED and "safetensors" not in f.name
        )

    def _matrices(self) -> tuple[list[str], dict[str, int]]:
        """Names of the embeddings and head, and of all other matrices with their weights."""
        ends = [self.original.get_input_embeddings(), self.original.get_output_embeddings()]
        kept = {id(module.weight) for module in ends if module is not None}
        matrices = find_matrices(self.original)
        return (
            [m.name for m in matrices if id(m.parameter) in kept],
            {m.name: m.parameter.numel() for m in matrices if id(m.parameter) not in kept},
        )

    def save_sequences(self) -> Path:
        """Sample the sequences that cvxq calibrates on, and save them for the peers."""
        sampling = self.sampling
        options = CalibrationOptions("self", sampling.count, sampling.length, sampling.seed)
        path = self.work / "sequences.safetensors"
        save_file({"ids": make_sequences(self.original, self.tokenizer, options)}, path)
        return path

    def original_perplexity(self) -> evaluate.PerplexityResult:
        """Perplexity of the original."""
        return evaluate.perplexity(self.original, self.windows)

    def convert(self, method: str, cell: tuple[int, int], name: str, *arguments: str) -> Row:
        """Convert with `cvxq convert`, and measure the file it writes."""
        file, report = self.work / f"{name}.cvxq", self.work / f"{name}-report"
        command = [sys.executable, "-m", "cvxq.cli", "convert", self.model, "-o", str(file)]
        command += ["--report", str(report), *arguments]
        if method != "RTN":
            command += ["--calibration", "self", "--sequences", str(self.sampling.count)]
            command += ["--length", str(self.sampling.length), "--seed", str(self.sampling.seed)]
        cost = run_measured(command, self.work / f"{name}.log")
        rate = json.loads((report / "report.json").read_text())["rate_bits_per_weight"]
        network = load_subject(str(file), with_tokenizer=False).network
        return self._row(method, cell, rate, file.stat().st_size, network, cost)

    def gptq(
        self, python: Path, cell: tuple[int, int], setting: str, flags: Sequence[str], ids: Path
    ) -> tuple[Row, dict[str, str]]:
        """Quantize with GPTQ and measure the result; also the versions of the peer's packages.

        python: interpreter of the peer's environment; flags: of `peers/gptq.py`.
        """
        bits, group = cell
        out = self.work / f"gptq-{bits}-{group}"
        command = [str(python), "-m", "peers.gptq", self.model, "--sequences", str(ids)]
        command += ["--bits", str(bits), "--group", str(group), "--out", str(out), *flags]
        cost = run_measured(command, self.work / f"{out.name}.log")
        return self.peer_row(cell, setting, out, cost)

    def peer_row(
        self, cell: tuple[int, int], setting: str, out: Path, cost: Cost
    ) -> tuple[Row, dict[str, str]]:
        """Put the weights that a peer left in `out` into a copy of the original, and measure it.

        Raises BenchmarkError when the peer quantized other matrices than cvxq is asked to.
        """
        summary = json.loads((out / "summary.json").read_text())
        matrices = load_file(out / "matrices.safetensors")
        odd = sorted(set(matrices) ^ set(self.quantized))
        if odd:
            raise BenchmarkError(f"{out}: the peer and cvxq disagree on {odd[0]}")
        network = load_subject(self.model, with_tokenizer=False).network
        parameters = dict(network.named_parameters())
        with torch.no_grad():
            for name, weight in matrices.items():
                parameters[name].copy_(weight)
        weights = sum(self.quantized.values())
        bits = sum(summary["bits"].values())
        size = -(-(bits + 16 * (self.parameters - weights)) // 8) + self.attached_bytes
        row = self._row("GPTQ", cell, bits / weights, size, network, cost, setting)
        return row, summary["versions"]

    def _row(
        self,
        method: str,
        cell: tuple[int, int],
        rate: float,
        file_bytes: int,
        network: PreTrainedModel,
        cost: Cost,
        setting: str = "",
    ) -> Row:
        found = evaluate.divergence(network, self.original, self.windows)
        perplexity = found.perplexity
        row = Row(
            method=method,
            cell=cell,
            setting=setting,
            rate=rate,
            file_bytes=file_bytes,
            perplexity=perplexity.perplexity,
            perplexity_error=perplexity.standard_error,
            kl=found.kl.mean,
            kl_error=found.kl.standard_error,
            cost=cost,
        )
        say(f"{row.label}: {rate:.3f} bits, {file_bytes:,} bytes, KL {row.kl:.5f}")
        return row


def check_same_sequences(file: Path, ids: Path) -> None:
    """Raise BenchmarkError unless the `.cvxq` file was calibrated on the sequences in `ids`."""
    with Reader(file) as reader:
        digest = json.loads(reader.file("provenance.json"))["calibration_sha256"]
    tokens = load_file(ids)["ids"].contiguous().numpy().tobytes()
    if digest != hashlib.sha256(tokens).hexdigest():
        raise BenchmarkError(f"{file}: calibrated on other sequences than the peers ({ids})")
