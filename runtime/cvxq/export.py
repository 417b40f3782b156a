"""A `.cvxq` file as the folder that transformers and vLLM load, see `cvxq.transformers`.

    model.cvxq                  the file itself, linked where the disk can
    config.json                 as the file carries it, naming model.cvxq
    unquantized.safetensors     the tensors that are not packed, by their names in the file; of
                                NAME.weight that is packed its number there, as NAME.cvxq
    tokenizer.json and others   as the file carries them

No file of it is called model.safetensors: programs that do not know of cvxq would take that for
the whole checkpoint, and make up the weights that it lacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cvxq_format import RawTensor, Reader, dequantize
from cvxq_format.decoder_record import FILE_NAME as DECODER_FILE
from cvxq_format.entries import CompandedEntry
from cvxq_format.unfinished import UnfinishedFolder, disk_error
from cvxq_kernels.cpu import crc32

from cvxq.errors import ArgumentError
from cvxq.hub import MODEL_FILE
from cvxq.parts import json_part, needed_part

METHOD = "cvxq"  # the quant_method of config.json
UNQUANTIZED_FILE = "unquantized.safetensors"
NUMBER = "cvxq"  # what follows a module's name in the name of its matrix's number
FOLDER_VERSION = 1  # of what a folder holds, the file apart; every change raises it

_OWN_PARTS = ("provenance.json", "report.json", DECODER_FILE)  # which only cvxq reads
_CODE = (".py", ".pyc")
_WEIGHT = ".weight"
# Tables of positions are plain embeddings to vLLM, which has no packed form of those.
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)\.weight$")
_DTYPES = {
    "bool": "bool",
    "u8": "uint8",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "f64": "float64",
}


def export(file: Path, folder: Path) -> None:
    """Write the folder of a `.cvxq` file, complete or not at all.

    What a killed run left beside it goes away first.
    Raises ArgumentError where there is something already, and what `export_rest` raises.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ArgumentError(f"{folder} exists and is not an empty folder; name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = UnfinishedFolder(folder)
    try:
        export_rest(file, made.path)
        _link(file.resolve(), made.path / MODEL_FILE)
        made.finish()
    except BaseException:
        made.abandon()
        raise


def export_rest(file: Path, folder: Path) -> None:
    """Write into `folder` all that belongs beside the `.cvxq` file.

    Raises MissingPartError for a file without config.json, and what `Reader` raises.
    """
    with Reader(file, crc32=crc32) as reader:
        needed_part(reader, "config.json")
        for name in reader.files:
            if name in _OWN_PARTS or name.endswith(_CODE):
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with _naming(target):
                target.write_bytes(reader.file(name))
        config = json_part(reader, "config.json")
        config["quantization_config"] = {"quant_method": METHOD, "file": MODEL_FILE}
        target = folder / "config.json"
        with _naming(target):
            target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_unquantized(reader, folder / UNQUANTIZED_FILE)


def _write_unquantized(reader: Reader, target: Path) -> None:
    from safetensors import SafetensorError, TensorSpec, serialize_file

    held, specs = [], {}  # what the specifications point at has to stay
    for name, dtype, data in _unquantized(reader):
        held.append(data)
        specs[name] = TensorSpec(
            dtype=dtype,
            shape=list(data.shape),
            data_ptr=data.ctypes.data,
            data_len=data.nbytes,
        )
    try:
        serialize_file(specs, str(target), {"format": "pt"})
    except SafetensorError as error:
        if full := disk_error(error, target):
            raise full from error
        raise
    shutil.copymode(target.with_name("config.json"), target)  # the library's is its owner's alone


def _unquantized(reader: Reader) -> Iterator[tuple[str, str, np.ndarray[Any, Any]]]:
    """Yield name, type and values of what the folder holds beside the file.

    transformers reads the file, and wants no more than that there is something; vLLM finds raw
    tensors here, and numbers that say which of its layers get which packed matrix. Added biases
    are left out: it has no place for them, see `cvxq.integrations.vllm.layers`.
    """
    for number, name in enumerate(reader.names):
        packed = isinstance(reader.entry(name), CompandedEntry)
        if packed and name.endswith(_WEIGHT) and not _POSITIONS.search(name):
            yield name.removesuffix("weight") + NUMBER, "int64", np.array(number, np.int64)
        elif name not in reader.added_biases:
            value = reader.read(name)
            if isinstance(value, RawTensor):
                data = np.ascontiguousarray(value.data).reshape(value.shape)
                yield name, _DTYPES[value.dtype], data
            elif _POSITIONS.search(name):
                yield name, "float32", dequantize(value, reader.codebook(value.codebook))


def _link(source: Path, target: Path) -> None:
    """Give the file a second name, or copy it where the disk, or another one, cannot."""
    try:
        os.link(source, target)
    except OSError:
        if not source.exists():
            raise
        with _naming(target):
            shutil.copyfile(source, target)


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Let an error of writing say where, that of a full disk for one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise
