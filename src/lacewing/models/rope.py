"""Rotary embeddings: from the words of a config to frequencies. Sources: the papers named below,
and `modeling_rope_utils.py` of transformers, which the tests compare with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import CheckpointError, UnsupportedModelError
from lacewing.models.config import Config, flag, integer, number, refuse, shown
from lacewing.models.spec import RopeSpec

__all__ = ["read_rope", "rope_from"]

Frequencies = npt.NDArray[np.float64]


def read_rope(config: Config, head_dim: int, default_theta: float = 10000.0) -> RopeSpec:
    """The model's one rotary embedding, in the older spelling (`rope_theta`, `rope_scaling`) or
    the newer one (`rope_parameters`)."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        parameters = config.get("rope_scaling")
    theta = number(config, "rope_theta", default_theta)
    return rope_from(config, {} if parameters is None else parameters, head_dim, theta)


def rope_from(config: Config, parameters: Any, head_dim: int, default_theta: float) -> RopeSpec:
    """A rotary embedding from one `rope_parameters` (or `rope_scaling`) mapping."""
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"config `rope_parameters`: needs a mapping, got {shown(parameters)}")
    for place in (parameters, config):
        part = number(place, "partial_rotary_factor", 1.0)
        if part != 1.0:
            raise UnsupportedModelError(f"config `partial_rotary_factor`: needs 1, got {part}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    build = _ROPES.get(kind) if isinstance(kind, str) else None
    if build is None:
        raise UnsupportedModelError(
            f"config `rope_type`: needs one of {', '.join(_ROPES)}, got {shown(kind)}"
        )
    theta = number(parameters, "rope_theta", default_theta)
    if theta <= 1:
        raise CheckpointError(f"config `rope_theta`: needs more than 1, got {theta}")
    inv_freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return build(config, parameters, theta, inv_freq)


def _default_rope(
    config: Config, parameters: Config, theta: float, inv_freq: Frequencies
) -> RopeSpec:
    return RopeSpec(inv_freq)


def _linear_rope(
    config: Config, parameters: Config, theta: float, inv_freq: Frequencies
) -> RopeSpec:
    """Positions squeezed by `factor` (arXiv:2306.15595)."""
    return RopeSpec(inv_freq / number(parameters, "factor"))


def _llama3_rope(
    config: Config, parameters: Config, theta: float, inv_freq: Frequencies
) -> RopeSpec:
    """Llama 3.1: waves longer than the old context / low_freq_factor are squeezed by `factor`,
    those shorter than the old context / high_freq_factor are kept, between them is a ramp."""
    factor = number(parameters, "factor")
    low = number(parameters, "low_freq_factor")
    high = number(parameters, "high_freq_factor")
    if not low < high:
        raise CheckpointError(
            f"config rope `low_freq_factor`: needs less than high_freq_factor {high}, got {low}"
        )
    context = integer(parameters, "original_max_position_embeddings")
    turns = context * inv_freq / (2 * math.pi)  # within the old context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return RopeSpec(inv_freq * (keep + (1 - keep) / factor))


def _yarn_rope(config: Config, parameters: Config, theta: float, inv_freq: Frequencies) -> RopeSpec:
    """YaRN (arXiv:2309.00071): squeeze slow pairs by `factor`, keep fast ones, a ramp between."""
    refuse(parameters, "mscale", "mscale_all_dim")
    factor = number(parameters, "factor")
    context = number(
        parameters,
        "original_max_position_embeddings",
        integer(config, "max_position_embeddings"),
    )
    dim = 2 * len(inv_freq)

    def pair_with(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with(number(parameters, "beta_fast", 32.0))
    high = pair_with(number(parameters, "beta_slow", 1.0))
    if flag(parameters, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    squeeze = np.clip((np.arange(dim // 2) - low) / span, 0.0, 1.0)
    gain = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    return RopeSpec(
        inv_freq * (1 - squeeze + squeeze / factor), number(parameters, "attention_factor", gain)
    )


def _factors_rope(
    config: Config, parameters: Config, theta: float, inv_freq: Frequencies
) -> RopeSpec:
    """Divisors stored in the file: GGUF's `rope_freqs`."""
    try:
        factors = np.asarray(parameters.get("factors"), dtype=np.float64)
    except (TypeError, ValueError):
        factors = np.empty(0)
    if factors.shape != inv_freq.shape or not np.all(np.isfinite(factors) & (factors > 0)):
        raise CheckpointError(
            f"`rope_freqs.weight`: needs {len(inv_freq)} positive numbers (head_dim / 2), "
            f"got {shown(parameters.get('factors'))}"
        )
    return RopeSpec(inv_freq / factors)


_ROPES = {
    "default": _default_rope,
    "linear": _linear_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
    "factors": _factors_rope,
}
