"""Quantizes projections and experts of transformers' own model for the inputs that they get on a text.

As in `quantization.calibrate`, inputs are those of the unquantized model, and memory holds one layer; weights are
neither rotated nor stored in several formats to choose from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from llm_edge.exporter.general.checkpoint import GeneralCheckpoint
from llm_edge.exporter.general.functions import are_experts, experts_inputs
from llm_edge.exporter.general.lockstep import LayerwiseModel
from llm_edge.exporter.graph.experts import EXPERT_WEIGHTS, expert_layout
from llm_edge.exporter.parallel import worker_threads
from llm_edge.exporter.quantization.calibrate import CalibratedWeights, StoredFormat, relative_error
from llm_edge.exporter.quantization.experts import quantize_experts
from llm_edge.exporter.quantization.formats.base import ObservedInputs, WeightFormat, apply, naming
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.hessian import Hessian
from llm_edge.exporter.quantization.observe import CallRecorder
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.quantization.store import QuantizedStore
from llm_edge.exporter.texts import Window
from llm_edge.exporter.validation.independent import silence_transformers

_SAMPLE_STEP = 32  # every 32nd input measures errors


def calibrate_general(
    checkpoint: GeneralCheckpoint,
    recipes: Sequence[Recipe],
    windows: Sequence[Window],
    folder: Path,
    progress: Callable[[float, str], None],
) -> dict[str, CalibratedWeights]:
    """Quantize the weights of all layers with GPTQ for each recipe, in a folder; the result is by recipe name.

    `progress` is called with the completed fraction and the current item.

    Raises:
        CheckpointError: a weight or its inputs hold NaN or infinity.
        UnsupportedModelError: the model runs a layer twice, or not in the order of the layers.
    """
    store = QuantizedStore(folder)
    with silence_transformers(transformers), worker_threads() as threads:
        layerwise = LayerwiseModel(checkpoint, with_head=False)
        calibration = _Calibration(checkpoint, recipes, store, threads)
        calls = [partial(_run, layerwise.model, window.tokens) for window in windows]
        for number, (path, layer, run) in enumerate(layerwise.run(calls)):
            progress(number / len(layerwise.layers), f"layer {number + 1}")
            calibration.quantize(path, layer, run)
    return {recipe.name: CalibratedWeights(calibration.formats[recipe.name], (), store, ()) for recipe in recipes}


def _run(model: Any, tokens: Sequence[int]) -> None:
    model(input_ids=torch.tensor([tokens]), use_cache=False)


class _Calibration:
    """Quantizes one layer after another.

    Attributes:
        formats: of the quantized weights, by recipe name and module path.
    """

    def __init__(
        self, checkpoint: GeneralCheckpoint, recipes: Sequence[Recipe], store: QuantizedStore, threads: Executor
    ) -> None:
        self._public_name = checkpoint.config.decoder.public_name
        self._recipes = recipes
        self._store = store
        self._threads = threads
        self.formats: dict[str, dict[str, StoredFormat]] = {recipe.name: {} for recipe in recipes}

    def quantize(self, path: str, layer: nn.Module, run: Callable[[], None]) -> None:
        """Quantize the weights of a layer for their inputs while `run` runs it."""
        observed = _Observed(layer)
        with observed.recording():
            run()
        name_of = {name: self._public_name(f"model.{path}.{name}") for name, _ in layer.named_modules()}
        weights = {name: layer.get_parameter(f"{name}.weight") for name in observed.projections}
        with torch.inference_mode():
            tasks = [
                self._threads.submit(self._quantize_projection, name_of[name], weights[name], inputs)
                for name, inputs in observed.projections.items()
            ]
            for task in tasks:
                task.result()
            for name, calls in observed.experts.items():
                self._quantize_experts(name_of[name], layer.get_submodule(name), calls)

    def _quantize_projection(self, module: str, weight: Tensor, inputs: _Inputs) -> None:
        formats = {recipe.name: recipe.format_of(module).for_width(weight.shape[1]) for recipe in self._recipes}
        observed = inputs.summary()
        errors: dict[WeightFormat, float] = {}
        expected = observed.samples @ weight.T
        for each in dict.fromkeys(each for each in formats.values() if isinstance(each, Blocks)):
            with naming(f"{module}.weight"):
                quantized = each.calibrate(weight, observed)
            self._store.add(module, each, (len(weight), weight.shape[1]), quantized)
            errors[each] = relative_error(apply(quantized, observed.samples), expected)
        for recipe, chosen in formats.items():
            if chosen in errors:
                self.formats[recipe][module] = StoredFormat(chosen, errors[chosen])

    def _quantize_experts(self, module: str, experts: Any, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        inputs = experts_inputs(experts, *(torch.cat(each) for each in zip(*calls, strict=True)))
        widths = [matrix.shape[1 if inputs.transposed else 2] for matrix in (inputs.gate_up, inputs.down)]
        formats = {}
        for recipe in self._recipes:
            wanted = recipe.format_of(module)
            layout = expert_layout(wanted if isinstance(wanted, Blocks) else None, inputs.gate, widths)
            if layout is not None:
                formats[recipe.name] = Blocks(layout.bits, layout.size, layout.symmetric)
        distinct = list(dict.fromkeys(formats.values()))
        if not distinct:
            return
        with naming(module):
            found = quantize_experts(inputs, distinct, self._threads)
        names = [f"{module}.{name}" for name in EXPERT_WEIGHTS]
        for each, parts in zip(distinct, found, strict=True):
            for name, width, part in zip(names, widths, parts, strict=True):
                self._store.add(name, each, (len(part.data), width), part)
        for recipe_name, each in formats.items():
            self.formats[recipe_name] |= dict.fromkeys(names, StoredFormat(each))


class _Inputs:
    """The inputs of a projection: their outer products, summed up, and a sample."""

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, width)
        self._count = 0
        self._samples: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add inputs [..., K]."""
        rows = x.flatten(0, -2)
        self._sum.addmm_(rows.T, rows)
        self._count += len(rows)
        self._samples.append(rows[::_SAMPLE_STEP].clone())

    def summary(self) -> ObservedInputs:
        """Return what rounding needs."""
        return ObservedInputs(Hessian(self._sum / max(self._count, 1)), torch.cat(self._samples))


class _Observed:
    """What the projections and experts of a layer get as inputs.

    Attributes:
        projections: by path in the layer; those that always have the same inputs share them.
        experts: by path in the layer, arguments of each call: tokens, their experts, and the weights of these.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._calls = CallRecorder()
        self._sums: dict[tuple[str, ...], _Inputs] = {}
        self.projections: dict[str, _Inputs] = {}
        self.experts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls of the layer."""
        before: Any = self._layer.register_forward_pre_hook(self._begin)
        hooks = [before, self._layer.register_forward_hook(self._add)]
        for name, module in self._layer.named_modules():
            if are_experts(module):
                hooks.append(module.register_forward_pre_hook(partial(self._add_experts, name)))
        with self._calls.recording(self._layer):
            yield
        for hook in hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self._calls.calls = {}

    def _add(self, *_: Any) -> None:
        """Add the inputs of a call of the layer; several projections often have the same."""
        groups: dict[int, list[str]] = {}
        for name, call in self._calls.calls.items():
            groups.setdefault(id(call[0]), []).append(name)
        for names in groups.values():
            given = self._calls.calls[names[0]][0]
            known = self._sums.setdefault(tuple(names), _Inputs(given.shape[-1]))
            known.add(given)
            self.projections |= dict.fromkeys(names, known)
        self._calls.calls = {}

    def _add_experts(self, name: str, _: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        self.experts.setdefault(name, []).append(arguments)
