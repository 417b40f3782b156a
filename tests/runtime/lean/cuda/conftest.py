"""A CUDA device that is none: tensors stay on the CPU, and what is asked of the device is recorded.

Everything that names a CUDA device, to make a tensor or to move one, gets the CPU.  The calls of
`torch.cuda` behave as a device's do where code goes wrong most: an index must be named where torch
wants one, and nothing may look at a value while a graph is captured.  Replaying a graph computes
anew.  The kernels are replaced by the plain operations that define them; that they compute the same
is shown elsewhere, in Triton's interpreter.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cvxq import cuda
from cvxq_kernels import PackedWeight
from cvxq_kernels.decode import launch, reference
from cvxq_kernels.gpu import GpuWeight
from cvxq_kernels.gpu.matrix import check
from torch.overrides import TorchFunctionMode

GENERATOR = torch.Generator
CPU = torch.device("cpu")
WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero", "unique"}


class FakeDevice(TorchFunctionMode):
    """While entered, `count` devices; `calls` has what was asked of them, in order.

    moved: how often tensors of main memory, by address and bytes, were brought to them.
    """

    def __init__(self, patch: pytest.MonkeyPatch, count: int = 1) -> None:
        """Put the fake in place of `torch.cuda`; the test's end takes it out again."""
        super().__init__()
        self.calls: list[str] = []
        self.moved: Counter[tuple[int, int]] = Counter()
        self._held: list[torch.Tensor] = []  # what was moved, so that no address is given out anew
        self.is_capturing = False
        self.count = count
        self.clock = 0.0  # milliseconds
        self._of_thread = threading.local()
        self._compute: Callable[[], None] = lambda: None
        capture = cuda.capture

        def remembering(compute: Callable[[], None], *rest: Any) -> Callable[[], None]:
            self._compute = compute
            return capture(compute, *rest)

        patch.setattr(cuda, "capture", remembering)
        patch.setattr(torch, "Generator", lambda device="cpu": _OnDevice(self._place(device)))
        for name, fake in {
            "is_available": lambda: True,
            "device_count": lambda: self.count,
            "current_device": lambda: self.current,
            "set_device": self._set_device,
            "synchronize": lambda device=None: self.calls.append("synchronize"),
            "max_memory_allocated": lambda device=None: 1 << 20,
            "mem_get_info": lambda device=None: (1 << 30, 1 << 30),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "get_device_name": lambda device=None: "Fake",
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: _nothing(),
            "Event": lambda enable_timing=False: _Event(self),
            "CUDAGraph": lambda: _Graph(self),
            "graph": self._graph,
        }.items():
            patch.setattr(torch.cuda, name, fake)

    @property
    def current(self) -> int:
        """The device of the thread that asks, 0 until it is set."""
        return getattr(self._of_thread, "current", 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with the CPU in place of a CUDA device."""
        name = getattr(func, "__name__", "")
        if self.is_capturing and name in WAITS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if name == "to" and any(self._place(value) is not value for value in args[1:]):
            self._held.append(args[0])
            self.moved[args[0].data_ptr(), args[0].nbytes] += 1
        if func is torch.device:  # code may name the device; no tensor gets there
            return func(*args, **(kwargs or {}))
        kwargs = {key: self._place(value) for key, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        return func(*map(self._place, args), **kwargs)

    @staticmethod
    def _place(value: Any) -> Any:
        is_device = isinstance(value, torch.device) and value.type == "cuda"
        is_name = isinstance(value, str) and value.startswith("cuda")
        return CPU if is_device or is_name else value

    def _set_device(self, device: torch.device | int) -> None:
        index = device if isinstance(device, int) else device.index
        if index is None:
            raise ValueError(f"Expected a torch.device with a specified index, but got:{device}")
        self._of_thread.current = index

    @contextmanager
    def _graph(self, graph: _Graph, capture_error_mode: str = "global") -> Iterator[None]:
        self.calls.append(f"capture {capture_error_mode}")
        graph.compute = self._compute
        self.is_capturing = True
        try:
            yield
        finally:
            self.is_capturing = False


class _Event:
    """The device's clock when it was recorded."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def record(self) -> None:
        self.time = self._device.clock

    def synchronize(self) -> None:
        self._device.calls.append("wait")

    def elapsed_time(self, end: _Event) -> float:
        return end.time - self.time


class _OnDevice(GENERATOR):
    """A generator made for the device."""


class _Graph:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.compute: Callable[[], None] = lambda: None

    def register_generator_state(self, generator: torch.Generator) -> None:
        assert isinstance(generator, _OnDevice)

    def replay(self) -> None:
        self._device.calls.append("replay")
        self.compute()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class StandIn(GpuWeight):
    """A weight on the fake device, whose kernels are the plain ones."""

    def __init__(self, parts: Sequence[PackedWeight], device: torch.device) -> None:
        check(parts)
        assert device.index is not None
        with torch._C.DisableTorchFunction():  # thousands of operations, none of them the device's
            self.values = torch.cat([part.dense() for part in parts])
        self.size = sum(part.nbytes for part in parts)
        self.device = CPU
        self.plans = {}

    @classmethod
    def from_packed(cls, weight: PackedWeight, device: torch.device | str) -> StandIn:
        return cls([weight], torch.device(device))

    @classmethod
    def fused(cls, weights: Sequence[PackedWeight], device: torch.device | str) -> StandIn:
        return cls(weights, torch.device(device))

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.values.shape
        return outputs, inputs

    @property
    def nbytes(self) -> int:
        return self.size

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.dense(x.dtype), bias)

    def dense(self, dtype: torch.dtype = torch.float32, **_: Any) -> torch.Tensor:
        return self.values.to(dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.dense(dtype)[ids]


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """Run the test on a fake device, with plain operations for its kernels."""
    monkeypatch.setattr("cvxq_kernels.gpu.GpuWeight", StandIn)
    for name in ("normalize", "add_and_normalize", "rotate_and_store", "attend_one", "activate"):
        monkeypatch.setattr(launch, name, getattr(reference, name))
    cuda.runs_kernels.cache_clear()
    with FakeDevice(monkeypatch) as fake:

        def tune(weights: object, dtype: torch.dtype, step: Callable[[], None]) -> None:
            fake.calls.append(f"tune {dtype}")
            step()

        monkeypatch.setattr("cvxq.lean.cuda.opening.tune_alike", tune)
        yield fake
    cuda.runs_kernels.cache_clear()
