"""Round to nearest: the baseline that needs no data.

Groups of G consecutive inputs of one output row, a uniform asymmetric grid of 2^B levels between
a shrunk minimum and maximum (zero between them), the shrinkage chosen per group by squared error.
Stored in the same container: the matrix is stored transposed, so that a group along the input is
a column segment.
"""

from itertools import pairwise

import numpy as np
import torch
from cvxq_format import Codebook, CompandedTensor, pack_codes
from cvxq_format.codebook import logarithmic_scales

from cvxq_converter.allocate.allocation import THRESHOLDS, UNITS_PER_BIT
from cvxq_converter.allocate.clustering import cluster_bounds
from cvxq_converter.errors import ConversionError
from cvxq_converter.options import Method, Target
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.stages import Stages

SCALE_BITS = 8
STEPS_PER_OCTAVE = 16
SHRINK = tuple(1 - i / 32 for i in range(17))  # 1.0 down to 0.5


def rtn_codebook() -> Codebook:
    """Uniform levels, one unit of scale apart, centred on zero."""
    return Codebook(
        scale_table=logarithmic_scales(SCALE_BITS, STEPS_PER_OCTAVE),
        depth_thresholds=THRESHOLDS,
        levels=tuple(
            (np.arange(1 << depth) - ((1 << depth) - 1) / 2).astype(np.float32)
            for depth in range(1, 9)
        ),
    )


def quantize_rtn(
    weight: torch.Tensor, depth: int, group_size: int, codebook: Codebook, source_orientation: str
) -> CompandedTensor:
    """Quantize weight (N, K) to `depth` bits in groups of `group_size` inputs.

    Scales take 8 bits (steps of 2^(1/16)), offsets 8 bits (steps of 2^(depth − 8) of a scale).
    """
    stored = weight.float().T  # (K, N): rows are inputs
    rows, columns = stored.shape
    bounds = cluster_bounds(rows, group_size, 1)
    clusters = len(bounds) - 1
    starts = torch.from_numpy(bounds[:-1])
    spans = [stored[a:b] for a, b in pairwise(bounds)]
    low = torch.stack([s.amin(0) for s in spans]).clamp_max(0)
    high = torch.stack([s.amax(0) for s in spans]).clamp_min(0)
    steps = (1 << depth) - 1
    mean_step = np.float32(2.0 ** (depth - 8))
    unit = np.float32(float((high - low).max()) / steps * 2 ** (1 / STEPS_PER_OCTAVE))
    scales = torch.from_numpy(codebook.scale_table * unit)
    steps_log = torch.log2(scales[1:].clamp_min(1e-38))
    edges = (steps_log[1:] + steps_log[:-1]) / 2

    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scale_codes = torch.zeros(clusters, columns, dtype=torch.uint8)
    mean_codes = torch.zeros(clusters, columns, dtype=torch.int8)
    for c, span in enumerate(spans):
        best = torch.full((columns,), torch.inf)
        first = int(starts[c])
        for shrink in SHRINK:
            width = (high[c] - low[c]) * shrink / steps
            index = torch.bucketize(torch.log2(width.clamp_min(1e-38)), edges) + 1
            index = torch.where(width > 0, index, torch.ones_like(index))
            scale = scales[index].clamp_min(1e-38)
            centre = (high[c] + low[c]) * shrink / 2 / scale
            mean = (centre / float(mean_step)).round().clamp(-127, 127)
            shifted = span / scale - mean * float(mean_step)
            q = (shifted + steps / 2).round().clamp(0, steps)
            error = (scale * (q - steps / 2 + mean * float(mean_step)) - span).square().sum(0)
            better = error < best
            best = torch.where(better, error, best)
            scale_codes[c] = torch.where(better, index.to(torch.uint8), scale_codes[c])
            mean_codes[c] = torch.where(better, mean.to(torch.int8), mean_codes[c])
            codes[first : first + len(span)] = torch.where(
                better, q.to(torch.uint8), codes[first : first + len(span)]
            )
    depths = np.full((1, clusters, columns), depth, dtype=np.uint8)
    return CompandedTensor(
        shape=tuple(weight.shape),
        group_size=group_size,
        partitions=1,
        transposed=True,
        source_orientation=source_orientation,
        codebook=0,
        scale_unit=unit,
        mean_step=mean_step,
        scale_bits=SCALE_BITS,
        depths=depths,
        column_terms=np.zeros((1, columns), dtype=np.uint8),
        cluster_terms=np.full((1, clusters), depth * UNITS_PER_BIT, dtype=np.int16),
        column_bits=0,
        column_shift=0,
        scale_codes=scale_codes.numpy()[None],
        mean_codes=mean_codes.numpy()[None],
        permutation=None,
        packed_codes=pack_codes(codes.numpy()[None], depths, group_size, 1),
    )


@torch.no_grad()
def quantize_network_rtn(
    loaded: LoadedModel,
    target: Target,
    method: Method,
    stages: Stages,
    stage: str = "quantize",
) -> Quantized:
    """Quantize every matrix of a network; ConversionError unless the depth is a whole number.

    stage: what this is called to whoever waits for it.
    """
    if target.bits is None or target.bits not in range(1, 9):
        raise ConversionError("--method rtn takes whole --bits from 1 to 8, of the codes alone")
    codebook = rtn_codebook()
    tensors = {}
    with stages.stage(stage) as done:
        for i, matrix in enumerate(loaded.matrices):
            tensors[matrix.name] = quantize_rtn(
                loaded.originals[matrix.name].cpu(),
                int(target.bits),
                method.group_size,
                codebook,
                matrix.source_orientation,
            )
            done(i + 1, len(loaded.matrices))
    return Quantized(tensors, codebook)
