"""llama.cpp, built natively from the sources that the package index carries.

    python benchmarks/peers/llamacpp.py [FOLDER]     # default ~/.cache/cvxq-peers/llama.cpp

The source archive of the package llama-cpp-python holds a copy of llama.cpp; pip fetches it, cmake
and ninja (which must be on the PATH) build its command-line tools for this very processor. A build
that finished leaves a stamp and is not repeated. Building takes 10 to 40 minutes on two cores.
"""

import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "llama-cpp-python"
FOLDER = Path.home() / ".cache" / "cvxq-peers" / "llama.cpp"
TARGETS = ("llama-bench", "llama-quantize", "llama-imatrix", "llama-perplexity")
RECIPE = "2"  # raised when builds have to be repeated
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


class BuildError(Exception):
    """Why llama.cpp could not be built: one line, with where to read more."""


@dataclass(frozen=True)
class LlamaCpp:
    """A finished build: version of the package, folder of the tools, folder of the sources."""

    version: str
    tools: Path
    sources: Path

    def tool(self, name: str) -> Path:
        """Path of one of TARGETS."""
        return self.tools / name

    @property
    def converter(self) -> Path:
        """The script that makes a GGUF file of a Hugging Face folder; needs torch, transformers."""
        return self.sources / "convert_hf_to_gguf.py"

    @property
    def gguf_package(self) -> Path:
        """Folder to put on the module path for `import gguf`."""
        return self.sources / "gguf-py"


def build(folder: Path = FOLDER) -> LlamaCpp:
    """Return the build in `folder`, made if there is none; BuildError says why it failed."""
    stamp = folder / "stamp"
    if stamp.exists() and stamp.read_text().split()[1:] == [RECIPE]:
        return _finished(folder, stamp.read_text().split()[0])
    for tool in ("cmake", "ninja", "cc", "c++"):
        if shutil.which(tool) is None:
            raise BuildError(f"llama.cpp needs {tool} to build: install it, e.g. with apt or pip")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    archive = _download(folder, log)
    root = _unpack(archive, folder)
    version = root.removeprefix("llama_cpp_python-")
    sources = folder / root / "vendor" / "llama.cpp"
    _mend(sources / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp")
    work = folder / "build"
    print(f"llama.cpp: building {', '.join(TARGETS)}; log: {log}", file=sys.stderr, flush=True)
    _run(["cmake", "-S", str(sources), "-B", str(work), "-G", "Ninja", *OPTIONS], log)
    _run(["cmake", "--build", str(work), "--target", *TARGETS], log)
    stamp.write_text(f"{version} {RECIPE}\n")
    return _finished(folder, version)


def _finished(folder: Path, version: str) -> LlamaCpp:
    sources = folder / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    return LlamaCpp(version, folder / "build" / "bin", sources)


def _download(folder: Path, log: Path) -> Path:
    """Fetch the latest source archive, unless an earlier attempt got that far."""
    found = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    if not found:
        print("llama.cpp: fetching the sources", file=sys.stderr, flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        _run([*pip, "-d", str(folder), PACKAGE], log)
        found = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    return found[-1]


def _unpack(archive: Path, folder: Path) -> str:
    """Unpack the archive and return the name of its one top folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return archive.name.removesuffix(".tar.gz")


def _mend(source: Path) -> None:
    """Make sure that AMX's tiles are set up before they are used.

    GCC 12's `_tile_loadconfig` claims to read eight bytes of its argument: the compiler drops the
    stores to the others, and every product on AMX crashes.
    """
    call = "    _tile_loadconfig(&tc);"
    barrier = '    __asm__ volatile("" : : "r"(&tc) : "memory");\n'
    text = source.read_text()
    source.write_text(text.replace(call, barrier + call))


def _run(command: list[str], log: Path) -> None:
    with log.open("ab") as file:
        done = subprocess.run(command, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command[:3])} … failed; its output is at the end of {log}")


def main() -> int:
    """Build into the folder given, or the default one."""
    try:
        made = build(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
    except BuildError as error:
        print(f"llama.cpp: {error}", file=sys.stderr)
        return 1
    print(made.tools)
    return 0


if __name__ == "__main__":
    sys.exit(main())
