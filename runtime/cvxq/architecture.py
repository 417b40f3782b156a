"""The network of a file's config.json, built without memory for its weights.

Only code of the installed transformers is ever run.  Parameters are created on torch's meta
device; buffers that the modules compute for themselves (rotary frequencies, masks) are real,
since no file supplies them.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cvxq.errors import InconsistentFileError, UnsupportedModelError


def read_config(blob: bytes) -> Any:
    """Parse the bytes of a config.json into the transformers config it describes.

    Raises UnsupportedModelError when the installed transformers has no such model, or when the
    model would need code from the checkpoint; InconsistentFileError when it is not a JSON object.
    """
    try:
        settings = json.loads(blob)
    except ValueError as error:
        raise InconsistentFileError(f"config.json of the file is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InconsistentFileError("config.json of the file is not a JSON object")
    kind = settings.get("model_type")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        try:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} cannot read the config of model type "
                f"{kind!r}: {_first_line(error)}"
            ) from error
    return config


def build_network(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Build the causal language model of `config` with parameters of `dtype` on the meta device.

    Raises UnsupportedModelError when transformers has no causal language model for it.
    """
    try:
        with _parameters_on_meta():
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
    except (ImportError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot build a causal language model of type "
            f"{config.model_type!r}: {_first_line(error)}"
        ) from error
    empty = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if empty:
        raise UnsupportedModelError(
            f"{type(network).__name__} has a buffer that no file supplies: {empty[0]!r}"
        )
    return network.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, with which modules allocate weights, gives meta tensors: no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within this context every parameter that a module registers is on the meta device."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
