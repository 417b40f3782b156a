"""Make quantized models with cvxq's command line and with peers, and measure them all alike.

Everything made is kept in the work folder under a digest of what it depends on: the model, the
calibration tokens, the settings and the code that made it. What a change of cvxq does not touch
(the peers above all) is thus not made again.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from comparison import Run
from cvxq import evaluate, load
from cvxq_converter.measure import calibration
from cvxq_converter.measure.calibration import make_sequences
from cvxq_converter.options import Calibration
from cvxq_converter.source.checkpoint import load_network, load_tokenizer, open_source
from cvxq_converter.source.matrices import find_matrices
from cvxq_format import Reader
from cvxq_format.model_config import context_length
from peers.catalogue import Peer, Settings
from peers.environment import requirements
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

BENCHMARKS = Path(__file__).resolve().parent
ATTACHED = {".json", ".model", ".jinja"}  # files beside the weights that every format carries


class BenchmarkError(Exception):
    """Why a step failed: one line."""


def say(text: str) -> None:
    """Tell the progress on stderr."""
    print(f"quality: {text}", file=sys.stderr, flush=True)


def digest(*parts: object) -> str:
    """Digest of what the parts say, and of the contents of those that are files."""
    found = hashlib.sha256()
    for part in parts:
        said = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        found.update(hashlib.sha256(said).digest())
    return found.hexdigest()[:24]


def sources(*folders: Path) -> list[Path]:
    """All Python files below the folders, in a fixed order."""
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def run(command: Sequence[str], log: Path) -> float:
    """Run a command to its end, and return its wall-clock seconds.

    It runs where `log` is, since some peers leave files of their own; what it prints goes to `log`.
    BenchmarkError with the last line it printed if it fails.
    """
    environment = os.environ.copy()
    paths = [str(BENCHMARKS), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    # GPTQModel asks for two workers of its pool, and makes one for every two processors.
    environment.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    started = time.perf_counter()
    with log.open("wb") as file:
        done = subprocess.run(
            command, stdout=file, stderr=file, env=environment, cwd=log.parent, check=False
        )
    if done.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise BenchmarkError(f"{' '.join(command)} failed, saying {said[-1]!r} (all: {log})")
    return time.perf_counter() - started


@dataclass(frozen=True)
class Sampling:
    """How the original is sampled for calibration: the same for cvxq and its peers."""

    count: int
    length: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """What is asked of the peers and of cvxq.

    near: rates that cvxq is asked for alone, if any; convert: options for all its conversions;
    tune: steps of tuning that some rows are made with a second time.
    """

    peers: tuple[Peer, ...]
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    samplings: tuple[Sampling, ...]
    near: tuple[float, ...]
    convert: tuple[str, ...]
    tune: int = 0


@dataclass(frozen=True)
class Text:
    """A text to evaluate on: its name, and the windows it was cut into."""

    name: str
    windows: list[evaluate.Window]


@dataclass(frozen=True)
class Programs:
    """What a peer runs with: its interpreter, and the folder of its command-line tools if any."""

    python: Path
    tools: Path | None = None


class Bench:
    """One model, the texts it is evaluated on and the folder that everything is written to."""

    def __init__(self, model: Path, texts: Sequence[Path], context: int, windows: int, work: Path):
        """Load the original and cut the texts into windows of at most `context` tokens.

        texts: the one that claims are about, and maybe a second one; of each, at most the first
        `windows` windows are used.
        """
        work.mkdir(parents=True, exist_ok=True)
        model = model.resolve()
        self.model, self.work = str(model), work
        self.name = model.parent.name if model.name == "model" else model.name
        self.source = open_source(self.model)
        self.original = load_network(self.source, torch.float32)
        self.tokenizer = load_tokenizer(self.source)
        longest = context_length(self.original.config.to_dict())
        self.context = min(context, longest or context)
        self.texts = [self._cut(text, windows) for text in texts]
        self.parameters = sum(p.numel() for p in self.original.parameters())
        self.embedding, self.shapes = self._matrices()
        weights = sorted(model.glob("*.safetensors"))
        self.digest = digest(*weights, model / "config.json")
        ids = [window.ids.tolist() for text in self.texts for window in text.windows]
        self.evaluation = digest(self.digest, ids, Path(evaluate.__file__))
        attached = (f for f in model.iterdir() if f.suffix in ATTACHED)
        self.attached_bytes = sum(f.stat().st_size for f in attached if "safetensors" not in f.name)

    def _cut(self, text: Path, windows: int) -> Text:
        ids = evaluate.token_ids(self.tokenizer, text.read_text(encoding="utf-8"))
        return Text(text.stem, evaluate.windows(ids, self.context)[:windows])

    def _matrices(self) -> tuple[list[str], dict[str, tuple[int, int]]]:
        """Names of the embeddings and head, and of all other matrices with their shapes (N, K)."""
        ends = [self.original.get_input_embeddings(), self.original.get_output_embeddings()]
        kept = {id(module.weight) for module in ends if module is not None}
        matrices = find_matrices(self.original)
        shapes = {m.name: m.weight.shape for m in matrices if id(m.parameter) not in kept}
        return (
            [m.name for m in matrices if id(m.parameter) in kept],
            {name: (shape[0], shape[1]) for name, shape in shapes.items()},
        )

    def count(self, names: Iterable[str]) -> int:
        """How many weights the matrices of these names have."""
        parameters = dict(self.original.named_parameters())
        return sum(parameters[name].numel() for name in names)

    def original_perplexity(self, text: Text) -> evaluate.PerplexityResult:
        """Perplexity of the original on a text."""
        return evaluate.perplexity(self.original, text.windows)

    def sequences(self, sampling: Sampling) -> Path:
        """File of the sequences that cvxq calibrates on, sampled when there is none yet."""
        code = Path(calibration.__file__)
        name = digest(self.digest, sampling, code, version("torch"))
        path = self.work / f"sequences-{name}.safetensors"
        if not path.exists():
            say(f"{self.name}: sampling calibration sequences, seed {sampling.seed}")
            options = Calibration("self", sampling.count, sampling.length, seed=sampling.seed)
            save_file({"ids": make_sequences(self.original, self.tokenizer, options)}, path)
        return path

    def ask(
        self, peer: Peer, programs: Programs, jobs: Sequence[Settings], ids: Path | None
    ) -> list[Path]:
        """Folders of a peer's results, one per settings, made by one process where missing."""
        code = [BENCHMARKS / "peers" / f"{name}.py" for name in (peer.key, "grid", "worker")]
        known = digest(self.digest, peer.key, ids and digest(ids), requirements(peer.key), *code)
        folders = [self.work / "peers" / f"{peer.key}-{digest(known, job)}" for job in jobs]
        missing = [
            {"out": str(folder), "settings": job}
            for folder, job in zip(folders, jobs, strict=True)
            if not (folder / "summary.json").exists()
        ]
        if missing:
            say(f"{self.name}: {peer.label}, {len(missing)} results to make")
            file = self.work / f"jobs-{peer.key}.json"
            file.write_text(json.dumps(missing))
            command = [str(programs.python), "-m", f"peers.{peer.key}", self.model]
            command += ["--jobs", str(file)]
            command += ["--sequences", str(ids)] if ids else []
            command += ["--tools", str(programs.tools)] if programs.tools else []
            run(command, self.work / f"{peer.key}.log")
        return folders

    def measure_peer(self, folder: Path) -> tuple[frozenset[str], Run]:
        """Put the weights that a peer left into a copy of the original, and measure it.

        Returns the names of the matrices it quantized, too. Raises BenchmarkError when a name or
        a shape is none of the model's.
        """
        summary = json.loads((folder / "summary.json").read_text())
        matrices = load_file(folder / "matrices.safetensors")
        known = dict(self.original.named_parameters())
        for name, weight in matrices.items():
            if name not in known or known[name].shape != weight.shape:
                raise BenchmarkError(f"{folder}: {name} is no matrix of the model")

        def quantized() -> PreTrainedModel:
            network: PreTrainedModel = load_network(self.source, torch.float32)
            network.load_state_dict(matrices, strict=False)
            return network

        weights = self.count(matrices)
        bits = sum(summary["bits"].values())
        size = -(-(bits + 16 * (self.parameters - weights)) // 8)
        size = (summary["file_bytes"] or size) + self.attached_bytes
        made = Sized(bits / weights, size, summary["seconds"])
        return frozenset(matrices), self._measured(folder, quantized, made)

    def statistics(self, sampling: Sampling) -> tuple[Path, float]:
        """File of what `cvxq measure` finds with a sampling, for all rates; and its seconds."""
        size = f"{sampling.count}x{sampling.length}"
        folder = self._folder(f"measured-{size}-seed-{sampling.seed}")
        file = folder / "statistics.safetensors"
        words = ["--calibration", "self", "--sequences", str(sampling.count)]
        words += ["--length", str(sampling.length), "--seed", str(sampling.seed)]
        return file, self._make(file, "measure", self.model, "-o", str(file), *words)

    def measuring_seconds(self, samplings: Sequence[Sampling]) -> float:
        """Seconds of one measurement, on average over the samplings."""
        return fmean(self.statistics(sampling)[1] for sampling in samplings)

    def convert(self, name: str, sampling: Sampling | None, *arguments: str) -> Run:
        """Convert with `cvxq convert`, and measure the file it writes.

        sampling: None for a method that does without calibration. With one, the measurement is
        shared with all other conversions of that sampling; the run's seconds include it.
        """
        folder = self._folder(name)
        file = folder / "model.cvxq"
        words = [self.model, "-o", str(file), *arguments]
        seconds = 0.0
        if sampling is not None:
            measured, seconds = self.statistics(sampling)
            words += ["--statistics", str(measured)]
        seconds += self._make(file, "convert", *words)
        if sampling is not None:
            check_same_sequences(file, self.sequences(sampling))
        with Reader(file) as reader:
            rate = json.loads(reader.file("report.json"))["rate_bits_per_weight"]
        made = Sized(rate, file.stat().st_size, seconds)
        return self._measured(folder, lambda: load(file, weights="dense").network, made)

    def _folder(self, name: str) -> Path:
        """Folder of one of cvxq's results on this model, made when missing."""
        folder = self.work / "cvxq" / f"{self.name}-{self.digest[:8]}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _make(self, file: Path, *arguments: str) -> float:
        """Have a command of cvxq's write `file`, unless it has; return the seconds that it took."""
        folder, stamp = file.parent, file.parent / "stamp.json"
        command = [sys.executable, "-m", "cvxq.cli", *arguments]
        root = BENCHMARKS.parent
        code = sources(root / "converter", root / "format_spec")
        known = digest(self.digest, arguments, version("torch"), *code)
        if not stamp.exists() or json.loads(stamp.read_text())["of"] != known:
            for old in (stamp, file, *folder.glob("measured-*.json")):
                old.unlink(missing_ok=True)
            seconds = run(command, folder / "log")
            stamp.write_text(json.dumps({"of": known, "seconds": seconds}))
        return float(json.loads(stamp.read_text())["seconds"])

    def _measured(self, folder: Path, network: Callable[[], PreTrainedModel], made: "Sized") -> Run:
        """Make and measure a network, or read what was measured before on the same texts."""
        path = folder / f"measured-{self.evaluation}.json"
        if path.exists():
            return Run(**json.loads(path.read_text()))
        quantized = network()
        found = [evaluate.divergence(quantized, self.original, t.windows) for t in self.texts]
        first, second = found[0], found[1] if len(found) > 1 else None
        measured = Run(
            rate=made.rate,
            file_bytes=made.file_bytes,
            kl=first.kl.mean,
            kl_error=first.kl.standard_error,
            perplexity=first.perplexity.perplexity,
            second_kl=second.kl.mean if second else float("nan"),
            second_perplexity=second.perplexity.perplexity if second else float("nan"),
            seconds=made.seconds,
        )
        path.write_text(json.dumps(asdict(measured)))
        return measured


@dataclass(frozen=True)
class Sized:
    """What a result took: bits per weight of its matrices, bytes of the file, seconds."""

    rate: float
    file_bytes: int
    seconds: float


def check_same_sequences(file: Path, ids: Path) -> None:
    """Raise BenchmarkError unless the `.cvxq` file was calibrated on the sequences in `ids`."""
    with Reader(file) as reader:
        provenance: dict[str, Any] = json.loads(reader.file("provenance.json"))
    tokens = load_file(ids)["ids"].contiguous().numpy().tobytes()
    if provenance["calibration_sha256"] != hashlib.sha256(tokens).hexdigest():
        raise BenchmarkError(f"{file}: calibrated on other sequences than the peers ({ids})")
