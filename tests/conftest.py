"""What the tests of several packages share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads, as the command line does

import numpy as np
import pytest
from cvxq_format import CompandedTensor, pack_codes

# Otherwise each of hundreds of processes would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_configure() -> None:
    """Let child processes feel Ctrl-C: a shell's background jobs start with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def make_companded(
    shape: tuple[int, ...], seed: int, *, transposed: bool = False, **changes: Any
) -> CompandedTensor:
    """Companded tensor of random depths 0 to 8, scales of groups and rows, means, codes, order."""
    rng = np.random.default_rng(seed)
    experts = shape[0] if len(shape) == 3 else 1
    rows, columns = shape[-2:] if not transposed else shape[:-3:-1]
    group_size = changes.pop("group_size", 12)
    partitions = changes.pop("partitions", 1 if transposed or rows % 2 else 2)
    means = changes.pop("means", True)
    permuted = changes.pop("permuted", True)
    row_scaled = changes.pop("row_scaled", not transposed)
    part = rows // partitions
    clusters = partitions * -(-part // group_size)
    depths = rng.integers(0, 9, (experts, clusters, columns), dtype=np.uint8)
    sizes = np.tile([min(group_size, part - i) for i in range(0, part, group_size)], partitions)
    deep = np.repeat(depths, sizes, axis=1).astype(np.int64)
    codes = (rng.integers(0, 256, (experts, rows, columns)) % (1 << deep)).astype(np.uint8)
    order = np.stack(
        [
            np.concatenate([rng.permutation(part) + p * part for p in range(partitions)])
            for _ in range(experts)
        ]
    )
    return CompandedTensor(
        shape=tuple(shape),
        group_size=group_size,
        partitions=partitions,
        scale_unit=np.float32(0.1),
        depths=depths,
        scale_codes=rng.integers(0, 64, depths.shape, dtype=np.uint8),
        packed_codes=pack_codes(codes, depths, group_size, partitions),
        mean_step=np.float32(0.005 if means else 0),
        mean_codes=rng.integers(-128, 128, depths.shape).astype(np.int8) if means else None,
        permutation=order.astype(np.int64) if permuted else None,
        row_scale_codes=rng.integers(0, 4, (experts, rows), dtype=np.uint8) if row_scaled else None,
        row_scale_bits=2 if row_scaled else 0,
        transposed=transposed,
        **changes,
    )


@pytest.fixture(scope="session")
def random_companded() -> Callable[..., CompandedTensor]:
    """Return a maker of random companded tensors: random_companded((N, K), seed, …)."""
    return make_companded


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute tiny networks with one thread: more only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def live_bytes() -> Any:
    """A class whose objects, while entered, count the bytes of tensors: `now`, and the `most`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveBytes(TorchDispatchMode):
        """Counts the bytes of tensors that operations made and that are still there."""

        def __init__(self) -> None:
            super().__init__()
            self.now = self.most = 0
            self._known: set[int] = set()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            given = {
                leaf.untyped_storage().data_ptr()
                for leaf in tree_leaves((args, kwargs or {}))
                if isinstance(leaf, torch.Tensor)
            }
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    place = storage.data_ptr()
                    if place not in given and place not in self._known and storage.nbytes():
                        self._known.add(place)
                        self.now += storage.nbytes()
                        self.most = max(self.most, self.now)
                        weakref.finalize(storage, self._gone, place, storage.nbytes())
            return result

        def _gone(self, place: int, size: int) -> None:
            self._known.discard(place)
            self.now -= size

    return LiveBytes


@pytest.fixture(scope="session")
def runs() -> Iterator[Callable[..., Callable[..., dict[str, Any]]]]:
    """Return a function that gives runs of a command which end early, see tests/faulty_runs.py.

    one = runs("export", file, folder), then one("kill", 0.2) → code, said, seconds. Further words
    with names are the environment of the process that they are forked from.
    """
    program = str(Path(__file__).with_name("faulty_runs.py"))
    started: dict[Any, subprocess.Popen[str]] = {}

    def begin(command: str, *words: object, **environment: str) -> Callable[..., dict[str, Any]]:
        loaded = "convert" if command == "measure" else command
        key = (loaded, *environment.items())
        if key not in started:
            started[key] = subprocess.Popen(
                [sys.executable, program, loaded],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
        process = started[key]

        def one(how: str, number: float = 0) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([how, number, [command, *map(str, words)]]) + "\n")
            process.stdin.flush()
            ended: dict[str, Any] = json.loads(process.stdout.readline())
            return ended

        return one

    yield begin
    for process in started.values():
        process.communicate(timeout=60)  # closes its stdin, at whose end it ends


@pytest.fixture
def disassemble(tmp_path: Path) -> Callable[[Any], str]:
    """Return the machine code of a kernel that Triton compiled, as text."""

    def listing(compiled: Any) -> str:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        code = tmp_path / "kernel.cubin"
        code.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([tool, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout

    return listing


@pytest.fixture(scope="session")
def run_interpreted() -> Callable[..., str]:
    """Run files of tests in Triton's interpreter, which is chosen before Triton loads."""
    plugin = Path(__file__).with_name("quick_interpreter.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(plugin.parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin.stem]

    def run(*words: object) -> str:
        done = subprocess.run(
            [*command, *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        return done.stdout

    return run


_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
_LATENT = {
    **_SMALL,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {**_SMALL, "intermediate_size": 24, "num_local_experts": 4},
    "Qwen2Moe": {
        **_SMALL,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
    },
    "Qwen3Moe": {**_SMALL, "num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {**_SMALL, "intermediate_size": 24, "num_experts": 4},
    "GptOss": {
        **_SMALL,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "head_dim": 8,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "GraniteMoe": {**_SMALL, "intermediate_size": 24, "num_local_experts": 4},
    "DeepseekV2": {**_LATENT, "topk_method": "greedy"},
    "DeepseekV3": {**_LATENT, "n_group": 1, "topk_group": 1},
    "Phimoe": {**_SMALL, "intermediate_size": 24, "num_local_experts": 4},
}


@pytest.fixture(params=MIXTURES)
def family(request: pytest.FixtureRequest) -> str:
    """Return each family of mixtures of experts in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def build_mixture() -> Callable[..., Any]:
    """Return build(family, **options): a random mixture of experts of `MIXTURES`."""

    def build(family: str, **options: Any) -> Any:
        import torch
        import transformers

        config = getattr(transformers, f"{family}Config")(**{**MIXTURES[family], **options})
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in network.parameters():  # large enough for routes to differ
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.05))
        return network

    return build
