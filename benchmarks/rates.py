"""Ten rates from one measurement: what they cost, and how well their loss was predicted.

    cvxq measure demo/model -o model.stats.safetensors
    python benchmarks/rates.py demo/model model.stats.safetensors --text demo/evaluation.txt

None of the rates is one that `cvxq measure` tried. The model is loaded once; then every rate is
allocated, quantized, corrected and written. "Quantization alone" is what one conversion takes
without calibration and measurement, so ten rates must take less than ten times that. The loss
found is that on held-back calibration sequences and, for comparison, on a text that nothing has
seen.
"""

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from cvxq import evaluate
from cvxq_converter.checkpoint import load_network, load_tokenizer, open_source
from cvxq_converter.job import Outcome, Prepared, finish, prepare, quantize
from cvxq_converter.loaded import load_model
from cvxq_converter.measurement import Measurement, load_measurement
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import preflight
from cvxq_converter.stages import Stages

RATES = (2.1, 2.4, 2.6, 2.8, 3.2, 3.4, 3.7, 4.5, 5.0, 6.0)


def prepared_from(model: str, measurement: Measurement, options: ConversionOptions) -> Prepared:
    """Load the model and use what was measured on it."""
    source = open_source(model)
    measurement.check(source, options)
    estimate = preflight(source, dtype=options.dtype, device="cpu")
    return prepare(load_model(source, options), options, estimate, measurement, Stages(None))


def main() -> None:
    """Print a Markdown table of the losses and the two times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("statistics", type=Path)
    parser.add_argument("--text", type=Path, help="also measure the KL on this text")
    arguments = parser.parse_args()
    measurement = load_measurement(arguments.statistics)
    measured = {n: v for n, v in measurement.record.options.items() if n != "dtype"}
    options = ConversionOptions(bits=RATES[0], **measured)
    windows, original = [], None
    if arguments.text:
        source = open_source(arguments.model)
        original = load_network(source, options.dtype)
        ids = evaluate.token_ids(load_tokenizer(source), arguments.text.read_text("utf-8"))
        windows = evaluate.windows(ids, min(original.config.max_position_embeddings, 2048))
    started = time.perf_counter()
    prepared = prepared_from(arguments.model, measurement, options)
    loading = time.perf_counter() - started
    quantizing, errors = [], []
    print("| bits per weight | file bytes | KL expected | KL found | error | KL on the text |")
    print("|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            started, stages = time.perf_counter(), Stages(None)
            chosen = replace(options, bits=rate)
            outcome = Outcome(quantize(prepared, chosen, stages))
            report = finish(prepared, outcome, Path(folder) / "a.cvxq", chosen, stages)
            quantizing.append(time.perf_counter() - started)
            expected = float(measurement.record.curve.loss_at([rate])[0])
            assert report.kl is not None
            errors.append(expected / report.kl - 1)
            elsewhere = ""
            if original is not None:
                found = evaluate.divergence(prepared.loaded.network, original, windows).kl
                elsewhere = f"{found.mean:.5f} ± {found.standard_error:.5f}"
            print(
                f"| {rate:.2f} | {report.file_bytes:,} | {expected:.5f} | {report.kl:.5f} ± "
                f"{report.kl_standard_error or 0:.5f} | {errors[-1]:+.1%} | {elsewhere} |",
                flush=True,
            )
    alone = loading + sum(quantizing) / len(quantizing)
    together = loading + sum(quantizing)
    spread = math.sqrt(sum(e * e for e in errors) / len(errors))
    print(
        f"\nError of the expected KL: {spread:.1%} (root mean square), "
        f"{max(errors, key=abs):+.1%} at worst.\n"
        f"Quantization alone: {alone:.1f} s ({loading:.1f} s of them loading). Ten rates from one "
        f"measurement: {together:.1f} s, {together / alone:.2f} times as long."
    )


if __name__ == "__main__":
    main()
