"""Verifies exported models against the reference decoder, within a memory limit.

Of a model that exceeds the limit, only the first layers are validated: a truncated model with the real embedding and
head is exported in the same way as the whole, and compared in its place. The result says how many layers that were.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.exporter.bundle.writer import BundleWriter
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.recipes import RECIPES, Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights, rotated_config
from llm_edge.exporter.validation.compare import (
    MAX_BOUND,
    MEAN_BOUND,
    Parity,
    Quality,
    Reference,
    ReferenceLogits,
    Runnable,
    compare,
    compare_hidden_states,
    record_reference,
    score,
)
from llm_edge.exporter.validation.independent import IndependentCheck, compare_with_transformers
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder, count_parameters
from llm_edge.runtime.backend.session import MAX_STEP_TOKENS, Session
from llm_edge.runtime.bundle import ModelShape
from llm_edge.runtime.errors import ParityError

ROTATED = "rotated"
"""Name of the rotated model in `Validation.parities`."""
_TRUNCATED_GB = 3.4  # memory limit of truncated models
_TRUNCATED_TOKENS = 2 * MAX_STEP_TOKENS  # of validation text: the quality of a truncated model says little
_REFERENCE_FRACTION = 0.3  # of the validation time
_BASE_GB = 0.7  # Python, torch and onnxruntime
_BYTES_PER_WEIGHT = 4.4  # float32, and temporary buffers for packing weights


@dataclass(frozen=True, slots=True)
class Texts:
    """Tokens of the two texts included in this package, which have no passage in common."""

    validation: list[int]
    calibration: list[int]


@dataclass(frozen=True, slots=True)
class Validation:
    """Result of a validation.

    Attributes:
        layers: number of compared layers, from the first on.
        parities: by precision; also of the rotated model, and of fp32 if it was exported only for validation.
        qualities: by precision; measured with the truncated model if the whole exceeds the memory limit.
        required_bytes: memory required to validate the whole model.
        independent: comparison of the reference with transformers.
    """

    layers: int
    parities: Mapping[str, Parity]
    qualities: Mapping[str, Quality]
    required_bytes: float
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
    texts: Texts,
    memory: float,
    progress: Progress,
) -> Validation:
    """Compare all precisions of a bundle with the reference.

    No bound applies to quantized models. If fp32 is not among the recipes, it is exported only to be verified.

    Args:
        folder: folder of the exported models. A temporary folder `check` is created beside it.
        checkpoint: what was exported.
        recipes: of the bundle.
        writer: of the bundle; it also exports models that only this comparison needs.
        texts: for validation, and for the calibration of those models.
        memory: limit in bytes.

    Raises:
        ParityError: an fp32 model exceeds the bounds, or logits are NaN or infinity.
    """
    config, total_layers = checkpoint.config, checkpoint.config.num_hidden_layers
    required = memory_for(config, total_layers)
    layers = total_layers if required <= memory else _layers_within(config, min(memory, _TRUNCATED_GB * 1e9))
    truncated = dataclasses.replace(checkpoint, config=_truncated(config, layers))
    auxiliary = () if any(recipe.lossless for recipe in recipes) else (RECIPES["fp32"],)
    temporary = auxiliary if layers == total_layers else (*auxiliary, *recipes)
    (check := folder.parent / "check").mkdir()
    if temporary:
        writer.write(check, truncated, temporary, texts.calibration, progress)
    progress("validating", 0.0, "PyTorch")
    text = texts.validation if layers == total_layers else texts.validation[:_TRUNCATED_TOKENS]
    expected = _record_reference(truncated, text, check / "logits", progress)
    progress("validating", _REFERENCE_FRACTION, "transformers")
    independent = compare_with_transformers(truncated, expected)
    parities, qualities = _compare_rotated(truncated, expected, recipes, progress), {}
    compared = (*auxiliary, *recipes)

    def update(number: int, name: str, fraction: float) -> None:
        done = (number + fraction) / len(compared)
        progress("validating", _REFERENCE_FRACTION + (1 - _REFERENCE_FRACTION) * done, name)

    for number, recipe in enumerate(compared):
        update(number, recipe.name, 0.0)
        session = writer.open(check if recipe in temporary else folder, model_shape(truncated.config), recipe)
        parities[recipe.name] = _compare_session(expected, session, writer)
        check_parity(recipe.name, parities[recipe.name], exact=recipe.lossless)
        if recipe in recipes:
            qualities[recipe.name] = score(expected, session, partial(update, number, recipe.name))
        del session  # only one model in memory at a time
        for file in writer.files(check, recipe) if recipe in temporary else ():
            file.unlink()
    expected.path.unlink()
    check.rmdir()
    return Validation(layers, parities, qualities, required, independent)


def _compare_rotated(
    checkpoint: Checkpoint, expected: ReferenceLogits, recipes: tuple[Recipe, ...], progress: Progress
) -> dict[str, Parity]:
    """Return the parity of the rotated model in PyTorch if a recipe quantizes its weights."""
    if not any(recipe.calibrated for recipe in recipes):
        return {}
    progress("validating", _REFERENCE_FRACTION, ROTATED)
    parity = compare(expected, _rotated_reference(checkpoint))
    check_parity(ROTATED, parity, exact=True)
    return {ROTATED: parity}


def _truncated(config: ModelConfig, layers: int) -> ModelConfig:
    return dataclasses.replace(config, layers=config.layers[:layers])


def memory_for(config: ModelConfig, layers: int) -> float:
    """Return the approximate memory in bytes required to validate the first layers of a model."""
    logits = 3 * 4 * min(MAX_STEP_TOKENS, config.max_position_embeddings) * config.vocab_size
    return _BASE_GB * 1e9 + _BYTES_PER_WEIGHT * count_parameters(_truncated(config, layers)) + logits


def model_shape(config: ModelConfig) -> ModelShape:
    """Return the shape of a model as the runtime needs it."""
    return ModelShape(**{key: getattr(config, key) for key in ModelShape.__slots__})


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


def _layers_within(config: ModelConfig, memory: float) -> int:
    """Return the number of layers, at least one, that can be validated within a memory limit."""
    one, two = memory_for(config, 1), memory_for(config, min(2, config.num_hidden_layers))
    more = int((memory - one) / (two - one)) if memory > one and two > one else 0
    return min(1 + more, config.num_hidden_layers)


def _record_reference(checkpoint: Checkpoint, tokens: list[int], path: Path, progress: Progress) -> ReferenceLogits:
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config).eval()
    decoder.load_weights(checkpoint.weights)
    return record_reference(
        decoder, tokens, path, lambda fraction: progress("validating", _REFERENCE_FRACTION * fraction, "PyTorch")
    )


def _rotated_reference(checkpoint: Checkpoint) -> Runnable:
    """Return the reference with rotated weights, from which calibrated precisions are quantized."""
    with torch.device("meta"):
        decoder = Decoder(rotated_config(checkpoint.config)).eval()
    decoder.load_weights(RotatedWeights(checkpoint.config, checkpoint.weights))
    return Reference(decoder)


def _compare_session(expected: ReferenceLogits, session: Runnable, writer: BundleWriter) -> Parity:
    parity = compare(expected, session)
    if writer.hidden_size is not None and isinstance(session, Session):
        parity = dataclasses.replace(parity, hidden_states=compare_hidden_states(expected, session))
    return parity
