"""Open a lean decoder in torch: on a CUDA device with its matrices packed.

Memory of the device at its peak: packed weights, keys and values, and a tenth of both, plus
WORKING_BYTES for activations, the kernels' scratch and what repacking one matrix takes (a test on
a device holds it to that).  The CUDA context itself, which no tensor shares, comes on top.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from cvxq_format.decoder_record import DecoderRecord
from cvxq_format.model_config import text_part
from cvxq_kernels import PackedWeight

from cvxq import cuda
from cvxq.lean.cuda.batch import PLACES_STEP
from cvxq.lean.cuda.decoder import TorchDecoder
from cvxq.lean.cuda.network import KeyValueCache, TorchNetwork
from cvxq.lean.cuda.weights import Weight, load_weights
from cvxq.lean.products import Tensors

WORKING_BYTES = 1 << 29

logger = logging.getLogger("cvxq")


def open_torch_decoder(
    record: DecoderRecord,
    tensors: Tensors,
    device: str,
    config: Mapping[str, Any],
    keep_packed: bool = True,
) -> TorchDecoder:
    """Load the tensors that `record` names to `device` and make a decoder of them.

    config: the file's config.json, for the type to compute in; keep_packed: False expands all
    matrices, as happens anyway where the kernels cannot run.
    """
    target = cuda.resolve(device)
    if target.type != "cuda":
        weights = load_weights(record, tensors, target, torch.float32)
        return TorchDecoder(TorchNetwork(record, weights, target, torch.float32))
    cuda.use(target)
    dtype = compute_dtype(config)

    def pack(weights: Sequence[PackedWeight]) -> Weight:
        from cvxq_kernels.gpu import GpuWeight

        return GpuWeight.fused(weights, target)

    packs = keep_packed and cuda.runs_kernels(target)
    weights = load_weights(record, tensors, target, dtype, pack if packs else None)
    network = TorchNetwork(record, weights, target, dtype)
    if packs:
        tune_alike(weights.multiplied(), dtype, lambda: one_step(network))
    return TorchDecoder(network)


def one_step(network: TorchNetwork) -> None:
    """Compute a token, for the kernels that are launched."""
    cache = KeyValueCache(network.record, PLACES_STEP, network.device, network.dtype)
    first = torch.zeros(1, dtype=torch.int64, device=network.device)
    with torch.inference_mode():
        network.forward(first, first, cache, 1 if network.waits else None)


def tune_alike(weights: Iterable[Weight], dtype: torch.dtype, step: Callable[[], None]) -> None:
    """Choose how packed weights are multiplied by one row, measured once for each shape.

    The first time on a device compiles the kernels, those of `step` included, in several processes,
    and says so; later ones recall what was found.
    """
    from cvxq_kernels.gpu import GpuWeight
    from cvxq_kernels.gpu.compiling import compile_all, processes_for, recording
    from cvxq_kernels.gpu.tuning import is_known, launch_all, tune

    groups: dict[tuple[object, ...], list[GpuWeight]] = {}
    for weight in weights:
        if isinstance(weight, GpuWeight):
            alike = (weight.shape, weight.matrix.rows, weight.matrix.depths)
            groups.setdefault(alike, []).append(weight)
    new = [group for group in groups.values() if not is_known(group[0], (1,), dtype)]
    if new:
        with recording() as sources:
            for group in new:
                launch_all(group[0], 1, dtype)
            step()
        processes = processes_for(sources)
        logger.warning(
            "Compiling %d kernels in %d processes, and measuring how to launch those of %d shapes "
            "of matrices: once for this GPU, up to a minute",
            *(len(sources), processes, len(new)),
        )
        compile_all(sources, processes)
    for first, *others in groups.values():
        tune(first, (1,), dtype)
        for weight in others:
            weight.plans.update(first.plans)


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return float16 where the model was stored so, else bfloat16, which has float32's range."""
    for part in (config, text_part(config)):
        stored = part.get("dtype") or part.get("torch_dtype")
        if stored:
            return torch.float16 if stored in ("float16", "half") else torch.bfloat16
    return torch.bfloat16
