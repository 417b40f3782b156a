"""Each PTX snippet against its plain twin: an emulator of the instructions on one side, Triton's
interpreter (or a GPU, where there is one) on the other."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cvxq_kernels.gpu.launch import uses_ptx
from cvxq_kernels.gpu.snippets import DOT4_ASM, PERMUTE_ASM, dot4, permute

SELECTORS = np.arange(1 << 16, dtype=np.int32)  # all that prmt looks at


def emulate_prmt(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """prmt.b32 d, a, b, c in its default mode, as the PTX ISA has it."""
    source = np.stack([a, b]).view(np.uint8).reshape(2, -1, 4)
    source = np.concatenate([source[0], source[1]], axis=1)  # bytes 0–7 of {b, a}
    result = np.zeros((len(a), 4), np.uint8)
    for i in range(4):
        control = (c.view(np.uint32) >> np.uint32(4 * i)) & 15
        byte = source[np.arange(len(a)), control & 7]
        sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint8)
        result[:, i] = np.where(control & 8, sign, byte)
    return result.view(np.int32)[:, 0]


def emulate_dp4a(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """dp4a.s32.s32 d, a, b, c, which wraps around at 32 bits."""
    left, right = (v.view(np.int8).reshape(-1, 4).astype(np.int64) for v in (a, b))
    return (c + (left * right).sum(1)).astype(np.int32)


EMULATORS = {"prmt.b32": emulate_prmt, "dp4a.s32.s32": emulate_dp4a}


def emulate(asm: str, *operands: np.ndarray) -> np.ndarray:
    """Run one line of inline PTX of the form `name $0, $1, $2, $3;` on arrays of int32."""
    found = re.fullmatch(r"(\S+) \$0, \$1, \$2, \$3;", asm)
    assert found, f"the emulator does not know {asm!r}"
    return EMULATORS[found[1]](*operands)


@triton.jit
def permute_kernel(a, b, c, out, SIZE: tl.constexpr, PTX: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, permute(tl.load(a + at), tl.load(b + at), tl.load(c + at), PTX))


@triton.jit
def dot4_kernel(a, b, c, out, SIZE: tl.constexpr, PTX: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, dot4(tl.load(a + at), tl.load(b + at), tl.load(c + at), PTX))


def run(kernel: object, operands: tuple[np.ndarray, ...], ptx: bool, device: torch.device):
    tensors = [torch.from_numpy(v).to(device) for v in operands]
    out = torch.full_like(tensors[0], -1)
    size = 1 << 14
    kernel[(len(out) // size,)](*tensors, out, SIZE=size, PTX=ptx)  # type: ignore[index]
    return out.cpu().numpy()


def words(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, len(SELECTORS)).astype(np.int32)


@pytest.mark.parametrize("upper", [0, -0x54320000])
def test_permute_for_all_selectors(upper: int, device: torch.device) -> None:
    operands = (words(1), words(2), (SELECTORS + upper).astype(np.int32))
    expected = emulate(PERMUTE_ASM, *operands)
    assert np.array_equal(run(permute_kernel, operands, False, device), expected)


def test_permute_of_extreme_bytes(device: torch.device) -> None:
    choice = np.random.default_rng(3).choice([0, 0x7F, 0x80, 0xFF], (2, len(SELECTORS), 4))
    low, high = choice.astype(np.uint8).view(np.int32)[..., 0]
    expected = emulate(PERMUTE_ASM, low, high, SELECTORS)
    assert np.array_equal(run(permute_kernel, (low, high, SELECTORS), False, device), expected)


def test_dot4(device: torch.device) -> None:
    a, b, c = words(4), words(5), words(6)
    a[:4], b[:4] = [-0x7F7F7F80, 0x7F7F7F7F, -1, 0], [-0x7F7F7F80, -0x7F7F7F80, -1, -1]
    expected = emulate(DOT4_ASM, a, b, c)
    assert np.array_equal(run(dot4_kernel, (a, b, c), False, device), expected)


@pytest.mark.gpu
def test_snippets_on_the_device(device: torch.device) -> None:
    if not uses_ptx(device):
        pytest.skip("needs an NVIDIA GPU: PTX runs nowhere else")
    operands = (words(7), words(8), SELECTORS)
    assert np.array_equal(
        run(permute_kernel, operands, True, device), emulate(PERMUTE_ASM, *operands)
    )
    operands = (words(9), words(10), words(11))
    assert np.array_equal(run(dot4_kernel, operands, True, device), emulate(DOT4_ASM, *operands))
