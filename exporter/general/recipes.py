"""The precisions of models that are exported through transformers: the same blocks in all layers, with GPTQ."""

from __future__ import annotations

from collections.abc import Mapping

from llm_edge.exporter.module_names import HEAD
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.formats.dense import Dense
from llm_edge.exporter.quantization.recipes import RECIPES, Recipe
from llm_edge.runtime.errors import ParameterError

_INT8 = Blocks(bits=8, size=32, symmetric=True)
_INT4 = Blocks(bits=4, size=64, symmetric=False)
_INT4_ENDS = Blocks(bits=8, size=64, symmetric=True)  # embedding and head
_ROUTERS = dict.fromkeys(("gate", "router"), Dense())  # small, and a wrong choice of experts costs most

GENERAL_RECIPES: Mapping[str, Recipe] = {
    "fp32": RECIPES["fp32"],
    "int8": Recipe("int8", RECIPES["int8"].stem, projections=_INT8, overrides=_ROUTERS, embedding=_INT8),
    "int4": Recipe(
        "int4", RECIPES["int4"].stem, projections=_INT4, overrides={**_ROUTERS, HEAD: _INT4_ENDS}, embedding=_INT4_ENDS
    ),
}


def general_recipes(recipes: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
    """Return the precisions of the same names.

    Raises:
        ParameterError: one is not available.
    """
    for recipe in recipes:
        if recipe.name not in GENERAL_RECIPES:
            raise ParameterError(
                f"--precision {recipe.name} is not available for models that are exported through transformers: "
                f"choose from {', '.join(GENERAL_RECIPES)}"
            )
    return tuple(GENERAL_RECIPES[recipe.name] for recipe in recipes)
