"""What each precision is: which format every projection and the embedding are stored in.

This is the place to change a precision. Knows nothing of graphs or of rounding; `lower.py` and `calibrate.py` carry a
recipe out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llm_edge.runtime.errors import ParameterError

HEAD = "lm_head"
_NARROWEST = 16  # weights a block of MatMulNBits


@dataclass(frozen=True, slots=True)
class Dense:
    """Weights as floating-point numbers of 32 bits, or 16."""

    bits: int = 32

    @property
    def bytes_per_weight(self) -> float:
        """Disk a weight takes."""
        return self.bits / 8

    def __str__(self) -> str:
        return f"fp{self.bits}"


@dataclass(frozen=True, slots=True)
class Blocks:
    """Weights in blocks along the input axis with a scale each, for the operator MatMulNBits.

    It rounds activations to 8 bits itself, block by block.

    Attributes:
        bits: 4 or 8 a weight.
        size: weights a block, a power of two from 16 on.
        symmetric: zero lies in the middle of the range; otherwise each block has a zero point too.
    """

    bits: int
    size: int
    symmetric: bool

    @property
    def bytes_per_weight(self) -> float:
        """About how much disk a weight takes: its bits and its share of the block's scale."""
        return self.bits / 8 + 4 / self.size

    def count(self, width: int) -> int:
        """Blocks in a row of `width` weights; the last one may be filled up."""
        return -(-width // self.size)

    def fitting(self, width: int) -> Blocks:
        """The same in half as large blocks, or a quarter, where only those divide a row: filling up costs time."""
        for size in (self.size, self.size // 2, self.size // 4):
            if width % size == 0 and size >= _NARROWEST:
                return Blocks(self.bits, size, self.symmetric)
        return self

    def __str__(self) -> str:
        return f"int{self.bits} blocks of {self.size}{'' if self.symmetric else ', zero points'}"


@dataclass(frozen=True, slots=True)
class Integer:
    """Products of 8-bit weights, one scale an output, and 8-bit activations of a scale that calibration fixed.

    Rows of a batch do not see each other, and the product runs several times as fast as one with `Blocks`.

    Attributes:
        spread: activations are divided by their root mean square, token by token, and mixed by a Hadamard matrix in
            blocks of about this many before they are rounded: for inputs with outliers. 1 divides without mixing, 0
            leaves them as they are.
        terms: 1, or 2 for activations of 16 bits as the sum of two 8-bit ones.
    """

    spread: int = 0
    terms: int = 1

    bytes_per_weight = 1.0

    def __str__(self) -> str:
        spread = f", spread over {self.spread}" if self.spread else ""
        return f"int8 channels x {8 * self.terms}-bit activations{spread}"


@dataclass(frozen=True, slots=True)
class Source:
    """The numbers of a quantized source as they are: blocks of 32 weights with a scale, and an offset or none.

    They are written like `Blocks`; what offsets add to a product is a small product of its own, of float32.

    Attributes:
        otherwise: format of a weight that the source does not hold in such blocks.
    """

    otherwise: Dense | Blocks

    bytes_per_weight = 1.125

    def __str__(self) -> str:
        return f"the source's own blocks, else {self.otherwise}"


Format = Dense | Blocks | Integer | Source


@dataclass(frozen=True, slots=True)
class Recipe:
    """A precision.

    Attributes:
        name: what `--precision` takes.
        stem: name of the graph in the bundle's `onnx` folder, without suffix, as transformers.js looks for it.
        projections: format of all projections that `special` does not name.
        special: formats by role, the last part of a module's path: `qkv`, `output`, `gate_up`, `up`, `down`, `lm_head`.
        embedding: format of the embedding where it is not tied to the head; tied, it takes the head's.
        fallback: format of a projection whose measured error in its own is larger than `limit`.
        limit: error that a projection may make, relative to the mean square of its output.
        calibrated: weights are rotated, and rounded so that they make up for each other's errors on a text.
        cache_bits: 8 for a KV cache of int8 with scales that calibration fixed; 0 for one of the activations' type.
        upgrades: by role, a better format and the share of the layers that get it: those that err most without.
    """

    name: str
    stem: str
    projections: Format
    special: Mapping[str, Format]
    embedding: Format
    fallback: Format | None = None
    limit: float = 0.0
    calibrated: bool = False
    cache_bits: int = 0
    upgrades: Mapping[str, tuple[Format, float]] = field(default_factory=dict)

    def format_of(self, module: str) -> Format:
        """Format of the projection at a module path such as `layers.0.attention.qkv`."""
        return self.special.get(module.rpartition(".")[2], self.projections)

    @property
    def half(self) -> bool:
        """Whether the graph computes in float16."""
        return self.projections == Dense(16)

    @property
    def lossless(self) -> bool:
        """Whether nothing is rounded, so that the graph must agree with the reference."""
        return all(form == Dense() for form in (self.projections, self.embedding, *self.special.values()))

    @property
    def bytes_per_weight(self) -> float:
        """About how much disk a weight takes."""
        return self.projections.bytes_per_weight

    def __str__(self) -> str:
        parts = [str(self.projections), *(f"{name} {form}" for name, form in self.special.items())]
        parts += [f"{name} of {share:.0%} of the layers {form}" for name, (form, share) in self.upgrades.items()]
        parts += ["rotated and calibrated"] if self.calibrated else []
        return "; ".join([*parts, *([f"int{self.cache_bits} cache, a scale a channel"] if self.cache_bits else [])])


_BYTES = Blocks(bits=8, size=64, symmetric=True)
_NIBBLES = Blocks(bits=4, size=128, symmetric=False)
_EXACT = Blocks(bits=8, size=32, symmetric=True)


def _calibrated(
    name: str,
    stem: str,
    projections: Format,
    special: Mapping[str, Format],
    limit: float = 2e-3,
    upgrades: Mapping[str, tuple[Format, float]] | None = None,
) -> Recipe:
    special = {**special, HEAD: _BYTES, "head_mix": Dense()}
    return Recipe(name, stem, projections, special, _BYTES, _EXACT, limit, calibrated=True, upgrades=upgrades or {})


_INT8 = _calibrated(
    "int8",
    "model_quantized",
    Integer(),
    {"qkv": Integer(terms=2), "output": Integer(spread=1), "down": Integer(spread=64)},
)

# A bundle's first precision is the one that is taken where none is named: the special ones come last.
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "model", projections=Dense(), special={}, embedding=Dense()),
        _INT8,
        _calibrated(
            "int8-exact",
            "model_int8",
            Integer(terms=2),
            {"output": Integer(spread=1, terms=2), "down": Integer(spread=1, terms=2)},
            limit=5e-4,
        ),
        _calibrated("int4", "model_q4", _NIBBLES, {"qkv": Integer()}),
        _calibrated(
            "int4-mixed",
            "model_q4_mixed",
            _NIBBLES,
            {"qkv": Integer()},
            upgrades={"gate_up": (Integer(), 0.4), "down": (Integer(spread=64), 0.5)},
        ),
        Recipe("source", "model_source", Source(Dense()), {HEAD: Source(_EXACT)}, embedding=Source(_EXACT)),
        replace(_INT8, name="int8-kv8", stem="model_int8_kv8", cache_bits=8),
        Recipe("fp16", "model_fp16", projections=Dense(16), special={}, embedding=Dense(16)),  # for CUDA
    )
}


def parse_precisions(text: str) -> tuple[Recipe, ...]:
    """Recipes named in a comma-separated list, in the order of `RECIPES`.

    Raises:
        ParameterError: a name is not known, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in RECIPES:
            raise ParameterError(f"--precision: {name!r} is not known; known: {', '.join(RECIPES)}")
    if not names:
        raise ParameterError(f"--precision is empty; known: {', '.join(RECIPES)}")
    return tuple(recipe for name, recipe in RECIPES.items() if name in names)
