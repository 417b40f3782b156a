"""Rotary positions: inverse frequencies and scaling factor of every static kind of RoPE.

Transformers 5 keeps the settings in `rope_parameters`; version 4 in `rope_theta` and
`rope_scaling`.  Where versions compute differently (YaRN with a `factor` that is not the ratio of
the two context lengths) the newest rules.  The arithmetic is float32 in transformers' order, so
that the frequencies agree to the last bit or two.  "dynamic" changes frequencies only beyond
`max_position_embeddings`, which no decoder here reads past, so within it equals "default".
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cvxq.lean.errors import NotLeanError

Floats = npt.NDArray[np.float32]

# What each kind may say besides rope_type (or type), rope_theta and partial_rotary_factor.
_SETTINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True, eq=False)
class Rope:
    """How queries and keys are turned, in the "half" layout: dimension i pairs with i + R/2.

    inverse_frequencies: (R/2,) float32, radians per position, R the first dimensions of a head
    that are turned (the others stay); attention_factor: multiplies cosine and sine.
    """

    inverse_frequencies: Floats
    attention_factor: float

    @property
    def rotary_dims(self) -> int:
        """R, how many dimensions of each head are turned."""
        return 2 * len(self.inverse_frequencies)

    def tables(self, positions: int) -> tuple[Floats, Floats]:
        """Return cosine and sine, each (positions, R/2) float32, attention factor included."""
        places = np.arange(positions, dtype=np.float32)
        angles = places[:, None] * self.inverse_frequencies
        factor = np.float32(self.attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor


def rope_settings(config: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """Merge both spellings of the rotary settings into one dict with `rope_type` and `rope_theta`.

    Raises NotLeanError when both spellings are present, or settings differ between layers.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new:
        raise NotLeanError("config has both rope_scaling and rope_parameters")
    settings = old or new or {}
    if not isinstance(settings, Mapping):
        raise NotLeanError(f"rotary settings are {settings!r}, not an object")
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise NotLeanError("rotary settings differ between kinds of layers")
    merged = dict(settings)
    for name in ("rope_theta", "partial_rotary_factor"):
        if config.get(name) is not None:
            merged.setdefault(name, config[name])
    merged.setdefault("rope_theta", default_theta)
    kinds = (merged.get("rope_type"), merged.pop("type", None), "default")
    merged["rope_type"] = next(kind for kind in kinds if kind is not None)
    return merged


def read_rope(settings: Mapping[str, Any], head_dim: int, context: int) -> Rope:
    """Compute the frequencies that `settings` (of `rope_settings`) describe.

    head_dim: dimensions of a head; context: `max_position_embeddings`.
    Raises NotLeanError for a kind, a setting or a value that is not implemented here.
    """
    kind = settings["rope_type"]
    if not isinstance(kind, str) or kind not in _SETTINGS:
        raise NotLeanError(f"rope_type is {kind!r}, implemented: {', '.join(_SETTINGS)}")
    strangers = sorted(set(settings) - _ALWAYS - _SETTINGS[kind])
    if strangers:
        raise NotLeanError(f"rotary setting {strangers[0]!r} is unknown for rope_type {kind!r}")
    theta = _number(settings, "rope_theta")
    share = 1.0 if settings.get("partial_rotary_factor") is None else None
    dims = int(head_dim * (share or _number(settings, "partial_rotary_factor")))
    if dims < 2 or dims % 2 or dims > head_dim:
        raise NotLeanError(f"{dims} rotary dimensions in a head of {head_dim}")
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    periods = np.float32(theta) ** exponents
    if kind == "linear":
        return Rope(1 / periods / np.float32(_number(settings, "factor")), 1.0)
    if kind == "llama3":
        return Rope(_llama3(1 / periods, settings, context), 1.0)
    if kind == "yarn":
        return _yarn(periods, theta, settings, context)
    return Rope(1 / periods, 1.0)


def _llama3(inverse: Floats, settings: Mapping[str, Any], context: int) -> Floats:
    """Divide low frequencies by the factor, keep high ones, go smoothly from one to the other."""
    factor = np.float32(_number(settings, "factor"))
    low, high = _number(settings, "low_freq_factor"), _number(settings, "high_freq_factor")
    before = _number(settings, "original_max_position_embeddings", context)
    if low == high:
        raise NotLeanError("low_freq_factor equals high_freq_factor")
    wave = np.float32(2 * math.pi) / inverse
    smooth = (np.float32(before) / wave - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * inverse / factor + smooth * inverse
    slow = np.where(wave > before / low, inverse / factor, between)
    return np.asarray(np.where(wave < before / high, inverse, slow), np.float32)


def _yarn(periods: Floats, theta: float, settings: Mapping[str, Any], context: int) -> Rope:
    """Interpolate dimensions that turn rarely within the old context, keep those that turn often.

    YaRN (arXiv 2309.00071), equations 19 to 25.
    """
    before = _number(settings, "original_max_position_embeddings", context)
    factor = _number(settings, "factor", context / before)
    fast, slow = _number(settings, "beta_fast", 32.0), _number(settings, "beta_slow", 1.0)
    dims = 2 * len(periods)
    if theta == 1:
        raise NotLeanError("rope_theta is 1: all dimensions turn alike, which YaRN cannot divide")

    def dimension(turns: float) -> float:
        return dims * math.log(before / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(fast), dimension(slow)
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    if first == last:
        last += 0.001  # as transformers does
    places = np.arange(dims // 2, dtype=np.float32)
    kept = 1 - np.clip((places - np.float32(first)) / np.float32(last - first), 0, 1)
    slowed = 1 / (np.float32(factor) * periods)
    return Rope(slowed * (1 - kept) + 1 / periods * kept, _yarn_attention_factor(settings, factor))


def _yarn_attention_factor(settings: Mapping[str, Any], factor: float) -> float:
    if settings.get("attention_factor") is not None:
        return _number(settings, "attention_factor")
    mscale, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and all_dims:
        return growth(_number(settings, "mscale")) / growth(_number(settings, "mscale_all_dim"))
    return growth(1.0)


def _number(settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Return a positive finite number of the settings; null counts as missing."""
    value = settings.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotLeanError(f"rotary setting {name!r} is {value!r}, not a number")
    if not 0 < value <= sys.float_info.max:
        raise NotLeanError(f"rotary setting {name!r} is {value!r}, not positive")
    return float(value)
