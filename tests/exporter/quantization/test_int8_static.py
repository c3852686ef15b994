"""Integer matmuls: the graph computes what calibration assumes, and rows and chunks do not affect each other."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch
from torch import Tensor

from llm_edge.exporter.export import export
from llm_edge.exporter.graph.editor import Editor
from llm_edge.exporter.graph.emitter import EmitContext
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.options import ExportOptions
from llm_edge.exporter.quantization.formats.base import ObservedInputs, apply
from llm_edge.exporter.quantization.formats.int8_static import Int8Static
from llm_edge.exporter.quantization.hessian import Hessian
from llm_edge.exporter.quantization.int8_static import QuantizedInt8
from llm_edge.exporter.quantization.recipes import RECIPES

Array = npt.NDArray[np.float32]

FORMS = [Int8Static(block, bits) for block in (0, 1, 64) for bits in (8, 16)]
STYLES = [style.value for style in GraphStyle]
CALIBRATED = ("int8", "int8-exact", "int4", "int4-mixed")
ROWS = 24


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def quantized(form: Int8Static, width: int, seed: int = 0) -> tuple[Tensor, QuantizedInt8]:
    """A weight [24, width] and its quantization, calibrated on inputs with larger and smaller channels."""
    weight = numbers(ROWS, width, seed=seed)
    inputs = numbers(400, width, seed=seed + 1) * torch.logspace(-1, 0.5, width)
    return weight, form.calibrate(weight, ObservedInputs(Hessian(inputs.T @ inputs / len(inputs)), inputs))


def graph_of(
    made: QuantizedInt8, form: Int8Static, style: str, parts: int, *, optimized: bool = True
) -> ort.InferenceSession:
    """A graph of the style that multiplies `x [B, S, K]` to `y_0`, `y_1`, …."""
    width = made.data.shape[1]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "S", width]))
    weight = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([ROWS, width]))
    imports = {"": 23, "com.microsoft": 1} if style == "fused" else {"": 23}
    graph = ir.Graph([x], [], nodes=[], opset_imports=imports, name="product")
    model = ir.Model(graph, ir_version=10)
    context = EmitContext(Editor(model), style == "fused", {}, lambda *_: made)
    nodes = form.emitter(context).linear(x, weight, "/p", parts)
    graph.extend(nodes)
    for number, node in enumerate(nodes[-parts:]):
        node.outputs[0].name = f"y_{number}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["B", "S", ROWS // parts])
        graph.outputs.append(node.outputs[0])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def run_graph(session: ort.InferenceSession, x: Tensor) -> Tensor:
    """Concatenated results of all parts, [B, S, 24]."""
    return torch.from_numpy(np.concatenate(session.run(None, {"x": x.numpy()}), axis=-1))


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


# ---- one matmul


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("width", [192, 136, 77])  # whole blocks of 64; the largest block is 8; no block
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_the_graph_computes_what_calibration_assumed(style: str, form: Int8Static, width: int, parts: int) -> None:
    weight, made = quantized(form, width)
    x = (numbers(2, 9, width, seed=5) * torch.logspace(-1, 0.5, width)).contiguous()
    x[1, 3] *= 30  # outside the calibrated range
    wanted = apply(made, x.flatten(0, 1)).view(2, 9, ROWS)
    found = run_graph(graph_of(made, form, style, parts), x)
    if (
        style == "portable" and form.activation_bits == 16
    ):  # which does not round to 16 bits itself; onnxruntime then rounds to 8
        found, wanted = (torch.cat([y[0], y[1, :3], y[1, 4:]]) for y in (found, wanted))
        assert relative(found, wanted) < 0.01
        found = run_graph(graph_of(made, form, style, parts, optimized=False), x)[0]
        assert relative(found, wanted[:9]) < 1e-3
    else:
        assert relative(found, wanted) < 2e-4  # another summation order may round an activation differently
    ordinary = torch.cat([x[0], x[1, :3]])
    exact = ordinary @ weight.T
    assert relative(apply(made, ordinary), exact) < (0.03 if form.activation_bits == 8 else 0.01)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_more_bits_reduce_the_error(form: Int8Static) -> None:
    weight, made = quantized(form, 192)
    x = numbers(60, 192, seed=5) * torch.logspace(-1, 0.5, 192)
    error = relative(apply(made, x), x @ weight.T)
    assert error > 1e-4
    if form.activation_bits == 16:
        assert error < 0.7 * relative(apply(quantized(Int8Static(form.hadamard_block), 192)[1], x), x @ weight.T)


@pytest.mark.parametrize("form", [form for form in FORMS if form.hadamard_block], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_a_very_large_token_does_not_affect_the_others(style: str, form: Int8Static) -> None:
    """Neither in the graph, where each token is scaled separately, nor during calibration."""
    weight, made = quantized(form, 192)
    x = numbers(1, 12, 192, seed=6)
    session = graph_of(made, form, style, 1)
    before = run_graph(session, x)
    huge = x.clone()
    huge[0, 4] *= 1e4
    after = run_graph(session, huge)
    others = [token for token in range(12) if token != 4]
    assert torch.equal(after[0, others], before[0, others])
    assert relative(after[0, 4], 1e4 * before[0, 4]) < 1e-3

    inputs = numbers(400, 192, seed=1)
    inputs[7] *= 100
    seen = form.calibrate(weight, ObservedInputs(Hessian(inputs.T @ inputs / len(inputs)), inputs))
    assert relative(apply(seen, x[0, others]), x[0, others] @ weight.T) < 0.03


@pytest.mark.parametrize("form", [form for form in FORMS if not form.hadamard_block], ids=str)
def test_tokens_are_independent_without_hadamard_blocks_too(form: Int8Static) -> None:
    _, made = quantized(form, 192)
    x = numbers(1, 12, 192, seed=6)
    session = graph_of(made, form, "fused", 1)
    huge = x.clone()
    huge[0, 4] *= 1e4
    others = [token for token in range(12) if token != 4]
    assert torch.equal(run_graph(session, huge)[0, others], run_graph(session, x)[0, others])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_a_token_of_zeros_stays_zero(style: str, form: Int8Static) -> None:
    _, made = quantized(form, 136)
    x = numbers(1, 3, 136)
    x[0, 1] = 0
    found = run_graph(graph_of(made, form, style, 2), x)
    assert found.isfinite().all()
    assert torch.equal(found[0, 1], torch.zeros(ROWS))


def test_16_bits_cover_larger_activations_than_calibration() -> None:
    weight, made = quantized(Int8Static(activation_bits=16), 192)
    x = numbers(20, 192, seed=8) * torch.logspace(-1, 0.5, 192) * 1.5
    assert relative(apply(made, x), x @ weight.T) < 0.01


# ---- whole graphs


class Runner:
    """A graph of the bundle, run directly."""

    def __init__(self, bundle: Path, precision: str) -> None:
        path = bundle / "onnx" / f"{RECIPES[precision].stem}.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._past = [(node.name, node.shape) for node in self._session.get_inputs() if "past" in node.name]

    def run(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], past: list[Array] | None = None
    ) -> tuple[Array, list[Array]]:
        """Logits [B, S, V] and what the next step needs."""
        if past is None:
            past = [np.zeros((len(ids), shape[1], 0, shape[3]), dtype=np.float32) for _, shape in self._past]
        feeds = {"input_ids": ids, "attention_mask": mask}
        feeds |= {name: array for (name, _), array in zip(self._past, past, strict=True)}
        logits, *present = self._session.run(None, feeds)
        return logits, present

    def logits_alone(self, tokens: npt.NDArray[np.int64], chunk: int) -> Array:
        """Logits [S, V] of one sequence, computed in chunks."""
        past, found = None, []
        for start in range(0, len(tokens), chunk):
            end = min(start + chunk, len(tokens))
            logits, past = self.run(tokens[None, start:end], np.ones((1, end), dtype=np.int64), past)
            found.append(logits[0])
        return np.concatenate(found)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All calibrated precisions of a model with peaked attention."""
    folder = tmp_path_factory.mktemp("integer")
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 32}
    tiny.save_checkpoint(folder / "source", initializer_range=0.15, **shape)
    with pytest.MonkeyPatch.context() as patch:
        tiny.shorten_texts(patch, 2048)
        out = folder / "bundle"
        options = ExportOptions(out, precision=",".join(CALIBRATED), validate=False)
        export(str(folder / "source"), options)
    return out


