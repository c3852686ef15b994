"""Block quantization: the documented layout, decoded by hand and by onnxruntime; recipes and their sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.module_names import HEAD
from llm_edge.exporter.quantization.blocks import QuantizedBlocks, quantize_blocks
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.formats.dense import Dense
from llm_edge.exporter.quantization.recipes import RECIPES, Recipe, parse_precisions
from llm_edge.model.decoder import Decoder, count_parameters
from llm_edge.runtime.errors import ParameterError

FORMS = [Blocks(bits, size, symmetric) for bits in (4, 8) for size in (16, 32, 128) for symmetric in (True, False)]
PRECISIONS = ("fp32", "int8", "int4")  # in the bundles of conftest.py
WIDTHS = (256, 64, 40, 16, 5)  # K: whole blocks, also an odd number of them, and rows that end within a block


def random_weight(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different magnitude, including a zero, a positive and a negative row."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-3, 3, rows)[:, None]
    weight[1] = 0
    weight[2] = weight[2].abs() + 1
    weight[3] = -weight[3].abs() - 1
    return weight


def unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.int64]:
    """Integers along the last axis; of two 4-bit ones in a byte the first is the low half."""
    if bits == 8:
        return packed.astype(np.int64)
    numbers = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.int64)
    numbers[..., 0::2], numbers[..., 1::2] = packed % 16, packed // 16
    return numbers[..., :count]


def dequantize(stored: QuantizedBlocks, form: Blocks, width: int) -> npt.NDArray[np.float64]:
    """The weight [N, K] according to the documentation of MatMulNBits."""
    rows, blocks = stored.scales.shape
    levels = unpack(stored.data, form.bits, form.size)  # [N, blocks, size]
    zeros: npt.NDArray[np.int64] | int = 2 ** (form.bits - 1)
    if stored.zero_points is not None:
        zeros = unpack(stored.zero_points, form.bits, blocks)[..., None]
    weight = (levels - zeros) * stored.scales[..., None].astype(np.float64)
    return weight.reshape(rows, -1)[:, :width]


# ---- the layout


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_dequantized_weights_are_within_half_a_step(form: Blocks, width: int) -> None:
    weight = random_weight(9, width)
    stored = quantize_blocks(weight, form)
    blocks = math.ceil(width / form.size)
    assert stored.data.dtype == np.uint8
    assert stored.data.shape == (9, blocks, form.size * form.bits // 8)
    assert stored.scales.dtype == np.float32
    assert stored.scales.shape == (9, blocks)
    if form.symmetric:
        assert stored.zero_points is None
    else:
        assert stored.zero_points is not None
        assert stored.zero_points.dtype == np.uint8
        assert stored.zero_points.shape == (9, math.ceil(blocks * form.bits / 8))

    padded = np.zeros((9, blocks * form.size))
    padded[:, :width] = weight.numpy()
    grouped = padded.reshape(9, blocks, form.size)
    if form.symmetric:
        steps = np.abs(grouped).max(-1) / (2 ** (form.bits - 1) - 1)
    else:
        steps = (np.maximum(grouped.max(-1), 0) - np.minimum(grouped.min(-1), 0)) / (2**form.bits - 1)
    np.testing.assert_allclose(stored.scales, steps, rtol=1e-5)
    error = np.abs(dequantize(stored, form, width) - weight.numpy())
    half = np.repeat(steps / 2, form.size, axis=1)[:, :width]
    assert (error <= half * (1 + 1e-4)).all()
    assert (dequantize(stored, form, width)[1] == 0).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_stay_zeros(form: Blocks) -> None:
    """Exactly, whatever else is in the block: pruned weights stay pruned, padding adds nothing."""
    weight = random_weight(6, 150)
    weight[:, ::3] = 0
    weight[:, 20:70] = 0
    stored = quantize_blocks(weight, form)
    assert (dequantize(stored, form, 150)[weight.numpy() == 0] == 0).all()
    assert np.isfinite(stored.scales).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_zero_matrix_stays_zero(form: Blocks) -> None:
    stored = quantize_blocks(torch.zeros(3, 70), form)
    assert (dequantize(stored, form, 70) == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_waste_no_level_on_an_unused_sign(bits: int) -> None:
    weight = torch.linspace(0, 1, 2**bits)[None]
    form = Blocks(bits, 2**bits, symmetric=False)
    np.testing.assert_allclose(dequantize(quantize_blocks(weight, form), form, 2**bits), weight.numpy(), atol=1e-6)
    np.testing.assert_allclose(dequantize(quantize_blocks(-weight, form), form, 2**bits), -weight.numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_rounded_as_float32(dtype: torch.dtype) -> None:
    weight = random_weight(5, 64).clamp(-60_000, 60_000).to(dtype)
    form = Blocks(4, 32, symmetric=False)
    ours, wanted = quantize_blocks(weight, form), quantize_blocks(weight.float(), form)
    assert np.array_equal(ours.data, wanted.data)
    assert np.array_equal(ours.scales, wanted.scales)


@pytest.mark.parametrize("width", [96, 40])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_levels_and_zeros_are_unpacked_as_documented(form: Blocks, width: int) -> None:
    stored = quantize_blocks(random_weight(7, width), form)
    blocks = math.ceil(width / form.size)
    levels = unpack(stored.data, form.bits, form.size).reshape(7, -1)
    assert np.array_equal(stored.levels(), levels)
    if stored.zero_points is None:
        assert (stored.zeros() == 2 ** (form.bits - 1)).all()
    else:
        assert np.array_equal(stored.zeros(), unpack(stored.zero_points, form.bits, blocks))
    assert stored.zeros().shape == (7, blocks)


# ---- onnxruntime's operators read the same initializers


def session(nodes: list[Any], inputs: list[Any], arrays: dict[str, npt.NDArray[Any]]) -> ort.InferenceSession:
    graph = helper.make_graph(
        nodes,
        "test",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def initializers(stored: QuantizedBlocks) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {"data": stored.data, "scales": stored.scales}
    if stored.zero_points is not None:
        arrays["zero_points"] = stored.zero_points
    return arrays


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [256, 96, 40])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_matmulnbits_multiplies_by_the_dequantized_weight(form: Blocks, width: int, rows: int) -> None:
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(1))
    weight[5] = 0
    stored = quantize_blocks(weight, form)
    arrays = initializers(stored)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=24,
        bits=form.bits,
        block_size=form.size,
        accuracy_level=0,
    )
    x = np.random.default_rng(2).standard_normal((2, rows, width), dtype=np.float32)
    run = session([node], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, rows, width])], arrays)
    (found,) = run.run(None, {"x": x})
    np.testing.assert_allclose(found, x.astype(np.float64) @ dequantize(stored, form, width).T, atol=2e-4)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gatherblockquantized_reads_the_same_initializers(form: Blocks) -> None:
    width, rows = 256, 40
    stored = quantize_blocks(random_weight(rows, width), form)
    arrays = initializers(stored)
    flat = helper.make_node("Reshape", ["data", "shape"], ["flat"])
    node = helper.make_node(
        "GatherBlockQuantized",
        ["flat", "ids", *list(arrays)[1:]],
        ["y"],
        domain="com.microsoft",
        bits=form.bits,
        block_size=form.size,
        gather_axis=0,
        quantize_axis=1,
    )
    shape = {"shape": np.array([rows, -1], dtype=np.int64)}
    ids = np.array([[0, 39, 1], [2, 3, 3]], dtype=np.int64)
    run = session([flat, node], [helper.make_tensor_value_info("ids", TensorProto.INT64, [2, 3])], arrays | shape)
    (found,) = run.run(None, {"ids": ids})
    np.testing.assert_allclose(found, dequantize(stored, form, width)[ids], rtol=1e-6)


# ---- whole graphs


def large_tensors(bundle: Path, recipe: str, rows: int, width: int) -> list[onnx.TensorProto]:
    """Initializers that could hold a [rows, width] matrix of at least 4 bits."""
    graph = onnx.load(bundle / "onnx" / f"{RECIPES[recipe].stem}.onnx", load_external_data=False).graph
    return [it for it in graph.initializer if rows in it.dims and math.prod(it.dims) >= rows * width // 2]


@pytest.mark.parametrize("recipe", PRECISIONS)
def test_a_tied_embedding_is_stored_once(tiny_bundle: Path, tiny_checkpoint: Path, recipe: str) -> None:
    config = read_folder(tiny_checkpoint).config
    assert config.tie_word_embeddings
    (tensor,) = large_tensors(tiny_bundle, recipe, config.vocab_size, config.hidden_size)
    assert tensor.data_type == (TensorProto.FLOAT if recipe == "fp32" else TensorProto.UINT8)


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_no_projection_stays_dense(
    tiny_bundle: Path, tiny_portable_bundle: Path, tiny_checkpoint: Path, recipe: str
) -> None:
    """Except the small matrix before a tied head; Hadamard matrices stay dense as well."""
    config = read_folder(tiny_checkpoint).config
    for bundle in (tiny_bundle, tiny_portable_bundle):
        graph = onnx.load(bundle / "onnx" / f"{RECIPES[recipe].stem}.onnx", load_external_data=False).graph
        kept = ("head_mix.weight.transposed", "hadamard_64")
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and tensor.name not in kept:
                assert math.prod(tensor.dims) <= config.vocab_size * math.ceil(config.hidden_size / 32), tensor.name


@pytest.mark.parametrize("recipe", PRECISIONS)
def test_bytes_per_weight_predicts_the_file_size(tiny_bundle: Path, tiny_checkpoint: Path, recipe: str) -> None:
    config = read_folder(tiny_checkpoint).config
    head = config.vocab_size * config.hidden_size
    made = RECIPES[recipe]
    choices = made.choices or {HEAD: (made.projections,)}
    size = sum(path.stat().st_size for path in (tiny_bundle / "onnx").glob(f"{made.stem}.onnx*"))

    def predicted(choose: Callable[[Iterable[float]], float]) -> float:
        sizes = {role: choose(each.bytes_per_weight for each in formats) for role, formats in choices.items()}
        return (count_parameters(config) - head) * choose(sizes.values()) + head * sizes[HEAD]

    assert predicted(min) <= size <= 1.25 * predicted(max) + 45_000  # the graph itself


@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("style", ["fused", "portable"])
def test_quantized_logits_are_close_to_the_reference(
    tiny_bundle: Path, tiny_portable_bundle: Path, tiny_checkpoint: Path, style: str, recipe: str
) -> None:
    checkpoint = read_folder(tiny_checkpoint)
    decoder = Decoder(checkpoint.config)
    decoder.load_weights(checkpoint.weights)
    tokens = torch.randint(0, checkpoint.config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    wanted = decoder(tokens, mask, decoder.empty_past())[0].detach().numpy()

    bundle = tiny_bundle if style == "fused" else tiny_portable_bundle
    run = ort.InferenceSession(bundle / "onnx" / f"{RECIPES[recipe].stem}.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()}
    for node in run.get_inputs()[2:]:
        feeds[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), dtype=np.float32)
    found = run.run(["logits"], feeds)[0]
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    low, high = {"int8": (1e-5, 0.02), "int4": (0.01, 0.2)}[recipe]
    assert low < error < high


# ---- recipes


def test_precisions_are_parsed() -> None:
    assert [it.name for it in parse_precisions("fp32,int8,int4")] == ["fp32", "int8", "int4"]
    assert [it.name for it in parse_precisions(" int4 ,, fp32,int4")] == ["fp32", "int4"]
    assert parse_precisions("int8") == (RECIPES["int8"],)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int3", ["'int3'", ", ".join(RECIPES)]),
        ("fp32,INT8", ["'INT8'"]),
        ("int8;int4", ["'int8;int4'"]),
        ("", ["empty", ", ".join(RECIPES)]),
        (" , ,", ["empty"]),
    ],
)
def test_unknown_precisions_are_rejected(text: str, words: list[str]) -> None:
    with pytest.raises(ParameterError) as caught:
        parse_precisions(text)
    assert caught.value.exit_code == 2
    for word in ("--precision", *words):
        assert word in str(caught.value)


def test_recipes_match_their_names() -> None:
    stems = {name: recipe.stem for name, recipe in RECIPES.items()}
    assert stems | {"fp32": "model", "int8": "model_quantized", "int4": "model_q4"} == stems
    assert len(set(stems.values())) == len(stems)
    assert {name for name, recipe in RECIPES.items() if recipe.lossless} == {"fp32"}
    for name, smallest in (("int8", 1.0), ("int4", 0.5)):
        for formats in RECIPES[name].choices.values():
            assert smallest <= min(each.bytes_per_weight for each in formats) < smallest + 0.2
    assert str(RECIPES["int4"]) == "the most faithful mix at the size of Q4_0; rotated and calibrated"
    assert str(RECIPES["int8"]) == "the fastest mix with 0.9 times the divergence of Q8_0; rotated and calibrated"


@pytest.mark.parametrize("place", ["projections", "overrides", "embedding"])
def test_a_recipe_with_any_rounding_is_not_lossless(place: str) -> None:
    blocks = Blocks(8, 32, symmetric=True)
    recipe = Recipe(
        "mine",
        "mine",
        projections=blocks if place == "projections" else Dense(),
        overrides={HEAD: blocks} if place == "overrides" else {},
        embedding=blocks if place == "embedding" else Dense(),
    )
    assert not recipe.lossless
    assert str(blocks) in str(recipe) or place == "embedding"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bytes_per_weight_of_blocks_includes_scales(form: Blocks) -> None:
    stored = quantize_blocks(torch.ones(64, 1024), form)
    assert form.bytes_per_weight * 64 * 1024 == stored.data.nbytes + stored.scales.nbytes
    assert form.num_blocks(1024) == stored.scales.shape[1]
    assert form.num_blocks(1023) == form.num_blocks(1024)
    assert form.num_blocks(1025) == form.num_blocks(1024) + 1
