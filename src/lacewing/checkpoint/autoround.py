"""auto-round's exports. `packing_format` (`backend` in old ones) says what the tensors are:

    auto_round:auto_gptq..            GPTQ with zero points less one
    auto_round, auto_round:gptqmodel  GPTQ with zero points as they are
    auto_round:auto_awq..             AWQ

Single modules have settings of their own in `extra_config`, by name or by an expression.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lacewing.checkpoint.awq import AWQ_PARTS, AwqTensor
from lacewing.checkpoint.files import fail, shown
from lacewing.checkpoint.gptq import GPTQ_PARTS, GptqTensor
from lacewing.checkpoint.parts import Files, Parts, Reading, modules_with
from lacewing.checkpoint.settings import Config, Settings, refuse
from lacewing.checkpoint.targets import matches

__all__ = ["read_auto_round"]

_PLAIN = ("auto_round", "auto_round:exllamav2", "auto_round:tritonv2", "auto_round:gptqmodel")


def read_auto_round(place: Path, config: Config, files: Files) -> Reading:
    """Raises UnsupportedModelError and CheckpointError."""
    where = f"{place / 'config.json'}: `quantization_config`"
    packing = config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq"
    awq, offset = _packing(where, packing)
    if config.get("rotation_config"):
        refuse(f"{where}.rotation_config", "weights that are not rotated", "a rotation")
    rules = config.get("extra_config") or {}
    if not isinstance(rules, dict) or not all(isinstance(rule, dict) for rule in rules.values()):
        fail(f"{where}.extra_config", "a mapping of modules to settings", shown(rules))
    reading = Reading()
    modules = modules_with("qweight", files)
    expressions = {key: rule for key, rule in rules.items() if key not in modules}
    for module in modules:
        own = {module: rules[module]} if module in rules else {}
        settings = _settings(where, config, own | expressions, module)
        if awq:
            parts = Parts(place, module, AWQ_PARTS, files)
            reading.add(AwqTensor(parts, settings, "auto-round awq"), parts)
        else:
            parts = Parts(place, module, GPTQ_PARTS, files)
            reading.add(GptqTensor(parts, settings, offset, "stream", "auto-round gptq"), parts)
    return reading


def _packing(where: str, packing: Any) -> tuple[bool, int]:
    """Whether weights lie as in AWQ, and what is added to a stored zero point."""
    text = packing if isinstance(packing, str) else ""
    if text in _PLAIN:
        return False, 0
    if text.startswith("auto_round:auto_awq") or text == "auto_round:awq":
        return True, 0
    if text.startswith(("auto_round:auto_gptq", "auto_round:gptq")) and "gptqmodel" not in text:
        return False, 1
    known = f"{', '.join(_PLAIN)}, auto_round:auto_gptq, auto_round:auto_awq"
    refuse(f"{where}.packing_format", f"one of {known}", packing)


def _settings(where: str, config: Config, rules: dict[str, Any], module: str) -> Settings:
    """`rules`: those for the very name, then expressions; the first that matches wins."""
    found = (p for p in rules if p == module or matches(p, module, f"{where}.extra_config", True))
    merged = {**config, **rules.get(next(found, ""), {})}
    if merged.get("data_type", "int") != "int":
        refuse(f"{where}.data_type", "int", merged["data_type"])
    act_bits = merged.get("act_bits", 16)
    if type(act_bits) is not int or act_bits < 16:
        refuse(f"{where}.act_bits", "activations that are not rounded", act_bits)
    return Settings.of(where, merged)
