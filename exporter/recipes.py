"""What each precision is: which format every projection and the embedding are stored in.

This is the place to change a precision. Knows nothing of graphs; `lower.py` carries a recipe out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llm_edge.runtime.errors import ParameterError

HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Dense:
    """Weights as float32."""

    bytes_per_weight = 4.0

    def __str__(self) -> str:
        return "fp32"


@dataclass(frozen=True, slots=True)
class Blocks:
    """Weights in blocks along the input axis with a scale each, for the operator MatMulNBits.

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

    def __str__(self) -> str:
        return f"int{self.bits} blocks of {self.size}{'' if self.symmetric else ', zero points'}"


Format = Dense | Blocks


@dataclass(frozen=True, slots=True)
class Recipe:
    """A precision.

    Attributes:
        name: what `--precision` takes.
        stem: name of the graph in the bundle's `onnx` folder, without suffix, as transformers.js looks for it.
        projections: format of all projections that `special` does not name.
        special: formats by module path, for example `lm_head`.
        embedding: format of the embedding where it is not tied to the head; tied, it takes the head's.
    """

    name: str
    stem: str
    projections: Format
    special: Mapping[str, Format]
    embedding: Format

    def format_of(self, module: str) -> Format:
        """Format of the projection at a module path such as `layers.0.attention.qkv`."""
        return self.special.get(module, self.projections)

    @property
    def lossless(self) -> bool:
        """Whether nothing is rounded, so that the graph must agree with the reference."""
        return all(isinstance(form, Dense) for form in (self.projections, self.embedding, *self.special.values()))

    @property
    def bytes_per_weight(self) -> float:
        """About how much disk a weight takes."""
        return self.projections.bytes_per_weight

    def __str__(self) -> str:
        parts = [str(self.projections), *(f"{name} {form}" for name, form in self.special.items())]
        return "; ".join(parts)


_INT8 = Blocks(bits=8, size=32, symmetric=True)
_INT4 = Blocks(bits=4, size=32, symmetric=False)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "model", projections=Dense(), special={}, embedding=Dense()),
        Recipe("int8", "model_quantized", projections=_INT8, special={}, embedding=_INT8),
        Recipe("int4", "model_q4", projections=_INT4, special={HEAD: _INT8}, embedding=_INT8),
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
