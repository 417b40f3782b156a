"""A GGUF file with the layers of another over and over, to measure the speed of a deeper model.

    python -m peers.deeper_gguf SOURCE OUTPUT TIMES GGUF_PACKAGE   # the last: llama.cpp's gguf-py

Quantizing all layers of a large random model takes long, and its speed does not depend on whether
they differ.
"""

import re
import sys
from pathlib import Path

_LAYER = re.compile(r"^blk\.(\d+)\.")


def repeat(source: Path, output: Path, times: int) -> None:
    """Write `source` with its layers `times` times."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    writer = GGUFWriter(output, fields["general.architecture"])
    layers = fields[f"{fields['general.architecture']}.block_count"]
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = layers * times if name.endswith(".block_count") else fields[name]
        kind, *rest = field.types
        writer.add_key_value(name, value, kind, rest[-1] if kind is GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        layer = _LAYER.match(tensor.name)
        for turn in range(times if layer else 1):
            name = tensor.name
            if layer:
                name = f"blk.{int(layer[1]) + turn * layers}.{name[layer.end() :]}"
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    """Repeat the layers of the file of the arguments."""
    source, output, times, package = sys.argv[1:]
    sys.path.insert(0, package)
    repeat(Path(source), Path(output), int(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
