"""The recipes of all precisions: which weight format each projection and the embedding are stored in.

To add a precision made of existing formats, add an entry to `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llm_edge.exporter.module_names import HEAD, HEAD_MIX
from llm_edge.exporter.quantization.formats.base import WeightFormat
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.formats.dense import Dense
from llm_edge.exporter.quantization.formats.int8_static import Int8Static
from llm_edge.exporter.quantization.formats.source import Source
from llm_edge.runtime.errors import ParameterError


@dataclass(frozen=True, slots=True)
class Recipe:
    """A precision.

    Attributes:
        name: value of `--precision`.
        stem: file name of the graph without suffix, as transformers.js expects it.
        projections: format of all projections that `overrides` does not list.
        overrides: formats by role, the last part of a module path: `qkv`, `output`, `gate_up`, `up`, `down`, `lm_head`.
        embedding: format of the embedding; a tied embedding uses the format of the head.
        fallback: format of a projection with static activations whose measured error exceeds `max_error`.
        max_error: maximum error of a projection, relative to the mean square of its output.
        calibrated: whether weights are rotated and quantized with GPTQ on a calibration text.
        cache_bits: 8 for an int8 KV cache with calibrated scales; 0 for a cache in the dtype of the activations.
        upgrades: by role, a more accurate format and the fraction of the layers that use it, those with the largest
            error.
    """

    name: str
    stem: str
    projections: WeightFormat
    overrides: Mapping[str, WeightFormat]
    embedding: WeightFormat
    fallback: WeightFormat | None = None
    max_error: float = 0.0
    calibrated: bool = False
    cache_bits: int = 0
    upgrades: Mapping[str, tuple[WeightFormat, float]] = field(default_factory=dict)

    def format_of(self, module: str) -> WeightFormat:
        """Return the format of the projection at a module path such as `layers.0.attention.qkv`."""
        return self.overrides.get(module.rpartition(".")[2], self.projections)

    @property
    def float16(self) -> bool:
        """Whether the graph computes in float16."""
        return self.projections == Dense(16)

    @property
    def lossless(self) -> bool:
        """Whether nothing is quantized, so that the graph must agree with the reference."""
        return all(weight == Dense() for weight in (self.projections, self.embedding, *self.overrides.values()))

    def __str__(self) -> str:
        parts = [str(self.projections), *(f"{role}: {weight}" for role, weight in self.overrides.items())]
        parts += [
            f"{role} in {fraction:.0%} of the layers: {weight}" for role, (weight, fraction) in self.upgrades.items()
        ]
        parts += ["rotated and calibrated"] if self.calibrated else []
        return "; ".join([*parts, *([f"int{self.cache_bits} cache, one scale per channel"] if self.cache_bits else [])])


_INT8_BLOCKS = Blocks(bits=8, size=64, symmetric=True)
_INT4_BLOCKS = Blocks(bits=4, size=128, symmetric=False)
_SMALL_INT8_BLOCKS = Blocks(bits=8, size=32, symmetric=True)


def _calibrated(
    name: str,
    stem: str,
    projections: WeightFormat,
    overrides: Mapping[str, WeightFormat],
    max_error: float = 2e-3,
    upgrades: Mapping[str, tuple[WeightFormat, float]] | None = None,
) -> Recipe:
    return Recipe(
        name,
        stem,
        projections,
        overrides={**overrides, HEAD: _INT8_BLOCKS, HEAD_MIX: Dense()},
        embedding=_INT8_BLOCKS,
        fallback=_SMALL_INT8_BLOCKS,
        max_error=max_error,
        calibrated=True,
        upgrades=upgrades or {},
    )


_INT8 = _calibrated(
    "int8",
    "model_quantized",
    Int8Static(),
    {
        "qkv": Int8Static(activation_bits=16),
        "output": Int8Static(hadamard_block=1),
        "down": Int8Static(hadamard_block=64),
    },
)

# The first precision of a bundle is the default one, so that special precisions come last.
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "model", projections=Dense(), overrides={}, embedding=Dense()),
        _INT8,
        _calibrated(
            "int8-exact",
            "model_int8",
            Int8Static(activation_bits=16),
            {
                "output": Int8Static(hadamard_block=1, activation_bits=16),
                "down": Int8Static(hadamard_block=1, activation_bits=16),
            },
            max_error=5e-4,
        ),
        _calibrated("int4", "model_q4", _INT4_BLOCKS, {"qkv": Int8Static()}),
        _calibrated(
            "int4-mixed",
            "model_q4_mixed",
            _INT4_BLOCKS,
            {"qkv": Int8Static()},
            upgrades={"gate_up": (Int8Static(), 0.4), "down": (Int8Static(hadamard_block=64), 0.5)},
        ),
        Recipe(
            "source",
            "model_source",
            projections=Source(Dense()),
            overrides={HEAD: Source(_SMALL_INT8_BLOCKS)},
            embedding=Source(_SMALL_INT8_BLOCKS),
        ),
        replace(_INT8, name="int8-kv8", stem="model_int8_kv8", cache_bits=8),
        Recipe("fp16", "model_fp16", projections=Dense(16), overrides={}, embedding=Dense(16)),  # for CUDA
    )
}


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
