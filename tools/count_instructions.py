"""Count the instructions that the GPU kernels spend per weight; needs no GPU.

    python tools/count_instructions.py [--arch 90 …] [--rows 64 …] [--depth 3 …] [--json]

Every kernel is compiled for each architecture with the Triton that is installed, disassembled with
the `nvdisasm` of Triton's wheel, and the loop over packed words is found in the machine code. What
is printed per weight is what one lane issues: instructions of the loop divided by the weights that
a lane works on in one turn, and the matvec's prologue (scaling and rounding the inputs) divided by
the weights that share it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from cvxq_kernels.gpu.activations import TURN
from cvxq_kernels.gpu.expand import expand_kernel, rows_kernel
from cvxq_kernels.gpu.gemm import gemm_kernel, sort_kernel
from cvxq_kernels.gpu.layout import ALL_DEPTHS, LOW_DEPTHS
from cvxq_kernels.gpu.matvec import matvec_kernel
from cvxq_kernels.gpu.means import WIDTH, means_kernel
from cvxq_kernels.gpu.plan import UNROLLS, gemm_warps
from cvxq_kernels.gpu.repack import repack_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
KERNELS = ("matvec", "matvec16", "gemm")
TILE_BATCH = 16

# Types of the kernels' parameters: one name, one type, in all of them.
POINTERS = {
    "i32": "items words tiles runs chunks order level_words half_words row_of arrived slot_tiles "
    "places place_of_row first_tiles tile_of first_rows",
    "i64": "acts8 acts32 scale_words mean_words ids group_starts planes",
    "u8": "scale_codes codes",
    "i8": "mean_codes",
    "fp16": "halves x out bias",
    "fp32": "factors scales exact units means steps partial top largest mean_steps levels",
}
TYPES = {name: f"*{kind}" for kind, names in POINTERS.items() for name in names.split()}

ALU = ("LOP3", "SHF", "PRMT")
FMA = ("IDP", "IMAD", "FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2")
LOADS = ("LDG", "LDS", "LDSM", "LDC", "LDGSTS")


@dataclass(frozen=True)
class Count:
    """Instructions of one compiled kernel per weight; spills and shared_bytes are bytes."""

    kernel: str
    depth: int
    arch: int
    rows: int
    total: float
    alu: float
    fma: float
    loads: float
    other: float
    prologue: float
    prologue_alu: float
    registers: int
    spills: int
    shared_bytes: int


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants."""

    kernel: Any
    constants: dict[str, Any]
    warps: int = 1
    stages: int = 1


def matvec_variant(
    depths: int, rows: int, batch: int = 1, wide: bool = False, overlap: bool = False
) -> Variant:
    """The matvec for the depths whose bits are set.

    wide: with activations of 16 bits; overlap: launched before the kernel before ends.
    """
    constants = {
        "M": batch, "ROWS": rows, "DEPTHS": depths, "SPLIT": True, "HAS_MEANS": False,
        "HAS_BIAS": False, "UNROLL": UNROLLS[batch == 1], "WIDE": wide, "PTX": True,
        "OVERLAP": overlap,
    }  # fmt: skip
    return Variant(matvec_kernel, constants)


def gemm_variant(depths: int, rows: int, tile_batch: int = TILE_BATCH) -> Variant:
    """The GEMM for `tile_batch` rows of input and the depths whose bits are set."""
    constants = {
        "MT": tile_batch, "ROWS": rows, "DEPTHS": depths, "SPLIT": True,
        "HAS_MEANS": False, "HAS_BIAS": False, "SORTED": True, "PTX": True,
    }  # fmt: skip
    return Variant(gemm_kernel, constants, warps=gemm_warps(rows, tile_batch))


def full_variants(rows: int) -> dict[str, Variant]:
    """All kernels as a mixture of depths uses them: 1–4 where each depth is a loop of its own.

    But for the matvec of several rows, which takes long to compile: depth 4, the largest loop.
    """
    tile = {"ROWS": rows, "HAS_MEANS": True}
    return {
        "matvec": matvec_variant(LOW_DEPTHS, rows),
        "matvec of 4": matvec_variant(1 << 4, rows, 4),
        "gemm": gemm_variant(LOW_DEPTHS, rows),
        "gemm of 64": gemm_variant(LOW_DEPTHS, rows, 64),
        "repack": Variant(repack_kernel, {"ROWS": rows}, 4),
        "expand": Variant(expand_kernel, tile | {"DEPTHS": ALL_DEPTHS, "NATURAL": True}, 4),
        "rows": Variant(rows_kernel, tile | {"WIDTH": 16}, 4),
        "means": Variant(means_kernel, {"WIDTH": WIDTH}, 4),
        "sort": Variant(sort_kernel, {"SORTED": True, "BLOCK": 1024}, 4),
    }


def compile_for(variant: Variant, arch: int) -> Any:
    """Compile for compute capability `arch` (90 for 9.0), no device needed."""
    return compile_target(variant, GPUTarget("cuda", arch, 32))


