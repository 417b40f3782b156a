"""The network of a file's config.json, built without memory for its weights.

Only code of the installed transformers is ever run.  Parameters are created on torch's meta
device; buffers that the modules compute for themselves (rotary frequencies, masks) are real,
since no file supplies them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from cvxq_format.model_config import attention_options
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype

from cvxq.claims import allowance
from cvxq.config import Settings, blame, parse, read_config, reason
from cvxq.errors import InconsistentFileError, UnsupportedModelError


def build_network(
    settings: Settings, file: str, dtype: torch.dtype, parameters: int
) -> PreTrainedModel:
    """Build the causal language model of a parsed config.json, its parameters on the meta device.

    file: what to call the config.json in errors; dtype: of the parameters; parameters: how many
    there are to fill it with.
    Raises UnsupportedModelError when transformers has no such causal language model, or cannot
    build it here; InconsistentFileError when a value of the config keeps it from doing so.
    """
    config = read_config(settings, file)
    version, model_type = transformers.__version__, settings["model_type"]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{file}: transformers {version} has no causal language model of type {model_type!r}; "
            "another version may"
        )
    try:
        network = _build(config, dtype, parameters)
    except Exception as error:  # whatever the architecture's code makes of the values
        blamed = blame(settings, lambda rest: _build(parse(rest), dtype, parameters))
        is_unknown = isinstance(error, (ImportError, KeyError))  # a package or name missing here
        is_value = bool(blamed) or isinstance(error, (ArithmeticError, ValueError))
        kind = InconsistentFileError if is_value and not is_unknown else UnsupportedModelError
        raise kind(
            f"{file}: {blamed}transformers {version} cannot build a model of type "
            f"{model_type!r}: {reason(error)}"
        ) from error
    empty = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if empty:
        raise UnsupportedModelError(
            f"{type(network).__name__} has a buffer that no file supplies, {empty[0]!r}; "
            "only other models can be run"
        )
    return network.eval()


def is_causal_model(network: PreTrainedModel) -> bool:
    """Tell whether `network` is of the kind that `build_network` builds."""
    return isinstance(network, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(network.config), ()))


def empty_copy(network: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Build a network of the same class and the very same config, its parameters on meta."""
    with torch.device("cpu"), local_torch_dtype(dtype), _parameters_on_meta():
        return type(network)(network.config).eval()


def _build(config: Any, dtype: torch.dtype, parameters: int) -> PreTrainedModel:
    with _parameters_on_meta(), allowance(parameters):
        return AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=False,
            dtype=dtype,
            **attention_options(config.get_text_config().to_dict()),
        )


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
