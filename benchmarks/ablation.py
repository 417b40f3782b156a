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
from dataclasses import replace
from pathlib import Path

import torch
from cvxq.evaluate import divergence, token_ids, windows
from cvxq_converter.amounts import calibration_amount
from cvxq_converter.job import Prepared, prepare, quantize_prepared
from cvxq_converter.options import Calibration, ConversionOptions
from cvxq_converter.preflight import preflight
from cvxq_converter.quantize.correction import Replacement
from cvxq_converter.source.checkpoint import load_network, load_tokenizer, open_source
from cvxq_converter.source.loaded import LoadedModel, load_model
from cvxq_converter.stages import Stages

ROOT = Path(__file__).resolve().parent.parent


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
        "no calibration": {"calibration": "none"},
        "1 row partition": {"partitions": 1},
        "4 row partitions": {"partitions": 4},
    }
    if text is not None:
        rows["calibrated on text"] = {"calibration": text}
    rows |= {f"group size {size}": {"group_size": size} for size in (32, 64, 128, 256, 512)}
    return rows


class Bench:
    """One model, what was measured by (calibration, metric), and the text to judge on."""

    def __init__(self, model: str, text: str, amount: tuple[int | None, int | None]) -> None:
        self.source = open_source(model)
        wanted = Calibration(sequences=amount[0], length=amount[1])
        count, length = calibration_amount(self.source, "cpu", wanted)
        self.options = ConversionOptions.of(bits=4.0, sequences=count, length=length)
        self.original = load_network(self.source, torch.float32)
        self.loaded: LoadedModel = load_model(self.source, self.options)
        tokenizer = load_tokenizer(self.source)
        context = self.original.config.max_position_embeddings
        self.windows = windows(token_ids(tokenizer, text), context)
        self._prepared: dict[tuple[str, str], Prepared] = {}

    def prepared(self, options: ConversionOptions) -> Prepared:
        """The network, measured once for all rows of one calibration; tuning could begin."""
        key = (options.calibration.source, options.calibration.metric)
        if key not in self._prepared:
            self.loaded.restore()
            if options.replaces_weights:
                options = options.having(tune=1)  # what is learnt from is kept, too
            estimate = preflight(self.source, options)
            self._prepared[key] = prepare(self.loaded, options, estimate, None, Stages(None))
        return self._prepared[key]

    def run(self, changes: dict[str, object], bits: float) -> str:
        """KL (mean ± standard error) of one variant at one rate, as text."""
        options = self.options.having(bits=bits, **changes)
        prepared = self.prepared(options)
        if not options.method.tune:
            prepared = replace(prepared, lessons=[])
        result = quantize_prepared(prepared, options, Stages(None))
        if prepared.choosing is None:  # then the job leaves the network alone
            tensors, codebook = result.tensors, result.codebook
            Replacement(self.loaded, tensors, codebook, {}, [], options.method).install()
        self.last_steps = result.allocation.steps if result.allocation else 0
        with self.loaded.whole() as network:
            found = divergence(network, self.original, self.windows)
        return f"{found.kl.mean:.4f} ± {found.kl.standard_error:.4f}"


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
    amount = bench.options.calibration
    return (
        f"Model: {Path(args.model).name}; text: {args.text.name}; calibration "
        f"{amount.sequences} × {amount.length} tokens; {machine}, {torch.get_num_threads()} "
        f"threads, {datetime.date.today()}. KL in nats per token.\n"
        f"Steps of the dual ascent: {ascent}.\n\n"
    )


if __name__ == "__main__":
    main()
