"""What a conversion says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from cvxq_converter.allocate.target import TargetResult
from cvxq_converter.write.report import ConversionReport, DecoderReport, depth_shares
from cvxq_format import CompandedTensor


def report() -> ConversionReport:
    return ConversionReport(
        method="cvxq",
        rate_bits_per_weight=2.99876543219,
        side_bits_per_weight=0.09,
        parameters=1000,
        quantized_weights=900,
        matrices=3,
        depth_histogram=(0.125, 0.25, 0.625, 0, 0, 0, 0, 0, 0),
        gained_biases=1,
        gain_exponent=0.5,
        dual_variable=-3.25,
        ascent_steps=7,
        kl=0.01,
        kl_standard_error=0.001,
        perplexity_increase=0.0101234567,
        calibration_tokens=64,
        decoder=DecoderReport(True),
        target=TargetResult("--max-kl", 0.01, 0.0098765432, 3),
    )


def test_the_histogram_counts_weights_not_groups(
    random_companded: Callable[..., CompandedTensor],
) -> None:
    """Clusters of a remainder have fewer weights per group."""
    tensors = [
        random_companded((20, 7), 1, group_size=8, partitions=1),
        random_companded((30, 5), 2, group_size=12, partitions=2),
    ]
    counts = np.zeros(9)
    for tensor in tensors:
        for c, rows in enumerate(tensor.cluster_rows()):
            for depth in tensor.depths[0, c]:
                counts[depth] += rows
    assert counts.sum() == 20 * 7 + 30 * 5
    assert depth_shares(tensors) == pytest.approx(tuple(counts / counts.sum()))


def test_the_whole_report_is_json_with_the_derived_figures() -> None:
    found = report().with_file(500, {"load": 1.5})
    record = json.loads(json.dumps(found.to_json()))
    assert record["file_bytes"] == 500
    assert record["file_bits_per_parameter"] == 4.0
    assert record["pruned_share"] == found.pruned_share == 0.125
    assert record["stage_seconds"] == {"load": 1.5}
    assert record["rate_bits_per_weight"] == 2.99876543219


def test_what_goes_into_the_file_is_the_same_in_every_run() -> None:
    early, late = (report().with_file(*f).for_file() for f in ((1, {}), (2, {"load": 9.0})))
    assert early == late
    assert not {"stage_seconds", "file_bytes"} & set(early)
    assert early["rate_bits_per_weight"] == 2.99877  # six digits
    assert early["target"]["achieved"] == 0.00987654
    assert early["depth_histogram"][:3] == [0.125, 0.25, 0.625]
    json.dumps(early)
