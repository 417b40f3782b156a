"""Round to nearest: the baseline that needs no data.

Groups of G consecutive inputs of one output row, a uniform asymmetric grid of 2^B levels between
a shrunk minimum and maximum (zero between them), the shrinkage chosen per group by squared error.
Stored in the same container: the matrix is stored transposed, so that a group along the input is
a column segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from cvxq_format import Codebook, CompandedTensor, pack_codes
from cvxq_format.codebook import logarithmic_scales

from cvxq_converter.allocate.allocation import THRESHOLDS, UNITS_PER_BIT
from cvxq_converter.allocate.clustering import cluster_bounds
from cvxq_converter.errors import ConversionError
from cvxq_converter.journal import Journal
from cvxq_converter.options import Method, Target
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.source.scratch import Scratch
from cvxq_converter.stages import Stages

SCALE_BITS = 8
STEPS_PER_OCTAVE = 16
CHUNK = 1 << 17  # weights that are searched at once: they stay in the processor's cache
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


@dataclass(frozen=True)
class _Grid:
    """What scales and offsets a matrix may use; edges: between log2 of neighbouring scales."""

    steps: int  # levels less one
    mean_step: float
    scales: torch.Tensor
    edges: torch.Tensor


def quantize_rtn(
    weight: torch.Tensor,
    depth: int,
    group_size: int,
    codebook: Codebook,
    source_orientation: str,
    scratch: Scratch,
) -> CompandedTensor:
    """Quantize weight (N, K) to `depth` bits in groups of `group_size` inputs.

    Scales take 8 bits (steps of 2^(1/16)), offsets 8 bits (steps of 2^(depth − 8) of a scale).
    scratch: takes the packed codes.
    """
    outputs, inputs = weight.shape
    bounds = cluster_bounds(inputs, group_size, 1)
    clusters = len(bounds) - 1
    step = max(1, CHUNK // inputs)
    parts = [slice(n, min(n + step, outputs)) for n in range(0, outputs, step)]
    widest = max(float((high - low).max()) for high, low in _ranges(weight, parts, bounds))
    steps, mean_step = (1 << depth) - 1, np.float32(2.0 ** (depth - 8))
    unit = np.float32(widest / steps * 2 ** (1 / STEPS_PER_OCTAVE))
    scales = torch.from_numpy(codebook.scale_table * unit)
    logs = torch.log2(scales[1:].clamp_min(1e-38))
    grid = _Grid(steps, float(mean_step), scales, (logs[1:] + logs[:-1]) / 2)

    codes = np.empty((inputs, outputs), np.uint8)
    scale_codes = np.empty((clusters, outputs), np.uint8)
    mean_codes = np.empty((clusters, outputs), np.int8)
    for part in parts:
        for run, groups in _groups(weight[part].float(), bounds):
            scale, mean, chosen = _search(groups, grid)
            inner = slice(int(bounds[run.start]), int(bounds[run.stop]))
            scale_codes[run, part] = scale.T.numpy()
            mean_codes[run, part] = mean.T.numpy()
            codes[inner, part] = chosen.flatten(1).T.numpy()
    depths = np.full((1, clusters, outputs), depth, dtype=np.uint8)
    packed = torch.from_numpy(pack_codes(codes[None], depths, group_size, 1))
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
        column_terms=np.zeros((1, outputs), dtype=np.uint8),
        cluster_terms=np.full((1, clusters), depth * UNITS_PER_BIT, dtype=np.int16),
        column_bits=0,
        column_shift=0,
        scale_codes=scale_codes[None],
        mean_codes=mean_codes[None],
        permutation=None,
        packed_codes=scratch.copy(packed).numpy(),
    )


def turned(made: CompandedTensor) -> CompandedTensor:
    """Take what was made of Wᵀ for W: its groups are of outputs of one input.

    Peers have no such groups, but it is these that the kernels are fast with.
    """
    rows, columns = made.shape
    return replace(made, shape=(columns, rows), transposed=False)


def _groups(weight: torch.Tensor, bounds: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
    """The groups of some outputs (n, K) as (n, C, G): those of full size, then a shorter one."""
    sizes = np.diff(bounds)
    full = int((sizes == sizes[0]).sum())
    for run in (slice(0, full), slice(full, len(sizes))):
        if run.start < run.stop:
            inner = weight[:, int(bounds[run.start]) : int(bounds[run.stop])]
            yield run, inner.reshape(len(weight), run.stop - run.start, -1)


def _ranges(
    weight: torch.Tensor, parts: list[slice], bounds: np.ndarray
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Maxima and minima of all groups, zero between them."""
    for part in parts:
        for _, groups in _groups(weight[part].float(), bounds):
            yield _range(groups)


