"""Where a precision's bytes and errors lie, as a bundle's manifest tells it. Knows nothing of graphs or terminals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.errors import BundleError

EMBEDDING = "embed_tokens"
HEAD = "lm_head"
_OTHER = ("norms", "tables", "graph")
_LONGEST = 120  # characters of a name or format in a manifest
_MOST = 1e100  # of an error or divergence
_MOST_SHOWN = 32  # precisions, and roles; ours are fewer than ten


@dataclass(frozen=True, slots=True)
class Stored:
    """How a projection or an embedding lies in the files.

    Attributes:
        format: `str` of a `recipes.Format`.
        bytes: with scales, bias and whatever else belongs to it.
        error: of its output relative to the output, as `calibrate.Choice` holds it; None where nothing measured it.
    """

    format: str
    bytes: int
    error: float | None


@dataclass(frozen=True, slots=True)
class Explained:
    """What a precision is made of.

    Attributes:
        name: of the precision.
        size: bytes of its files; the sum of all that follows.
        layers: one mapping a layer, by role: `qkv`, `output`, `gate_up`, `up`, `down`.
        outside: what belongs to no layer, by module path; a head that is not there shares the embedding.
        other: bytes of `norms`, `tables` (rotary positions, Hadamard matrices and the like), and `graph`: operators,
            small constants, and gaps between tensors.
        divergence: mean KL to PyTorch fp32 in nats; None where nobody measured.
    """

    name: str
    size: int
    layers: Sequence[Mapping[str, Stored]]
    outside: Mapping[str, Stored]
    other: Mapping[str, int]
    divergence: float | None

    @property
    def roles(self) -> list[str]:
        """Of the projections of all layers."""
        return list(dict.fromkeys(role for layer in self.layers for role in layer))

    @property
    def measured(self) -> bool:
        """Whether an error of any projection is known."""
        return any(stored.error is not None for layer in self.layers for stored in layer.values())


def explain(bundle: Bundle, names: Sequence[str] | None = None) -> list[Explained]:
    """What the precisions of a bundle are made of; `names` are some of them, each told once, None takes all.

    Raises:
        BundleError: a name is not in the bundle, or the manifest does not say, or not what can be.
    """
    asked = dict.fromkeys(bundle.precisions if names is None else names)
    if len(asked) > _MOST_SHOWN:
        raise BundleError(f"{bundle.path / MANIFEST}: {len(asked)} precisions, no more than {_MOST_SHOWN} can be shown")
    return [_explained(bundle, bundle.precision(name).name) for name in asked]


def _explained(bundle: Bundle, name: str) -> Explained:
    if not _is_name(name):
        raise BundleError(f"{bundle.path / MANIFEST}: a precision's name that is none ({name[:_LONGEST]!r})")
    entry = bundle.manifest["precisions"][name]
    where = f"{bundle.path / MANIFEST}: precisions.{name}"
    projections, other = entry.get("projections"), entry.get("other")
    if not isinstance(projections, dict) or not isinstance(other, dict):
        raise BundleError(
            f"{where} does not say how its projections are stored: it is TorchScript, or of an earlier llm-edge; "
            "export the checkpoint again, as ONNX"
        )
    layers: list[dict[str, Stored]] = [{} for _ in range(bundle.shape.num_hidden_layers)]
    outside: dict[str, Stored] = {}
    for module, given in projections.items():
        stored = _stored(given, f"{where}.projections.{module}")
        if not _is_name(module):
            raise BundleError(f"{where}.projections: a name that is none ({module[:_LONGEST]!r}): export it again")
        found = re.fullmatch(r"layers\.([0-9]{1,4})\.(?:\w+\.)*(\w+)", module)
        if found is None:
            outside[module] = stored
        elif int(found[1]) < len(layers) and found[2] not in layers[int(found[1])]:
            layers[int(found[1])][found[2]] = stored
        else:
            raise BundleError(f"{where}.projections.{module}: no such layer, or told twice: export it again")
    rest = {key: _bytes(other.get(key), f"{where}.other.{key}") for key in _OTHER}
    divergence = bundle.precisions[name].quality.get("kl_mean")
    if divergence is not None and not _is_number(divergence):
        raise BundleError(f"{where}.quality.kl_mean is {divergence!r}, not a number: export the bundle again")
    explained = Explained(name, bundle.precisions[name].size, layers, outside, rest, divergence)
    if len(explained.roles) > _MOST_SHOWN:
        raise BundleError(f"{where}.projections: more than {_MOST_SHOWN} kinds of them in the layers: export it again")
    return explained


def _stored(given: Any, where: str) -> Stored:
    form, error = (given.get("format"), given.get("error")) if isinstance(given, dict) else (None, None)
    if not isinstance(form, str) or not _is_name(form):
        raise BundleError(f"{where}: no format that can be shown: export the bundle again")
    if error is not None and (not _is_number(error) or error < 0):
        raise BundleError(f"{where}.error is {error!r}, not a number from 0 on: export the bundle again")
    return Stored(form, _bytes(given.get("bytes"), f"{where}.bytes"), error)


def _is_name(value: str) -> bool:
    return value.isprintable() and 0 < len(value) <= _LONGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


def _bytes(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise BundleError(f"{where} is not a number of bytes: export the bundle again")
    return value
