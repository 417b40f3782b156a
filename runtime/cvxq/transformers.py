"""`import cvxq.transformers` teaches transformers to load what `cvxq export` writes.

    import cvxq.transformers
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("folder")

The weights stay packed, as in `cvxq.load(...).network`, and are filled in by the same code: while
transformers loads, the network has no modules, so that it finds nothing to load, to initialize or
to tie; they come when it is done.  The tensors that are not packed also lie in
`unquantized.safetensors`: transformers wants a checkpoint, and does not take it for one unless it
is told here, so that without this import loading fails instead of making up random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cvxq_format import Reader
from cvxq_format.model_config import attention_options
from cvxq_kernels.cpu import crc32
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from cvxq.architecture import empty_copy, is_causal_model
from cvxq.errors import ArgumentError, MissingPartError, UnsupportedModelError
from cvxq.experts import unstack
from cvxq.export import METHOD, UNQUANTIZED_FILE
from cvxq.hub import MODEL_FILE
from cvxq.modules import packed_modules
from cvxq.network import fill_network

_PLANS = ("auto", "balanced", "balanced_low_0", "sequential")


def compute_exactly(model: PreTrainedModel, exact: bool = True) -> None:
    """Let a model on a CPU multiply in float32 throughout, which is slower, or as usual again.

    Usually activations are rounded to 8 bits where that is faster.
    """
    for module in packed_modules(model):
        module.exact = exact


@register_quantization_config(METHOD)
class CvxqConfig(QuantizationConfigMixin):
    """The `quantization_config` of an exported folder; file: the `.cvxq` file beside it."""

    def __init__(self, file: str = MODEL_FILE, **_: Any) -> None:
        """Take what config.json says."""
        self.quant_method = METHOD
        self.file = file


@register_quantizer(METHOD)
class CvxqQuantizer(HfQuantizer):
    """Loads the network of a `.cvxq` file into what transformers has built of config.json."""

    requires_calibration = True
    quantization_config: CvxqConfig
    _device = torch.device("cpu")
    _file: Path

    def update_device_map(self, device_map: Any) -> Any:
        """Choose the one device that a model is on; raises ArgumentError for several."""
        if device_map is None:
            return None
        if isinstance(device_map, str) and device_map in _PLANS:
            device_map = {"": 0 if torch.cuda.is_available() else "cpu"}
        devices = set(device_map.values())
        if len(devices) > 1 or "disk" in devices:
            named = ", ".join(sorted(map(str, devices)))
            raise ArgumentError(
                f"device_map names {named}; a cvxq model is on one device, so give that one"
            )
        device = next(iter(devices))
        self._device = torch.device("cuda", device) if isinstance(device, int) else device
        self._device = torch.device(self._device)
        return {"": device}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type to compute in: on a CPU, that of its kernels."""
        return torch.float32 if self._device.type == "cpu" else dtype

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Name the checkpoint, before transformers looks for one."""
        config.transformers_weights = UNQUANTIZED_FILE
        chosen = attention_options(config.get_text_config().to_dict()).get("attn_implementation")
        if chosen and config._attn_implementation_internal is None:
            config._attn_implementation = chosen
        return config

    update_tp_plan = update_attn_implementation  # the hook of transformers 5.16 at that place

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **_: Any
    ) -> None:
        if not is_causal_model(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} is no causal language model; load the folder with "
                "AutoModelForCausalLM"
            )
        if not checkpoint_files:
            raise ArgumentError(
                "a model in cvxq's format is loaded from its folder only, not from a state_dict"
            )
        self._file = _beside(Path(checkpoint_files[0]), self.quantization_config.file, model.config)
        model._modules.clear()
        model.all_tied_weights_keys = {}
        model._tp_plan = {}
        model._keys_to_ignore_on_load_unexpected = {""}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        with Reader(self._file, crc32=crc32) as reader:
            dtype = model.config.dtype
            model._modules = empty_copy(model, dtype)._modules
            unstack(model)
            fill_network(model, reader, True, self._device, dtype)

    def is_serializable(self, **_: Any) -> bool:
        """Refuse to save: what transformers would write is only the unpacked rest."""
        raise ArgumentError(
            "a cvxq model is not saved by transformers, nor has it changed: copy its folder, or "
            "use cvxq export or cvxq push"
        )

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return False


def _beside(checkpoint: Path, name: str, config: PreTrainedConfig) -> Path:
    """Return the `.cvxq` file that lies, or on the hub lies, beside the checkpoint file."""
    file = checkpoint.with_name(name)
    if file.exists():
        return file
    snapshot = checkpoint.parent
    found = None
    if snapshot.parent.name == "snapshots":
        found = cached_file(
            config._name_or_path,
            name,
            revision=snapshot.name,
            cache_dir=snapshot.parents[2],
            _raise_exceptions_for_missing_entries=False,
        )
    if found is None:
        raise MissingPartError(
            f"{file} does not exist, which config.json names; export the file again"
        )
    return Path(found)
