"""What each ingredient of the converter is worth: one removed at a time, at equal all-in rates.

    python benchmarks/ablation.py --calibration-text novels.txt --output table.md

Every row quantizes the same network with the same statistics at the same rates, side information
and gained biases included, and reports the KL divergence to the original on a text that the
calibration never saw. Rows whose statistics differ (metric, calibration, iterations) measure
their own.
"""

import argparse
import datetime
import platform
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from cvxq.evaluate import divergence, token_ids, windows
from cvxq_converter.job import split_sequences
from cvxq_converter.measure.calibration import CalibrationOptions, make_sequences
from cvxq_converter.measure.hessian import Feedback
from cvxq_converter.measure.quality import Reference, make_reference
from cvxq_converter.measure.statistics import MatrixStatistics, measure, measure_groups
from cvxq_converter.measure.teaching import Lesson, make_lessons
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import calibration_amount
from cvxq_converter.quantize.correction import install
from cvxq_converter.quantize.iteration import make_plan, quantize_network
from cvxq_converter.quantize.tuning import tune
from cvxq_converter.source.checkpoint import load_network, load_tokenizer, open_source
from cvxq_converter.source.loaded import LoadedModel, load_model
from cvxq_converter.stages import Stages

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Calibrated:
    """What was measured with one kind of calibration, and the original's predictions."""

    statistics: dict[str, MatrixStatistics]
    reference: Reference | None = None
    feedback: Feedback | None = None
    lessons: list[Lesson] = field(default_factory=list)


def variants(text: str | None) -> dict[str, dict[str, object]]:
    """Row name → options that differ from the defaults."""
    rows: dict[str, dict[str, object]] = {
        "everything (the defaults)": {},
        "one depth for all groups": {"uniform_depths": True},
        "no bound on a cluster's error": {"largest_error": 1.0},
        "bound 1/2": {"largest_error": 0.5},
        "bound 1/5": {"largest_error": 0.2},
        "bound 1/10": {"largest_error": 0.1},
        "compander's levels, not fitted": {"levels": "compander"},
        "no error feedback": {"feedback": False},
        "no error feedback, full gain (p = 1)": {"feedback": False, "gain": 1.0},
        "tuned, 60 steps": {"tune": 60},
        "no gain (p = 0)": {"gain": 0.0},
        "half gain (p = ½)": {"gain": 0.5},
        "full gain (p = 1)": {"gain": 1.0},
        "no bias correction": {"correct_biases": False},
        "no scale refinement": {"refine_scales": False},
        "no means": {"means": False},
        "2 iterations": {"iterations": 2},
        "metric: logits": {"metric": "logits"},
        "free depths (4 bits per group)": {"separable_depths": False},
        "sensitivity measured per group": {"measured_groups": True},
        "sensitivity per group, free depths": {"measured_groups": True, "separable_depths": False},
        "thresholds from measured curves": {"curve": "measured"},
        "no calibration": {"calibration": "none"},
        "1 row partition": {"partitions": 1},
        "4 row partitions": {"partitions": 4},
    }
    if text is not None:
        rows["calibrated on text"] = {"calibration": text}
    rows |= {f"group size {size}": {"group_size": size} for size in (32, 64, 128, 256, 512)}
    return rows


