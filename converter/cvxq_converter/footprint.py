"""What a conversion takes in memory, in temporary files and in its result, by formulas."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cvxq_converter.measure.calibration import cache_bytes, copy_batch, sampling_batch
from cvxq_converter.measure.quality import HELD_BACK, LOGIT_LIMIT
from cvxq_converter.measure.sums import shards_of
from cvxq_converter.measure.teaching import KEPT
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.columns import SIDE_BY_SIDE, TOGETHER
from cvxq_converter.quantize.tuning import TOGETHER as LEARNT_TOGETHER
from cvxq_converter.shapes import Shape
from cvxq_converter.source.blocks import LOGITS
from cvxq_converter.source.checkpoint import Source
from cvxq_converter.source.scratch import Scratch
from cvxq_converter.write.proof import MOST_PLACES as PROOF_PLACES

_BASE_BYTES = 400 << 20  # interpreter, torch and transformers, loaded
_QUANTIZER_BYTES = 16  # per weight that is quantized together: copies in the order of the columns
_BATCH_BYTES = 24  # per weight of matrices that are quantized side by side: also their codes
_CODE_BYTES = 3  # per weight of the matrix at hand: codes, before and after they are packed
_FELT_BYTES = 5  # per weight that is tuned: the mean of its gradients, and its code
_GRADIENTS = 3  # of each at once, at most: summed up, one more, and what the heap keeps of others
_PLAN_BYTES = 1 / 32  # per quantized weight: what its row, column and cluster are worth
_MOMENT_BYTES = 0.25  # per quantized weight, of its group
_REPACKED = 1.15  # of the packed size, at most: what the decoder that is proved makes of it
COPY_BITS = 6  # of the copy that text is sampled from where the network does not fit
_SHARE_OF_DISK = 0.8  # of what is free, for temporary files


def proving_bytes(shape: Shape) -> int:
    """Bytes that proving a decoder's record takes, what lies in files excepted.

    A block and what is outside of the blocks in float32, the largest matrix while it is packed
    anew, and the logits.
    """
    logits = PROOF_PLACES * shape.vocabulary
    logits = 4 * (logits + 4 * min(LOGITS, logits))
    weights = 4 * (shape.outside_weights + shape.block_weights)
    return _BASE_BYTES + weights + 2 * shape.largest_weights + logits


def peak_memory(
    source: Source, shape: Shape, options: ConversionOptions, count: int, tokens: int
) -> int:
    """The most that one of the stages needs."""
    element = options.place.dtype.itemsize
    is_rtn = options.method.name == "rtn"
    plans = 0 if is_rtn else int(_PLAN_BYTES * shape.quantized_weights)
    alone = min(shape.largest_weights, TOGETHER) * _QUANTIZER_BYTES
    side_by_side = min(shape.quantized_weights, SIDE_BY_SIDE) * _BATCH_BYTES
    together = 0 if is_rtn else max(alone, side_by_side)
    quantizing = together + shape.largest_weights * _CODE_BYTES
    result = shape.quantized_weights // 16  # depths and scales of groups; codes are in a file
    stages = [result + plans + quantizing + (4 * shape.largest_inputs**2 if count else 0)]
    if count:
        stages.append(28 * shape.largest_inputs**2)  # of float64, on the way to a factor
        in_memory = (shape.outside_weights + shape.block_weights) * element
        logits = 4 * 4 * min(LOGITS, tokens * shape.vocabulary)
        activations = tokens * (18 * shape.hidden + 6 * shape.inner) * element
        sums = 48 * shape.vocabulary + 4 * shape.largest_weights // 8
        sums += 4 * count * tokens * shape.block_matrices  # what each token's outputs are felt
        stages.append(in_memory + activations + logits + sums)
        stages.append(in_memory + logits + result + plans + shape.largest_weights)
    if count and options.calibration.source == "self":
        stages.append(sampling_bytes(source, shape, options, count, tokens))
    if count and options.calibration.source == "copy":
        packed = 2 * COPY_BITS * shape.quantized_weights // 8  # and again as the decoder has it
        texts = min(count, copy_batch(source.config, tokens))
        cache = texts * (cache_bytes(source.config, tokens, 4) + 8 * shape.vocabulary)
        stages.append(packed + 10 * shape.largest_weights + cache)
    is_made = source.has_names_of_network or source.scales or source.mxfp4
    if is_made:  # read as a whole, then put into files
        stages.append(4 * shape.parameters)
    if options.method.tune:
        whole = shape.parameters * element + 12 * KEPT * count * tokens
        tokens = max(tokens, LEARNT_TOGETHER)
        activations = shape.layers * tokens * (12 * shape.hidden + 4 * shape.inner) * element
        moving = shape.quantized_weights * (_GRADIENTS * element + _FELT_BYTES)
        stages.append(
            whole + moving + result + activations + 4 * tokens * shape.vocabulary * element
        )
    return _BASE_BYTES + max(stages)


def disk_bytes(source: Source, shape: Shape, options: ConversionOptions) -> int:
    if options.target.size_bytes is not None:
        return options.target.size_bytes
    # Everything outside the matrices is stored in 16 bits; the header is small.
    rest = (shape.parameters - shape.quantized_weights) * 2
    carried = sum(len(data) for _, data in source.carried())
    return int(shape.quantized_weights * rate_of(shape, options) / 8) + rest + carried + (1 << 16)


def sampling_bytes(
    source: Source, shape: Shape, options: ConversionOptions, count: int, tokens: int
) -> int:
    """The whole network, and keys and values of the sequences that are sampled side by side."""
    element = options.place.dtype.itemsize
    batch = min(count, sampling_batch(source.config, tokens, element))
    cache = batch * cache_bytes(source.config, tokens, element)
    return shape.parameters * element + cache + 8 * batch * shape.vocabulary


@dataclass(frozen=True)
class ScratchPlan:
    """How measuring keeps to a disk. size: bytes of temporary files.

    rounds: in each, some of the shards are measured. room: bytes of Hessians that are there at
    once, if not all of them are; they are then gathered apart from measuring, twice.
    """

    size: int
    rounds: int = 1
    room: int | None = None


def plan_scratch(shape: Shape, options: ConversionOptions, count: int, tokens: int) -> ScratchPlan:
    """Divide the work so that temporary files fit the disk, as far as that can be done.

    What lies between blocks is there for the sequences of one round, the gradient before and after
    a block, and once more until a journal has it; logits that are kept or felt, and what each
    matrix feels of every token, are there for all. Factors take the place of the Hessians.
    """
    place = options.place
    logits = tokens * shape.vocabulary
    held_back = max(1, count // HELD_BACK)
    kept = min(held_back * logits, max(LOGIT_LIMIT, 2 * logits)) + logits if count else 0
    rate = rate_of(shape, options) / 8
    packed = int(shape.quantized_weights * ((1 + _REPACKED) * rate + _MOMENT_BYTES))
    if not count:
        return ScratchPlan(packed)
    fixed = packed + 4 * kept + 4 * count * tokens * shape.matrices
    state = tokens * shape.hidden * place.dtype.itemsize  # of one sequence
    each = (shape.layers + 5) * state
    shards = shards_of(count)
    largest = max(map(len, shards))
    free = place.disk or int(_SHARE_OF_DISK * free_disk(Scratch(place.scratch).folder))
    # Sums of the block at hand, and its totals.
    hessians = 4 * (shape.squared_inputs + 2 * shape.block_squared_inputs)
    if not options.method.feedback:
        hessians = 0

    def fitting(room: int) -> int:
        return min(len(shards), max(1, room // (each * largest)))

    if fixed + hessians + each * largest <= free or not hessians:
        at_once = fitting(free - fixed - hessians)
        size = fixed + hessians + min(count, at_once * largest) * each
        return ScratchPlan(size, -(-len(shards) // at_once))
    at_once = fitting(free - fixed)
    # Two states of all sequences, one more until the journal has it; sums, totals and factors.
    beside = 3 * count * state + 4 * (shape.pooled_squares + 2 * shape.largest_inputs**2)
    least, most = 4 * shape.largest_inputs**2, 4 * shape.block_squared_inputs
    room = min(most, max(least, (free - fixed - beside) // 2))
    size = fixed + max(min(count, at_once * largest) * each, beside + 2 * room)
    return ScratchPlan(size, -(-len(shards) // at_once), room)


def rate_of(shape: Shape, options: ConversionOptions) -> float:
    """Bits per weight, or an upper bound where a loss is asked for."""
    target = options.target
    if target.size_bytes is not None:
        return min(8.0, 8 * target.size_bytes / max(1, shape.quantized_weights))
    return 8.0 if target.bits is None else target.bits


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder lies."""
    return shutil.disk_usage(folder).free
