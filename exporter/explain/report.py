"""Reads from a bundle's manifest how the weights of each precision are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.errors import BundleError

_OTHER = ("norms", "tables", "graph")
_MAX_NAME = 120  # characters of a name or format
_MAX_VALUE = 1e100  # of an error or divergence
_MAX_SHOWN = 32  # precisions, and roles of projections; exported bundles have fewer than ten


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """How a projection or embedding is stored.

    Attributes:
        label: short name of its format, such as `int4-128z`.
        format: description of its format.
        bytes: size including scales and bias.
        error: of its output, relative to the output; None if it was not measured.
    """

    label: str
    format: str
    bytes: int
    error: float | None


@dataclass(frozen=True, slots=True)
class PrecisionExplanation:
    """Contents of a precision.

    Attributes:
        name: name of the precision.
        size: bytes of its files, the sum of all sizes below.
        layers: weights of each layer by role: `qkv`, `output`, `gate_up`, `up`, `down`.
        outside: weights outside of the layers by module path; a head that is missing here shares the embedding.
        other: bytes of `norms`, `tables` (rotary tables, Hadamard matrices and the like), and `graph`: operators,
            small constants, and gaps between tensors.
        divergence: mean KL divergence from PyTorch fp32 in nats; None if it was not measured.
        frontier: size in bytes and estimated divergence of the best mixes of its formats, by size.
    """

    name: str
    size: int
    layers: Sequence[Mapping[str, StoredWeight]]
    outside: Mapping[str, StoredWeight]
    other: Mapping[str, int]
    divergence: float | None
    frontier: Sequence[tuple[int, float]] = ()

    @property
    def roles(self) -> list[str]:
        """Roles of the projections in all layers."""
        return list(dict.fromkeys(role for layer in self.layers for role in layer))

    @property
    def measured(self) -> bool:
        """Whether the error of any projection is known."""
        return any(weight.error is not None for layer in self.layers for weight in layer.values())


def explain(bundle: Bundle, names: Sequence[str] | None = None) -> list[PrecisionExplanation]:
    """Explain the named precisions of a bundle, or all of them.

    Raises:
        BundleError: a precision does not exist, or its manifest entry is missing or invalid.
    """
    selected = dict.fromkeys(bundle.precisions if names is None else names)
    if len(selected) > _MAX_SHOWN:
        raise BundleError(f"{bundle.path / MANIFEST}: {len(selected)} precisions exceed the maximum of {_MAX_SHOWN}")
    return [_explain_precision(bundle, bundle.precision(name).name) for name in selected]


def _explain_precision(bundle: Bundle, name: str) -> PrecisionExplanation:
    if not _is_name(name):
        raise BundleError(f"{bundle.path / MANIFEST}: invalid name of a precision ({name[:_MAX_NAME]!r})")
    entry = bundle.manifest["precisions"][name]
    where = f"{bundle.path / MANIFEST}: precisions.{name}"
    projections, other = entry.get("projections"), entry.get("other")
    if not isinstance(projections, dict) or not isinstance(other, dict):
        raise BundleError(
            f"{where} does not describe its weights: it is TorchScript, or written by an earlier llm-edge; "
            "export the checkpoint again, as ONNX"
        )
    layers: list[dict[str, StoredWeight]] = [{} for _ in range(bundle.shape.num_hidden_layers)]
    outside: dict[str, StoredWeight] = {}
    for module, given in projections.items():
        weight = _read_weight(given, f"{where}.projections.{module}")
        if not _is_name(module):
            raise BundleError(f"{where}.projections: invalid name ({module[:_MAX_NAME]!r}): export the bundle again")
        match = re.fullmatch(r"layers\.([0-9]{1,4})\.(?:\w+\.)*(\w+)", module)
        if match is None:
            outside[module] = weight
        elif int(match[1]) < len(layers) and match[2] not in layers[int(match[1])]:
            layers[int(match[1])][match[2]] = weight
        else:
            raise BundleError(
                f"{where}.projections.{module}: unknown layer or duplicate projection: export the bundle again"
            )
    other_sizes = {key: _read_size(other.get(key), f"{where}.other.{key}") for key in _OTHER}
    divergence = bundle.precisions[name].quality.get("kl_mean")
    if divergence is not None and not _is_number(divergence):
        raise BundleError(f"{where}.quality.kl_mean is {divergence!r}, not a number: export the bundle again")
    size = bundle.precisions[name].size
    frontier = _read_frontier(entry.get("frontier", []), f"{where}.frontier")
    explanation = PrecisionExplanation(name, size, layers, outside, other_sizes, divergence, frontier)
    if len(explanation.roles) > _MAX_SHOWN:
        raise BundleError(f"{where}.projections: more than {_MAX_SHOWN} roles of projections: export the bundle again")
    return explanation


def _read_frontier(given: Any, where: str) -> list[tuple[int, float]]:
    points: list[Any] = given if isinstance(given, list) and len(given) <= _MAX_SHOWN else [None]
    if not all(isinstance(point, dict) and _is_number(point.get("divergence")) for point in points):
        raise BundleError(f"{where} is not a list of sizes and divergences: export the bundle again")
    return [(_read_size(point.get("bytes"), f"{where}.bytes"), point["divergence"]) for point in points]


def _read_weight(given: Any, where: str) -> StoredWeight:
    entry = given if isinstance(given, dict) else {}
    weight_format = entry.get("format")
    texts = [weight_format.get(key) if isinstance(weight_format, dict) else None for key in ("label", "description")]
    label, description = (text if isinstance(text, str) and _is_name(text) else "" for text in texts)
    if not label or not description:
        raise BundleError(f"{where}.format has no valid label and description: export the bundle again")
    error = entry.get("error")
    if error is not None and (not _is_number(error) or error < 0):
        raise BundleError(f"{where}.error is {error!r}, not a number of at least 0: export the bundle again")
    return StoredWeight(label, description, _read_size(entry.get("bytes"), f"{where}.bytes"), error)


def _is_name(value: str) -> bool:
    return value.isprintable() and 0 < len(value) <= _MAX_NAME


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MAX_VALUE < value < _MAX_VALUE


def _read_size(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise BundleError(f"{where} is not a number of bytes: export the bundle again")
    return value
