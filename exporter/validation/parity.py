"""Verifies exported models against the reference decoder: whole models of any size, in bounded memory.

The reference runs layer by layer over the text and its logits are stored in a file. Graphs are run by the runtime, but
unquantized ones that are large, or only proven and not exported, run part by part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.exporter.bundle.onnx_writer import GraphFiles, OnnxWriter
from llm_edge.exporter.bundle.writer import BundleWriter
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights, rotated_config
from llm_edge.exporter.texts import Window
from llm_edge.exporter.validation.compare import (
    MAX_BOUND,
    MEAN_BOUND,
    Difference,
    Parity,
    Quality,
    compare,
    compare_in_one_step,
    relative_difference,
    score,
)
from llm_edge.exporter.validation.graph_parts import PartwiseGraph
from llm_edge.exporter.validation.independent import IndependentCheck, compare_with_transformers
from llm_edge.exporter.validation.reference import ReferenceLogits, record_reference, reference_logits
from llm_edge.exporter.validation.windows import Forward, Run, select_windows
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import count_parameters
from llm_edge.runtime.backend.open import AnySession
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.errors import ParityError
from llm_edge.runtime.model_shape import ModelShape, key_value_caches

Exported: TypeAlias = AnySession | PartwiseGraph
"""A loaded model."""
ROTATED = "rotated"
"""Name of the rotated model in `Validation.parities`."""
UNQUANTIZED = "fp32"
"""Name of the unquantized graph in `Validation.parities`, if it is not in the bundle."""
_WHOLE_BYTES = 2 << 30  # graphs of more weights run part by part
_REFERENCE_FRACTION = 0.4  # of the validation time


@dataclass(frozen=True, slots=True)
class Validation:
    """Result of a validation.

    Attributes:
        parities: by precision; also of the rotated model, and of fp32 if it was compared only as a proof.
        qualities: by precision.
        independent: comparison of the reference with transformers.
    """

    parities: Mapping[str, Parity]
    qualities: Mapping[str, Quality]
    independent: IndependentCheck

    @property
    def auxiliary_parities(self) -> dict[str, Parity]:
        """Parities of models that are not in the bundle."""
        return {name: parity for name, parity in self.parities.items() if name not in self.qualities}


def verify_parity(
    folder: Path,
    checkpoint: Checkpoint,
    recipes: tuple[Recipe, ...],
    writer: BundleWriter,
    text: Sequence[Window],
    progress: Progress,
) -> Validation:
    """Compare all precisions of a bundle with the reference.

    No bound applies to quantized models. If fp32 is not among the recipes, its graph is compared without writing it.

    Args:
        folder: folder of the exported models. A temporary file of logits is created beside it.
        checkpoint: what was exported.
        recipes: of the bundle.
        writer: of the bundle.
        text: for validation.
        progress: called with the completed fraction.

    Raises:
        ParityError: an fp32 model exceeds the bounds, or logits are NaN or infinity.
    """
    config, weights = checkpoint.config, checkpoint.weights
    windows = select_windows(text, config.vocab_size, count_parameters(config))

    def update(fraction: float, item: str) -> None:
        progress("validating", _REFERENCE_FRACTION * fraction, f"PyTorch: {item}")

    expected = record_reference(config, weights, windows, folder.parent / "logits", update)
    progress("validating", _REFERENCE_FRACTION, "transformers")
    parities, qualities = {}, {}
    independent = compare_with_transformers(checkpoint, expected)
    if any(recipe.calibrated for recipe in recipes):
        progress("validating", _REFERENCE_FRACTION, ROTATED)
        parities[ROTATED] = _compare_rotated(checkpoint, expected)
    if isinstance(writer, OnnxWriter) and not any(recipe.lossless for recipe in recipes):
        progress("validating", _REFERENCE_FRACTION, UNQUANTIZED)
        parities[UNQUANTIZED] = _compare_unquantized(checkpoint, expected, writer)
    for number, recipe in enumerate(recipes):

        def update_recipe(fraction: float, number: int = number, name: str = recipe.name) -> None:
            done = (number + fraction) / len(recipes)
            progress("validating", _REFERENCE_FRACTION + (1 - _REFERENCE_FRACTION) * done, name)

        update_recipe(0.0)
        model = open_exported(folder, model_shape(config), recipe, writer)
        parity, quality = score_exported(expected, model, update_recipe)
        if writer.hidden_size is not None:
            parity = dataclasses.replace(parity, hidden_states=_compare_hidden_states(expected, model))
        check_parity(recipe.name, parity, exact=recipe.lossless)
        parities[recipe.name], qualities[recipe.name] = parity, quality
        del model  # only one model in memory at a time
    expected.path.unlink()
    return Validation(parities, qualities, independent)


def _compare_rotated(checkpoint: Checkpoint, expected: ReferenceLogits) -> Parity:
    """Return the parity of the rotated model in PyTorch, from which calibrated precisions are quantized."""
    config, weights = rotated_config(checkpoint.config), RotatedWeights(checkpoint.config, checkpoint.weights)
    parity = compare_in_one_step(expected, reference_logits(config, weights, expected.cached.tokens))
    check_parity(ROTATED, parity, exact=True)
    return parity


def _compare_unquantized(checkpoint: Checkpoint, expected: ReferenceLogits, writer: OnnxWriter) -> Parity:
    """Return the parity of the unquantized graph."""
    graph = PartwiseGraph(writer.unquantized(checkpoint), model_shape(checkpoint.config))
    parity = compare(expected, graph)
    if writer.hidden_size is not None:
        parity = dataclasses.replace(parity, hidden_states=_compare_hidden_states(expected, graph))
    check_parity(UNQUANTIZED, parity, exact=True)
    return parity


def open_exported(folder: Path, shape: ModelShape, recipe: Recipe, writer: BundleWriter | GraphFiles) -> Exported:
    """Load an exported model in the runtime, or part by part if it is large."""
    size = sum(path.stat().st_size for path in writer.files(folder, recipe))
    if isinstance(writer, GraphFiles) and size > _WHOLE_BYTES:
        file = folder / writer.file_name(recipe)
        return PartwiseGraph(ir.load(file), shape, file=None if recipe.lossless or recipe.float16 else file)
    return writer.open(folder, shape, recipe)


def score_exported(
    expected: ReferenceLogits, model: Exported, progress: Callable[[float], None]
) -> tuple[Parity, Quality]:
    """Compare a loaded model with the reference; `progress` is called with the completed fraction."""
    if isinstance(model, PartwiseGraph):
        return score(expected, partial(model, progress=progress))
    return score(expected, forward_of(model), progress)


def forward_of(model: Exported) -> Forward:
    """Return what runs a loaded model."""
    return model if isinstance(model, PartwiseGraph) else partial(_run_session, model)


def _run_session(session: AnySession, runs: Sequence[Run]) -> Iterator[Tensor]:
    """Run a loaded model; see `Forward`."""
    for run in runs:
        session.clear_cache()
        for chunk in run.chunks:
            yield torch.from_numpy(session.step(chunk, num_logits=0))


def _compare_hidden_states(expected: ReferenceLogits, model: Exported) -> Difference:
    """Return the difference of a model's hidden states of the prompt; see `Parity`."""
    if isinstance(model, PartwiseGraph):
        states = model.hidden_states(expected.prompt)
    else:
        assert isinstance(model, Session)
        model.clear_cache()
        states = torch.from_numpy(model.hidden_states(expected.prompt.tokens))
    return relative_difference(states, expected.hidden_states[: len(states)])


