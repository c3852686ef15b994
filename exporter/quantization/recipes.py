"""The recipes of all precisions: the format of each weight, or what decides on it.

To add a precision made of existing formats, add an entry to `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.exporter.quantization.formats.base import WeightFormat
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.formats.dense import Dense
from llm_edge.exporter.quantization.formats.int8_static import Int8Static
from llm_edge.exporter.quantization.formats.source import Source
from llm_edge.exporter.quantization.goals import AsFaithfulAsQ8, AsSmallAs, Goal
from llm_edge.runtime.errors import ParameterError

_FP32 = Dense()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A precision.

    Attributes:
        name: value of `--precision`.
        stem: file name of the graph without suffix, as transformers.js expects it.
        projections: format of all projections that `overrides` does not list.
        overrides: formats by role, the last part of a module path: `qkv`, `output`, `gate_up`, `up`, `down`, `lm_head`.
        embedding: format of the embedding; a tied embedding uses the format of the head.
        choices: by role, formats among which `goal` chooses for each module.
        goal: which mix of `choices` is best. Weights are then rotated, and quantized with GPTQ on a calibration text.
        cache_bits: 8 for an int8 KV cache with calibrated scales; 0 for a cache in the dtype of the activations.
    """

    name: str
    stem: str
    projections: WeightFormat = _FP32
    overrides: Mapping[str, WeightFormat] = field(default_factory=dict)
    embedding: WeightFormat = _FP32
    choices: Mapping[str, tuple[WeightFormat, ...]] = field(default_factory=dict)
    goal: Goal | None = None
    cache_bits: int = 0

    def format_of(self, module: str) -> WeightFormat:
        """Return the format of the weight at a module path such as `layers.0.attention.qkv`."""
        return (
            self.embedding if module == EMBEDDING else self.overrides.get(module.rpartition(".")[2], self.projections)
        )

    @property
    def calibrated(self) -> bool:
        """Whether weights are rotated, and quantized on a calibration text."""
        return self.goal is not None

    @property
    def float16(self) -> bool:
        """Whether the graph computes in float16."""
        return self.projections == Dense(16)

    @property
    def lossless(self) -> bool:
        """Whether nothing is quantized, so that the graph must agree with the reference."""
        formats = (self.projections, self.embedding, *self.overrides.values())
        return not self.calibrated and all(weight == _FP32 for weight in formats)

    def __str__(self) -> str:
        if self.goal is not None:
            text = f"{self.goal}; rotated and calibrated"
        else:
            overrides = (f"{role}: {weight}" for role, weight in self.overrides.items())
            text = "; ".join([str(self.projections), *overrides])
        return f"{text}; int{self.cache_bits} cache, one scale per channel" if self.cache_bits else text


_SMALL_INT8_BLOCKS = Blocks(bits=8, size=32, symmetric=True)
_INT8_BLOCKS = Blocks(bits=8, size=64, symmetric=True)
_INT4_BLOCKS = tuple(Blocks(bits=4, size=size, symmetric=False) for size in (128, 64, 32))
_INT4_ROWS = (*(Blocks(bits=4, size=size, symmetric=False) for size in (32, 16)), _INT8_BLOCKS)
_INT8_ROWS = (_INT8_BLOCKS, _SMALL_INT8_BLOCKS)
"""Of the embedding and the head."""


_STATIC: Mapping[str, tuple[WeightFormat, ...]] = {
    role: tuple(Int8Static(hadamard_block=block, activation_bits=bits) for bits in (8, 16))
    for role, block in {"qkv": 0, "output": 1, "gate_up": 0, "up": 0, "down": 64}.items()
}
_INT8_CHOICES = {
    **{role: (*formats, _INT8_BLOCKS) for role, formats in _STATIC.items()},  # blocks for inputs with outliers
    HEAD: _INT8_ROWS,
    EMBEDDING: _INT8_ROWS,
}
_INT4_CHOICES = {
    **{role: (*_INT4_BLOCKS, *formats) for role, formats in _STATIC.items()},
    HEAD: _INT4_ROWS,
    EMBEDDING: _INT4_ROWS,
}
_MIXED_CHOICES = {role: (*_INT4_CHOICES[role], *_INT8_CHOICES[role]) for role in _INT4_CHOICES}
_INT8 = Recipe("int8", "model_quantized", choices=_INT8_CHOICES, goal=AsFaithfulAsQ8())

# The first precision of a bundle is the default one, so that special precisions come last.
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "model"),
        _INT8,
        Recipe("int8-exact", "model_int8", choices=_INT8_CHOICES, goal=AsFaithfulAsQ8(0.4)),
        Recipe("int4", "model_q4", choices=_INT4_CHOICES, goal=AsSmallAs("Q4_0")),
        Recipe("int4-mixed", "model_q4_mixed", choices=_INT4_CHOICES, goal=AsSmallAs("Q4_K_M")),
        Recipe(
            "source",
            "model_source",
            projections=Source(Dense()),
            overrides={HEAD: Source(_SMALL_INT8_BLOCKS)},
            embedding=Source(_SMALL_INT8_BLOCKS),
        ),
        replace(_INT8, name="int8-kv8", stem="model_int8_kv8", cache_bits=8),
        Recipe("fp16", "model_fp16", projections=Dense(16), embedding=Dense(16)),  # for CUDA
    )
}


def mixed(goal: Goal) -> Recipe:
    """Return the precision `mixed`, a mix of all formats that a target on the command line decides on."""
    return Recipe("mixed", "model_mixed", choices=_MIXED_CHOICES, goal=goal)


def parse_precisions(text: str) -> tuple[Recipe, ...]:
    """Return the recipes named in a comma-separated list, in the order of `RECIPES`.

    Raises:
        ParameterError: a name is unknown, or the list is empty.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in RECIPES:
            raise ParameterError(f"--precision: unknown precision {name!r}; choose from {', '.join(RECIPES)}")
    if not names:
        raise ParameterError(f"--precision is empty; choose from {', '.join(RECIPES)}")
    return tuple(recipe for name, recipe in RECIPES.items() if name in names)
