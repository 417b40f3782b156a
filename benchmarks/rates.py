"""What one measurement is good for: ten rates, the losses predicted for them, targets met.

    cvxq measure demo/model -o model.stats.safetensors
    python benchmarks/rates.py demo/model model.stats.safetensors --text demo/evaluation.txt

The first table is of ten rates, none of which `cvxq measure` tried. The model is loaded once; then
every rate is allocated, quantized, corrected and written. "Quantization alone" is what one
conversion takes without calibration and measurement, so ten rates must take less than ten times
that. The second table is of losses that were asked for. Losses are
those on held-back calibration sequences and, for comparison, on a text that nothing has seen.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cvxq import evaluate
from cvxq_converter.job import Outcome, Prepared, finish, prepare, quantize_prepared, seek
from cvxq_converter.measure.curve import Curve
from cvxq_converter.measure.measurement import Measurement, load_measurement
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import preflight
from cvxq_converter.source.checkpoint import load_network, load_tokenizer, open_source
from cvxq_converter.source.loaded import load_model
from cvxq_converter.stages import Stages

RATES = (2.1, 2.4, 2.6, 2.8, 3.2, 3.4, 3.7, 4.5, 5.0, 6.0)
KLS = (0.2, 0.1, 0.05, 0.01, 0.002)
INCREASES = (0.2, 0.05, 0.01)
Elsewhere = Callable[[], str]  # KL of the network as it is now, on the text


def prepared_from(model: str, measurement: Measurement, options: ConversionOptions) -> Prepared:
    """Load the model and use what was measured on it."""
    source = open_source(model)
    measurement.check(source, options)
    estimate = preflight(source, options, measurement)
    return prepare(load_model(source, options), options, estimate, measurement, Stages(None))


def judge(model: str, text: Path | None, prepared: Prepared) -> Elsewhere:
    """A function that measures the KL on the text, and says nothing if there is none."""
    if text is None:
        return lambda: ""
    source = open_source(model)
    original = load_network(source, prepared.loaded.hollow.dtype)
    ids = evaluate.token_ids(load_tokenizer(source), text.read_text("utf-8"))
    windows = evaluate.windows(ids, min(original.config.max_position_embeddings, 2048))

    def measured() -> str:
        with prepared.loaded.whole() as network:
            found = evaluate.divergence(network, original, windows).kl
        return f"{found.mean:.5f} ± {found.standard_error:.5f}"

    return measured


def table_of_rates(
    prepared: Prepared,
    options: ConversionOptions,
    curve: Curve,
    loading: float,
    elsewhere: Elsewhere,
) -> None:
    """Convert at every rate; compare losses with the prediction, and times."""
    seconds, errors = [], []
    print("| bits per weight | file bytes | KL expected | KL found | error | KL on the text |")
    print("|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            started, stages = time.perf_counter(), Stages(None)
            chosen = options.at_rate(rate)
            outcome = Outcome(quantize_prepared(prepared, chosen, stages))
            report = finish(prepared, outcome, Path(folder) / "a.cvxq", chosen, stages)
            seconds.append(time.perf_counter() - started)
            expected = float(curve.loss_at([rate])[0])
            assert report.kl is not None
            errors.append(expected / report.kl - 1)
            print(
                f"| {rate:.2f} | {report.file_bytes:,} | {expected:.5f} | {report.kl:.5f} ± "
                f"{report.kl_standard_error or 0:.5f} | {errors[-1]:+.1%} | {elsewhere()} |",
                flush=True,
            )
    alone = loading + sum(seconds) / len(seconds)
    together = loading + sum(seconds)
    spread = math.sqrt(sum(e * e for e in errors) / len(errors))
    print(
        f"\nError of the expected KL: {spread:.1%} (root mean square), "
        f"{max(errors, key=abs):+.1%} at worst.\n"
        f"Quantization alone: {alone:.1f} s ({loading:.1f} s of them loading). Ten rates from one "
        f"measurement: {together:.1f} s, {together / alone:.2f} times as long.\n"
    )


def table_of_targets(prepared: Prepared, options: ConversionOptions, elsewhere: Elsewhere) -> None:
    """Seek the smallest file for every loss."""
    print("| asked for | achieved | share of it | trials | bits per weight | KL on the text |")
    print("|---|---:|---:|---:|---:|---:|")
    wanted = [("max_kl", value) for value in KLS]
    wanted += [("max_perplexity_increase", value) for value in INCREASES]
    for name, value in wanted:
        aim = options.having(bits=None, **{name: value})
        outcome = seek(prepared, aim, Stages(None), lambda _: None)
        target = outcome.target
        assert target is not None
        assert outcome.curve is not None
        rate = next(
            t.rate_bits_per_weight for t in outcome.curve.trials if t.achieved == target.achieved
        )
        is_kl = name == "max_kl"
        asked = f"`--max-kl {value:g}`" if is_kl else f"`{target.option} {100 * value:g}%`"
        print(
            f"| {asked} | {target.achieved:.5f} | {target.achieved / value:.1%} | "
            f"{target.trials} | {rate:.4f} | {elsewhere()} |",
            flush=True,
        )


def main() -> None:
    """Print Markdown tables of the losses, and the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("statistics", type=Path)
    parser.add_argument("--text", type=Path, help="also measure the KL on this text")
    parser.add_argument("--only", choices=["rates", "targets"], help="one of the two tables")
    arguments = parser.parse_args()
    measurement = load_measurement(arguments.statistics)
    measured = {n: v for n, v in measurement.record.options.items() if n != "dtype"}
    options = ConversionOptions.of(bits=RATES[0], **measured)
    started = time.perf_counter()
    prepared = prepared_from(arguments.model, measurement, options)
    loading = time.perf_counter() - started
    elsewhere = judge(arguments.model, arguments.text, prepared)
    if arguments.only != "targets":
        table_of_rates(prepared, options, measurement.record.curve, loading, elsewhere)
    if arguments.only != "rates":
        table_of_targets(prepared, options, elsewhere)


if __name__ == "__main__":
    main()
