"""Proves that the graphs compute what the reference computes, within a bound of memory.

A model that does not fit is cut: its first layers, with the real embedding and head, go the same way from weights to
graphs as the whole, and are compared in its place. What that leaves unchecked is part of the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.exporter.bundle.formats import Form
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.recipes import RECIPES, Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights, rotated_config
from llm_edge.exporter.validation.compare import (
    MAX_BOUND,
    MEAN_BOUND,
    Expected,
    Parity,
    Quality,
    Reference,
    Runnable,
    compare,
    compare_hidden_states,
    record,
    score,
)
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder, count_parameters
from llm_edge.runtime.backend.session import MAX_STEP_TOKENS, Session
from llm_edge.runtime.bundle import ModelShape
from llm_edge.runtime.errors import ParityError

WHOLE_GB = 4.5
"""Memory, in 10^9 bytes, in which a whole model is validated by default."""
ROTATED = "rotated"
"""Name under which the rotated model's parity with the reference is told."""
_CUT_GB = 3.4
_REFERENCE = 0.3  # of validation's time goes into running the reference
_CUT_TOKENS = 2 * MAX_STEP_TOKENS  # of text for a model that is cut: its quality tells little
_BASE_GB = 0.7  # Python, torch and onnxruntime themselves
_BYTES_PER_WEIGHT = 4.4  # float32, and what packing it for matrix products takes at a time


@dataclass(frozen=True, slots=True)
class Texts:
    """Tokens of the two texts that come with this package; they share no passage."""

    validation: list[int]
    calibration: list[int]


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared, and how it came out.

    Attributes:
        layers: how many of the model's layers were compared, from the first on.
        parities: by name of the precision, those of fp32 made for this alone and of the rotated model too.
        qualities: by name of the precision; of the cut model where it was cut.
        needed: memory in bytes that the whole would take.
    """

    layers: int
    parities: Mapping[str, Parity]
    qualities: Mapping[str, Quality]
    needed: float

    @property
    def extra(self) -> dict[str, Parity]:
        """Parities of what the bundle does not hold."""
        return {name: parity for name, parity in self.parities.items() if name not in self.qualities}


def prove(
    folder: Path,
    checkpoint: Checkpoint,
    recipes: tuple[Recipe, ...],
    form: Form,
    texts: Texts,
    memory: float,
    progress: Progress,
) -> Proof:
    """Compare all precisions of a bundle with the reference.

    What is rounded cannot be held to a bound: where fp32 is not among the recipes, it is made and proven for this
    alone.

    Args:
        folder: where the bundle's graphs lie; a folder `check` is made beside them, and removed.
        checkpoint: the source.
        recipes: the precisions of the bundle.
        form: of the bundle.
        texts: for validation, and for calibration of what is made here.
        memory: bytes that this may take; a larger model is cut.
        progress: see `Progress`.

    Raises:
        ParityError: an fp32 graph misses its bound, or logits are not numbers.
    """
    config, whole = checkpoint.config, checkpoint.config.num_hidden_layers
    layers = whole if memory_for(config, whole) <= memory else _fitting(config, min(memory, _CUT_GB * 1e9))
    cut = dataclasses.replace(config, layers=config.layers[:layers])
    extra = () if any(recipe.lossless for recipe in recipes) else (RECIPES["fp32"],)
    made = extra if layers == whole else (*extra, *recipes)
    check = folder.parent / "check"
    check.mkdir()
    if made:
        form.write(check, cut, checkpoint.weights, made, texts.calibration, progress)
    progress("validating", 0.0, "PyTorch")
    text = texts.validation if layers == whole else texts.validation[:_CUT_TOKENS]
    expected = _expected(cut, checkpoint, text, check / "logits", progress)
    parities, qualities = {}, {}
    if any(recipe.calibrated for recipe in recipes):
        progress("validating", _REFERENCE, ROTATED)
        parities[ROTATED] = compare(expected, _rotated(cut, checkpoint))
        _judge(ROTATED, parities[ROTATED], exact=True)
    compared = (*extra, *recipes)
    for number, recipe in enumerate(compared):

        def scored(share: float, name: str = recipe.name, number: int = number) -> None:
            progress("validating", _after((number + 0.2 + 0.8 * share) / len(compared)), name)

        progress("validating", _after(number / len(compared)), recipe.name)
        session = form.open(check if recipe in made else folder, model_shape(cut), recipe)
        parity = compare(expected, session)
        if form.hidden_size is not None and isinstance(session, Session):
            parity = dataclasses.replace(parity, hidden_states=compare_hidden_states(expected, session))
        parities[recipe.name] = parity
        _judge(recipe.name, parity, exact=recipe.lossless)
        if recipe in recipes:
            qualities[recipe.name] = score(expected, session, scored)
        del session  # one at a time: memory
        if recipe in made:
            for file in form.files(check, recipe):
                file.unlink()
    expected.path.unlink()
    check.rmdir()
    return Proof(layers, parities, qualities, memory_for(config, whole))


def memory_for(config: ModelConfig, layers: int) -> float:
    """Bytes that validating a model's first layers takes, about."""
    cut = dataclasses.replace(config, layers=config.layers[:layers])
    logits = 3 * 4 * min(MAX_STEP_TOKENS, config.max_position_embeddings) * config.vocab_size
    return _BASE_GB * 1e9 + _BYTES_PER_WEIGHT * count_parameters(cut) + logits


