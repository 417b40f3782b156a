"""Where every byte of a `.cvxq` file went, and how its bit depths are spread.

Two rates are always told together: bits per weight of the companded matrices with all their side
information, and the whole file's bits per parameter of the source model.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cvxq_format import (
    MAX_DEPTH,
    CompandedTensor,
    FormatError,
    RawEntry,
    Reader,
    depth_histogram,
)
from cvxq_format.decoder_record import FILE_NAME as DECODER_FILE
from cvxq_format.decoder_record import DecoderRecord, parse_record
from cvxq_format.model_config import expert_pool, routed_share, text_part

from cvxq.cache_size import CacheSize, Reach, cache_size, reach_of

_MOST_LEVELS = 50  # of a document that is shown

# Kinds in the order in which they are shown; a file need not have all of them.
KINDS = {
    "preamble": "preamble",
    "header": "header (the index)",
    "codebook": "codebooks",
    "codes": "matrices: packed codes",
    "depths": "matrices: bit depths",
    "scales": "matrices: scales",
    "means": "matrices: means",
    "permutation": "matrices: cluster maps",
    "row_scales": "matrices: row scales",
    "raw": "raw tensors",
    "added_bias": "raw tensors: added biases",
    "file": "carried files",
    "padding": "padding",
}


@dataclass(frozen=True)
class MatrixSummary:
    """One companded tensor: its size and the spread of its bit depths.

    depth_histogram: weights at depth 0 to 8.
    """

    name: str
    shape: tuple[int, ...]
    payload_bytes: int
    depth_histogram: tuple[int, ...]
    group_size: int
    partitions: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def rate_bits_per_weight(self) -> float:
        """Bits per weight, side information included."""
        return 8 * self.payload_bytes / self.weights

    @property
    def mean_depth(self) -> float:
        """Mean bit depth over the weights, side information left out."""
        return sum(depth * count for depth, count in enumerate(self.depth_histogram)) / self.weights

    @property
    def depth_range(self) -> tuple[int, int]:
        """The smallest and the largest depth that occur."""
        present = [depth for depth, count in enumerate(self.depth_histogram) if count]
        return present[0], present[-1]

    @property
    def pruned_share(self) -> float:
        """Share of the weights at depth 0."""
        return self.depth_histogram[0] / self.weights


@dataclass(frozen=True)
class FileSummary:
    """A whole file: bytes by kind (they add up to `file_bytes`) and its matrices.

    carried_files: name → bytes that it takes in the file; original_sizes: name → its own bytes,
    more than these where it is stored deflated; cache: None where nothing tells its size.
    active_parameters: those that one token is computed with, fewer where experts are chosen.
    """

    file_bytes: int
    bytes_by_kind: dict[str, int]
    carried_files: dict[str, int]
    original_sizes: dict[str, int]
    matrices: tuple[MatrixSummary, ...]
    parameters: int
    active_parameters: int
    provenance: dict[str, Any] | None
    report: dict[str, Any] | None
    reach: Reach
    cache: CacheSize | None

    @property
    def weights(self) -> int:
        """Weights in companded matrices."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def pooled_matrices(self) -> tuple[MatrixSummary, ...]:
        """The matrices, those that do the same for a layer's experts as one (E, N, K)."""
        pools: dict[str, list[MatrixSummary]] = {}
        for matrix in self.matrices:
            pools.setdefault(expert_pool(matrix.name) or matrix.name, []).append(matrix)
        return tuple(_pooled(name, pool) for name, pool in pools.items())

    @property
    def rate_bits_per_weight(self) -> float | None:
        """Bits per companded weight with all that these matrices need; None without any.

        That is their payloads, the codebooks, and the biases that the source did not have.
        """
        needed = sum(matrix.payload_bytes for matrix in self.matrices)
        needed += self.bytes_by_kind.get("codebook", 0) + self.bytes_by_kind.get("added_bias", 0)
        return 8 * needed / self.weights if self.weights else None

    @property
    def file_bits_per_parameter(self) -> float | None:
        """All bytes of the file against all parameters that the source model had."""
        return 8 * self.file_bytes / self.parameters if self.parameters else None

    @property
    def depth_histogram(self) -> tuple[int, ...]:
        """Weights at depth 0 to 8 over all matrices."""
        counts = np.zeros(MAX_DEPTH + 1, np.int64)
        for matrix in self.matrices:
            counts += np.asarray(matrix.depth_histogram)
        return tuple(int(count) for count in counts)

    @property
    def path_text(self) -> str:
        """Which decoder runs the file, in words, and why not the fast one."""
        if DECODER_FILE in self.carried_files:
            unscaled = self.reach.unscaled
            limit = "" if unscaled is None else f", with a context of at most {unscaled} tokens"
            return f"runs by its own decoders, from its record{limit}"
        return f"runs through transformers: {reason_without_record(self.report)}"

    def record(self) -> dict[str, Any]:
        """Return the summary as JSON types."""
        return {
            "file_bytes": self.file_bytes,
            "bytes_by_kind": self.bytes_by_kind,
            "carried_files": self.carried_files,
            "carried_files_original": self.original_sizes,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "companded_weights": self.weights,
            "rate_bits_per_weight": self.rate_bits_per_weight,
            "file_bits_per_parameter": self.file_bits_per_parameter,
            "depth_histogram": list(self.depth_histogram),
            "context": self.reach.context,
            "key_value_cache": None if self.cache is None else asdict(self.cache),
            "matrices": [
                {
                    "name": matrix.name,
                    "shape": list(matrix.shape),
                    "payload_bytes": matrix.payload_bytes,
                    "rate_bits_per_weight": matrix.rate_bits_per_weight,
                    "mean_depth": matrix.mean_depth,
                    "depth_range": list(matrix.depth_range),
                    "pruned_share": matrix.pruned_share,
                    "depth_histogram": list(matrix.depth_histogram),
                    "group_size": matrix.group_size,
                    "partitions": matrix.partitions,
                }
                for matrix in self.matrices
            ],
            "provenance": self.provenance,
            "report": self.report,
        }


