"""Compares the exported graph of a model with transformers' own model, in all ways in which a graph is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_edge.exporter.general.checkpoint import GeneralCheckpoint, read_general_folder
from llm_edge.exporter.general.recipes import GENERAL_RECIPES
from llm_edge.exporter.general.reference import load_reference
from llm_edge.exporter.general.writer import GeneralWriter
from llm_edge.exporter.quantization.recipes import RECIPES
from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import open_graph
from llm_edge.runtime.model_shape import ModelShape

LENGTH, GREEDY = 60, 64  # several times every window
_CAPACITY = 128
_LONG, _SHORT, _TOGETHER = 20, 13, 12  # tokens of two rows, and of both after them

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """Largest differences of logits from transformers' own model, and the number of equal greedy tokens.

    Differences are relative to the standard deviation of the logits where that is larger than 1.

    Attributes:
        whole: in one pass.
        steps: in chunks, then token by token.
        batch: two rows of unequal length in one step, then token by token.
        greedy: leading greedy tokens that are equal.
        operators: number of nodes by operator, for those that attend or keep a state.
    """

    whole: float
    steps: float
    batch: float
    greedy: int
    operators: dict[str, int]

    @property
    def worst(self) -> float:
        """The largest difference."""
        return max(self.whole, self.steps, self.batch)


def run_quantized(source: Path, target: Path) -> None:
    """Export a folder as int8 and int4, rounded to nearest, and check that the graphs run and differ little."""
    checkpoint = read_general_folder(source)
    target.mkdir()
    writer, recipes = GeneralWriter(), [GENERAL_RECIPES[name] for name in ("fp32", "int8", "int4")]
    writer.write(target, checkpoint, tuple(recipes), lambda *_: None)
    sessions = [writer.open(target, checkpoint.config.shape, recipe) for recipe in recipes]
    exact, int8, int4 = (session.step(tuple(range(5, 25)), num_logits=0) for session in sessions)
    deviation = np.std(exact)
    assert np.abs(int8 - exact).mean() < 0.3 * deviation, "int8"
    assert np.abs(int4 - exact).mean() < 1.2 * deviation, "int4"


def compare_export(source: Path, target: Path) -> Comparison:
    """Export a folder as fp32 to another one, and compare the graph with transformers' own model of the source."""
    checkpoint = read_general_folder(source)
    target.mkdir()
    GeneralWriter().write(target, checkpoint, (RECIPES["fp32"],), lambda *_: None)
    return compare_graph(target / "model.onnx", checkpoint)


@torch.inference_mode()
def compare_graph(path: Path, checkpoint: GeneralCheckpoint) -> Comparison:
    reference = load_reference(checkpoint)
    runner = GraphRunner(path, checkpoint.config.shape)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, checkpoint.config.vocab_size - 10, (2, LENGTH), generator=generator)
    expected, tokens = reference(input_ids=ids, use_cache=False).logits.numpy(), ids.numpy()
    ones = np.ones((2, LENGTH), np.int64)

    logits, _ = runner.step(tokens, ones, runner.empty(2))
    whole = _difference(logits, expected)

    cache, parts = runner.empty(1), []
    for start, end in [(0, 11), (11, 19), *((at, at + 1) for at in range(19, LENGTH))]:
        logits, cache = runner.step(tokens[:1, start:end], ones[:1, :end], cache)
        parts.append(logits)
    steps = _difference(np.concatenate(parts, 1), expected[:1])

    mask = ones[:, :_LONG].copy()
    mask[1, _SHORT:] = 0
    logits, cache = runner.step(tokens[:, :_LONG], mask, runner.empty(2))
    batch = max(_difference(logits[0], expected[0, :_LONG]), _difference(logits[1, :_SHORT], expected[1, :_SHORT]))
    for number in range(_TOGETHER):
        first, second = _LONG + number, _SHORT + number
        mask = np.ones((2, first + 1), np.int64)
        mask[1, second + 1 :] = 0
        logits, cache = runner.step(np.stack([tokens[0, first, None], tokens[1, second, None]]), mask, cache)
        found, wanted = logits[:, 0], np.stack([expected[0, first], expected[1, second]])
        batch = max(batch, _difference(found, wanted))

    scale = max(float(expected.std()), 1.0)
    whole, steps, batch = whole / scale, steps / scale, batch / scale
    return Comparison(whole, steps, batch, _equal_greedy(runner, reference, ids[:1, :7]), runner.operators)


def _difference(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max())  # NaN if any is NaN


def _equal_greedy(runner: GraphRunner, reference: Any, prompt: torch.Tensor) -> int:
    given, cache = prompt.numpy(), runner.empty(1)
    sequence = prompt
    for number in range(GREEDY):
        wanted = int(reference(input_ids=sequence, use_cache=False).logits[0, -1].argmax())
        mask = np.ones((1, prompt.shape[1] + number), np.int64)
        logits, cache = runner.step(given, mask, cache)
        if int(logits[0, -1].argmax()) != wanted:
            return number
        given = np.array([[wanted]])
        sequence = torch.cat([sequence, torch.tensor(given)], dim=1)
    return GREEDY


class GraphRunner:
    """Calls a graph as the runtime does: keys and values share a buffer for past and present, states do not."""

    def __init__(self, path: Path, shape: ModelShape) -> None:
        self._graph = open_graph(GraphFile(path, shape), ExecutionOptions("cpu", threads=1, spinning=False))
        self._session, self._shape = self._graph.inference, shape  # the graph owns the session's weights
        self._inputs = {node.name for node in self._session.get_inputs()}
        self.operators = _count_operators(path)

    def empty(self, rows: int) -> dict[str, Array]:
        return {tensor.name: np.zeros((rows, *tensor.sized(_CAPACITY)), np.float32) for tensor in self._shape.caches}

    def step(self, ids: Array, mask: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        binding = self._session.io_binding()
        for name, array in (("input_ids", ids), ("attention_mask", mask)):
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        after = {}
        for tensor in self._shape.caches:
            before = cache[tensor.name]
            after[tensor.name] = before if tensor.grows else np.empty_like(before)
            if f"past_key_values.{tensor.name}" in self._inputs:
                binding.bind_input(
                    f"past_key_values.{tensor.name}", "cpu", 0, np.float32, before.shape, before.ctypes.data
                )
            output = after[tensor.name]
            binding.bind_output(f"present.{tensor.name}", "cpu", 0, np.float32, output.shape, output.ctypes.data)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy(), after


def _count_operators(path: Path) -> dict[str, int]:
    import onnx

    shown = ("GroupQueryAttention", "Attention", "TensorScatter", "MoE", "LinearAttention", "CausalConvWithState")
    nodes = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    return {name: nodes.count(name) for name in shown if name in nodes} | {"nodes": len(nodes)}