def model_shape(config: ModelConfig) -> ModelShape:
    """What a caller of the graph has to know of the model."""
    return ModelShape(**{key: getattr(config, key) for key in ModelShape.__slots__})


def _after(share: float) -> float:
    """Share of the whole validation, once the reference has run."""
    return _REFERENCE + (1 - _REFERENCE) * share


def _fitting(config: ModelConfig, memory: float) -> int:
    """Layers that can be validated in so much memory, at least one."""
    one, two = memory_for(config, 1), memory_for(config, min(2, config.num_hidden_layers))
    more = int((memory - one) / (two - one)) if memory > one and two > one else 0
    return min(1 + more, config.num_hidden_layers)


def _expected(
    config: ModelConfig, checkpoint: Checkpoint, tokens: list[int], path: Path, progress: Progress
) -> Expected:
    with torch.device("meta"):
        decoder = Decoder(config).eval()
    decoder.load_weights(checkpoint.weights)
    return record(decoder, tokens, path, lambda share: progress("validating", _REFERENCE * share, "PyTorch"))


def _rotated(config: ModelConfig, checkpoint: Checkpoint) -> Runnable:
    """The reference with the weights that calibrated precisions start from."""
    with torch.device("meta"):
        decoder = Decoder(rotated_config(config)).eval()
    decoder.load_weights(RotatedWeights(config, checkpoint.weights))
    return Reference(decoder)


def _judge(name: str, parity: Parity, *, exact: bool) -> None:
    worst = parity.worst
    if not math.isfinite(worst.max):
        raise ParityError(
            f"{name}: logits are not numbers: the weights are damaged, or they overflow. Nothing was written"
        )
    if exact and not parity.within_bounds:
        raise ParityError(
            f"{name}: logits differ from PyTorch by up to {worst.max:.2g}, {worst.mean:.2g} on average; "
            f"{MAX_BOUND:g} and {MEAN_BOUND:g} are allowed. Nothing was written"
        )
    hidden = parity.hidden_states
    if hidden is not None and (exact or not math.isfinite(hidden.max)) and not hidden.within_bounds:
        raise ParityError(
            f"{name}: hidden states differ from PyTorch by up to {hidden.max:.2g} of their length, {hidden.mean:.2g} "
            f"on average; {MAX_BOUND:g} and {MEAN_BOUND:g} are allowed. Nothing was written"
        )
