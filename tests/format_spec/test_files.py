"""Writing and reading whole files: atomic, lazy, deterministic, beyond 4 GiB."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from cvxq_format import (
    Codebook,
    CompandedTensor,
    CorruptError,
    Geometry,
    Layout,
    NotCvxqError,
    RawTensor,
    Reader,
    UnsupportedError,
    WriteError,
    Writer,
    bfloat16_bits,
    dequantize,
    dequantize_rows,
    logarithmic_scales,
    pack_codes,
    unpack_codes,
    verify,
)
from cvxq_format.companded import encode
from cvxq_format.files import planned_entry
from cvxq_format.raw import decode

BOOK = Codebook.default()


def plain_tensor(shape: tuple[int, int] = (16, 8), depth: int = 3) -> CompandedTensor:
    depths = np.full((1, -(-shape[0] // 8), shape[1]), depth, np.uint8)
    return CompandedTensor(
        shape=shape,
        group_size=8,
        partitions=1,
        scale_unit=np.float32(1),
        depths=depths,
        scale_codes=np.full_like(depths, 63),
        packed_codes=pack_codes(np.zeros((1, *shape), np.uint8), depths, 8, 1),
    )


ROWS = np.arange(16)[None]
CODES = np.full((1, 16), 8, np.uint8)


def interrupt_after(writer: Writer) -> None:
    writer.add_companded("w", plain_tensor())
    raise KeyboardInterrupt


def test_failure_leaves_target_and_folder_untouched(tmp_path: Path) -> None:
    path = tmp_path / "model.cvxq"
    path.write_bytes(b"precious")
    writer = Writer(path, [BOOK])
    with pytest.raises(KeyboardInterrupt), writer:
        interrupt_after(writer)
    assert [p.name for p in tmp_path.iterdir()] == ["model.cvxq"]
    assert path.read_bytes() == b"precious"
    with Writer(path) as writer:
        writer.add_raw("same", np.zeros(1))
        with pytest.raises(WriteError, match="'same' was added before"):
            writer.add_raw("same", np.zeros(1))
        writer.abort()
    assert path.read_bytes() == b"precious"
    with Writer(path):
        pass
    assert verify(path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["model.cvxq"]


def test_target_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "model.cvxq"
    writer = Writer(path, [BOOK])
    writer.add_raw("w", np.zeros(1000))
    assert not path.exists()
    writer.close()
    writer.close()  # closing twice is harmless
    assert verify(path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": 1}, "codebook 1, the file has 1"),
        ({"scale_bits": 8}, "8 scale bits, its codebook has 6"),
        ({"scale_unit": np.float32(np.inf)}, "scale unit inf"),
        ({"mean_step": np.float32(1)}, "mean step 1.0 without means"),
        ({"group_size": 4}, "depths is uint8"),
        ({"partitions": 3}, "3 partitions do not divide 16"),
        ({"column_bits": 2}, "explicit depths have column_bits 0"),
        ({"packed_codes": np.zeros(5, np.uint8)}, "5 bytes of codes, 48 expected"),
        ({"permutation": np.zeros((1, 16), np.int64)}, "permutation leaves out row 1"),
        ({"permutation": np.full((1, 16), 99)}, "permutation crosses a partition"),
        ({"scale_codes": np.full((1, 2, 8), 64, np.uint8)}, "do not fit 6 bits"),
        ({"depths": np.full((1, 2, 8), 9, np.uint8)}, "bit depth 9"),
        ({"source_orientation": "sideways"}, "source_orientation"),
        ({"cluster_terms": np.zeros((1, 2), np.int16)}, "go together"),
        ({"cluster_map": True}, "a cluster map without a permutation"),
        ({"cluster_map": True, "permutation": ROWS[:, ::-1]}, "rows of cluster 0 do not ascend"),
        ({"row_scale_bits": 3}, "row_scale_bits 3 without row scales"),
        ({"row_scale_codes": CODES}, "row_scale_bits 0, allowed 1 to 8"),
        ({"row_scale_codes": CODES, "row_scale_bits": 9}, "row_scale_bits 9, allowed 1 to 8"),
        ({"row_scale_codes": CODES, "row_scale_bits": 3}, "up to 8 do not fit 3 bits"),
        ({"row_scale_codes": CODES[:, 1:], "row_scale_bits": 4}, "expected .* \\(1, 16\\)"),
    ],
)
def test_writer_refuses(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "bad.cvxq"
    with pytest.raises(WriteError, match=message), Writer(path, [BOOK]) as writer:
        writer.add_companded("w", replace(plain_tensor(), **change))
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_depths_that_terms_do_not_give(tmp_path: Path) -> None:
    terms = {"column_terms": np.zeros((1, 8), np.uint8), "cluster_terms": np.zeros((1, 2), "i2")}
    tensor = replace(plain_tensor(), column_bits=1, **terms)
    with (
        pytest.raises(WriteError, match="depths differ from what their terms say"),
        Writer(tmp_path / "bad.cvxq", [BOOK]) as writer,
    ):
        writer.add_companded("w", tensor)


def test_row_scales_of_a_transposed_matrix_are_refused() -> None:
    tensor = replace(plain_tensor(), row_scale_codes=CODES, row_scale_bits=4, transposed=True)
    tensor = replace(tensor, shape=(8, 16))
    with pytest.raises(WriteError, match="row scales of a transposed matrix"):
        encode(tensor)


def test_cluster_map_of_one_cluster_is_left_out(tmp_path: Path) -> None:
    """Then it would say nothing, so that the file is the same as without a permutation."""
    plain = replace(plain_tensor((8, 8)), cluster_map=False)
    mapped = replace(plain, permutation=np.arange(8)[None], cluster_map=True)
    paths = [tmp_path / "plain.cvxq", tmp_path / "mapped.cvxq"]
    for path, tensor in zip(paths, (plain, mapped), strict=True):
        with Writer(path, [BOOK]) as writer:
            writer.add_companded("w", tensor)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert mapped.payload_size == plain.payload_size


def test_writer_requires_features_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "features.cvxq"
    with Writer(path, [BOOK], required=["seen-by-nobody"]) as writer:
        writer.add_companded("w", replace(plain_tensor(), permutation=ROWS, cluster_map=True))
    with pytest.raises(UnsupportedError, match="'seen-by-nobody'"):
        Reader(path)
    assert b'"required":["cluster-maps","seen-by-nobody"]' in path.read_bytes()
    with (
        pytest.raises(WriteError, match="'row-scales' is required, but nothing uses it"),
        Writer(tmp_path / "unused.cvxq", required=["row-scales"]),
    ):
        pass


def test_writer_refuses_names_and_dtypes(tmp_path: Path) -> None:
    with Writer(tmp_path / "a.cvxq") as writer:
        for name in ("", "two\nlines", "n" * 513):
            with pytest.raises(WriteError, match="tensor name"):
                writer.add_raw(name, np.zeros(1))
        for name in ("../x", "/x", "a/b/c", "", "a b", ".", "a/.."):
            with pytest.raises(WriteError, match="file name"):
                writer.add_file(name, b"")
        with pytest.raises(WriteError, match="complex128"):
            writer.add_raw("w", np.zeros(1, complex))
        with pytest.raises(WriteError, match="bit patterns as uint16"):
            writer.add_raw("w", np.zeros(1, np.float32), "bf16")
        with pytest.raises(WriteError, match="has not been added"):
            writer.add_alias("a", "nothing")
    with pytest.raises(WriteError, match="is a folder"):
        Writer(tmp_path)


def text_of(size: int) -> bytes:
    """Text that deflates well."""
    return b" ".join(b"token%d" % (i % 997) for i in range(size))[:size]


@pytest.mark.parametrize(
    ("data", "deflated"),
    [
        (b"", False),
        (text_of(4095), False),
        (text_of(4096), True),
        (bytes(4 << 20), True),
        (np.random.default_rng(0).bytes(20_000), False),
        (np.random.default_rng(0).bytes(9_100) + bytes(900), False),  # saves 9 %
        (np.random.default_rng(0).bytes(8_900) + bytes(1_100), True),
    ],
)
def test_files_are_deflated_where_that_pays(tmp_path: Path, data: bytes, deflated: bool) -> None:
    path = tmp_path / "a.cvxq"
    with Writer(path) as writer:
        writer.add_file("a", data)
    assert verify(path) == []
    with Reader(path) as reader:
        (entry,) = reader.header.files
        assert reader.file("a") == data
        assert reader.preamble.version == (1, 2 if deflated else 0)
    assert entry.original_size == len(data)
    assert (entry.size < 0.9 * len(data)) == deflated == (entry.inflated_size is not None)
    assert planned_entry("a", data) == replace(entry, offset=0, crc32=0)


def test_damage_of_a_deflated_file_is_found_without_checksums(valid: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.cvxq"
    good = (valid / "files-deflated.cvxq").read_bytes()
    with Reader(valid / "files-deflated.cvxq") as reader:
        whole, entry = reader.file("tokenizer.json"), reader.header.files[1]
    for at in range(entry.size):
        data = bytearray(good)
        data[entry.offset + at] ^= 1 << (at % 8)
        path.write_bytes(data)
        with Reader(path, check=False) as reader:
            try:
                found = reader.file("tokenizer.json")
            except CorruptError as error:
                assert "file 'tokenizer.json' at byte 0x" in str(error)  # noqa: PT017
            else:  # a bit that means nothing, such as the level in the stream's header
                assert found == whole


def test_reader_refuses_other_files_with_their_path(tmp_path: Path) -> None:
    path = tmp_path / "picture.cvxq"
    path.write_bytes(b"\x89PNG")
    with pytest.raises(NotCvxqError, match=r"picture\.cvxq: first bytes 89 50 4e 47"):
        Reader(path)
    with pytest.raises(FileNotFoundError):
        Reader(tmp_path / "missing.cvxq")


def test_reader_is_lazy_and_check_can_be_left_out(valid: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.cvxq"
    data = bytearray((valid / "raw-dtypes.cvxq").read_bytes())
    data[128] ^= 1  # tensor int-u1
    path.write_bytes(data)
    with Reader(path) as reader:
        assert isinstance(reader.read("int-i1"), RawTensor)
        with pytest.raises(CorruptError, match="tensor 'int-u1' at byte 0x80: checksum differs"):
            reader.read("int-u1")
    with Reader(path, check=False) as reader:
        damaged = reader.read("int-u1")
    assert isinstance(damaged, RawTensor)
    assert damaged.data[0] == 1  # outlives the reader
    assert not damaged.data.flags.writeable
    with pytest.raises(KeyError):
        Reader(path).read("no such tensor")


def test_sections_tile_the_file(valid: Path, valid_name: str) -> None:
    with Reader(valid / valid_name) as reader:
        sections = reader.sections()
    assert sections[0][:4] == ("preamble", "", 0, 128)
    assert sections[-1].kind == "header"
    end = 0
    for section in sections:
        assert section.offset == end
        assert 0 <= section.padding < 64
        end += section.size + section.padding
    assert end == (valid / valid_name).stat().st_size


def test_aliases_and_added_biases(valid: Path) -> None:
    with Reader(valid / "alias.cvxq") as reader:
        assert reader.names == ["embed.weight"]
        assert reader.aliases == {"lm_head.weight": "embed.weight"}
        assert reader.entry("lm_head.weight") is reader.entry("embed.weight")
        assert reader.read("lm_head.weight").shape == (8, 3)
    with Reader(valid / "bias-added.cvxq") as reader:
        assert reader.added_biases == ["fc.bias"]


def test_two_writes_are_equal_and_carry_nothing_of_the_machine(
    make_vectors: ModuleType, tmp_path: Path
) -> None:
    book, tensor = make_vectors.worked_example()
    paths = [tmp_path / "one.cvxq", tmp_path / "folder-name" / "two.cvxq"]
    paths[1].parent.mkdir()
    for path in paths:
        with Writer(path, [book]) as writer:
            writer.add_companded("w", tensor)
            writer.add_file("config.json", b"{}")
    one, two = (path.read_bytes() for path in paths)
    assert one == two
    for trace in (str(tmp_path), "folder-name", "one.cvxq", Path.home().name or "root"):
        assert trace.encode() not in one


def test_sparse_file_beyond_4_gib(make_vectors: ModuleType, valid: Path, tmp_path: Path) -> None:
    """A tensor past 2^32 bytes is found; the hole before it takes no disk."""
    hole = 5 << 30
    draft = make_vectors.Draft((valid / "depths-explicit.cvxq").read_bytes())
    entry = draft.header["tensors"][0]
    start = draft.header["codebooks"][0]["offset"] + draft.header["codebooks"][0]["size"]
    start = -(-start // 64) * 64
    raw = {"codec": "raw", "dtype": "u8", "shape": [hole], "name": "hole"}
    raw |= {"offset": start, "size": hole, "crc32": 0}
    payload = bytes(draft.body[entry["offset"] : entry["offset"] + entry["size"]])
    entry["offset"] = start + hole
    draft.header["tensors"] = [raw, entry]
    header_offset = -(-(entry["offset"] + entry["size"]) // 64) * 64
    front = draft.body[:start]
    draft.body = bytearray(128)  # seal() is asked for preamble and header only
    text = draft.seal()[128:]
    sealed = draft.seal(
        file_size=header_offset + len(text),
        header_offset=header_offset,
        header_crc32=zlib.crc32(text),
    )
    path = tmp_path / "sparse.cvxq"
    with path.open("wb") as file:
        file.write(sealed[:128] + front[128:])
        file.seek(entry["offset"])
        file.write(payload)
        file.seek(header_offset)
        file.write(text)
    assert path.stat().st_size > 2**32
    with Reader(valid / "depths-explicit.cvxq") as reader, Reader(path) as sparse:
        want, found = reader.read("layer.weight"), sparse.read("layer.weight")
        assert sparse.entry("layer.weight").offset > 2**32
    assert isinstance(want, CompandedTensor)
    assert isinstance(found, CompandedTensor)
    np.testing.assert_array_equal(dequantize(found, BOOK_2), dequantize(want, BOOK_2))
    path.unlink()


BOOK_2 = Codebook.default(2)


def test_side_information_of_a_square_matrix() -> None:
    """1024 × 1024, group size 128, 8 partitions: at most 0.09 bits per weight beside the codes."""
    geometry = Geometry.of((1024, 1024), 128, 8, False)
    layout = Layout(
        geometry=geometry,
        scale_bits=6,
        column_bits=8,
        separable=True,
        means=False,
        permuted=True,
        cluster_map=False,
        row_scale_bits=0,
    )
    entry = 512  # more than a header entry takes
    assert 8 * (layout.side_bytes + entry + 64) / geometry.weights <= 0.09


def test_codebook_tables() -> None:
    scales = logarithmic_scales(6)
    assert scales[0] == 0
    assert scales[-1] == 1
    np.testing.assert_allclose(scales[2:] / scales[1:-1], 2 ** (1 / 8), rtol=1e-6)
    assert logarithmic_scales(2, steps_per_octave=1).tolist() == [0, 0.25, 0.5, 1]
    with pytest.raises(CorruptError, match="level table 2 is not the default"):
        replace(BOOK, levels=tuple(2 * table for table in BOOK.levels), stored_depths=(1, 3))
    for depths in ((0, 1), (2, 1), (9,), (1, 1)):
        with pytest.raises(CorruptError, match="allowed 1 to 8, ascending"):
            replace(BOOK, stored_depths=depths)
    assert BOOK.depth_thresholds.tolist() == [128, 384, 640, 896, 1152, 1408, 1664, 1920]
    again = Codebook.from_bytes(BOOK.to_bytes(), 6)
    assert again.to_bytes() == BOOK.to_bytes()
    terms = np.array([[0, 127, 128, 255]], np.uint8)
    depths = BOOK.depths_of(terms, np.array([[0, -200, 2000]], np.int16), 1)
    assert depths.tolist() == [[[0, 1, 1, 2], [0, 0, 0, 1], [8, 8, 8, 8]]]


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, 3.4e38, np.inf, np.nan], np.float32)
    patterns = bfloat16_bits(values)
    assert [hex(p) for p in patterns[:6]] == [
        *("0x3f80", "0x3f80", "0x3f82", "0x8000", "0x7f80", "0x7f80")
    ]
    back = decode("bf16", (7,), memoryview(patterns.tobytes())).to_float32()
    assert np.isnan(back[6])
    assert back[:2].tolist() == [1.0, 1.0]


def test_rows_outside_the_matrix_are_refused() -> None:
    tensor = plain_tensor()
    for row in (-1, 16):
        with pytest.raises(IndexError, match="allowed 0 to 15"):
            dequantize_rows(tensor, BOOK, [row])
    assert dequantize_rows(tensor, BOOK, []).shape == (0, 8)


def test_experts_are_read_one_at_a_time(valid: Path) -> None:
    with Reader(valid / "experts.cvxq") as reader:
        tensor = reader.read("layer.weight")
        assert isinstance(tensor, CompandedTensor)
        whole, codes = dequantize(tensor, reader.codebook(0)), unpack_codes(tensor)
        for expert in range(3):
            one = dequantize(tensor, reader.codebook(0), expert)
            np.testing.assert_array_equal(one, whole[expert])
            np.testing.assert_array_equal(unpack_codes(tensor, expert), codes[expert])
