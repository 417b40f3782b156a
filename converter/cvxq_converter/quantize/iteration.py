"""One iteration of a conversion: sensitivities → depths → codes → corrections."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cvxq_converter.allocate.bias import layers_to_gain_bias
from cvxq_converter.allocate.plan import make_plans
from cvxq_converter.allocate.sizes import allocate, make_ledger
from cvxq_converter.journal import Journal
from cvxq_converter.measure.hessian import Feedback
from cvxq_converter.measure.quality import Reference
from cvxq_converter.measure.sums import Statistics
from cvxq_converter.options import Method, Target
from cvxq_converter.quantize.correction import correct
from cvxq_converter.quantize.encode import encode_matrices
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.stages import Stages


@torch.no_grad()
def quantize_network(
    loaded: LoadedModel,
    statistics: Statistics,
    feedback: Feedback | None,
    reference: Reference | None,
    documents: Mapping[str, bytes],
    target: Target,
    method: Method,
    stages: Stages,
    journal: Journal | None = None,
) -> Quantized:
    """Quantize the original weights, once measured; leaves the result in the network.

    statistics: by matrix name, empty for sensitivity 1 everywhere. feedback: of the same
    statistics; None quantizes every group on its own. reference: of the original, for the choice of
    the gain and the loss that is reported; None leaves the network as it was. documents: as
    in `make_ledger`. target: a rate or a size.
    """
    journal = journal or Journal()
    gained = layers_to_gain_bias(loaded.matrices, statistics) if method.correct_biases else []
    feedback = feedback if method.feedback else None
    foreseen = statistics
    if feedback:
        with stages.stage("hessians") as done:
            foreseen = feedback.foresee(statistics, done)
    with stages.stage("allocate") as done:
        plans = make_plans(loaded, foreseen, method, done)
        ledger = make_ledger(loaded, plans, gained, documents, method)
        allocation = allocate(plans, target, ledger)
    with stages.stage("quantize") as done:
        encoded = encode_matrices(loaded, plans, allocation, method, done, feedback, journal)
    with stages.stage("correct") as done:
        result = correct(loaded, encoded, statistics, gained, reference, method, done, journal)
    return Quantized(
        tensors={m.name: t for m, t in zip(loaded.matrices, encoded.tensors, strict=True)},
        codebook=result.codebook,
        added_biases=result.added_biases,
        allocation=allocation,
        gain_exponent=result.gain_exponent,
        quality=result.quality,
    )
