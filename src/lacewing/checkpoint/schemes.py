"""The `quantization_config` of compressed-tensors: which modules are rounded, and how."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacewing.checkpoint.files import fail, shown
from lacewing.checkpoint.parts import Parts
from lacewing.checkpoint.settings import Config, refuse
from lacewing.checkpoint.targets import matches
from lacewing.checkpoint.words import Layout

__all__ = ["ORIGINAL", "Scheme", "Schemes"]

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")
_SPARSE = ("sparse-bitmask", "sparse-24-bitmask", "dense")
_STRATEGIES = ("tensor", "channel", "group")
_STREAM_SINCE = (0, 18)
_EMBEDDINGS = ("wte", "wpe")
"""Names of embeddings that do not say so."""
ORIGINAL = "use the original model, or an export of it in integers (W4A16, W8A8)"


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are rounded."""

    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    reordered: bool
    layout: Layout | None
    """How codes lie in words, by the version that wrote them; None where it is not said."""


class Schemes:
    """`config_groups`, checked."""

    def __init__(self, place: Path, config: Config, modules: Iterable[str]) -> None:
        """modules: those that are stored, whose names are no classes."""
        self._modules = frozenset(modules)
        self._where = f"{place / 'config.json'}: `quantization_config`"
        self._config = config
        self.notes: list[str] = []
        self._check_whole()
        groups = config.get("config_groups") or {}
        if not isinstance(groups, dict):
            fail(f"{self._where}.config_groups", "a mapping", shown(groups))
        self._schemes = [
            scheme
            for name, group in groups.items()
            if (scheme := self._scheme(f"{self._where}.config_groups.{shown(name)}", group))
        ]

    def _check_whole(self) -> None:
        self._check_format(self._where, self._config.get("format"))
        sparsity = self._config.get("sparsity_config") or {}
        kind = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
        if kind not in _SPARSE:
            refuse(f"{self._where}.sparsity_config", f"format {', '.join(_SPARSE)}", kind, ORIGINAL)
        if self._config.get("transform_config"):
            where = f"{self._where}.transform_config"
            refuse(where, "weights that are not rotated", "a transform", ORIGINAL)
        if self._config.get("kv_cache_scheme"):
            self.notes.append(
                "`kv_cache_scheme` is left out: the format of the KV cache is chosen when the"
                " model runs (--kv)"
            )

    def _check_format(self, where: str, value: Any) -> None:
        if value is not None and value not in _FORMATS:
            refuse(f"{where}.format", f"one of {', '.join(_FORMATS)}", value, ORIGINAL)

    def _scheme(self, where: str, group: Any) -> Scheme | None:
        """None for a group that leaves weights as they are."""
        if not isinstance(group, dict):
            fail(where, "a mapping", shown(group))
        self._check_format(where, group.get("format"))
        self._note_activations(group)
        weights, targets = group.get("weights"), group.get("targets")
        if weights is None:
            return None
        if not isinstance(weights, dict):
            fail(f"{where}.weights", "a mapping", shown(weights))
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            fail(f"{where}.targets", "a list of names", shown(targets))
        if weights.get("type", "int") != "int":
            refuse(f"{where}.weights.type", "int", weights.get("type"), ORIGINAL)
        bits = weights.get("num_bits", 8)
        if type(bits) is not int or not 2 <= bits <= 8:
            refuse(f"{where}.weights.num_bits", "2 to 8 bits", bits, ORIGINAL)
        strategy, size = self._grouping(f"{where}.weights", weights)
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool):
            fail(f"{where}.weights.symmetric", "true or false", shown(symmetric))
        reordered = weights.get("actorder") in ("group", "dynamic", True)
        layout = self._layout()
        return Scheme(tuple(targets), bits, symmetric, strategy, size, reordered, layout)

    def _grouping(self, where: str, weights: Config) -> tuple[str, int | None]:
        size = weights.get("group_size")
        if size is not None and (type(size) is not int or not (size == -1 or 0 < size < 1 << 31)):
            fail(f"{where}.group_size", "a positive number, -1 or null", shown(size))
        inferred = "tensor" if size is None else "group" if size > 0 else "channel"
        strategy = weights.get("strategy") or inferred
        if strategy not in _STRATEGIES:
            refuse(f"{where}.strategy", f"one of {', '.join(_STRATEGIES)}", strategy, ORIGINAL)
        if strategy == "group" and (size is None or size < 1):
            fail(f"{where}.group_size", "a positive number", shown(size))
        return strategy, size if strategy == "group" else None

    def _layout(self) -> Layout | None:
        version = self._config.get("version")
        found = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
        if found is None:
            return None
        return "stream" if (int(found[1]), int(found[2])) >= _STREAM_SINCE else "padded"

    def _note_activations(self, group: Config) -> None:
        if group.get("input_activations") or group.get("output_activations"):
            note = (
                "how activations are to be rounded is left out: our formats round them to 8 bits"
                " per token and group while they run"
            )
            if note not in self.notes:
                self.notes.append(note)

    def of(self, parts: Parts) -> Scheme:
        """The scheme of a module: by its name, else by an expression, else by a class."""
        module = parts.module
        exact = [s for s in self._schemes if module in s.targets]
        found = exact or [s for s in self._schemes if self._expression(s, module)]
        found = found or self._by_class(module)
        if not found:
            targets = [target for scheme in self._schemes for target in scheme.targets]
            where = f"{self._where}.config_groups"
            fail(where, f"a group for `{shown(module)}`", shown(targets or "none"))
        if len(found) > 1 and any(scheme != found[0] for scheme in found):
            where = f"{self._where}.config_groups"
            fail(where, f"one group for `{shown(module)}`", f"{len(found)} that differ")
        return found[0]

    def _expression(self, scheme: Scheme, module: str) -> bool:
        where = f"{self._where}.config_groups"
        return any(
            matches(target.removeprefix("re:"), module, where)
            for target in scheme.targets
            if target.startswith("re:")
        )

    def _by_class(self, module: str) -> list[Scheme]:
        """The schemes for the module's class. Files know no classes: what is called an embedding is
        one where there is a scheme for those; all else that has parts, and GPT-NeoX's head
        `embed_out`, is a kind of linear layer."""
        name = module.rpartition(".")[2]
        embeddings = [s for s in self._schemes if any("Embedding" in c for c in self._classes(s))]
        if embeddings and name != "embed_out" and ("embed" in name or name in _EMBEDDINGS):
            return embeddings
        return [s for s in self._schemes if any("Embedding" not in c for c in self._classes(s))]

    def _classes(self, scheme: Scheme) -> list[str]:
        return [t for t in scheme.targets if not set(".:") & set(t) and t not in self._modules]
