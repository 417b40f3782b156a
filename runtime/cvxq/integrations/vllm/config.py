"""vLLM's quantization method `cvxq`: which file, and which layers it holds packed."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from cvxq.errors import ArgumentError, MissingPartError, UnsupportedModelError
from cvxq.export import METHOD
from cvxq.hub import MODEL_FILE, HubFile, fetch
from cvxq.integrations.vllm.layers import PackedMethod

_MARK = "asks_for_cvxq"


class CvxqConfig(QuantizationConfig):
    """The `quantization_config` of an exported folder.

    file: the `.cvxq` file, beside config.json. exact: on a CPU, multiply in float32 throughout
    instead of rounding activations to 8 bits where that is faster.
    """

    def __init__(self, file: str, exact: bool) -> None:
        """Keep what config.json says."""
        super().__init__()
        self.file = file
        self.exact = exact
        self.path = Path(file)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CvxqConfig:
        """Read config.json's `quantization_config`; ArgumentError for values of other types."""
        file, exact = config.get("file", MODEL_FILE), config.get("exact", False)
        if not isinstance(file, str) or not isinstance(exact, bool):
            raise ArgumentError(
                f"quantization_config: file is {file!r:.60} and exact {exact!r:.60}, allowed: "
                "a file's name, and true or false"
            )
        return cls(file, exact)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Find the file, in the folder or on the hub; MissingPartError where it is not."""
        folder = Path(model_name)
        if folder.is_dir():
            self.path = folder / self.file
            if not self.path.exists():
                raise MissingPartError(
                    f"{self.path} does not exist, which config.json names; export the file again"
                )
        else:
            self.path = fetch(HubFile(model_name, revision, self.file))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer is loaded and multiplied, None where it has no matrix of its own."""
        if isinstance(layer, LinearBase | VocabParallelEmbedding):
            return PackedMethod(self.path, self.exact)
        if hasattr(layer, "moe_config"):
            raise UnsupportedModelError(
                f"{prefix}: a mixture of experts, which vLLM cannot run from a .cvxq file; "
                "use cvxq serve"
            )
        return None

    def get_name(self) -> str:
        """Return the method's name in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the types that a model may compute in beside the packed products."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest CUDA architecture that the kernels are compiled for: Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no further files: config.json says it all."""
        return []


def pack_every_embedding() -> None:
    """Let embeddings and heads ask the model's configuration where vLLM's code forgot to.

    Its Gemma, Gemma 2, OPT and others make them without one.
    """
    original = VocabParallelEmbedding.__init__
    if hasattr(original, _MARK):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        bound = signature.bind(self, *args, **options)
        current = getattr(get_current_vllm_config_or_none(), "quant_config", None)
        if bound.arguments.get("quant_config") is None and isinstance(current, CvxqConfig):
            bound.arguments["quant_config"] = current
        original(*bound.args, **bound.kwargs)

    setattr(init, _MARK, True)
    VocabParallelEmbedding.__init__ = init