def model_shape(config: ModelConfig) -> ModelShape:
    """Return the shape of a model as the runtime needs it."""
    caches = key_value_caches(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    context = config.max_position_embeddings
    windows = tuple(layer.window if layer.window and layer.window < context else 0 for layer in config.layers)
    return ModelShape(config.vocab_size, config.num_hidden_layers, context, caches, windows if any(windows) else ())


def check_parity(name: str, parity: Parity, *, exact: bool) -> None:
    """Raise ParityError if logits are NaN or infinity, or if an `exact` model exceeds the bounds for fp32."""
    worst = parity.worst
    if not math.isfinite(worst.max):
        raise ParityError(
            f"{name}: logits are NaN or infinity: the weights are damaged, or they overflow. Nothing was written"
        )
    if exact and not parity.within_bounds:
        raise ParityError(
            f"{name}: logits differ from PyTorch by up to {worst.max:.2g} and {worst.mean:.2g} on average; "
            f"the bounds are {MAX_BOUND:g} and {MEAN_BOUND:g}. Nothing was written"
        )
    hidden = parity.hidden_states
    if hidden is not None and (exact or not math.isfinite(hidden.max)) and not hidden.within_bounds:
        raise ParityError(
            f"{name}: hidden states differ from PyTorch by up to {hidden.max:.2g} of their norm and {hidden.mean:.2g} "
            f"on average; the bounds are {MAX_BOUND:g} and {MEAN_BOUND:g}. Nothing was written"
        )