def text(length: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, 320, length)


@pytest.mark.parametrize(
    ("precision", "bound"),
    # The kernel of 4-bit blocks sums groups of four rows in another order than the remaining one to three rows.
    [("int8", 0.0), ("int8-exact", 0.0), ("int4", 1e-4), ("int4-mixed", 1e-4)],
)
def test_a_sequence_has_the_same_logits_alone_and_in_a_batch(bundle: Path, precision: str, bound: float) -> None:
    """Right-padded prompts of different lengths, and one further token each; bitwise equal if the bound is 0."""
    runner = Runner(bundle, precision)
    rows = [text(length, seed) for seed, length in enumerate((24, 9, 17, 2, 30))]
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 2), np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    logits, past = runner.run(ids, mask)
    following = np.arange(5)[:, None] + 40
    steps, _ = runner.run(following, np.concatenate([mask, np.ones((5, 1), dtype=np.int64)], axis=1), past)
    for number, row in enumerate(rows):
        ours, cache = runner.run(row[None], np.ones((1, len(row)), dtype=np.int64))
        assert np.abs(ours[0] - logits[number, : len(row)]).max() <= bound
        step, _ = runner.run(following[number][None], np.ones((1, len(row) + 1), dtype=np.int64), cache)
        assert np.abs(step[0] - steps[number]).max() <= bound


@pytest.mark.parametrize("precision", CALIBRATED)
def test_chunks_of_a_prompt_give_the_same_logits(bundle: Path, precision: str) -> None:
    runner = Runner(bundle, precision)
    tokens = text(96, 9)
    whole = runner.logits_alone(tokens, 96)
    assert whole.std() > 0.5
    for chunk in (48, 32, 16):
        found = runner.logits_alone(tokens, chunk)
        assert np.array_equal(found, whole), (chunk, np.abs(found - whole).max())