def _range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = torch.aminmax(groups, dim=-1)
    return high.clamp_min(0), low.clamp_max(0)


def _search(groups: torch.Tensor, grid: _Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale codes, mean codes (n, C) and codes (n, C, G) of least squared error, (n, C, G)."""
    high, low = _range(groups)
    shrink = torch.tensor(SHRINK)[:, None, None]
    width = (high - low) * shrink / grid.steps
    index = torch.bucketize(torch.log2(width.clamp_min(1e-38)), grid.edges) + 1
    index = torch.where(width > 0, index, torch.ones_like(index))
    scale = grid.scales[index].clamp_min(1e-38)
    mean = (high + low) * shrink / 2 / scale / grid.mean_step
    mean = mean.round_().clamp_(-127, 127)
    shift, inverse = grid.steps / 2 - mean * grid.mean_step, 1 / scale
    space = torch.empty_like(groups), torch.empty_like(groups)
    errors = torch.empty_like(scale)
    for i in range(len(SHRINK)):
        exact, rounded = _round(groups, shift[i], inverse[i], grid, space)
        torch.sum(rounded.sub_(exact).square_(), -1, out=errors[i])
    best = errors.mul_(scale.square()).argmin(0, keepdim=True)
    index, mean, shift, inverse = (t.gather(0, best)[0] for t in (index, mean, shift, inverse))
    _, codes = _round(groups, shift, inverse, grid, space)
    return index.to(torch.uint8), mean.to(torch.int8), codes.to(torch.uint8)


def _round(
    groups: torch.Tensor,
    shift: torch.Tensor,
    inverse: torch.Tensor,
    grid: _Grid,
    space: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups (n, C, G) in units of a code, exactly and rounded to codes; both lie in `space`."""
    exact, rounded = space
    torch.addcmul(shift[..., None], groups, inverse[..., None], out=exact)
    torch.round(exact, out=rounded).clamp_(0, grid.steps)
    return exact, rounded


@torch.no_grad()
def quantize_network_rtn(
    loaded: LoadedModel,
    target: Target,
    method: Method,
    stages: Stages,
    journal: Journal | None = None,
    copies: bool = False,
) -> Quantized:
    """Quantize every matrix of a network; ConversionError unless the depth is a whole number.

    copies: make a copy to sample from, which is no result: kept by no journal, and fast.
    """
    if target.bits is None or target.bits not in range(1, 9):
        raise ConversionError("--method rtn takes whole --bits from 1 to 8, of the codes alone")
    codebook = rtn_codebook()
    journal, depth = journal or Journal(), int(target.bits)

    def encode(matrix: Matrix) -> CompandedTensor:
        weight = loaded.originals[matrix.name].cpu()
        orientation, scratch = matrix.source_orientation, loaded.streamed.scratch
        if copies:
            weight = weight.T
        made = quantize_rtn(weight, depth, method.group_size, codebook, orientation, scratch)
        return turned(made) if copies else made

    with stages.stage("copy" if copies else "quantize") as done:
        ways = [partial(encode, matrix) for matrix in loaded.matrices]
        steps = journal.each([f"codes.1.{m.name}" for m in loaded.matrices], ways, done)
        tensors = {m.name: made for m, made in zip(loaded.matrices, steps, strict=True)}
    return Quantized(tensors, codebook)