class Bench:
    """One model, its statistics by (calibration, metric), and the text to judge on."""

    def __init__(self, model: str, text: str, amount: tuple[int | None, int | None]) -> None:
        self.options = ConversionOptions(bits=4.0)
        source = open_source(model)
        self.tokenizer = load_tokenizer(source)
        self.original = load_network(source, torch.float32)
        self.loaded: LoadedModel = load_model(source, self.options)
        self.amount = calibration_amount(source, "cpu", *amount)
        context = self.original.config.max_position_embeddings
        self.windows = windows(token_ids(self.tokenizer, text), context)
        self._sequences: dict[str, torch.Tensor] = {}
        self._calibrated: dict[tuple[str, str], Calibrated] = {}

    def sequences(self, calibration: str) -> torch.Tensor:
        """Calibration sequences (S, L), made once."""
        if calibration not in self._sequences:
            self.loaded.restore()
            wanted = CalibrationOptions(calibration, *self.amount)
            self._sequences[calibration] = make_sequences(
                self.loaded.network, self.tokenizer, wanted
            )
        return self._sequences[calibration]

    def calibrated(self, options: ConversionOptions) -> Calibrated:
        """Statistics of the original, the reference for the gain, and what is learnt from."""
        if options.calibration == "none":
            return Calibrated({})
        key = (options.calibration, options.metric)
        if key not in self._calibrated:
            training, held = split_sequences(self.sequences(options.calibration))
            self.loaded.restore()
            network = self.loaded.network
            statistics = measure(
                network, self.loaded.matrices, training, options.metric, options.seed
            )
            self._calibrated[key] = Calibrated(
                statistics,
                make_reference(network, held),
                Feedback(self.loaded, training, statistics),
                make_lessons(network, training),
            )
        return self._calibrated[key]

    def _group_sensitivities(
        self, statistics: dict[str, MatrixStatistics], options: ConversionOptions
    ) -> dict[str, np.ndarray]:
        """A second measuring pass over the clusters that the first one fixed."""
        plans = [make_plan(self.loaded, m, statistics, options) for m in self.loaded.matrices]
        clusters = {p.matrix.name: p.clustering.cluster_of_row() for p in plans}
        training, _ = split_sequences(self.sequences(options.calibration))
        self.loaded.restore()
        matrices, metric, seed = self.loaded.matrices, options.metric, options.seed
        return measure_groups(self.loaded.network, matrices, training, metric, seed, clusters)

    def run(self, changes: dict[str, object], bits: float) -> str:
        """KL (mean ± standard error) of one variant at one rate, as text."""
        by_group = bool(changes.pop("measured_groups", False))
        options = replace(self.options, bits=bits, **changes)  # type: ignore[arg-type]
        calibrated = self.calibrated(options)
        statistics, reference = calibrated.statistics, calibrated.reference
        feedback = calibrated.feedback
        stages = Stages(None)
        groups = self._group_sensitivities(statistics, options) if by_group else None
        for iteration in range(options.iterations):
            if iteration:
                training, _ = split_sequences(self.sequences(options.calibration))
                statistics = measure(
                    self.loaded.network,
                    self.loaded.matrices,
                    training,
                    options.metric,
                    options.seed,
                )
                feedback = Feedback(self.loaded, training, statistics)
            result = quantize_network(
                self.loaded, statistics, reference, options, stages, _no_size, groups, feedback
            )
        if options.tune and reference is not None:
            steps, seed = options.tune, options.seed
            lessons = calibrated.lessons
            tune(self.loaded, result, lessons, reference, steps, seed, lambda *_: None)
        if reference is None:  # then the job leaves the network alone
            with torch.no_grad():
                install(self.loaded, result.tensors, result.codebook, {}, [], options)
        self.last_steps = result.allocation.steps if result.allocation else 0
        found = divergence(self.loaded.network, self.original, self.windows)
        return f"{found.kl.mean:.4f} ± {found.kl.standard_error:.4f}"


def _no_size(*_: object) -> None:
    raise AssertionError("rates only")


def main() -> None:
    """Run all variants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--text", type=Path, default=ROOT / "demo" / "evaluation.txt")
    parser.add_argument("--calibration-text", help="also calibrate on this .txt or .jsonl file")
    parser.add_argument("--bits", type=float, action="append", help="default: 2.3, 3.3 and 4.3")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--only", action="append", default=[], help="rows whose name contains this")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rates = args.bits or [2.3, 3.3, 4.3]
    bench = Bench(args.model, args.text.read_text("utf-8"), (args.sequences, args.length))
    lines = [
        "| variant | " + " | ".join(f"KL at {bits:g} bits" for bits in rates) + " | seconds |",
        "|---|" + "---:|" * (len(rates) + 1),
    ]
    print("\n".join(lines), flush=True)
    steps: dict[float, int] = {}
    for name, changes in variants(args.calibration_text).items():
        if args.only and not any(part in name for part in args.only):
            continue
        started = time.perf_counter()
        cells = []
        for bits in rates:
            cells.append(bench.run(dict(changes), bits))
            steps.setdefault(bits, bench.last_steps)
        cells.append(f"{time.perf_counter() - started:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if args.output:
        head = _head(args, bench, steps)
        args.output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def _head(args: argparse.Namespace, bench: Bench, steps: dict[float, int]) -> str:
    ascent = ", ".join(f"{count} at {bits:g} bits" for bits, count in steps.items())
    machine = platform.processor() or platform.machine()
    return (
        f"Model: {Path(args.model).name}; text: {args.text.name}; calibration "
        f"{bench.amount[0]} × {bench.amount[1]} tokens; {machine}, {torch.get_num_threads()} "
        f"threads, {datetime.date.today()}. KL in nats per token.\n"
        f"Steps of the dual ascent: {ascent}.\n\n"
    )


if __name__ == "__main__":
    main()
