"""Every instruction set against products in float64, over shapes that no kernel likes."""

import mmap
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvxq_format import Codebook, CompandedTensor, dequantize
from cvxq_format.codebook import logarithmic_scales
from cvxq_kernels import cpu
from cvxq_kernels.cpu.matrix import matmul_many

CODEBOOK = Codebook.default()
Maker = Callable[..., CompandedTensor]

SHAPES: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((1, 1), {}),
    ((12, 5), {}),
    ((64, 200), {"group_size": 64}),
    ((130, 37), {"group_size": 64, "partitions": 1}),  # the last cluster has 2 rows
    ((200, 129), {"group_size": 100, "partitions": 2}),  # tiles of 4, 2 and 1 strips
    ((48, 300), {"group_size": 48, "partitions": 1}),
    ((600, 70), {"group_size": 600, "partitions": 1}),  # one cluster, three items of work
    ((128, 64), {"group_size": 64, "means": False}),
    ((128, 64), {"group_size": 64, "permuted": False}),
    ((96, 50), {"group_size": 1}),
    ((64, 80), {"transposed": True}),
    ((300, 33), {"transposed": True, "group_size": 64}),
]


def inputs(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(m).standard_normal((m, k)).astype(np.float32)


def separable(tensor: CompandedTensor) -> CompandedTensor:
    """The tensor with one depth per column and column terms that say so."""
    rng = np.random.default_rng(5)
    columns = rng.integers(0, 9, tensor.columns, dtype=np.uint8)
    depths = np.broadcast_to(columns, tensor.depths.shape).copy()
    height = np.asarray(tensor.cluster_rows())
    size = int((depths.sum(axis=(0, 2), dtype=np.int64) * ((height + 7) // 8)).sum())
    codes = np.zeros(size, np.uint8)
    if not np.any(height % 8):
        codes = rng.integers(0, 256, size, dtype=np.uint8)
    terms = columns[None].copy()
    cluster_terms = np.zeros((1, tensor.clusters), np.int16)
    return replace(
        tensor,
        depths=depths,
        packed_codes=codes,
        column_terms=terms,
        cluster_terms=cluster_terms,
        column_bits=4,
    )


def poisoned(m: int, n: int) -> np.ndarray:
    return np.full((m, n), np.nan, np.float32)


def check(
    isa: str, tensor: CompandedTensor, x: np.ndarray, reference: Any, book: Codebook = CODEBOOK
) -> None:
    bias = np.linspace(-1, 1, tensor.shape[0]).astype(np.float32)
    truth = reference(tensor, book)
    weight = cpu.Matrix.from_tensor(tensor, book, bias=bias)
    expected = truth.product(x, bias)
    for exact, bound in ((True, truth.exact_bound(x, bias)), (False, truth.fast_bound(x, bias))):
        out = poisoned(len(x), tensor.shape[0])
        matmul_many([weight], x, exact=exact, out=[out])
        worst = np.abs(out - expected) - bound
        assert worst.max() <= 0, f"{isa}, exact={exact}: off by {worst.max():.3g} too much"


@pytest.mark.parametrize(("shape", "changes"), SHAPES)
def test_products(
    isa: str,
    shape: tuple[int, int],
    changes: dict[str, Any],
    random_companded: Maker,
    reference: Any,
) -> None:
    tensor = random_companded(shape, seed=3, **changes)
    for m in (1, 3, 40):
        check(isa, tensor, inputs(m, shape[1]), reference)


@pytest.mark.parametrize("m", range(1, 41))
def test_batches(isa: str, m: int, random_companded: Maker, reference: Any) -> None:
    tensor = random_companded((80, 90), seed=m, group_size=32, partitions=1)
    check(isa, tensor, inputs(m, 90), reference)
    check(isa, separable(tensor), inputs(m, 90), reference)


@pytest.mark.parametrize("depth", range(9))
@pytest.mark.parametrize("rows", [16, 32, 64])  # tiles of one, two and four strips
def test_single_depth(
    isa: str, depth: int, rows: int, random_companded: Maker, reference: Any
) -> None:
    """Every depth alone, all-pruned clusters included, with more columns than two blocks."""
    tensor = random_companded((rows, 141), seed=1, group_size=rows, partitions=1, means=depth == 4)
    rng = np.random.default_rng(depth)
    tensor = replace(
        tensor,
        depths=np.full_like(tensor.depths, depth),
        packed_codes=rng.integers(0, 256, 141 * depth * rows // 8, dtype=np.uint8),
    )
    check(isa, tensor, inputs(2, 141), reference)


def test_shared_order(isa: str, random_companded: Maker, reference: Any) -> None:
    """Separable depths: one order of columns serves all clusters."""
    tensor = separable(random_companded((256, 777), seed=2, group_size=64))
    check(isa, tensor, inputs(5, 777), reference)


@pytest.mark.parametrize("m", [5, 17, 70, 300])  # of which 256 are in work at a time
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((256, 777), {"group_size": 64}),
        ((200, 129), {"group_size": 100, "partitions": 2, "means": False}),  # 4, 2 and 1 strips
        ((80, 1100), {"group_size": 16, "partitions": 1}),
        ((64, 31), {"group_size": 32, "partitions": 1}),
    ],
)
def test_many_inputs(
    isa: str,
    m: int,
    shape: tuple[int, int],
    changes: dict[str, Any],
    random_companded: Maker,
    reference: Any,
) -> None:
    """More inputs than are rounded for every cluster, and runs that begin anywhere."""
    check(
        isa, separable(random_companded(shape, seed=m, **changes)), inputs(m, shape[1]), reference
    )


def test_many_inputs_are_exact_without_a_matrix_unit(
    random_companded: Maker, reference: Any
) -> None:
    """AVX2 expands weights to float32 for them, so that nothing else is rounded."""
    if not cpu.force_isa("avx2"):
        pytest.skip("this processor has no avx2")
    try:
        tensor = separable(random_companded((200, 300), seed=7, group_size=50))
        bias = np.zeros(200, np.float32)
        truth = reference(tensor, CODEBOOK)
        weight = cpu.Matrix.from_tensor(tensor, CODEBOOK)
        x = inputs(100, 300)
        products = weight.matmul(x)
        assert (np.abs(products - truth.product(x, bias)) <= truth.exact_bound(x, bias)).all()
        np.testing.assert_array_equal(products[:7], weight.matmul(x[:7]))
        for m in (1, 100):
            np.testing.assert_array_equal(products[:m], weight.matmul(x[:m], exact=True))
    finally:
        cpu.force_isa("")


def test_row_scales(isa: str, random_companded: Maker, reference: Any) -> None:
    """A factor for each output, in products and in rows."""
    tensor = separable(random_companded((128, 70), seed=6, group_size=64))
    codes = np.random.default_rng(6).integers(0, 16, (1, 128), dtype=np.uint8)
    tensor = replace(tensor, row_scale_codes=codes, row_scale_bits=4)
    for m in (1, 40):
        check(isa, tensor, inputs(m, 70), reference)
    rows = cpu.Matrix.from_tensor(tensor, CODEBOOK).rows(range(128))
    assert np.array_equal(rows, dequantize(tensor, CODEBOOK))


@pytest.mark.parametrize("depth", range(9))
def test_many_inputs_of_one_depth(
    isa: str, depth: int, random_companded: Maker, reference: Any
) -> None:
    """Two runs: the pruned columns in front are an odd number."""
    tensor = random_companded((64, 341), seed=1, group_size=64, means=False)
    depths = np.full_like(tensor.depths, depth)
    depths[..., :35] = 0
    tensor = replace(
        tensor,
        depths=depths,
        packed_codes=np.random.default_rng(depth).integers(0, 256, 306 * depth * 8, dtype=np.uint8),
    )
    check(isa, tensor, inputs(40, 341), reference)


@pytest.mark.parametrize("exponent", [-120, -60, 60, 110])
def test_extreme_scales(isa: str, exponent: int, random_companded: Maker, reference: Any) -> None:
    tensor = random_companded((64, 100), seed=4, group_size=64)
    tensor = replace(tensor, scale_unit=np.float32(2.0**exponent))
    check(isa, tensor, inputs(1, 100) * np.float32(2.0**4), reference)


def test_one_huge_input(isa: str, random_companded: Maker, reference: Any) -> None:
    tensor = random_companded((64, 300), seed=4, group_size=64)
    x = inputs(1, 300)
    x[0, 7] = 3000
    check(isa, tensor, x, reference)


@pytest.mark.parametrize(
    "table",
    [
        *(logarithmic_scales(bits) for bits in (1, 3, 8)),
        logarithmic_scales(6, steps_per_octave=5),
        logarithmic_scales(6) + np.float32(0.01),
    ],
    ids=["2", "8", "256", "five an octave", "none is zero"],
)
def test_scales_of_any_table(
    isa: str, table: np.ndarray, random_companded: Maker, reference: Any
) -> None:
    """Scales that double every eight codes, as usual, and others."""
    tensor = random_companded((64, 300), seed=4, group_size=64)
    codes = np.random.default_rng(1).integers(0, table.size, tensor.scale_codes.shape)
    tensor = replace(tensor, scale_codes=codes.astype(np.uint8))
    check(isa, tensor, inputs(1, 300), reference, replace(CODEBOOK, scale_table=table))


@pytest.mark.parametrize("depth", range(1, 9))
def test_largest_inputs(isa: str, depth: int, random_companded: Maker) -> None:
    """Sums of magnitudes may be beyond float32 where every input and every result is within."""
    levels = tuple(level * np.float32(1e-4) for level in CODEBOOK.levels)
    book = replace(CODEBOOK, levels=levels, scale_table=np.float32([0, 1]))
    tensor = random_companded((64, 128), seed=4, group_size=64, means=False, row_scaled=False)
    depths = np.full_like(tensor.depths, depth)
    tensor = replace(
        tensor,
        scale_unit=np.float32(1),
        depths=depths,
        scale_codes=np.ones_like(tensor.scale_codes),
        packed_codes=np.full(64 * 128 * depth // 8, 0xFF, np.uint8),
    )
    x = np.full((1, 128), 3e38, np.float32)
    got = cpu.Matrix.from_tensor(tensor, book).matmul(x)
    truth = x.astype(np.float64) @ dequantize(tensor, book).T.astype(np.float64)
    np.testing.assert_allclose(got, truth, rtol=0.02)


def test_all_pruned(isa: str, random_companded: Maker, reference: Any) -> None:
    tensor = random_companded((40, 60), seed=4, means=False)
    tensor = replace(
        tensor, depths=np.zeros_like(tensor.depths), packed_codes=np.zeros(0, np.uint8)
    )
    check(isa, tensor, inputs(2, 60), reference)


def test_nan_and_infinity_show(isa: str, random_companded: Maker) -> None:
    """An input that is no number must not turn into one, in any depth."""
    weight = cpu.Matrix.from_tensor(random_companded((64, 90), seed=1), CODEBOOK)
    for bad in (np.nan, np.inf, -np.inf):
        x = inputs(1, 90)
        x[0] = bad
        assert np.isnan(weight.matmul(x)).all()


@pytest.mark.parametrize("changes", [{}, {"transposed": True}, {"means": False, "group_size": 48}])
def test_rows_equal_the_file(changes: dict[str, Any], random_companded: Maker) -> None:
    tensor = random_companded((96, 75), seed=6, **changes)
    weight = cpu.Matrix.from_tensor(tensor, CODEBOOK, bias=np.ones(96))
    ids = np.array([95, 0, 31, 31])
    np.testing.assert_array_equal(weight.rows(ids), dequantize(tensor, CODEBOOK)[ids])
    with pytest.raises(IndexError, match=r"row ids span -1\.\.3, allowed 0\.\.95"):
        weight.rows([3, -1])


def test_products_share_an_input(isa: str, random_companded: Maker) -> None:
    """Fused products equal single ones, whatever order their columns have."""
    tensors = [random_companded((n, 70), seed=n, group_size=16) for n in (64, 32, 50)]
    tensors.append(separable(random_companded((64, 70), seed=9, group_size=64)))
    weights = [cpu.Matrix.from_tensor(tensor, CODEBOOK) for tensor in tensors]
    weights.append(cpu.Matrix.from_dense(inputs(20, 70)))
    x = inputs(3, 70)
    for weight, together in zip(weights, matmul_many(weights, x), strict=True):
        np.testing.assert_array_equal(together, weight.matmul(x))


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
@pytest.mark.parametrize("k", [1, 63, 200])
def test_dense(isa: str, dtype: str, k: int) -> None:
    values = np.random.default_rng(k).standard_normal((70, k)).astype(np.float32)
    if dtype == "uint16":
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = values.astype(dtype)
        values = stored.astype(np.float32)
    bias = np.arange(70, dtype=np.float32)
    weight = cpu.Matrix.from_dense(stored, bias=bias)
    np.testing.assert_array_equal(weight.rows([5, 69]), values[[5, 69]])
    for m in (1, 7):
        x = inputs(m, k)
        size = np.abs(x).astype(np.float64) @ np.abs(values.astype(np.float64)).T + bias
        expected = x.astype(np.float64) @ values.astype(np.float64).T + bias
        assert (np.abs(weight.matmul(x) - expected) <= (k + 3) * 2.0**-24 * size).all()


def test_small_half_precision_numbers() -> None:
    """Subnormal, zero, largest and infinite float16 values widen exactly."""
    bits = np.array([[0, 1, 0x03FF, 0x0400, 0x7BFF, 0x7C00, 0x8001, 0xFBFF]], np.uint16)
    weight = cpu.Matrix.from_dense(bits.view(np.float16))
    np.testing.assert_array_equal(weight.rows([0]), bits.view(np.float16).astype(np.float32))


@pytest.mark.parametrize(("m", "is_separable"), [(7, False), (7, True), (150, True)])
def test_number_of_threads_changes_nothing(
    m: int, is_separable: bool, random_companded: Maker
) -> None:
    tensor = random_companded((600, 130), seed=8, group_size=64, partitions=1)
    tensor = separable(tensor) if is_separable else tensor
    x = inputs(m, 130)
    results = []
    for threads in (1, 2, 5):
        pool = cpu.Pool(threads)
        weight = cpu.Matrix.from_tensor(tensor, CODEBOOK, pool=pool)
        results += [weight.matmul(x) for _ in range(3)]
        del weight
        pool.close()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_refusals(random_companded: Maker) -> None:
    with pytest.raises(ValueError, match="stacked weight"):
        cpu.Matrix.from_tensor(random_companded((2, 24, 5), seed=1), CODEBOOK)
    tensor = random_companded((24, 5), seed=1)
    with pytest.raises(ValueError, match=r"a bias \(5,\), allowed \(24,\)"):
        cpu.Matrix.from_tensor(tensor, CODEBOOK, bias=np.zeros(5))
    with pytest.raises(ValueError, match=r"allowed \(M, 5\)"):
        cpu.Matrix.from_tensor(tensor, CODEBOOK).matmul(np.zeros((2, 6)))
    with pytest.raises(ValueError, match="of float64"):
        cpu.Matrix.from_dense(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="a pool of 0 threads"):
        cpu.Pool(0)


def resident_kilobytes(path: Path) -> int:
    """What of a mapped file is in this process's memory."""
    found = re.search(
        rf"{path}\n(?:\w+:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text()
    )
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_pages_of_a_mapping_are_released(random_companded: Maker, tmp_path: Path) -> None:
    """Read-only mappings lose their pages and keep their contents; other memory is untouched."""
    tensor = separable(random_companded((256, 700), seed=4, group_size=64))
    codes, path = tensor.packed_codes, tmp_path / "codes"
    path.write_bytes(bytes(5000) + codes.tobytes() + bytes(5000))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = np.frombuffer(memoryview(mapped)[5000 : 5000 + codes.size], np.uint8)
    np.testing.assert_array_equal(view, codes)
    before = resident_kilobytes(path)
    weight = cpu.Matrix.from_tensor(replace(tensor, packed_codes=view), CODEBOOK)
    assert resident_kilobytes(path) <= before - codes.size // 1024
    np.testing.assert_array_equal(view, codes)
    ours = codes.copy()
    again = cpu.Matrix.from_tensor(replace(tensor, packed_codes=ours), CODEBOOK)
    np.testing.assert_array_equal(ours, codes)
    np.testing.assert_array_equal(weight.rows(range(256)), again.rows(range(256)))


def test_many_at_once_are_those_made_one_by_one(random_companded: Maker) -> None:
    pool = cpu.Pool(3)
    sizes = [(200, 70), (64, 300), (17, 5), (130, 64)]
    tensors = [random_companded(size, seed=i, group_size=24) for i, size in enumerate(sizes)]
    biases = [np.arange(size[0], dtype=np.float32) for size in sizes]
    sources = [(t, CODEBOOK, b, -1) for t, b in zip(tensors, biases, strict=True)]
    for source, weight in zip(sources, cpu.Matrix.from_tensors(sources, pool), strict=True):
        alone = cpu.Matrix.from_tensor(*source[:3])
        x = inputs(3, source[0].shape[1])
        np.testing.assert_array_equal(weight.matmul(x), alone.matmul(x))
    assert cpu.Matrix.from_tensors([], pool) == []


def test_one_of_many_that_cannot_be(random_companded: Maker) -> None:
    """Codes that are too few are found when they are repacked, beside others."""
    good = random_companded((64, 30), seed=1, group_size=16)
    bad = replace(good, packed_codes=good.packed_codes[:-1])
    sources = [(tensor, CODEBOOK, None, -1) for tensor in (good, bad, good)]
    with pytest.raises(MemoryError, match="sizes contradict"):
        cpu.Matrix.from_tensors(sources, cpu.Pool(2))