def compile_target(variant: Variant, target: GPUTarget) -> Any:
    """Compile for any GPU that the installed Triton knows, no device needed."""
    names = variant.kernel.arg_names
    signature = {
        name: "constexpr" if name in variant.constants else TYPES.get(name, "i32") for name in names
    }
    hint = [["tt.divisibility", 16]]
    aligned = [n for n in names if signature[n].startswith("*") or n == "padded_batch"]
    source = ASTSource(
        variant.kernel, signature, variant.constants, {(names.index(n),): hint for n in aligned}
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    return triton.compile(source, target=target, options=options)


def run_tool(name: str, cubin: bytes, *flags: str) -> str:
    """Output of one of the binary tools in Triton's wheel for a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[list[str]]:
    """Bodies of the loops that no other contains, in order: from a label to a jump back to it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    spans: set[tuple[int, int]] = set()
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(re.sub(r"^@!?U?P[T\d]\s+", "", found[1]))
            jump = re.search(r"BRA.*`\((\.L_\w+)\)", found[1])
            if jump and labels.get(jump[1], len(code)) < len(code) - 1:
                spans.add((labels[jump[1]], len(code)))
    return [
        code[a:b]
        for a, b in sorted(spans)
        if not any(c <= a and b <= d and (a, b) != (c, d) for c, d in spans)
    ]


def opcodes(body: Sequence[str]) -> Counter[str]:
    """Instructions by name without suffixes."""
    return Counter(line.split()[0].split(".")[0] for line in body)


def share(count: Counter[str], names: Sequence[str]) -> int:
    """How many of the instructions have one of the names."""
    return sum(count[name] for name in names)


def weights_per_turn(kernel: str, depth: int, count: Counter[str]) -> float:
    """Weights that a lane works on in one turn of a loop, told from its multiplications."""
    if kernel == "gemm":
        return count["HMMA"] * 4 * 16 / TILE_BATCH  # 8 rows · 16 columns by 32 lanes
    if depth > 4:
        return count["FFMA"]
    products = {"matvec": (1, 2), "matvec16": (3, 5)}[kernel]  # of four weights
    return 4 * count["IDP"] / products[depth == 4]


def measure(kernel: str, depth: int, arch: int, rows: int) -> Count:
    """Compile one of KERNELS for one depth and count."""
    variant = (
        gemm_variant(1 << depth, rows)
        if kernel == "gemm"
        else matvec_variant(1 << depth, rows, wide=kernel == "matvec16", overlap=arch >= 90)
    )
    compiled = compile_for(variant, arch)
    cubin = compiled.asm["cubin"]
    sass = run_tool("nvdisasm", cubin, "-c")
    bodies = loops(sass)
    main = max(bodies, key=lambda body: weights_per_turn(kernel, depth, opcodes(body)))
    count = opcodes(main)
    weights = weights_per_turn(kernel, depth, count)
    prologue: Counter[str] = Counter()
    if kernel != "gemm":
        prologue = opcodes(next(body for body in bodies if opcodes(body)["STG"]))
    shared_by = TURN * rows
    known = (*ALU, *FMA, *LOADS)
    return Count(
        kernel=kernel,
        depth=depth,
        arch=arch,
        rows=rows,
        total=count.total() / weights,
        alu=share(count, ALU) / weights,
        fma=share(count, FMA) / weights,
        loads=share(count, LOADS) / weights,
        other=(count.total() - share(count, known)) / weights,
        prologue=prologue.total() / shared_by,
        prologue_alu=share(prologue, ALU) / shared_by,
        **resources(compiled),
    )


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes of its stack and of shared memory of a whole kernel.

    The kernels have no arrays of their own: what is on the stack was spilled.
    """
    usage = run_tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump tells no registers: {usage!r}")
    return {
        "registers": int(found[1]),
        "spills": int(found[2]) + int(found[3]),
        "shared_bytes": compiled.metadata.shared,
    }


def table(counts: Sequence[Count]) -> Iterator[str]:
    """Rows of a Markdown table."""
    yield (
        "| kernel | sm | bits | rows | all in | loop | prologue | ALU | FMA/IDP | loads | other "
        "| registers | spills | shared |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for c in counts:
        yield (
            f"| {c.kernel} | {c.arch} | {c.depth} | {c.rows} | **{c.total + c.prologue:.2f}** "
            f"| {c.total:.2f} | {c.prologue:.2f} | {c.alu + c.prologue_alu:.2f} | {c.fma:.2f} "
            f"| {c.loads:.2f} | {c.other:.2f} | {c.registers} | {c.spills} | {c.shared_bytes} |"
        )


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    result.add_argument("--rows", type=int, nargs="+", default=(64, 128), help="rows of a tile")
    result.add_argument("--depth", type=int, nargs="+", default=tuple(range(1, 9)))
    result.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    result.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    result.add_argument(
        "--compile-only", action="store_true", help="all kernels for all depths; registers, spills"
    )
    return result


def main() -> None:
    options = parser().parse_args()
    if options.compile_only:
        found: list[dict[str, Any]] = []
        for arch in options.arch:
            for name, variant in full_variants(options.rows[0]).items():
                used = resources(compile_for(variant, arch))
                found.append({"kernel": name, "arch": arch} | used)
        print(json.dumps(found) if options.json else "\n".join(map(str, found)))
        return
    counts = [
        measure(kernel, depth, arch, rows)
        for kernel in options.kernel
        for arch in options.arch
        for rows in options.rows
        for depth in options.depth
    ]
    if options.json:
        print(json.dumps([asdict(count) for count in counts]))
    else:
        print(f"Triton {triton.__version__}", *table(counts), sep="\n")


if __name__ == "__main__":
    main()