def reason_without_record(report: dict[str, Any] | None) -> str:
    """Return why a file with this `report.json` carries no record of its decoder."""
    told = (report or {}).get("decoder")
    reason = told.get("reason") if isinstance(told, dict) else None
    return str(reason or f"it has no {DECODER_FILE}")


def summarize(path: Path) -> FileSummary:
    """Account for every byte of `path`, checksums compared on the way.

    Raises FormatError for a file that cannot be trusted, OSError for one that cannot be read.
    """
    with Reader(path) as reader:
        config, record = json_file(reader, "config.json") or {}, _record(reader)
        counts: Counter[str] = Counter()
        matrices: list[MatrixSummary] = []
        parameters, inactive = 0, 0.0
        unused = 1 - routed_share(text_part(config))
        for kind, name, _, size, padding in reader.sections():
            counts["padding"] += padding
            if kind != "tensor":
                counts[kind] += size
                continue
            entry = reader.entry(name)
            if expert_pool(name):
                inactive += unused * math.prod(entry.shape)
            if isinstance(entry, RawEntry):
                is_added = name in reader.added_biases
                counts["added_bias" if is_added else "raw"] += size
                parameters += 0 if is_added else math.prod(entry.shape)
            else:
                tensor = reader.read(name)
                assert isinstance(tensor, CompandedTensor)
                for block in tensor.layout.blocks:
                    counts[block.kind] += block.size
                counts["codes"] += tensor.packed_codes.size
                matrices.append(_summarize_matrix(name, tensor))
                parameters += matrices[-1].weights
        return FileSummary(
            file_bytes=path.stat().st_size,
            bytes_by_kind={kind: counts[kind] for kind in KINDS if counts[kind]},
            carried_files={entry.name: entry.size for entry in reader.header.files},
            original_sizes={entry.name: entry.original_size for entry in reader.header.files},
            matrices=tuple(matrices),
            parameters=parameters,
            active_parameters=parameters - round(inactive),
            provenance=json_file(reader, "provenance.json"),
            report=json_file(reader, "report.json"),
            reach=reach_of(config, record),
            cache=cache_size(config, record),
        )


def _pooled(name: str, pool: list[MatrixSummary]) -> MatrixSummary:
    if len(pool) == 1:
        return pool[0]
    counts = np.sum([matrix.depth_histogram for matrix in pool], axis=0)
    return replace(
        pool[0],
        name=name,
        shape=(len(pool), *pool[0].shape),
        payload_bytes=sum(matrix.payload_bytes for matrix in pool),
        depth_histogram=tuple(int(count) for count in counts),
    )


def _record(reader: Reader) -> DecoderRecord | None:
    """Return the record of the decoder, None without one that this version knows."""
    try:
        return parse_record(reader.file(DECODER_FILE)) if DECODER_FILE in reader.files else None
    except FormatError:
        return None


def _summarize_matrix(name: str, tensor: CompandedTensor) -> MatrixSummary:
    histogram = depth_histogram(tensor.depths, tensor.cluster_rows())
    return MatrixSummary(
        name=name,
        shape=tensor.shape,
        payload_bytes=tensor.payload_size,
        depth_histogram=tuple(int(count) for count in histogram),
        group_size=tensor.group_size,
        partitions=tensor.partitions,
    )


def json_file(reader: Reader, name: str) -> dict[str, Any] | None:
    """Return a carried JSON object, or None when it is absent, not one or nested too deeply."""
    if name not in reader.files:
        return None
    try:
        value = json.loads(reader.file(name))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _nests_at_most(_MOST_LEVELS, value) else None


def _nests_at_most(levels: int, value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_nests_at_most(levels - 1, item) for item in inner)
